package qcow2

import (
	"fmt"

	"github.com/gnomon-vmm/gnomon/disk/block"
)

// Backing is the node of the backing file; nil: there is none.
func (n *Node) Backing() block.Node { return n.backing }

// SetBacking has the image read from b what it does not hold itself, and returns
// the node that it read from so far, which is the caller's then. There are no
// requests meanwhile, and b holds the same bytes; the image's header stays as it is.
func (n *Node) SetBacking(b block.Node) (old block.Node) {
	old, n.backing = n.backing, b
	return old
}

// Named implements block.Reopener.
func (n *Node) Named() error {
	f, err := n.reopener()
	if err != nil {
		return err
	}
	return f.Named()
}

// Lend implements block.Reopener.
func (n *Node) Lend() (back func() error, err error) {
	f, err := n.reopener()
	if err != nil {
		return nil, err
	}
	return f.Lend()
}

// reopener is the image's file.
func (n *Node) reopener() (block.Reopener, error) {
	f, ok := n.file.(block.Reopener)
	if !ok {
		return nil, fmt.Errorf("disk %s: it cannot be opened anew while it is in use", n.path)
	}
	return f, nil
}

// RenameBacking has the header name another image to lie on, by its path and format,
// or none, with "": what SetBacking is for requests, it is for who opens the image
// later. There are no requests meanwhile.
func (n *Node) RenameBacking(name, format string) error {
	if n.w == nil {
		return fmt.Errorf("disk %s: %w", n.path, block.ErrReadOnly)
	}
	if err := n.rename(name, format); err != nil {
		return fmt.Errorf("disk %s: name of its backing file: %w", n.path, err)
	}
	return nil
}
