package qcow2

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/raw"
)

// qemuImg runs qemu-img, which must succeed.
func qemuImg(t testing.TB, args ...string) string {
	t.Helper()
	out, err := exec.Command("qemu-img", args...).CombinedOutput()
	if err != nil {
		t.Fatalf("qemu-img %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// clean has qemu-img check find nothing wrong, not even a leak.
func clean(t testing.TB, path string) {
	t.Helper()
	if out := qemuImg(t, "check", path); !strings.Contains(out, "No errors were found") {
		t.Fatalf("%s: %s", path, out)
	}
}

// same has QEMU compare an image with a raw one of these bytes.
func same(t testing.TB, path string, want []byte) {
	t.Helper()
	model := filepath.Join(t.TempDir(), "model")
	if err := os.WriteFile(model, want, 0o600); err != nil {
		t.Fatal(err)
	}
	qemuImg(t, "compare", "-F", "raw", path, model)
}

// Several writers at once, each in its own places, clusters shared.
func TestWritersTogether(t *testing.T) {
	path := filepath.Join(t.TempDir(), "image")
	const size, writers, piece = 8 << 20, 4, 8 << 10
	if err := Create(path, CreateOptions{Size: size}); err != nil {
		t.Fatal(err)
	}
	n, err := Open(path, false)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			for at := w * piece; at < size; at += writers * piece {
				if err := n.Writev([][]byte{bytes.Repeat([]byte{byte(at / piece)}, piece)}, int64(at)); err != nil {
					t.Error(err)
				}
				if at%(1<<20) == w*piece {
					if err := n.Flush(); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	wg.Wait()
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	clean(t, path)
	want := make([]byte, size)
	for i := range want {
		want[i] = byte(i / piece)
	}
	same(t, path, want)
}

// A writer that is killed leaves what it flushed, and an image that the next
// writer, or QEMU, makes whole.
func TestKilledWriter(t *testing.T) {
	const size = 4 << 20
	if path := os.Getenv("QCOW2_TEST_WRITE"); path != "" {
		n, err := Open(path, false)
		if err != nil {
			t.Fatal(err)
		}
		for i := byte(1); ; i++ {
			for at := int64(0); at < size; at += 96 << 10 {
				if err := n.Writev([][]byte{bytes.Repeat([]byte{i}, 4096)}, at); err != nil {
					t.Fatal(err)
				}
			}
			if err := n.Flush(); err != nil {
				t.Fatal(err)
			}
			fmt.Println(i)
		}
	}
	dir := t.TempDir()
	base, path := filepath.Join(dir, "base"), filepath.Join(dir, "image")
	if err := os.WriteFile(base, bytes.Repeat([]byte{0xEE}, size), 0o600); err != nil {
		t.Fatal(err)
	}
	r := rand.New(rand.NewPCG(3, 3))
	for range 20 {
		if err := Create(path, CreateOptions{Size: size, Backing: "base", BackingFormat: "raw"}); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(os.Args[0], "-test.run=^TestKilledWriter$")
		cmd.Env = append(os.Environ(), "QCOW2_TEST_WRITE="+path)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		flushed := 0
		fmt.Fscan(out, &flushed)
		for range r.IntN(1 << 21) {
			flushed += 0 // some instructions
		}
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if flushed == 0 {
			t.Fatal("the writer flushed nothing")
		}
		n, err := Open(path, false)
		if err != nil {
			t.Fatal(err)
		}
		got := make([]byte, size)
		if err := n.Readv([][]byte{got}, 0); err != nil {
			t.Fatal(err)
		}
		for at := 0; at < size; at += 96 << 10 {
			if v := int(got[at]); v < flushed {
				t.Errorf("at %d stands %d, and %d was flushed", at, v, flushed)
			}
			if at+4096 < size && got[at+4096] != 0xEE {
				t.Errorf("at %d stands %#x, which nobody wrote", at+4096, got[at+4096])
			}
		}
		if err := n.Close(); err != nil {
			t.Fatal(err)
		}
		clean(t, path)
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
}

// An overlay is put on a disk that is in use, which others may read from then on.
func TestOverlay(t *testing.T) {
	dir := t.TempDir()
	base := filepath.Join(dir, "base")
	if err := os.WriteFile(base, bytes.Repeat([]byte("base"), 1<<18), 0o600); err != nil {
		t.Fatal(err)
	}
	disk, err := raw.Open(base, false)
	if err != nil {
		t.Fatal(err)
	}
	root := block.NewRoot(disk)
	if err := root.Writev([][]byte{[]byte("mine")}, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := raw.Open(base, true); !errors.Is(err, block.ErrInUse) {
		t.Fatalf("a disk that is written: %v", err)
	}
	for i, name := range []string{"a.qcow2", "b.qcow2"} {
		under := root.Current().(block.Freezer)
		if err := under.Freeze(); err != nil {
			t.Fatal(err)
		}
		if err := CreateOver(filepath.Join(dir, name), under); err != nil {
			t.Fatal(err)
		}
		over, err := OpenOver(filepath.Join(dir, name), under)
		if err != nil {
			t.Fatal(err)
		}
		root.Swap(over)
		if err := root.Writev([][]byte{{byte(i + 1)}}, int64(i+1)); err != nil {
			t.Fatal(err)
		}
	}
	other, err := raw.Open(base, true)
	if err != nil {
		t.Fatalf("a disk under an overlay: %v", err)
	}
	defer other.Close()
	if _, err := raw.Open(base, false); !errors.Is(err, block.ErrInUse) {
		t.Errorf("another writer of a disk under an overlay: %v", err)
	}
	got := make([]byte, 8)
	if err := root.Readv([][]byte{got}, 0); err != nil || string(got) != "m\x01\x02ebase" {
		t.Errorf("%q %v", got, err)
	}
	if err := other.Readv([][]byte{got}, 0); err != nil || string(got) != "minebase" {
		t.Errorf("the base holds %q: %v", got, err)
	}
	if err := root.Close(); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"a.qcow2", "b.qcow2"} {
		clean(t, filepath.Join(dir, name))
	}
	if err := CreateOver(base, disk); !errors.Is(err, fs.ErrExist) {
		t.Errorf("an overlay in place of a file that is there: %v", err)
	}
}

// What cannot be written is refused, and says what helps.
func TestNotWritten(t *testing.T) {
	for _, tt := range []struct {
		name, options, says string
		after               []string
		is                  error
	}{
		{"internal snapshots", "compat=1.1", "internal snapshots", []string{"snapshot", "-c", "one", "image.qcow2"}, ErrUnsupported},
		{"subclusters", "extended_l2=on", "subclusters", nil, ErrUnsupported},
		{"data file", "data_file=data.raw", "data file", nil, ErrUnsupported},
	} {
		dir := t.TempDir()
		create(t, dir, "image.qcow2", "1M", tt.options)
		if tt.after != nil {
			qemu(t, dir, "qemu-img", tt.after...)
		}
		path := filepath.Join(dir, "image.qcow2")
		before, _ := os.ReadFile(path)
		if _, err := Open(path, false); !errors.Is(err, tt.is) || !strings.Contains(err.Error(), tt.says) || !strings.Contains(err.Error(), "readonly=on") {
			t.Errorf("%s: %v", tt.name, err)
		}
		if now, _ := os.ReadFile(path); !bytes.Equal(now, before) {
			t.Errorf("%s: the image was changed", tt.name)
		}
	}
}

// An image whose counts QEMU left behind is repaired when it is opened, and one
// that is damaged otherwise is not touched.
func TestOpenRepairsCounts(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "image.qcow2")
	create(t, dir, "image.qcow2", "10M", "lazy_refcounts=on")
	// QEMU ends as if it were killed.
	_ = exec.Command("qemu-io", "-f", "qcow2", "-c", "write -P 5 1M 3M", "-c", "flush", "-c", "abort", path).Run()
	if r := checkByUs(t, path, RepairNone); r.Corruptions == 0 {
		t.Fatalf("QEMU left nothing to repair: %+v", r)
	}
	n, err := Open(path, false)
	if err != nil {
		t.Fatal(err)
	}
	want := make([]byte, 10<<20)
	copy(want[1<<20:], bytes.Repeat([]byte{5}, 3<<20))
	if !bytes.Equal(readAll(t, n), want) {
		t.Error("the disk holds something else")
	}
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	clean(t, path)
	p := placesOf(t, path)
	patch(t, path, p.l2, be64(1<<50))
	patch(t, path, 72, be64(FeatureDirty))
	if _, err := Open(path, false); !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), "entry 0") {
		t.Errorf("an entry that leads nowhere: %v", err)
	}
}
