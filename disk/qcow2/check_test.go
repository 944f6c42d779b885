package qcow2

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// checkByQEMU is what qemu-img check says; its exit status tells the same.
func checkByQEMU(t testing.TB, path string) Report {
	t.Helper()
	cmd := exec.Command("qemu-img", "check", "-f", "qcow2", "--output=json", path)
	cmd.Dir = filepath.Dir(path)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	var r Report
	if jerr := json.Unmarshal(out, &r); jerr != nil {
		t.Fatalf("%v: %v\n%s%s", err, jerr, out, &stderr)
	}
	return r
}

func checkByUs(t testing.TB, path string, repair Repair) *Report {
	t.Helper()
	r, err := Check(context.Background(), path, CheckOptions{Repair: repair})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// agree has both checks say the same of an image, and returns it.
func agree(t testing.TB, path string) *Report {
	t.Helper()
	want, r := checkByQEMU(t, path), checkByUs(t, path, RepairNone)
	got := *r
	got.Problems = nil
	if a, b := asJSON(t, got), asJSON(t, want); a != b {
		t.Fatalf("we: %s\nQEMU: %s\n%+v", a, b, r.Problems)
	}
	return r
}

func asJSON(t testing.TB, v any) string {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// place is where in an image something is.
type place struct{ l1, l2, data, table, block int64 }

func placesOf(t testing.TB, path string) place {
	t.Helper()
	n := mustOpen(t, path)
	defer n.Close()
	p := place{l1: n.header.L1Offset, l2: int64(n.l1[0] & offsetMask), table: n.header.RefcountOffset}
	e, _, err := n.lookup(0, 1)
	if err != nil {
		t.Fatal(err)
	}
	p.data = e.host
	table, err := n.readRefcountTable()
	if err != nil {
		t.Fatal(err)
	}
	p.block = int64(table[0] & offsetMask)
	return p
}

// TestDamageIsFoundAndRepaired: damage of every kind is found as QEMU finds it, and
// a repaired image is clean for both.
func TestDamageIsFoundAndRepaired(t *testing.T) {
	dir := t.TempDir()
	converted("compat=1.1")(t, dir)
	want := expected(t, dir)
	whole, err := os.ReadFile(filepath.Join(dir, "image.qcow2"))
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name   string
		damage func(t *testing.T, path string, p place)
		says   string
		leaks  bool // no more than leaks
		lost   bool // content is lost by the repair
		alone  bool // QEMU counts it otherwise
	}{
		{name: "leak", leaks: true, says: "cluster at", damage: func(t *testing.T, path string, p place) {
			f, _ := os.Stat(path)
			patch(t, path, p.block+2*(f.Size()>>16), []byte{0, 1})
			patch(t, path, f.Size(), make([]byte, 64<<10))
		}},
		{name: "count too large", leaks: true, says: "counted as 7", damage: func(t *testing.T, path string, p place) {
			patch(t, path, p.block+2*(p.l2>>16), []byte{0, 7})
		}, alone: true},
		{name: "count too small", says: "counted as 0", damage: func(t *testing.T, path string, p place) {
			patch(t, path, p.block+2*(p.data>>16), []byte{0, 0})
		}, alone: true},
		{name: "cluster used twice", says: "2 references", damage: func(t *testing.T, path string, p place) {
			patch(t, path, p.l2+8, be64(uint64(p.data)|entryOwn))
		}, lost: true, alone: true},
		{name: "entry without its flag", says: "otherwise", damage: func(t *testing.T, path string, p place) {
			patch(t, path, p.l2, be64(uint64(p.data)))
		}},
		{name: "L1 entry without its flag", says: "otherwise", damage: func(t *testing.T, path string, p place) {
			patch(t, path, p.l1, be64(uint64(p.l2)))
		}},
		{name: "cluster not at a cluster", says: "entry 0: cluster", damage: func(t *testing.T, path string, p place) {
			patch(t, path, p.l2, be64(uint64(p.data+512)|entryOwn))
		}, lost: true, alone: true},
		{name: "cluster behind the file", says: "entry 0: cluster", damage: func(t *testing.T, path string, p place) {
			patch(t, path, p.l2, be64(1<<50|entryOwn))
		}, lost: true, alone: true},
		{name: "L2 table behind the file", says: "L1 entry 0", damage: func(t *testing.T, path string, p place) {
			patch(t, path, p.l1, be64(1<<50|entryOwn))
		}, lost: true, alone: true},
		{name: "L2 table is the L1 table", says: "L1 entry 0", damage: func(t *testing.T, path string, p place) {
			patch(t, path, p.l1, be64(uint64(p.l1)|entryOwn))
		}, lost: true, alone: true},
		{name: "no table of counts", says: "reference count table", damage: func(t *testing.T, path string, p place) {
			patch(t, path, 48, be64(1<<50))
		}, alone: true},
		{name: "block of counts behind the file", says: "block at", damage: func(t *testing.T, path string, p place) {
			patch(t, path, p.table, be64(1<<50))
		}, alone: true},
		{name: "block of counts is data", says: "block at", damage: func(t *testing.T, path string, p place) {
			patch(t, path, p.table, be64(uint64(p.data)))
		}, alone: true},
		{name: "counts are gone", says: "counted as 0", damage: func(t *testing.T, path string, p place) {
			patch(t, path, p.table, be64(0))
		}, alone: true},
		{name: "not closed", damage: func(t *testing.T, path string, p place) {
			patch(t, path, 72, be64(FeatureDirty))
		}},
		{name: "marked as corrupt", damage: func(t *testing.T, path string, p place) {
			patch(t, path, 72, be64(FeatureCorrupt))
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "image.qcow2")
			writeFile(t, path, whole)
			tt.damage(t, path, placesOf(t, path))
			if !tt.alone {
				agree(t, path)
			}
			r := checkByUs(t, path, RepairNone)
			if r.Clean() != (tt.says == "") || tt.leaks && (r.Corruptions != 0 || r.Leaks != 1) || tt.says != "" && !tt.leaks && r.Corruptions == 0 {
				t.Fatalf("%+v", r)
			}
			if tt.says != "" && !strings.Contains(r.Problems[0].Text, tt.says) {
				t.Errorf("%+v", r.Problems)
			}
			if before := checkByUs(t, path, RepairLeaks); tt.leaks && before.LeaksFixed != 1 || before.CorruptionsFixed != 0 {
				t.Errorf("leaks: %+v", before)
			}
			if tt.leaks {
				clean(t, path)
			}
			if fixed := checkByUs(t, path, RepairAll); !fixed.Clean() || r.Corruptions > 0 && fixed.CorruptionsFixed == 0 {
				t.Fatalf("repair: %+v", fixed)
			}
			clean(t, path)
			agree(t, path)
			n, err := Open(path, false)
			if err != nil {
				t.Fatal(err)
			}
			got := readAll(t, n)
			if same := bytes.Equal(got, want); same == tt.lost {
				t.Errorf("the content is the same: %v", same)
			}
			if tt.lost && !strings.HasPrefix(tt.name, "L2 table") && !bytes.Equal(got[128<<10:], want[128<<10:]) {
				t.Error("more is lost than there was wrong")
			}
			if err := n.Writev([][]byte{want}, 0); err != nil {
				t.Error(err)
			}
			if err := n.Close(); err != nil {
				t.Error(err)
			}
			clean(t, path)
			same(t, path, want)
		})
	}
}

