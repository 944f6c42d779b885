package raw

import "github.com/gnomon-vmm/gnomon/disk/block"

var _ block.Starter = (*Node)(nil)

// Start implements block.Starter.
func (n *Node) Start(r *block.Request, as block.Node) bool {
	if as != block.Node(n) || n.io == nil || n.check(r.Off, total(r.Bufs)) != nil {
		return false
	}
	if r.Write && (n.readOnly || n.options.WriteThrough || n.options.Rules.Detects(r.Bufs)) {
		return false
	}
	return n.io.Start(r)
}
