package owner

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
)

func newDirectory(t *testing.T) directory {
	t.Helper()
	d, err := directoryOf(newImage(t))
	if err == nil {
		err = d.create()
	}
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func record(generation uint64) *Record {
	return &Record{Generation: generation, Epoch: generation, State: Owned, Owner: ID(random(16)), Address: "unix:@none"}
}

func (d directory) mustBe(t *testing.T, generation uint64) {
	t.Helper()
	if r, err := d.current(); err != nil || r.Generation != generation {
		t.Errorf("generation %d, %v; want %d", r.Generation, err, generation)
	}
}

// TestStalePublish: who was frozen before it made its owner file finds the generation free
// again, and is not the owner.
func TestStalePublish(t *testing.T) {
	d := newDirectory(t)
	for g := uint64(1); g <= 9; g++ {
		if err := d.publish(record(g), ""); err != nil {
			t.Fatal(err)
		}
	}
	for _, g := range []uint64{1, 5, 8, 9} {
		if err := d.publish(record(g), ""); !errors.Is(err, errRaced) {
			t.Errorf("generation %d: %v", g, err)
		}
		d.mustBe(t, 9)
	}
	names, err := os.ReadDir(d.path)
	if err != nil || len(names) != 1 {
		t.Errorf("%v, %v", names, err)
	}
}

// TestLateClaimant: who was frozen before it put its copy in the disk's place cannot do
// so when there is a successor.
func TestLateClaimant(t *testing.T) {
	d := newDirectory(t)
	if err := d.publish(record(1), ""); err != nil {
		t.Fatal(err)
	}
	claim, err := d.makeClaim(2)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.publish(record(2), claim); err != nil {
		t.Fatal(err)
	}
	temp := filepath.Join(d.path, claim, copyName)
	if err := os.WriteFile(temp, []byte("an old copy"), 0o600); err != nil {
		t.Fatal(err)
	}
	early, err := d.makeClaim(4)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.publish(record(3), ""); err != nil {
		t.Fatal(err)
	}
	inode := inodeOf(t, d.image)
	if err := os.Rename(temp, d.image); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the copy is still there: %v", err)
	}
	if _, err := replaceDisk(context.Background(), d, claim); !errors.Is(err, errRaced) {
		t.Errorf("replace: %v", err)
	}
	if inodeOf(t, d.image) != inode {
		t.Error("the disk was replaced")
	}
	if _, err := os.Stat(filepath.Join(d.path, early)); err != nil {
		t.Errorf("the claim of a later generation: %v", err)
	}
}

// TestDamagedRecord: it is named, and nothing is done to the disk.
func TestDamagedRecord(t *testing.T) {
	d := newDirectory(t)
	if err := d.publish(record(1), ""); err != nil {
		t.Fatal(err)
	}
	for _, content := range []string{"", "x", string(record(3).encode()), string(make([]byte, recordSize))} {
		if err := os.WriteFile(d.recordPath(2), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(t.Context(), d.image, openRaw(d.image), Options{}); !errors.Is(err, ErrRecord) {
			t.Error(err)
		}
	}
}

func TestEntryNames(t *testing.T) {
	for name, want := range map[string]entry{
		"17":                   {name: "17", generation: 17},
		"17-0a.new":            {name: "17-0a.new", generation: 17, nonce: "0a", kind: newSuffix},
		"17-0a.claim":          {name: "17-0a.claim", generation: 17, nonce: "0a", kind: claimSuffix},
		"0":                    {},
		"017":                  {},
		"+17":                  {},
		"17-0a":                {},
		"17.new":               {},
		"":                     {},
		"99999999999999999999": {},
	} {
		if got, ok := parseEntry(name); ok != (want.name != "") || ok && got != want {
			t.Errorf("%q: %+v, %v", name, got, ok)
		}
	}
}