// A disk is not written whose tables would be.
func TestTablesAreNotOverwritten(t *testing.T) {
	for _, tt := range []string{"header", "L1 table", "reference count table"} {
		dir := t.TempDir()
		converted("compat=1.1")(t, dir)
		path := filepath.Join(dir, "image.qcow2")
		p := placesOf(t, path)
		at := map[string]int64{"L1 table": p.l1, "reference count table": p.table}[tt]
		if tt == "header" { // an entry cannot say that; a count can
			for i := range int64(4) {
				patch(t, path, p.block+2*i, []byte{0, 0})
			}
			patch(t, path, p.l2, be64(0))
		} else {
			patch(t, path, p.l2, be64(uint64(at)|entryOwn))
		}
		n, err := Open(path, false)
		if err != nil {
			t.Fatal(err)
		}
		if err := n.Writev([][]byte{make([]byte, 512)}, 0); !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), tt) {
			t.Errorf("%s: %v", tt, err)
		}
		if err := n.Writev([][]byte{make([]byte, 512)}, 4<<20); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: the image is written on: %v", tt, err)
		}
		if err := n.Readv([][]byte{make([]byte, 512)}, 4<<20); err != nil {
			t.Error(err)
		}
		n.Close()
		if _, err := Open(path, false); !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), "repair") {
			t.Errorf("%s: opened again: %v", tt, err)
		}
		checkByUs(t, path, RepairAll)
		clean(t, path)
	}
}
