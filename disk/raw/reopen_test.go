package raw

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/gnomon-vmm/gnomon/disk/block"
)

// While an image's locks are lent another node may write to it; they are only lent by
// who is still found by its name, and only come back when nobody else has them.
func TestLend(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(path, make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	n, err := Open(path, true)
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	writes := func() error {
		w, err := Open(path, false)
		if err == nil {
			err = w.Close()
		}
		return err
	}
	if err := writes(); !errors.Is(err, block.ErrInUse) {
		t.Fatalf("before: %v", err)
	}
	back, err := n.Lend()
	if err != nil {
		t.Fatal(err)
	}
	w, err := Open(path, false)
	if err != nil {
		t.Fatal(err)
	}
	if err := n.Readv([][]byte{make([]byte, 512)}, 0); err != nil {
		t.Error(err)
	}
	if err := back(); !errors.Is(err, block.ErrInUse) {
		t.Errorf("back while another writes: %v", err)
	}
	w.Close()
	if err := back(); err != nil {
		t.Fatal(err)
	}
	if err := writes(); !errors.Is(err, block.ErrInUse) {
		t.Errorf("after: %v", err)
	}
	if err := os.Rename(path, path+".moved"); err != nil {
		t.Fatal(err)
	}
	if _, err := n.Lend(); !errors.Is(err, ErrMoved) {
		t.Errorf("moved: %v", err)
	}
	path += ".moved"
	if err := writes(); !errors.Is(err, block.ErrInUse) {
		t.Errorf("moved it is not locked: %v", err)
	}
}
