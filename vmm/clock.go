package vmm

import (
	"sync"
	"time"
)

// clock is the machine's time: the host's monotonic clock without the pauses.
type clock struct {
	mu      sync.Mutex
	origin  time.Time     // guarded by mu: Now() was zero then, as far as pauses go
	stopped bool          // guarded by mu
	frozen  time.Duration // guarded by mu: Now() while stopped
}

func newClock() *clock { return &clock{origin: time.Now(), stopped: true} }

// Now is the machine's time since it was made.
func (c *clock) Now() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.stopped {
		return c.frozen
	}
	return time.Since(c.origin)
}

func (c *clock) stop() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.stopped {
		c.frozen, c.stopped = time.Since(c.origin), true
	}
}

func (c *clock) start() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.stopped {
		c.origin, c.stopped = time.Now().Add(-c.frozen), false
	}
}

func (c *clock) isStopped() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.stopped
}

// set makes Now() now while the clock is stopped.
func (c *clock) set(now time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.frozen = now
}
