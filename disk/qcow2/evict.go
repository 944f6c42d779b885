package qcow2

import "github.com/gnomon-vmm/gnomon/disk/block"

var _ block.Evictor = (*Node)(nil)

// Evict implements block.Evictor, for what the image itself holds.
func (n *Node) Evict(off, length int64) {
	var at, got int64 // of the file, what is to be evicted next
	for length > 0 {
		e, err := n.Map(off, length)
		if err != nil || e.Length <= 0 {
			break
		}
		if e.Depth == 0 && e.Data && e.Offset >= 0 {
			if e.Offset != at+got {
				block.Evict(n.dataFile(), at, got)
				at, got = e.Offset, 0
			}
			got += e.Length
		}
		off, length = off+e.Length, length-e.Length
	}
	block.Evict(n.dataFile(), at, got)
}
