package pager

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/mm/checkpoint"
)

var testID = checkpoint.ID{1, 2, 3, 15: 16}

func TestRecordedFile(t *testing.T) {
	path := RecordedPath(filepath.Join(t.TempDir(), "vm.checkpoint"))
	if _, err := LoadRecorded(path, testID); !errors.Is(err, ErrRecorded) || !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
	for _, blocks := range [][]Block{{}, {7}, {5, 3, 1 << 31, 5}} {
		if err := SaveRecorded(path, testID, blocks); err != nil {
			t.Fatal(err)
		}
		if got, err := LoadRecorded(path, testID); err != nil || !slices.Equal(got, blocks) {
			t.Errorf("%v became %v, %v", blocks, got, err)
		}
	}
	if _, err := LoadRecorded(path, checkpoint.ID{9}); !errors.Is(err, ErrRecorded) {
		t.Errorf("another checkpoint's: %v", err)
	}
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for i := range good {
		bad := slices.Clone(good)
		bad[i] ^= 1 << (i % 8)
		if got, err := parseRecorded(bad, testID); err == nil {
			t.Errorf("byte %d changed: %v", i, got)
		}
		if got, err := parseRecorded(good[:i], testID); err == nil {
			t.Errorf("cut at %d: %v", i, got)
		}
	}
	if _, err := parseRecorded(append(good, 0), testID); err == nil {
		t.Error("a byte more is accepted")
	}
	if names, err := os.ReadDir(filepath.Dir(path)); err != nil || len(names) != 1 {
		t.Errorf("left behind: %v, %v", names, err)
	}
	if err := SaveRecorded(filepath.Join(t.TempDir(), "no", "such"), testID, nil); !errors.Is(err, ErrRecorded) {
		t.Errorf("no directory: %v", err)
	}
}

// Whether a set can be kept is known ahead, and finding out leaves nothing behind.
func TestCheckRecordable(t *testing.T) {
	dir := t.TempDir()
	path := RecordedPath(filepath.Join(dir, "vm.checkpoint"))
	if err := CheckRecordable(path); err != nil {
		t.Error(err)
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(dir, 0)
	fill, err := os.Create(filepath.Join(dir, "fill"))
	if err != nil {
		t.Fatal(err)
	}
	defer fill.Close()
	if _, err := fill.Write(make([]byte, 1<<20)); !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
	if err := CheckRecordable(path); !errors.Is(err, ErrRecorded) || !errors.Is(err, unix.ENOSPC) {
		t.Errorf("where there is no room: %v", err)
	}
	if names, err := os.ReadDir(dir); err != nil || len(names) != 1 {
		t.Errorf("left behind: %v, %v", names, err)
	}
	if err := CheckRecordable(filepath.Join(dir, "no", "such")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no directory: %v", err)
	}
}

func FuzzRecorded(f *testing.F) {
	path := filepath.Join(f.TempDir(), "set")
	for _, blocks := range [][]Block{{}, {1, 2, 3}} {
		if err := SaveRecorded(path, testID, blocks); err != nil {
			f.Fatal(err)
		}
		b, err := os.ReadFile(path)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		blocks, err := parseRecorded(b, testID)
		if err != nil {
			return
		}
		again := filepath.Join(t.TempDir(), "set")
		if err := SaveRecorded(again, testID, blocks); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(again); err != nil || !slices.Equal(got, b) {
			t.Errorf("%x became %x, %v", b, got, err)
		}
	})
}
