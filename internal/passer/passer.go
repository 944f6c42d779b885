// Package passer keeps goroutines that make system calls for long in step with Go's scheduler.
package passer

import (
	"runtime"
	"time"
)

// Passer passes the scheduler now and then. From a goroutine that has made nothing but
// system calls for 10 ms the runtime's monitor takes its processor at each of them, and has
// to be woken for that. To pass each time would cost too much, since another thread is
// woken that might have something to run.
type Passer struct{ last time.Time }

// every is half of what the monitor lets be.
const every = 5 * time.Millisecond

// Pass passes the scheduler if that is due.
func (p *Passer) Pass() {
	if now := time.Now(); now.Sub(p.last) > every {
		p.last = now
		runtime.Gosched()
	}
}
