package block

import "sync/atomic"

// Freezer is a Node that can be made one to be read only, for good.
type Freezer interface {
	Node
	// Freeze lets go of what keeps others from reading the image. There are no
	// requests meanwhile, and no writes later; Flush still makes durable what was
	// written.
	Freeze() error
}

// Root is the node a device uses: it passes everything on to another node, which
// can be replaced.
type Root struct {
	current atomic.Pointer[holder]
}

type holder struct{ Node }

var _ Node = (*Root)(nil)

// NewRoot makes a root that passes requests on to n.
func NewRoot(n Node) *Root {
	r := &Root{}
	r.Swap(n)
	return r
}

// Current is the node that requests are passed on to.
func (r *Root) Current() Node { return r.current.Load().Node }

// Swap has later requests go to n. There are none under way.
func (r *Root) Swap(n Node) { r.current.Store(&holder{n}) }

// Readv implements Node.
func (r *Root) Readv(bufs [][]byte, off int64) error { return r.Current().Readv(bufs, off) }

// Writev implements Node.
func (r *Root) Writev(bufs [][]byte, off int64) error { return r.Current().Writev(bufs, off) }

// Flush implements Node.
func (r *Root) Flush() error { return r.Current().Flush() }

// Discard implements Node.
func (r *Root) Discard(off, n int64) error { return r.Current().Discard(off, n) }

// WriteZeroes implements Node.
func (r *Root) WriteZeroes(off, n int64, unmap bool) error {
	return r.Current().WriteZeroes(off, n, unmap)
}

// Size implements Node.
func (r *Root) Size() int64 { return r.Current().Size() }

// ReadOnly implements Node.
func (r *Root) ReadOnly() bool { return r.Current().ReadOnly() }

// Info implements Node.
func (r *Root) Info() Info { return r.Current().Info() }

// Close implements Node.
func (r *Root) Close() error { return r.Current().Close() }
