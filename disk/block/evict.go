package block

// Evictor is a Node that the host's page cache may hold something of.
type Evictor interface {
	Node
	// Evict has the page cache give up what it holds of n bytes from off on, but for what
	// is yet to be written to the host's file. It is read from there when it is wanted again.
	Evict(off, n int64)
}

// Evict is that of the node, if it has it.
func Evict(n Node, off, length int64) {
	if e, ok := n.(Evictor); ok {
		e.Evict(off, length)
	}
}
