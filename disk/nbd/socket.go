package nbd

import (
	"errors"
	"io"
	"net"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// socket is a connection whose reads and writes wait in the kernel, in the calling thread,
// instead of in Go's poller: so what arrives wakes the one thread that it is for. A
// request and its reply take less than waking two would.
type socket struct {
	fd int

	mu     sync.Mutex
	hungUp bool // guarded by mu
	closed bool // guarded by mu: fd is not ours any more

	vector vector // of the one that writes
}

// newSocket takes conn over, which is closed. It is nil where there is no socket that is
// conn and nothing more.
func newSocket(conn net.Conn) (*socket, error) {
	var source syscall.Conn
	switch c := conn.(type) {
	case *net.UnixConn:
		source = c
	case *net.TCPConn:
		source = c
	default:
		return nil, nil
	}
	raw, err := source.SyscallConn()
	if err != nil {
		return nil, err
	}
	fd := -1
	if controlErr := raw.Control(func(original uintptr) {
		fd, err = unix.FcntlInt(original, unix.F_DUPFD_CLOEXEC, 0)
	}); controlErr != nil {
		return nil, controlErr
	}
	if err != nil {
		return nil, err
	}
	// The poller's use of it ends before it waits: both have the same flags.
	conn.Close()
	if err := unix.SetNonblock(fd, false); err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	return &socket{fd: fd}, nil
}

// Read implements io.Reader.
func (s *socket) Read(p []byte) (int, error) {
	for {
		n, err := unix.Read(s.fd, p)
		switch {
		case err == unix.EINTR:
		case (err != nil || n == 0) && s.isHungUp():
			return 0, net.ErrClosed
		case err != nil:
			return 0, err
		case n == 0 && len(p) > 0:
			return 0, io.EOF
		default:
			return n, nil
		}
	}
}

// writev sends all of bufs. One goroutine at a time calls it.
func (s *socket) writev(bufs [][]byte) error {
	for rest := bufs; len(rest) > 0; {
		rest = s.vector.fill(rest)
		for s.vector.length() > 0 {
			n, err := s.vector.send(s.fd)
			switch {
			case err == unix.EINTR:
			case err != nil && s.isHungUp():
				return net.ErrClosed
			case err != nil:
				return err
			default:
				s.vector.skip(n)
			}
		}
	}
	return nil
}

func (s *socket) isHungUp() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.hungUp
}

// hangUp ends reads and writes, those under way too.
func (s *socket) hangUp() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closed {
		s.hungUp = true
		_ = unix.Shutdown(s.fd, unix.SHUT_RDWR) // an error: the other side was first
	}
}

// close frees the socket, which nobody reads or writes any more.
func (s *socket) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	_ = unix.Close(s.fd)
}
