package mirror

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"github.com/gnomon-vmm/gnomon/disk"
	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/qcow2"
)

// Middle deletes snapshots in the middle of the chain of a disk in use: what some
// images that lie one on another hold goes into the base on which they lie, and the
// image above them lies on the base then. Their files stay, for the caller to
// remove.
//
// At every instant the chain reads as the disk: what the base comes to hold is
// hidden by the images that hold it too. So after a crash it is as it was, and
// begins anew.
type Middle struct {
	root   *block.Root
	o      MiddleOptions
	upper  *qcow2.Node // that lies on above, or nil
	above  *qcow2.Node // that lies on top
	top    *qcow2.Node // the first image that goes
	lowest *qcow2.Node // the last, which lies on the base
	base   base        // open to be written
	pass   *Filter     // nobody's requests go by it
	over   bool        // the base is open to be read again, and may lie below another node
}

// MiddleOptions say which images go.
type MiddleOptions struct {
	// Options has the base's depth, as it is seen from the disk: at least 2.
	Options
	// Top is the depth of the first image that goes, 1 for what the disk's own image
	// lies on, less than that of the base.
	Top int
	// BackingFile is how the image above shall name the base; "": by its absolute
	// path.
	BackingFile string
}

// NewMiddle opens the base to be written. Run makes the pass; then Finish or Cancel
// follows.
func NewMiddle(root *block.Root, o MiddleOptions) (*Middle, error) {
	m := &Middle{root: root, o: o}
	var err error
	root.Drained(func(current block.Node) block.Node {
		err = m.begin(current)
		return current
	})
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMirror, err)
	}
	return m, nil
}

func (m *Middle) begin(current block.Node) error {
	if m.o.Top < 1 || m.o.Depth <= m.o.Top {
		return fmt.Errorf("images from depth %d to before %d: there are none", m.o.Top, m.o.Depth)
	}
	if current.ReadOnly() {
		return block.ErrReadOnly
	}
	for depth, n := 0, current; depth < m.o.Depth; depth++ {
		image, ok := n.(*qcow2.Node)
		if !ok || image.Backing() == nil {
			return fmt.Errorf("%s lies on fewer than %d images", current.Info().Filename, m.o.Depth)
		}
		switch depth {
		case m.o.Top - 2:
			m.upper = image
		case m.o.Top - 1:
			m.above = image
		case m.o.Top:
			m.top = image
		}
		m.lowest, n = image, image.Backing()
	}
	var err error
	if m.upper != nil { // the header of the image above is written by its name
		if err := m.above.Named(); err != nil {
			return err
		}
	}
	if m.base, err = openToWrite(m.lowest); err != nil {
		return err
	}
	if m.base.Size() < m.top.Size() {
		r, ok := m.base.(block.Resizer)
		if !ok {
			err = fmt.Errorf("%s has %d bytes, its base %d", m.top.Info().Filename, m.top.Size(), m.base.Size())
		} else {
			err = r.Resize(m.top.Size())
		}
	}
	if err == nil {
		pass := m.o.Options
		pass.Depth -= m.o.Top
		m.pass, err = New(m.top, m.base, pass)
	}
	if err == nil {
		m.pass.alwaysRest = true // the requests do not go by it
	}
	if err != nil {
		return errors.Join(err, m.base.Freeze())
	}
	return nil
}

// Run makes the pass: all that the images hold is then in the base.
func (m *Middle) Run(ctx context.Context) error {
	if err := m.pass.Run(ctx); err != nil {
		return err
	}
	// What the base holds behind the end of the image above it would be seen.
	if end := min(m.base.Size(), m.above.Size()); end > m.top.Size() {
		if err := m.base.WriteZeroes(m.top.Size(), end-m.top.Size(), true); err != nil {
			return fmt.Errorf("%w: %w", ErrMirror, err)
		}
	}
	if err := m.base.Flush(); err != nil {
		return fmt.Errorf("%w: %w", ErrMirror, err)
	}
	return nil
}

// Figures are those up to now.
func (m *Middle) Figures() Figures { return m.pass.Figures() }

// Cancel leaves the chain as it is. The base is not the snapshot any more that it
// was.
func (m *Middle) Cancel() error {
	var err error
	m.root.Drained(func(current block.Node) block.Node {
		err = m.release()
		return current
	})
	return err
}

// release has the base be read only. Preconditions: there are no requests.
func (m *Middle) release() error {
	if m.over {
		return nil
	}
	m.over = true
	return m.base.Freeze()
}

// Finish has the image above lie on the base, and closes those that go. When it
// fails the chain is as after Cancel.
func (m *Middle) Finish() error {
	var err error
	m.root.Drained(func(current block.Node) block.Node {
		if err = m.release(); err == nil {
			err = m.relink()
		}
		return current
	})
	if err != nil {
		return fmt.Errorf("%w: %w", ErrMirror, err)
	}
	return nil
}

func (m *Middle) relink() error {
	if err := m.base.Named(); err != nil {
		return err
	}
	info := m.base.Info()
	name := m.o.BackingFile
	if name == "" {
		var err error
		if name, err = filepath.Abs(info.Filename); err != nil {
			return err
		}
	}
	if m.upper == nil { // above is the disk's own image, open to be written
		if err := m.above.RenameBacking(name, info.Format); err != nil {
			return err
		}
		base := m.lowest.SetBacking(nil)
		m.above.SetBacking(base)
		m.top.Close() // it was only read
		return nil
	}
	back, err := m.above.Lend() // its own locks would keep us from writing its header
	if err != nil {
		return err
	}
	above := m.above.Info()
	err = qcow2.Rebase(context.Background(), above.Filename, qcow2.RebaseOptions{Backing: name, BackingFormat: info.Format, NameOnly: true})
	var now block.Node
	if err == nil {
		now, err = disk.Open(above.Filename, disk.Options{Format: above.Format, ReadOnly: true, Like: m.above})
	}
	if err != nil { // the images on which it lay read as before, whichever its header names
		return errors.Join(err, takeBack(m.upper, back))
	}
	m.upper.SetBacking(now)
	m.above.Close() // it and those below were only read
	return nil
}
