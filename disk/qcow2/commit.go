package qcow2

import (
	"context"
	"errors"
	"fmt"

	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/raw"
)

// Commit writes what the image at path holds itself to its backing file. The
// image stays as it is; it can then be removed, or go on being used. progress,
// where not nil, is told how many bytes of the disk are done.
func Commit(ctx context.Context, path string, progress func(done, total int64)) (err error) {
	c := newChain()
	file, err := c.open(path, true)
	if err != nil {
		return err
	}
	n := c.node(file, path)
	defer func() { err = errors.Join(err, file.Close()) }()
	if err := n.init(); err != nil {
		return fmt.Errorf("disk %s: %w", path, err)
	}
	if n.header.Incompatible&FeatureDataFile != 0 {
		if n.external, err = c.openDataFile(path, n.header); err != nil {
			return err
		}
		defer n.external.Close()
	}
	if n.header.BackingFile == "" {
		return fmt.Errorf("disk %s: %w: it lies on none", path, ErrBacking)
	}
	name, err := backingPath(path, n.header.BackingFile)
	if err != nil {
		return err
	}
	var base block.Node
	if n.header.BackingFormat == "qcow2" {
		base, err = Open(name, false)
	} else {
		base, err = raw.Open(name, false)
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, base.Close()) }()
	if base.Size() < n.Size() {
		if err := base.(block.Resizer).Resize(n.Size()); err != nil {
			return fmt.Errorf("commit disk %s: %w", path, err)
		}
	}
	buf := make([]byte, n.copied())
	for off, size := int64(0), n.Size(); off < size; {
		if err := ctx.Err(); err != nil {
			return err
		}
		e, _, err := n.lookup(off, min(int64(len(buf)), size-off))
		switch {
		case err != nil:
		case e.kind == zero:
			err = base.WriteZeroes(off, e.length, true)
		case e.kind != unallocated:
			if err = n.readExtent(&cursor{bufs: [][]byte{buf[:e.length]}}, e, off); err == nil {
				err = base.Writev([][]byte{buf[:e.length]}, off)
			}
		}
		if err != nil {
			return fmt.Errorf("commit disk %s: at %d: %w", path, off, err)
		}
		off += e.length
		if progress != nil {
			progress(off, size)
		}
	}
	return base.Flush()
}

// copied is how many bytes are copied at once: whole clusters, and no more than the
// disk has.
func (n *Node) copied() int64 {
	size := n.header.ClusterSize()
	return min(max(maxRun, size), (n.Size()+size-1)/size*size)
}
