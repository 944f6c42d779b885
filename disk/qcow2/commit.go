package qcow2

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"

	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/raw"
)

// ErrNotEmptied is an image that could be committed, and not be emptied afterwards.
var ErrNotEmptied = errors.New("the overlay cannot be emptied")

// CommitOptions say how an image is committed.
type CommitOptions struct {
	// Base is the image of its backing chain that gets what it holds; "": its backing file.
	Base string
	// Empty has the image hold nothing itself afterwards, which its backing file must be
	// the base for. Else it stays as it is.
	Empty bool
	// Files are how the images' files are read and written.
	Files raw.Options
	// Rate is how many bytes a second are written to the base at most; 0: no limit.
	Rate int64
	// Progress, where not nil, is told how many bytes of the disk are done.
	Progress func(done, total int64)
}

// Commit writes what the image at path holds itself to an image that it lies on, which
// then reads as it does. Images between the two are not what they were: their paths are
// returned. The image itself reads as before.
func Commit(ctx context.Context, path string, o CommitOptions) (invalid []string, err error) {
	above, base, err := openCommit(path, o)
	if err != nil {
		return nil, err
	}
	top := above[0]
	defer func() { err = errors.Join(err, base.Close(), top.Close()) }()
	if err := commit(ctx, top, len(above), base, &o); err != nil {
		return nil, fmt.Errorf("commit disk %s: %w", path, err)
	}
	if o.Empty {
		if err := top.empty(); err != nil {
			return nil, fmt.Errorf("empty disk %s: %w", path, err)
		}
	}
	for _, n := range above[1:] {
		invalid = append(invalid, n.path)
	}
	return invalid, nil
}

// openCommit opens the image at path and those between it and the base, the last of
// which lies on none here, and the base to be written.
func openCommit(path string, o CommitOptions) (above []*Node, base block.Node, err error) {
	var wanted fs.FileInfo
	if o.Base != "" {
		if wanted, err = os.Stat(o.Base); err != nil {
			return nil, nil, fmt.Errorf("commit disk %s: %w: %w", path, ErrBacking, err)
		}
	}
	c := newChainWith(o.Files)
	defer func() {
		if err != nil && len(above) > 0 {
			above[0].Close()
		}
	}()
	for name := path; ; {
		n, err := c.openNext(name, o.Empty && len(above) == 0)
		if errors.Is(err, fs.ErrNotExist) && len(above) > 0 {
			err = missingBacking(above[len(above)-1].path, name)
		}
		if err != nil {
			return above, nil, err
		}
		if above = append(above, n); len(above) > 1 {
			above[len(above)-2].backing = n
		}
		h := n.header
		if h.BackingFile == "" && wanted != nil {
			return above, nil, fmt.Errorf("commit disk %s: %w: it does not lie on %s", path, ErrBacking, o.Base)
		}
		if h.BackingFile == "" {
			return above, nil, fmt.Errorf("disk %s: %w: it lies on none", path, ErrBacking)
		}
		next, err := backingPath(name, h.BackingFile)
		if err != nil {
			return above, nil, err
		}
		info, err := os.Stat(next)
		if wanted == nil || err == nil && os.SameFile(info, wanted) {
			if o.Empty && len(above) > 1 {
				return above, nil, fmt.Errorf("commit disk %s: %w: it cannot be emptied, since it does not lie on %s itself", path, ErrBacking, o.Base)
			}
			base, err = c.openBase(name, next, h.BackingFormat, o.Files)
			return above, base, err
		}
		if h.BackingFormat != "qcow2" {
			return above, nil, fmt.Errorf("commit disk %s: %w: it does not lie on %s", path, ErrBacking, o.Base)
		}
		name = next
	}
}

// openOne opens the image at path without what it lies on.
func (c *chain) openOne(path string, writable bool) (*Node, error) {
	if writable {
		return c.openWritable(path)
	}
	file, err := c.open(path, true)
	if err != nil {
		return nil, err
	}
	n := c.node(file, path)
	if err = n.init(); err != nil {
		err = fmt.Errorf("disk %s: %w", path, err)
	} else if n.header.Incompatible&FeatureDataFile != 0 {
		n.external, err = c.openDataFile(path, n.header)
	}
	if err != nil {
		n.abandon()
		return nil, err
	}
	return n, nil
}

// openNext is openOne, which tells of an image that can be read and not be emptied.
func (c *chain) openNext(path string, writable bool) (*Node, error) {
	n, err := c.openOne(path, writable)
	if !writable || !errors.Is(err, ErrUnsupported) {
		return n, err
	}
	c.opened = nil
	readable, readErr := c.openOne(path, false)
	if readErr != nil {
		return nil, err
	}
	return nil, fmt.Errorf("%w: %w", ErrNotEmptied, errors.Join(err, readable.Close()))
}

// openBase opens the image at path, on which the one of the chain at over lies, to be
// written.
func (c *chain) openBase(over, path, format string, o raw.Options) (block.Node, error) {
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		return nil, missingBacking(over, path)
	}
	below := newChainWith(o)
	below.opened = slices.Clone(c.opened)
	if format == "qcow2" {
		n, err := below.openWhole(path)
		if err != nil {
			return nil, err
		}
		return n, nil
	}
	info, err := os.Stat(path)
	if err == nil {
		err = below.has(path, info)
	}
	if err != nil {
		return nil, err
	}
	n, err := raw.OpenWith(path, false, o)
	if err != nil {
		return nil, err
	}
	return n, nil
}

// commit writes to base what the images above it hold. top is the newest of them, and
// the last of them lies on none.
func commit(ctx context.Context, top *Node, images int, base block.Node, o *CommitOptions) error {
	if base.Size() < top.Size() {
		if err := base.(block.Resizer).Resize(top.Size()); err != nil {
			return err
		}
	}
	buf, pace := make([]byte, top.copied()), block.NewPace(o.Rate)
	for off, size := int64(0), top.Size(); off < size; {
		if err := ctx.Err(); err != nil {
			return err
		}
		e, err := top.Map(off, min(int64(len(buf)), size-off))
		switch {
		case err != nil:
		case !e.Present && e.Depth == images-1: // it is the base's
		case e.Zero || !e.Present:
			// What lies behind the end of an image reads as zero, whatever the base holds
			// there.
			err = base.WriteZeroes(off, e.Length, true)
		default:
			part := buf[:e.Length]
			if err = top.Readv([][]byte{part}, off); err == nil {
				err = base.Writev([][]byte{part}, off)
			}
			if err == nil {
				err = pace.Wait(ctx, e.Length)
			}
		}
		if err != nil {
			return fmt.Errorf("at %d: %w", off, err)
		}
		off += e.Length
		if o.Progress != nil {
			o.Progress(off, size)
		}
	}
	return base.Flush()
}

// empty has an image hold nothing itself. Interrupted, it holds some of what it did.
func (n *Node) empty() error {
	cluster := n.header.ClusterSize()
	if err := n.dropAll(0, (n.Size()+cluster-1)/cluster); err != nil {
		return err
	}
	if err := n.Flush(); err != nil {
		return err
	}
	n.w.flushing.Lock()
	defer n.w.flushing.Unlock()
	n.dropTables(0)
	return n.flush()
}

// copied is how many bytes are copied at once: whole clusters, and no more than the
// disk has.
func (n *Node) copied() int64 {
	size := n.header.ClusterSize()
	return min(max(maxRun, size), (n.Size()+size-1)/size*size)
}
