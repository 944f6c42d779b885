package mirror_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/mirror"
	"github.com/gnomon-vmm/gnomon/disk/qcow2"
	"github.com/gnomon-vmm/gnomon/disk/raw"
)

func rename(t testing.TB, from, to string) {
	t.Helper()
	if err := os.Rename(from, to); err != nil {
		t.Fatal(err)
	}
}

// still wants a disk to read as it did, to be written still, and its nodes to be told of.
func still(t testing.TB, what string, root *block.Root, model []byte) {
	t.Helper()
	got := make([]byte, root.Size())
	if err := root.Readv([][]byte{got}, 0); err != nil || !bytes.Equal(got, model) {
		t.Errorf("%s: the disk is not what was written: %v", what, err)
	}
	if err := root.Writev([][]byte{model[4096:8192]}, 4096); err != nil {
		t.Errorf("%s: %v", what, err)
	}
	if info := root.Info(); info.Backing == nil || info.Backing.Filename == info.Filename {
		t.Errorf("%s: %+v", what, info)
	}
}

// A disk whose base has lost its name, to nothing or to another file, or is held by
// somebody else, is not consolidated, and goes on on the base that it has.
func TestConsolidateBaseMoved(t *testing.T) {
	for _, format := range []string{"raw", "qcow2"} {
		t.Run(format, func(t *testing.T) {
			n, model, dir := overlay(t, 3, format)
			root := block.NewRoot(n)
			base, moved := filepath.Join(dir, "base."+format), filepath.Join(dir, "moved")
			refused := func(what string, is error) {
				t.Helper()
				if _, err := mirror.Consolidate(root, mirror.Options{}); !errors.Is(err, is) {
					t.Errorf("%s: %v", what, err)
				}
				still(t, what, root, model)
			}
			rename(t, base, moved)
			refused("no file", raw.ErrMoved)
			held, err := os.ReadFile(moved)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(base, held, 0o600); err != nil {
				t.Fatal(err)
			}
			refused("another file", raw.ErrMoved)
			if now, err := os.ReadFile(base); err != nil || !bytes.Equal(now, held) {
				t.Error("the other file was written to")
			}
			rename(t, moved, base)
			reader, err := raw.Open(base, true)
			if err != nil {
				t.Fatal(err)
			}
			refused("in use", block.ErrInUse)
			reader.Close()
			if _, err := raw.Open(base, false); !errors.Is(err, block.ErrInUse) {
				t.Errorf("the base is not locked any more: %v", err)
			}

			// It loses its name during the pass.
			for _, cancel := range []bool{true, false} {
				c, err := mirror.Consolidate(root, mirror.Options{})
				if err != nil {
					t.Fatal(err)
				}
				if err := c.Run(context.Background()); err != nil {
					t.Fatal(err)
				}
				rename(t, base, moved)
				if cancel {
					if err := c.Cancel(); err != nil {
						t.Error(err)
					}
				} else if err := c.Finish(); !errors.Is(err, raw.ErrMoved) {
					t.Errorf("finished: %v", err)
				}
				still(t, "moved during the pass", root, model)
				rename(t, moved, base)
			}

			c, err := mirror.Consolidate(root, mirror.Options{})
			if err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(c.Run(context.Background()), c.Finish()); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(content(t, root), model) {
				t.Error("consolidated the disk is not what was written")
			}
			if err := root.Close(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// Nor are images in the middle of a chain deleted when one whose header changes has
// lost its name.
func TestMiddleMoved(t *testing.T) {
	n, model, dir := overlay(t, 5, "qcow2")
	top := filepath.Join(dir, "overlay.qcow2")
	for _, name := range []string{"above.qcow2", "upper.qcow2"} {
		if err := n.Close(); err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, name)
		if err := qcow2.Create(path, qcow2.CreateOptions{Size: size, Backing: top, BackingFormat: "qcow2"}); err != nil {
			t.Fatal(err)
		}
		var err error
		if n, err = qcow2.Open(path, false); err != nil {
			t.Fatal(err)
		}
		top = path
	}
	root := block.NewRoot(n)
	o := mirror.MiddleOptions{Top: 2, Options: mirror.Options{Depth: 3}}
	moved := filepath.Join(dir, "moved")
	for _, name := range []string{"base.qcow2", "above.qcow2"} {
		path := filepath.Join(dir, name)
		rename(t, path, moved)
		if _, err := mirror.NewMiddle(root, o); !errors.Is(err, raw.ErrMoved) {
			t.Errorf("%s: %v", name, err)
		}
		still(t, name, root, model)
		rename(t, moved, path)

		m, err := mirror.NewMiddle(root, o)
		if err != nil {
			t.Fatal(err)
		}
		if err := m.Run(context.Background()); err != nil {
			t.Fatal(err)
		}
		rename(t, path, moved)
		if err := m.Finish(); !errors.Is(err, raw.ErrMoved) {
			t.Errorf("%s: finished: %v", name, err)
		}
		still(t, name+" moved during the pass", root, model)
		rename(t, moved, path)
	}
	// Somebody else reads the image whose header is to name the base.
	m, err := mirror.NewMiddle(root, o)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Run(context.Background()); err != nil {
		t.Fatal(err)
	}
	reader, err := raw.Open(filepath.Join(dir, "above.qcow2"), true)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Finish(); !errors.Is(err, block.ErrInUse) {
		t.Errorf("finished: %v", err)
	}
	reader.Close()
	still(t, "in use", root, model)

	if m, err = mirror.NewMiddle(root, o); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(m.Run(context.Background()), m.Finish()); err != nil {
		t.Fatal(err)
	}
	still(t, "finished", root, model)
	if got := root.Info().Backing.Backing.Filename; got != filepath.Join(dir, "base.qcow2") {
		t.Errorf("it lies on %s", got)
	}
	if err := root.Close(); err != nil {
		t.Fatal(err)
	}
	if n, err = qcow2.Open(top, false); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(content(t, n), model) {
		t.Error("opened anew the disk is not what was written")
	}
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
}
