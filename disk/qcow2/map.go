package qcow2

import (
	"fmt"

	"github.com/gnomon-vmm/gnomon/disk/block"
)

var _ block.Mapper = (*Node)(nil)

// Map implements block.Mapper.
func (n *Node) Map(off, length int64) (block.Extent, error) {
	if off < 0 || length < 0 || off > n.size || length > n.size-off {
		return block.Extent{}, fmt.Errorf("%w: %d bytes at %d of %d", block.ErrOutOfRange, length, off, n.size)
	}
	e, err := n.lookup(off, length)
	if err != nil {
		return block.Extent{}, fmt.Errorf("disk %s: %w", n.path, err)
	}
	out := block.Extent{Start: off, Length: e.length, Present: true, Offset: -1}
	switch e.kind {
	case data:
		out.Data, out.File, out.Offset = true, n.path, e.host
	case compressed:
		out.Data, out.Compressed = true, true
	case zero:
		out.Zero = true
	case unallocated:
		return n.mapBacking(out)
	}
	return out, nil
}

// mapBacking is Map for what the image does not hold.
func (n *Node) mapBacking(e block.Extent) (block.Extent, error) {
	if n.backing == nil {
		e.Present, e.Zero = false, true
		return e, nil
	}
	left := n.backing.Size() - e.Start
	if left <= 0 { // behind its end; QEMU too counts this as its zeroes
		e.Zero, e.Depth = true, 1
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
