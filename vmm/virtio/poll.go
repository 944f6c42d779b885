package virtio

import "time"

// A thread that sleeps takes tens of microseconds to wake, far longer than most
// requests take. So after work a worker looks for more for a while, with kicks
// suppressed, before it sleeps; and, while requests are under way that it has begun, for
// their ends. For how long follows from how it went before, much as in QEMU's I/O
// threads: the window doubles while the sleeps turn out short enough that a longer window
// would have spared them, and halves, down to nothing, while they are long. A worker that
// does not look any more tries it again now and then.
const (
	pollFirst = 8 * time.Microsecond
	// pollRetry is after how many sleeps a closed window is tried again.
	pollRetry = 16
	// pollLooks is how often the ring is looked at between looks at the clock.
	pollLooks = 32
)

// poller is the polling of one worker for one kind of thing, used only by it.
type poller struct {
	most time.Duration // the longest window
	// worth is the longest time without work that makes the window longer: it includes
	// the time that waking took.
	worth time.Duration

	window time.Duration
	idle   time.Time // when the worker began to look before it slept; zero: it did not
	closed int       // sleeps since the window was closed
}

var (
	pollChains = poller{most: 64 * time.Microsecond, worth: 128 * time.Microsecond}
	// A device takes its time for every request: where it is more than the longest
	// window nothing is gained by any.
	pollEnds = poller{most: 256 * time.Microsecond, worth: 256 * time.Microsecond}
)

// spin looks for the end of what the worker has begun, for a chain, if that is news, or
// for another reason to call Handle, until the window has passed.
func (p *poller) spin(w *worker, news bool) bool {
	q := w.queue
	p.idle = time.Now()
	if p.window == 0 {
		return false
	}
	for {
		for range pollLooks {
			if q.ended() || news && q.hasAvail() {
				p.idle = time.Time{}
				return true
			}
		}
		if w.state.Load() == workerAgain || w.gate.hold.Load() {
			p.idle = time.Time{}
			return true
		}
		if time.Since(p.idle) > p.window {
			return false
		}
		if q.begun > 0 {
			// Threads of the kernel may need the processor to end what is waited for.
			yield()
		}
	}
}

// woken adapts the window to how long the worker had nothing to do.
func (p *poller) woken() {
	if p.idle.IsZero() {
		return
	}
	p.adapt(time.Since(p.idle))
	p.idle = time.Time{}
}

func (p *poller) adapt(idle time.Duration) {
	switch {
	case idle <= p.window:
		// It came just as the window closed.
	case idle <= p.worth:
		p.window = min(max(2*p.window, pollFirst), p.most)
	case p.window > 0:
		if p.window /= 2; p.window < pollFirst {
			p.window, p.closed = 0, 0
		}
	default:
		if p.closed++; p.closed == pollRetry {
			p.window, p.closed = pollFirst, 0
		}
	}
}
