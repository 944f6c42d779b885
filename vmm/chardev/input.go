package chardev

import (
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"
)

const (
	// inputLimit is how much input waits for the guest before nothing more is
	// read.
	inputLimit = 64 << 10
	// inputHardLimit is how much waits at most, with what clients left behind
	// when they went.
	inputHardLimit = 1 << 20
)

// input takes what a reader got and gives it to the frontend, at the
// frontend's pace.
type input struct {
	mu       sync.Mutex
	changed  *sync.Cond
	frontend Frontend // guarded by mu
	buf      []byte   // guarded by mu
	open     bool     // guarded by mu: a frontend is connected
	closed   bool     // guarded by mu
	signal   *signal  // of the reader: there is room again, or it shall stop
}

func newInput() (*input, error) {
	s, err := newSignal()
	if err != nil {
		return nil, err
	}
	in := &input{signal: s}
	in.changed = sync.NewCond(&in.mu)
	return in, nil
}

// connect starts the delivery to f.
func (in *input) connect(f Frontend) {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.open || in.closed {
		return
	}
	in.frontend, in.open = f, true
	go in.deliver()
}

func (in *input) connected() bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.open
}

// deliver runs until close, on a goroutine of its own: the frontend may wait.
func (in *input) deliver() {
	piece := make([]byte, 0, 4096)
	for {
		in.mu.Lock()
		for len(in.buf) == 0 && !in.closed {
			in.changed.Wait()
		}
		if in.closed {
			in.mu.Unlock()
			return
		}
		wasFull := len(in.buf) >= inputLimit
		piece = append(piece[:0], in.buf[:min(len(in.buf), cap(piece))]...)
		in.buf = in.buf[:copy(in.buf, in.buf[len(piece):])]
		if wasFull && len(in.buf) < inputLimit {
			in.signal.raise()
		}
		in.mu.Unlock()
		in.frontend.Input(piece)
	}
}

// room is how much more input may be read now; none after close.
func (in *input) room() int {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.closed {
		return 0
	}
	return max(inputLimit-len(in.buf), 0)
}

// push adds p, as far as limit allows; the rest is lost.
func (in *input) push(p []byte, limit int) {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.closed {
		return
	}
	in.buf = append(in.buf, p[:min(len(p), max(limit-len(in.buf), 0))]...)
	in.changed.Signal()
}

// sendBreak gives the frontend a break.
func (in *input) sendBreak() {
	in.mu.Lock()
	f := in.frontend.Break
	in.mu.Unlock()
	if f != nil {
		f()
	}
}

func (in *input) isClosed() bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.closed
}

// close ends the delivery and wakes the reader.
func (in *input) close() {
	in.mu.Lock()
	defer in.mu.Unlock()
	if !in.closed {
		in.closed = true
		in.changed.Broadcast()
		in.signal.raise()
	}
}

// signal wakes a goroutine that waits in poll.
type signal struct{ fd int }

func newSignal() (*signal, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("create eventfd: %w", err)
	}
	return &signal{fd}, nil
}

func (s *signal) raise() { unix.Write(s.fd, []byte{1, 0, 0, 0, 0, 0, 0, 0}) }

// wait waits for events on fd (-1: none), or for the signal; 0 means the
// latter.
func (s *signal) wait(fd int, events int16) (happened int16) {
	fds := []unix.PollFd{{Fd: int32(fd), Events: events}, {Fd: int32(s.fd), Events: unix.POLLIN}}
	for {
		if _, err := unix.Poll(fds, -1); err == nil {
			break
		} else if !errors.Is(err, unix.EINTR) {
			return unix.POLLERR
		}
	}
	if fds[1].Revents != 0 {
		var count [8]byte
		unix.Read(s.fd, count[:])
		return 0
	}
	return fds[0].Revents
}

func (s *signal) close() { unix.Close(s.fd) }
