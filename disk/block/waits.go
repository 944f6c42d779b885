package block

// Waiter is a Node that can tell whether its requests wait for a device, rather than
// for memory to be copied: then it pays to have several under way.
type Waiter interface {
	Node
	Waits() bool
}

// Waits tells whether requests of n wait for a device; of one that does not know, they
// do not.
func Waits(n Node) bool {
	w, ok := n.(Waiter)
	return ok && w.Waits()
}

// Waits implements Waiter.
func (r *Root) Waits() bool { return Waits(r.Current()) }
