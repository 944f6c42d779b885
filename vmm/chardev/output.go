package chardev

import (
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// patience is how long a write waits for a reader that has stopped. A
	// vCPU waits with it.
	patience = 200 * time.Millisecond
	// outputPiece is written at once: a pipe that poll calls writable takes it.
	outputPiece = 4096
	// terminalPiece likewise; a terminal promises less.
	terminalPiece = 64
)

// output writes to a descriptor whose other end may stop reading. The
// descriptor may block: it is written only when poll says it will not.
type output struct {
	mu      sync.Mutex
	fd      int  // guarded by mu; -1: nobody is there
	piece   int  // guarded by mu: bytes a writable fd is sure to take
	stalled bool // guarded by mu: the last write found no room
	polled  [1]unix.PollFd
}

// use makes o write to fd from now on; -1: to nobody.
func (o *output) use(fd, piece int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.fd, o.piece, o.stalled = fd, piece, false
}

// Write writes p, or as much as can be within patience; ErrStalled then.
func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for done := 0; ; {
		if done == len(p) || o.fd < 0 {
			return len(p), nil
		}
		if !o.writable() {
			return done, ErrStalled
		}
		n, err := unix.Write(o.fd, p[done:min(done+o.piece, len(p))])
		switch err {
		case nil:
			done += n
		case unix.EINTR, unix.EAGAIN:
		default:
			return done, err
		}
	}
}

// writable waits until fd takes bytes: for patience, or, if it kept the last
// write waiting in vain, not at all.
func (o *output) writable() bool {
	if o.poll(0) {
		o.stalled = false
		return true
	}
	if o.stalled {
		return false
	}
	o.stalled = !o.poll(patience)
	return !o.stalled
}

// poll waits for fd to take bytes. An error condition counts as well: the
// write then tells it.
func (o *output) poll(wait time.Duration) bool {
	o.polled[0] = unix.PollFd{Fd: int32(o.fd), Events: unix.POLLOUT}
	var deadline time.Time
	if wait > 0 {
		deadline = time.Now().Add(wait)
	}
	for {
		n, err := unix.Poll(o.polled[:], int(wait/time.Millisecond))
		if err != unix.EINTR {
			return err == nil && n > 0
		}
		wait = max(time.Until(deadline), 0)
	}
}
