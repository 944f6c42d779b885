package qcow2

import "github.com/gnomon-vmm/gnomon/disk/block"

// Backing is the node of the backing file; nil: there is none.
func (n *Node) Backing() block.Node { return n.backing }

// SetBacking has the image read from b what it does not hold itself, and returns
// the node that it read from so far, which is the caller's then. There are no
// requests meanwhile, and b holds the same bytes; the image's header stays as it is.
func (n *Node) SetBacking(b block.Node) (old block.Node) {
	old, n.backing = n.backing, b
	return old
}
