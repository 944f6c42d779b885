package virtio

import "time"

// A thread that sleeps takes tens of microseconds to wake, far longer than most
// requests take. So after work a worker looks for more for a while, with kicks
// suppressed, before it sleeps; for how long follows from how it went
// before, as in QEMU's I/O threads: the window doubles while sleeps turn out
// shorter than the longest window, and closes when they are long.
const (
	pollFirst = 8 * time.Microsecond
	pollMost  = 64 * time.Microsecond
	// pollLooks is how often the ring is looked at between looks at the clock.
	pollLooks = 32
)

// poller is the polling of one worker, used only by it.
type poller struct {
	window time.Duration
	idle   time.Time // when the worker ran out of work
	slept  bool      // it went to sleep without being woken for pausing
}

// spin looks for a chain, or another reason to call Handle, until the window has passed.
func (p *poller) spin(w *worker) bool {
	p.idle = time.Now()
	if p.window == 0 {
		return false
	}
	for {
		for range pollLooks {
			if w.queue.hasAvail() {
				return true
			}
		}
		if w.state.Load() == workerAgain || w.gate.hold.Load() {
			return true
		}
		if time.Since(p.idle) > p.window {
			return false
		}
	}
}

// blocked says that the worker goes to sleep.
func (p *poller) blocked() { p.slept = !p.idle.IsZero() }

// woken adapts the window to how long the worker found nothing to do.
func (p *poller) woken() {
	if !p.slept {
		return
	}
	switch idle := time.Since(p.idle); {
	case idle <= p.window:
		// It came just as the window closed.
	case idle > pollMost:
		p.window = 0
	default:
		p.window = min(max(2*p.window, pollFirst), pollMost)
	}
	p.idle = time.Time{}
}
