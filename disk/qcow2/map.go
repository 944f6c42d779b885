package qcow2

import (
	"fmt"

	"github.com/gnomon-vmm/gnomon/disk/block"
)

var _ block.Mapper = (*Node)(nil)

// Map implements block.Mapper.
func (n *Node) Map(off, length int64) (block.Extent, error) {
	if size := n.Size(); off < 0 || length < 0 || off > size || length > size-off {
		return block.Extent{}, fmt.Errorf("%w: %d bytes at %d of %d", block.ErrOutOfRange, length, off, size)
	}
	e, epoch, err := n.lookup(off, length)
	if err != nil {
		return block.Extent{}, fmt.Errorf("disk %s: %w", n.path, err)
	}
	defer n.leave(epoch)
	out := block.Extent{Start: off, Length: e.length, Present: true, Offset: -1}
	switch e.kind {
	case data:
		out.Data, out.File, out.Offset = true, n.dataFile().Info().Filename, e.host
		return n.mapFile(out)
	case compressed:
		out.Data, out.Compressed = true, true
	case zero:
		out.Zero = true
		if e.host != 0 {
			out.File, out.Offset = n.dataFile().Info().Filename, e.host
		}
	case unallocated:
		return n.mapBacking(out, e.host)
	}
	return out, nil
}

// mapFile tells of data that the host's file holds nothing for that it reads as
// zero: clusters that were allocated before they are written. As QEMU, it does so
// where there are many of them.
func (n *Node) mapFile(e block.Extent) (block.Extent, error) {
	m, ok := n.dataFile().(block.Mapper)
	if !ok {
		return e, nil
	}
	n.holes.Do(func() {
		size := n.header.ClusterSize()
		clusters, kept := n.dataFile().Size()/size, n.dataFile().Info().ActualSize/size
		n.hasHoles = clusters >= max(kept*10/9, kept+2)
	})
	if !n.hasHoles {
		return e, nil
	}
	f, err := m.Map(e.Offset, e.Length)
	if err != nil {
		return block.Extent{}, fmt.Errorf("disk %s: %w", n.path, err)
	}
	e.Length, e.Zero = f.Length, f.Zero
	return e, nil
}

// mapBacking is Map for what the image does not hold, and keeps a place for at host.
func (n *Node) mapBacking(e block.Extent, host int64) (block.Extent, error) {
	left := int64(0)
	if n.backing != nil {
		left = n.backing.Size() - e.Start
	}
	if left <= 0 { // nor does another
		e.Present, e.Zero = false, true
		if host != 0 {
			e.File, e.Offset = n.dataFile().Info().Filename, host
		}
		return e, nil
	}
	m, ok := n.backing.(block.Mapper)
	if !ok {
		e.Length = min(e.Length, left)
		e.Data, e.Depth = true, 1
		return e, nil
	}
	b, err := m.Map(e.Start, min(e.Length, left))
	b.Depth++
	return b, err
}
