package mirror

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/qcow2"
)

// Consolidation deletes the newest snapshots of a disk in use: what the overlay,
// and more images on which it lies, hold goes into the base, the image behind
// them, in which the disk's user then goes on.
//
// At every instant the overlay on its chain is the disk: the pass writes to the
// base only what is held before it too, and what is diverted there is what is not. What
// lies on the base itself stops holding what was copied, as soon as that is durable there.
// So after a crash the disk is as it was flushed, and consolidating begins anew, with
// what is left. At the end an empty overlay takes the place of the old one, by a rename,
// before the disk's user can write on: the overlay's name stays a name of this disk.
type Consolidation struct {
	root    *block.Root
	overlay *qcow2.Node
	above   *qcow2.Node // that lies on the base itself: the overlay, or one behind it
	base    base        // open to be written
	path    string      // the overlay's
	filter  *Filter
	done    bool // the disk is in the base, and the overlay gone
}

// Consolidate puts the filter in place. Run makes the pass; then Finish or Cancel
// follows.
func Consolidate(root *block.Root, o Options) (*Consolidation, error) {
	c := &Consolidation{root: root}
	var err error
	root.Drained(func(current block.Node) block.Node {
		if err = c.begin(current, o); err != nil {
			return current
		}
		return c.filter
	})
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMirror, err)
	}
	return c, nil
}

func (c *Consolidation) begin(current block.Node, o Options) error {
	overlay, ok := current.(*qcow2.Node)
	switch {
	case !ok:
		return fmt.Errorf("a disk of format %s has no backing file to move into", current.Info().Format)
	case overlay.ReadOnly():
		return block.ErrReadOnly
	case overlay.Backing() == nil:
		return fmt.Errorf("%s has no backing file", overlay.Info().Filename)
	}
	var err error
	if c.path, err = filepath.Abs(overlay.Info().Filename); err != nil {
		return err
	}
	c.overlay, c.above = overlay, overlay
	o.Depth = max(o.Depth, 1)
	for range o.Depth - 1 {
		if c.above, ok = c.above.Backing().(*qcow2.Node); !ok || c.above.Backing() == nil {
			return fmt.Errorf("%s lies on fewer than %d images", overlay.Info().Filename, o.Depth)
		}
	}
	if c.base, err = openToWrite(c.above); err != nil {
		return err
	}
	if c.filter, err = New(overlay, c.base, o); err != nil {
		return errors.Join(err, c.base.Freeze())
	}
	return nil
}

// Run makes the pass: all that is held before the base is then in it.
func (c *Consolidation) Run(ctx context.Context) error { return c.filter.Run(ctx) }

// Figures are those up to now.
func (c *Consolidation) Figures() Figures { return c.filter.Figures() }

// Cancel takes the filter away. The disk goes on in its overlay; the base is not the
// snapshot any more that it was. Once the disk is in the base Cancel does nothing.
func (c *Consolidation) Cancel() error {
	if c.done {
		return nil
	}
	var err error
	c.root.Drained(func(block.Node) block.Node {
		c.overlay.Reclaim()
		err = c.base.Freeze()
		return c.overlay
	})
	return err
}

// Finish has the disk's user go on in the base, and leaves an empty
// overlay in the old one's place. When it fails the disk is as after Cancel.
func (c *Consolidation) Finish() error {
	if err := c.finish(); err != nil {
		return fmt.Errorf("%w: %w", ErrMirror, errors.Join(err, c.Cancel()))
	}
	return nil
}

func (c *Consolidation) finish() (err error) {
	if err := c.filter.Err(); err != nil {
		return err
	}
	// Most of what must be durable is: this leaves less to be done between two requests.
	if err := c.base.Flush(); err != nil {
		return err
	}
	// The empty overlay names the base.
	if err := c.base.Named(); err != nil {
		return err
	}
	empty := c.path + ".consolidated"
	if err := os.Remove(empty); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := qcow2.CreateOver(empty, c.base); err != nil {
		return err
	}
	replaced := false
	c.root.Drained(func(filter block.Node) block.Node {
		if err = c.filter.Err(); err == nil {
			err = c.base.Flush()
		}
		if err == nil {
			replaced, err = replace(empty, c.path)
		}
		if !replaced {
			return filter
		}
		return c.base
	})
	if !replaced {
		os.Remove(empty)
		return err
	}
	// Nobody needs it any more, or what it has not written yet; its file has no name.
	c.above.SetBacking(nil)
	c.overlay.IgnoreFlushes()
	c.overlay.Close()
	c.done = true
	return err
}

// replace renames a file, and tells whether it has. An error beside that is one
// of making it durable.
func replace(from, to string) (bool, error) {
	if err := os.Rename(from, to); err != nil {
		return false, err
	}
	dir, err := os.Open(filepath.Dir(to))
	if err != nil {
		return true, err
	}
	defer dir.Close()
	return true, dir.Sync()
}
