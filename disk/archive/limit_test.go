package archive

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/gnomon-vmm/gnomon/disk/qcow2"
)

// An archive takes no backup that could not be read for the chain on which it lies, and
// says what to do; done, it takes them again.
func TestBackupsOnOneFull(t *testing.T) {
	a, err := Create(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	add := func(full bool) error {
		p, err := a.Begin(1<<20, full)
		if err == nil {
			_, err = p.Finish(nil, "")
		}
		return err
	}
	for i := range 64 {
		if err := add(i == 0); err != nil {
			t.Fatalf("backup %d: %v", i+1, err)
		}
	}
	if err := add(false); !errors.Is(err, qcow2.ErrBacking) || !strings.Contains(err.Error(), "gnomon backup prune") {
		t.Errorf("the 65th: %v", err)
	}
	if _, err := a.Prune(context.Background(), 60, nil); err != nil {
		t.Fatal(err)
	}
	if err := add(false); err != nil {
		t.Errorf("after others have been merged: %v", err)
	}
	if err := add(true); err != nil {
		t.Errorf("another full one: %v", err)
	}
}
