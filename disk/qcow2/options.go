package qcow2

import (
	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/raw"
)

var (
	_ raw.Opened  = (*Node)(nil)
	_ block.Ruled = (*Node)(nil)
)

// Options implements raw.Opened: of the image's own file. Its Rules are the file's.
func (n *Node) Options() raw.Options {
	o := raw.OptionsOf(n.file)
	o.WriteThrough = n.through
	return o
}

// SetOptions implements raw.Opened: of the image's own file.
func (n *Node) SetOptions(o raw.Options) error {
	f, ok := n.file.(raw.Opened)
	if !ok {
		return nil
	}
	through := o.WriteThrough
	o.WriteThrough = false
	if err := f.SetOptions(o); err != nil {
		return err
	}
	n.through = through
	return nil
}

// Rules implements block.Ruled.
func (n *Node) Rules() block.WriteRules { return n.rules }

// SetRules implements block.Ruled.
func (n *Node) SetRules(r block.WriteRules) { n.rules = r }
