package block

import "errors"

// Request is a read or a write that ends later than the call that began it. It is used
// again and again, and so costs no memory.
type Request struct {
	Write bool
	Bufs  [][]byte
	Off   int64 // bytes; each node puts in place where the next finds it
	// Ring is what takes the request to the kernel.
	Ring Ring

	layers [8]layer
	count  int
}

// Starter is a Node that can begin requests without waiting for them to end.
type Starter interface {
	Node
	// Start begins a request and returns true: End of the request is called later, not
	// within this call. Or it returns false, and all is as before: Readv or Writev has
	// to do it, since something must be waited for or is wrong. as is the node that was
	// asked: where it is another, which has this one embedded and does more than it, all is
	// left to its Readv and Writev.
	Start(r *Request, as Node) bool
}

// Start has n begin a request, if it is a Starter; others begin nothing.
func Start(n Node, r *Request) bool {
	s, ok := n.(Starter)
	return ok && s.Start(r, n)
}

// Ring takes requests to the kernel.
type Ring interface {
	// Start has the kernel read or write the file fd. It tells whether there was room.
	Start(r *Request, fd int) bool
}

// Ender hears of a request's end.
type Ender interface {
	// Ended is called once for each Enter, with its tag.
	Ended(r *Request, tag int64, err error)
}

type layer struct {
	ender Ender
	tag   int64
}

// ErrAgain ends a request that has to be done by Readv or Writev.
var ErrAgain = errors.New("request must be made again")

// Enter has e hear of the request's end; who entered last hears first. It tells whether
// there was room.
func (r *Request) Enter(e Ender, tag int64) bool {
	if r.count == len(r.layers) {
		return false
	}
	r.layers[r.count] = layer{e, tag}
	r.count++
	return true
}

// Leave undoes the last Enter.
func (r *Request) Leave() { r.count-- }

// End tells all who entered of the request's end. The last that hears of it may use it
// for something else.
func (r *Request) End(err error) {
	for i := r.count - 1; i >= 0; i-- {
		l := r.layers[i]
		r.count = i
		l.ender.Ended(r, l.tag, err)
	}
}

// Start implements Starter.
func (r *Root) Start(q *Request, as Node) bool {
	// Who wants the nodes to stand still waits for requests that may still be on their
	// way to the kernel: no waiting for him here.
	if as != Node(r) || r.throttle.Load() != nil || !r.requests.TryRLock() {
		return false
	}
	if q.Enter(r, 0) {
		if q.Write && (r.always != nil || r.recorders.Load() != nil) {
			r.record(q.Off, length(q.Bufs))
		}
		if Start(r.Current(), q) {
			return true
		}
		q.Leave()
	}
	r.requests.RUnlock()
	return false
}

// Ended implements Ender.
func (r *Root) Ended(*Request, int64, error) { r.requests.RUnlock() }
