package virtio

import (
	"time"

	"github.com/gnomon-vmm/gnomon/internal/busypoll"
)

// pollLooks is how often the ring is looked at between looks at the clock.
const pollLooks = 32

// After work a worker looks for more for a while, with kicks suppressed, before it sleeps;
// and, while requests are under way that it has begun, for their ends.
var (
	pollChains = busypoll.Window{Most: 64 * time.Microsecond, Worth: 128 * time.Microsecond}
	// A device takes its time for every request: where it is more than the longest
	// window nothing is gained by any.
	pollEnds = busypoll.Window{Most: 256 * time.Microsecond, Worth: 256 * time.Microsecond}
)

// look looks for the end of what the worker has begun, for a chain, if that is news, or
// for another reason to call Handle, until the window has passed.
func (w *worker) look(window *busypoll.Window, news bool) bool {
	q := w.queue
	if !window.Open() {
		return false
	}
	for {
		for range pollLooks {
			if q.ended() || news && q.hasAvail() {
				window.Found()
				return true
			}
		}
		if w.state.Load() == workerAgain || w.gate.hold.Load() {
			window.Found()
			return true
		}
		if window.Over() {
			return false
		}
		if q.begun > 0 {
			// Threads of the kernel may need the processor to end what is waited for.
			busypoll.Yield()
		}
	}
}
