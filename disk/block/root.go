package block

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
)

// Freezer is a Node that can be made one to be read only, for good.
type Freezer interface {
	Node
	// Freeze lets go of what keeps others from reading the image. There are no
	// requests meanwhile, and no writes later; Flush still makes durable what was
	// written.
	Freeze() error
}

// Reopener is a Node whose image can be opened a second time, in another way, while
// the node itself goes on being read.
type Reopener interface {
	Node
	// Named returns an error unless the image's name leads to its file still.
	Named() error
	// Lend is Named, and lets go of the locks of the image's own file until back is
	// called, for another node of this process to take. Without back the node is to be
	// closed.
	Lend() (back func() error, err error)
}

// Root is the node a device uses: it passes everything on to another node, which
// can be replaced between two requests.
type Root struct {
	// requests is held to be read by each request, and to be written while there
	// must be none.
	requests sync.RWMutex
	current  atomic.Pointer[holder]
	waits    atomic.Bool // see Waits; changed when current is
	// claim names who changes the nodes; "": nobody.
	claim atomic.Pointer[string]
	// released gets a value at each Release, for who waits in ClaimWhenFree.
	released chan struct{}
	// recorders hear of what is written; nil: there are none.
	recorders atomic.Pointer[[]Recorder]
	// always hears of it too, and was there before the first request; or nil.
	always Recorder

	throttle   atomic.Pointer[throttle] // nil: requests have no limits
	letThrough sync.Mutex               // held while throttle or hurried are changed
	hurried    bool                     // guarded by letThrough
}

// Recorder hears of each part of a disk that is about to change. Each request waits
// for it.
type Recorder interface {
	Record(off, n int64)
}

// SetRecorders has requests from now on recorded by these. Between two requests:
// see Drained.
func (r *Root) SetRecorders(all []Recorder) {
	if len(all) == 0 {
		r.recorders.Store(nil)
		return
	}
	r.recorders.Store(&all)
}

// RecordAlways has all requests recorded by x, whoever sets recorders. There have been
// none yet.
func (r *Root) RecordAlways(x Recorder) { r.always = x }

func (r *Root) record(off, n int64) {
	if r.always != nil {
		r.always.Record(off, n)
	}
	if all := r.recorders.Load(); all != nil {
		for _, x := range *all {
			x.Record(off, n)
		}
	}
}

type holder struct{ Node }

var _ Mapper = (*Root)(nil)

// NewRoot makes a root that passes requests on to n.
func NewRoot(n Node) *Root {
	r := &Root{released: make(chan struct{}, 1)}
	r.use(n)
	return r
}

// use has requests be passed on to n. There are none meanwhile.
func (r *Root) use(n Node) {
	r.current.Store(&holder{n})
	r.waits.Store(Waits(n))
}

// Current is the node that requests are passed on to.
func (r *Root) Current() Node { return r.current.Load().Node }

// ErrBusy is a disk whose nodes somebody else is changing.
var ErrBusy = errors.New("disk is busy")

// Claim has nobody else change the root's nodes until Release: who does so and
// undoes it later must find what it left. by names the claimant to others.
func (r *Root) Claim(by string) error {
	if r.claim.CompareAndSwap(nil, &by) {
		return nil
	}
	other := "another operation"
	if p := r.claim.Load(); p != nil {
		other = *p
	}
	return fmt.Errorf("%w: it is in use by %s: wait until that has ended", ErrBusy, other)
}

// ClaimWhenFree is Claim that waits for others to release the root; it fails when ctx
// ends. One at a time may wait.
func (r *Root) ClaimWhenFree(ctx context.Context, by string) error {
	for {
		err := r.Claim(by)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return errors.Join(ctx.Err(), err)
		case <-r.released:
		}
	}
}

// Release ends a Claim.
func (r *Root) Release() {
	r.claim.Store(nil)
	select {
	case r.released <- struct{}{}:
	default:
	}
}

// Swap has later requests go to n, when those under way have ended.
func (r *Root) Swap(n Node) {
	r.Drained(func(Node) Node { return n })
}

// Drained calls f while there are no requests; those that come meanwhile wait.
// They go on with the node that f returns.
func (r *Root) Drained(f func(current Node) Node) {
	r.requests.Lock()
	defer r.requests.Unlock()
	r.use(f(r.Current()))
}

func length(bufs [][]byte) (n int64) {
	for _, b := range bufs {
		n += int64(len(b))
	}
	return n
}

// Readv implements Node.
func (r *Root) Readv(bufs [][]byte, off int64) error {
	if r.throttle.Load() != nil {
		r.hold(false, length(bufs))
	}
	r.requests.RLock()
	defer r.requests.RUnlock()
	return r.Current().Readv(bufs, off)
}

// Writev implements Node.
func (r *Root) Writev(bufs [][]byte, off int64) error {
	if r.throttle.Load() != nil {
		r.hold(true, length(bufs))
	}
	r.requests.RLock()
	defer r.requests.RUnlock()
	if r.always != nil || r.recorders.Load() != nil {
		r.record(off, length(bufs))
	}
	return r.Current().Writev(bufs, off)
}

// Flush implements Node.
func (r *Root) Flush() error {
	r.requests.RLock()
	defer r.requests.RUnlock()
	return r.Current().Flush()
}

// Discard implements Node.
func (r *Root) Discard(off, n int64) error {
	r.requests.RLock()
	defer r.requests.RUnlock()
	r.record(off, n)
	return r.Current().Discard(off, n)
}

// WriteZeroes implements Node.
func (r *Root) WriteZeroes(off, n int64, unmap bool) error {
	r.hold(true, n)
	r.requests.RLock()
	defer r.requests.RUnlock()
	r.record(off, n)
	return r.Current().WriteZeroes(off, n, unmap)
}

// Map implements Mapper; of a node that does not know how its bytes are kept, all
// are data.
func (r *Root) Map(off, n int64) (Extent, error) {
	r.requests.RLock()
	defer r.requests.RUnlock()
	if m, ok := r.Current().(Mapper); ok {
		return m.Map(off, n)
	}
	return Extent{Start: off, Length: n, Present: true, Data: true, Offset: -1}, nil
}

// Size implements Node.
func (r *Root) Size() int64 { return r.Current().Size() }

// ReadOnly implements Node.
func (r *Root) ReadOnly() bool { return r.Current().ReadOnly() }

// Info implements Node. Nobody changes the nodes meanwhile.
func (r *Root) Info() (info Info) {
	r.View(func(current Node) { info = current.Info() })
	return info
}

// View calls f while nobody changes the nodes; requests go on. f makes no use of
// the root itself.
func (r *Root) View(f func(current Node)) {
	r.requests.RLock()
	defer r.requests.RUnlock()
	f(r.Current())
}

// Close implements Node.
func (r *Root) Close() error { return r.Current().Close() }
