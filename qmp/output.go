package qmp

import (
	"net"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// maxUnread is how much may wait for a client to read before an event finds it too slow.
	maxUnread = 1 << 20
	// drainBelow is how little must be waiting before the next command of a session is run.
	drainBelow = 64 << 10
	// closeDrain is how long the end of a session waits for the client to read what is left.
	closeDrain = 500 * time.Millisecond
)

// output is what a session sends. A line is written by whoever produces it, with one system call, as long as the socket
// takes it; what the socket does not take is left to a goroutine that exists only meanwhile. Nobody but the session's own
// commands ever waits for the client.
type output struct {
	conn net.Conn
	raw  syscall.RawConn // nil where conn has none: everything is then left to the goroutine

	mu       sync.Mutex
	wake     sync.Cond // signalled when draining ends or pending shrinks
	pending  []byte    // guarded by mu; what is to be sent after what drain is sending
	inFlight int       // guarded by mu; bytes that drain is sending
	draining bool      // guarded by mu; drain is running
	failed   bool      // guarded by mu; nothing can be sent any more

	// Used by writeNow and its callback only, with mu held; here so that writing allocates nothing.
	line     []byte
	written  int
	writeErr error
	writeFn  func(fd uintptr) bool
}

func newOutput(c net.Conn) *output {
	o := &output{conn: c}
	o.wake.L = &o.mu
	if sc, ok := c.(syscall.Conn); ok {
		if raw, err := sc.SyscallConn(); err == nil {
			o.raw = raw
		}
	}
	o.writeFn = func(fd uintptr) bool {
		for {
			o.written, o.writeErr = unix.Write(int(fd), o.line)
			if o.writeErr != unix.EINTR {
				return true
			}
		}
	}
	return o
}

// event sends a line without ever waiting, and hangs up on a client with too much unread.
func (o *output) event(line []byte) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.pending)+o.inFlight+len(line) > maxUnread {
		o.failLocked()
		return
	}
	o.sendLocked(line)
}

// response sends a line, then waits until the client has read nearly all there is, so that it cannot make us hold more
// than one response.
func (o *output) response(line []byte) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.sendLocked(line)
	for !o.failed && len(o.pending)+o.inFlight > drainBelow {
		o.wake.Wait()
	}
}

func (o *output) sendLocked(line []byte) {
	if o.failed {
		return
	}
	if !o.draining && o.raw != nil {
		n, err := o.writeNowLocked(line)
		if err != nil && err != unix.EAGAIN {
			o.failLocked()
			return
		}
		line = line[n:]
	}
	if len(line) == 0 {
		return
	}
	o.pending = append(o.pending, line...)
	if !o.draining {
		o.draining = true
		go o.drain()
	}
}

// writeNowLocked writes what the socket takes.
func (o *output) writeNowLocked(line []byte) (int, error) {
	o.line, o.written, o.writeErr = line, 0, nil
	err := o.raw.Write(o.writeFn)
	o.line = nil
	if err != nil {
		return 0, err
	}
	return max(o.written, 0), o.writeErr
}

// drain sends what is pending until nothing is. Only drain waits for the socket: writeNowLocked is not called meanwhile.
func (o *output) drain() {
	var buf []byte
	o.mu.Lock()
	defer o.mu.Unlock()
	for len(o.pending) > 0 && !o.failed {
		buf, o.pending = o.pending, buf[:0]
		o.inFlight = len(buf)
		o.mu.Unlock()
		_, err := o.conn.Write(buf)
		o.mu.Lock()
		o.inFlight = 0
		if err != nil {
			o.failLocked()
		}
		o.wake.Broadcast()
	}
	o.draining = false
	if cap(o.pending) > drainBelow {
		o.pending = nil
	}
	o.wake.Broadcast()
}

// failLocked gives up on the client. Closing the connection ends the session's reading, too.
func (o *output) failLocked() {
	if !o.failed {
		o.failed = true
		o.pending = nil
		o.conn.Close()
		o.wake.Broadcast()
	}
}

// close sends what is left, if the client reads it soon, and closes the connection.
func (o *output) close() {
	o.conn.SetWriteDeadline(time.Now().Add(closeDrain))
	o.mu.Lock()
	defer o.mu.Unlock()
	for o.draining && !o.failed {
		o.wake.Wait()
	}
	o.failLocked()
}
