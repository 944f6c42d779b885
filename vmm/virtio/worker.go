package virtio

import (
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/internal/busypoll"
)

// eventFD is an eventfd that KVM or Wake signals and one worker waits for.
type eventFD struct {
	// mu keeps close from other users of fd; fd is -1 afterwards.
	mu sync.RWMutex
	fd int
}

func newEventFD() (*eventFD, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("create eventfd: %w", err)
	}
	return &eventFD{fd: fd}, nil
}

// signal wakes the waiter, now or when it waits next.
func (e *eventFD) signal() {
	e.mu.RLock()
	defer e.mu.RUnlock()
	if e.fd < 0 {
		return
	}
	var one [8]byte
	binary.NativeEndian.PutUint64(one[:], 1)
	_, _ = unix.Write(e.fd, one[:])
}

// wait returns once the eventfd has been signalled. Only the waiter's own
// session closes the eventfd, after the waiter ended.
//
// It blocks in the system call and not in Go's poller: a kick then makes the
// worker's own thread runnable, without another thread in between.
func (e *eventFD) wait() {
	var count [8]byte
	for {
		if _, err := unix.Read(e.fd, count[:]); !errors.Is(err, unix.EINTR) {
			return
		}
	}
}

func (e *eventFD) close() {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.fd >= 0 {
		_ = unix.Close(e.fd)
		e.fd = -1
	}
}

// gate lets a transport's workers into Handle, and holds them in front of it
// while the transport is paused.
type gate struct {
	// hold asks workers inside to come out: pausing or stopping.
	hold atomic.Bool

	mu       sync.Mutex
	changed  sync.Cond // of anything below
	paused   bool      // guarded by mu
	stopping bool      // guarded by mu
	inside   int       // workers in Handle, and who has joined them; guarded by mu
}

func newGate() *gate {
	g := &gate{}
	g.changed.L = &g.mu
	return g
}

// enter waits while paused, and returns false when the worker shall end; but not if it
// has joined for what it has begun.
func (g *gate) enter(begun bool) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	for g.paused && !g.stopping && !begun {
		g.changed.Wait()
	}
	if g.stopping && !begun {
		return false
	}
	g.inside++
	return true
}

// join has one more be inside, who is not a worker. Preconditions: a worker is inside.
func (g *gate) join() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.inside++
}

func (g *gate) leave() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.inside--; g.inside == 0 {
		g.changed.Broadcast()
	}
}

// set changes paused and stopping and, where one of them is set, waits until
// no worker is inside.
func (g *gate) set(change func()) {
	g.mu.Lock()
	defer g.mu.Unlock()
	change()
	g.hold.Store(g.paused || g.stopping)
	g.changed.Broadcast()
	for g.inside > 0 && (g.paused || g.stopping) {
		g.changed.Wait()
	}
}

func (g *gate) pause() { g.set(func() { g.paused = true }) }
func (g *gate) stop()  { g.set(func() { g.stopping = true }) }
func (g *gate) open()  { g.set(func() { g.stopping = false }) }

// States of a worker, for Wake.
const (
	workerRunning = iota // will call Handle, or is in it
	workerAgain          // in Handle, woken: will call it again
	workerIdle           // waits for the eventfd
	workerKicked         // waits for the eventfd, which Wake has signalled
)

// worker is the goroutine of one queue.
type worker struct {
	queue *Queue
	dev   Device
	gate  *gate
	event *eventFD
	fail  func(error)
	// broken tells that Handle must not be called any more.
	broken *atomic.Bool
	state  atomic.Uint32
	// chains polls for chains, ends for the end of what has been begun, and for chains.
	chains, ends busypoll.Window
	done         chan struct{} // closed when the goroutine has ended
}

// wake has the worker call Handle after this.
func (w *worker) wake() {
	for {
		switch w.state.Load() {
		case workerAgain, workerKicked:
			return
		case workerRunning:
			if w.state.CompareAndSwap(workerRunning, workerAgain) {
				return
			}
		case workerIdle:
			if w.state.CompareAndSwap(workerIdle, workerKicked) {
				w.event.signal()
				return
			}
		}
	}
}

// run serves the queue until the gate says to end. It begins with a call of
// Handle: there may be chains from before the start.
func (w *worker) run() {
	defer close(w.done)
	q := w.queue
	for w.gate.enter(q.begun > 0) {
		again := w.serve()
		w.gate.leave()
		if again {
			continue
		}
		if w.state.CompareAndSwap(workerRunning, workerIdle) {
			runtime.Gosched() // as a passer.Passer does
			w.event.wait()
			w.chains.Woken()
			w.ends.Woken()
		}
		w.state.Store(workerRunning)
	}
}

// serve calls Handle until there is nothing to do. It returns true when the
// gate wants the worker out before that is certain, and nothing is under way that Handle
// has begun. Of a device that is broken Handle only ends that.
func (w *worker) serve() bool {
	q := w.queue
	for {
		if w.broken.Load() {
			if q.begun == 0 {
				return false
			}
			q.broken = true
		}
		w.state.Store(workerRunning)
		q.suppressKicks()
		q.emptied = false
		err := w.dev.Handle(q)
		q.Flush()
		if err != nil {
			w.fail(err)
			q.broken = true
		}
		hold := w.gate.hold.Load()
		if hold && q.begun == 0 {
			return true
		}
		// It may have left chains for later, as a device does that has nothing to fill
		// them with: more of them are no news.
		news := !hold && !q.broken && (q.emptied || !q.hasAvail())
		switch {
		case w.state.Load() == workerAgain && !q.broken:
		case w.spin(news):
		case news && q.wantKicks():
		case q.wantEnds():
		default:
			return false
		}
	}
}

// spin looks for a while for chains, if they are news, and for the end of what has been
// begun, and returns true when it has found something. Others that go on with chains need
// the processor.
func (w *worker) spin(news bool) bool {
	switch {
	case w.queue.aside || w.gate.hold.Load():
		return false
	case w.queue.begun > 0:
		return w.look(&w.ends, news)
	}
	return news && w.look(&w.chains, true)
}
