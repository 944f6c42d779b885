// Package busypoll tells for how long a thread looks for work before it sleeps.
package busypoll

import (
	"time"

	"golang.org/x/sys/unix"
)

const (
	// First is how long it is looked when that is tried again.
	First = 8 * time.Microsecond
	// Retry is after how many sleeps without a look before it is tried again.
	Retry = 16
)

// Window is how long one thread looks for one kind of thing before it sleeps. A thread that
// sleeps takes tens of microseconds to wake, far longer than most requests take. For how
// long it looks follows from how it went before, much as in QEMU's I/O threads: the window
// doubles while the sleeps turn out short enough that a longer one would have spared them,
// and halves, down to nothing, while they are long. A thread that does not look any more
// tries it again now and then.
type Window struct {
	Most time.Duration // the longest window
	// Worth is the longest time without work that makes the window longer: it includes
	// the time that waking took.
	Worth time.Duration

	Length time.Duration // of the window, now
	idle   time.Time     // when there was nothing to do; zero: there is
	closed int           // sleeps since the window was closed
}

// Open begins to look, and tells whether it is of use.
func (w *Window) Open() bool {
	w.idle = time.Now()
	return w.Length > 0
}

// Over tells whether it was looked long enough.
func (w *Window) Over() bool { return time.Since(w.idle) > w.Length }

// Found ends the look: there is work.
func (w *Window) Found() { w.idle = time.Time{} }

// Idle tells whether nothing was found since Open.
func (w *Window) Idle() bool { return !w.idle.IsZero() }

// Woken adapts the window after a sleep, to how long there was nothing to do.
func (w *Window) Woken() {
	if w.Idle() {
		w.adapt(time.Since(w.idle))
		w.Found()
	}
}

func (w *Window) adapt(idle time.Duration) {
	switch {
	case idle <= w.Length:
		// It came just as the window closed.
	case idle <= w.Worth:
		w.Length = min(max(2*w.Length, First), w.Most)
	case w.Length > 0:
		if w.Length /= 2; w.Length < First {
			w.Length, w.closed = 0, 0
		}
	default:
		if w.closed++; w.closed == Retry {
			w.Length, w.closed = First, 0
		}
	}
}

// Yield lets another thread run that needs the processor.
func Yield() { _, _, _ = unix.RawSyscall(unix.SYS_SCHED_YIELD, 0, 0, 0) }
