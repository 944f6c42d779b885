package qcow2

import "github.com/gnomon-vmm/gnomon/disk/block"

var _ block.Starter = (*Node)(nil)

// Start implements block.Starter, for what lies side by side in clusters of the image
// itself and, if it is to be written, needs no change of tables.
func (n *Node) Start(r *block.Request, as block.Node) bool {
	length, size, off := total(r.Bufs), n.size.Load(), r.Off
	if as != block.Node(n) || n.w == nil || length == 0 || off < 0 || off > size || length > size-off {
		return false
	}
	if r.Write && (n.through || n.rules.Detects(r.Bufs) || !n.startsWrite(off, length)) {
		return false
	}
	host, epoch, ok := n.place(off, length, r.Write)
	if !ok {
		return false
	}
	if r.Enter(n, int64(epoch)) {
		r.Off = host
		if block.Start(n.dataFile(), r) {
			return true
		}
		r.Off = off
		r.Leave()
	}
	n.leave(epoch)
	return false
}

// startsWrite tells whether bitmaps can be told of a write without changing the image,
// and does so.
func (n *Node) startsWrite(off, length int64) bool {
	if n.bitmaps.recording.Load() == nil {
		return true
	}
	return n.bitmaps.marked.Load() && n.record(off, length) == nil
}

// place is where in the file data is, if all of it is known to lie side by side there.
// It is in use until leave.
func (n *Node) place(off, length int64, write bool) (host int64, epoch int, ok bool) {
	w := n.w
	w.mu.Lock()
	defer w.mu.Unlock()
	e, err := n.lookupLocked(off, length)
	if err != nil || e.kind != data || e.length < length {
		return 0, 0, false
	}
	if write {
		if w.broken != nil || !e.own || n.overlaps(e.host, length) != nil {
			return 0, 0, false
		}
		if bits := n.header.ClusterBits; len(w.busy) > 0 {
			for c := off >> bits; c <= (off+length-1)>>bits; c++ {
				if w.busy[c] {
					return 0, 0, false
				}
			}
		}
	}
	return e.host, w.enter(), true
}

// Ended implements block.Ender.
func (n *Node) Ended(_ *block.Request, epoch int64, _ error) { n.leave(int(epoch)) }
