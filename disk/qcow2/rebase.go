package qcow2

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/raw"
)

// RebaseOptions say on what an image shall lie.
type RebaseOptions struct {
	// Backing is the path of the image that it shall lie on, as it shall name it:
	// relative to its directory, or absolute. "": none; the image holds all then.
	Backing       string
	BackingFormat string // "raw" or "qcow2"
	// NameOnly changes no more than the name: the new backing file holds the same
	// bytes as the old. Neither is opened.
	NameOnly bool
	// Files are how the images' files are read and written.
	Files raw.Options
	// Progress, where not nil, is told how many bytes of the disk are done.
	Progress func(done, total int64)
}

// Rebase has the image at path lie on another image, or on none. It reads as
// before: where the new backing file reads otherwise than the old, the image comes
// to hold the old one's bytes. Interrupted, it lies on the old one still.
func Rebase(ctx context.Context, path string, o RebaseOptions) (err error) {
	if o.Backing != "" && o.BackingFormat != "raw" && o.BackingFormat != "qcow2" {
		return fmt.Errorf("rebase disk %s: %w: format %q of the backing file: raw and qcow2 are possible", path, ErrBacking, o.BackingFormat)
	}
	if err := RoomBelow(path, o.Backing, o.BackingFormat); err != nil {
		return fmt.Errorf("rebase disk %s: %w", path, err)
	}
	var backing block.Node
	if !o.NameOnly && o.Backing != "" {
		// What the image shall lie on does not lie on the image.
		other := newChainWith(o.Files)
		info, err := os.Stat(path)
		if err == nil {
			other.opened = append(other.opened, info)
			backing, err = other.openBacking(path, &Header{BackingFile: o.Backing, BackingFormat: o.BackingFormat})
		}
		if err != nil {
			return fmt.Errorf("rebase disk %s: %w", path, err)
		}
		defer backing.Close() // it is only read
	}
	c := newChainWith(o.Files)
	n, err := c.openWritable(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, n.Close()) }()
	if !o.NameOnly {
		if n.backing, err = c.openBacking(path, n.header); err != nil {
			return fmt.Errorf("rebase disk %s: %w", path, err)
		}
		if err := n.moveTo(ctx, backing, o.Progress); err != nil {
			return fmt.Errorf("rebase disk %s: %w", path, err)
		}
	}
	if err := n.rename(o.Backing, o.BackingFormat); err != nil {
		return fmt.Errorf("rebase disk %s: %w", path, err)
	}
	return nil
}

// moveTo has the image lie on backing, or on none, and hold what that does not read
// as the old backing file does. Its header stays as it is.
func (n *Node) moveTo(ctx context.Context, backing block.Node, progress func(done, total int64)) error {
	old := n.SetBacking(backing)
	defer n.SetBacking(nil)
	if old != nil {
		defer old.Close()
	}
	was, now := make([]byte, n.copied()), make([]byte, n.copied())
	for off, end := int64(0), n.Size(); off < end; {
		if err := ctx.Err(); err != nil {
			return err
		}
		e, epoch, err := n.lookup(off, min(int64(len(was)), end-off))
		if err != nil {
			return err
		}
		n.leave(epoch)
		if e.kind == unallocated {
			if err := readBacking(old, was[:e.length], off); err != nil {
				return err
			}
			if err := readBacking(backing, now[:e.length], off); err != nil {
				return err
			}
			if err := n.keep(was[:e.length], now[:e.length], off); err != nil {
				return err
			}
		}
		if off += e.length; progress != nil {
			progress(off, end)
		}
	}
	return n.Flush()
}

// readBacking reads from off of a backing file, or of none.
func readBacking(backing block.Node, p []byte, off int64) error {
	if backing == nil {
		clear(p)
		return nil
	}
	return readFrom(backing, &cursor{bufs: [][]byte{p}}, off, int64(len(p)))
}

// keep writes those clusters of was, which begins at off, that differ from now.
func (n *Node) keep(was, now []byte, off int64) error {
	size := int(n.header.ClusterSize())
	for at := 0; at < len(was); at += size {
		end := min(at+size, len(was))
		if part := was[at:end]; !bytes.Equal(part, now[at:end]) {
			var err error
			if block.IsZero(part) {
				err = n.WriteZeroes(off+int64(at), int64(len(part)), true)
			} else {
				err = n.Writev([][]byte{part}, off+int64(at))
			}
			if err != nil {
				return err
			}
		}
	}
	return nil
}
