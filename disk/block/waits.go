package block

// Waiter is a Node that can tell whether its requests wait for a device, rather than
// for memory to be copied: then it pays to have several under way.
type Waiter interface {
	Node
	// Waits tells so. It is asked while nobody changes the node.
	Waits() bool
}

// Waits tells whether requests of n wait for a device; of one that does not know, they
// do not.
func Waits(n Node) bool {
	w, ok := n.(Waiter)
	return ok && w.Waits()
}

// Waits implements Waiter. It may be asked at any time.
func (r *Root) Waits() bool { return r.waits.Load() }
