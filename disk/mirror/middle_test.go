package mirror

import (
	"bytes"
	"errors"
	"fmt"
	"path/filepath"
	"testing"

	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/qcow2"
)

// unclosable cannot be closed well.
type unclosable struct {
	block.Node
	closed *int
}

var errUnclosable = errors.New("it cannot be closed")

func (u unclosable) Close() error {
	*u.closed++
	return errors.Join(errUnclosable, u.Node.Close())
}

// imagesOn makes images that lie one on another, each with a MiB of its own, and opens
// the newest.
func imagesOn(t *testing.T, dir string, images int) *qcow2.Node {
	t.Helper()
	for i := range images {
		o := qcow2.CreateOptions{Size: 8 << 20}
		if i > 0 {
			o.Backing, o.BackingFormat = fmt.Sprint(i-1, ".qcow2"), "qcow2"
		}
		path := filepath.Join(dir, fmt.Sprint(i, ".qcow2"))
		if err := qcow2.Create(path, o); err != nil {
			t.Fatal(err)
		}
		n, err := qcow2.Open(path, false)
		if err != nil {
			t.Fatal(err)
		}
		if i == images-1 {
			return n
		}
		if err := errors.Join(n.Writev([][]byte{bytes.Repeat([]byte{byte(i + 1)}, 1<<20)}, int64(i)<<20), n.Close()); err != nil {
			t.Fatal(err)
		}
	}
	return nil
}

// Once the image above lies on the base, Finish has done what it is to do, whatever
// becomes of the files that are only closed: who is told that it failed takes the chain
// for what it was.
func TestMiddleClosesBadly(t *testing.T) {
	for top := 1; top <= 2; top++ {
		dir := t.TempDir()
		root := block.NewRoot(imagesOn(t, dir, 4))
		m, err := NewMiddle(root, MiddleOptions{Options: Options{Depth: 3}, Top: top})
		if err != nil {
			t.Fatal(err)
		}
		if err := m.Run(t.Context()); err != nil {
			t.Fatal(err)
		}
		closed := 0
		m.top.SetBacking(unclosable{m.top.Backing(), &closed})
		if err := m.Finish(); err != nil {
			t.Errorf("from depth %d: %v", top, err)
		}
		if err := m.Cancel(); err != nil { // for who was told of an error
			t.Errorf("from depth %d: %v", top, err)
		}
		var names []string
		for i := root.Info(); ; i = *i.Backing {
			if names = append(names, filepath.Base(i.Filename)); i.Backing == nil {
				break
			}
		}
		if want := []string{"[3.qcow2 0.qcow2]", "[3.qcow2 2.qcow2 0.qcow2]"}[top-1]; fmt.Sprint(names) != want || closed != 1 {
			t.Errorf("from depth %d: the chain is %v, not %s; closed %d times", top, names, want, closed)
		}
		got := make([]byte, 3<<20)
		if err := root.Readv([][]byte{got}, 0); err != nil || got[0] != 1 || got[1<<20] != 2 || got[2<<20] != 3 {
			t.Errorf("from depth %d: %d, %d, %d, %v", top, got[0], got[1<<20], got[2<<20], err)
		}
		if err := root.Close(); err != nil {
			t.Error(err)
		}
	}
}
