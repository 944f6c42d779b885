package nbd

import (
	"errors"
	"io"
	"math"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/internal/busypoll"
	"github.com/gnomon-vmm/gnomon/internal/iovec"
)

// socket is a connection whose reads and writes wait in the kernel, in the calling thread,
// instead of in Go's poller: so what arrives wakes the one thread that it is for. A
// request and its reply take less than waking two would.
type socket struct {
	fd int

	mu     sync.Mutex
	hungUp bool // guarded by mu
	closed bool // guarded by mu: fd is not ours any more

	list   []unix.Iovec    // of the one that writes
	window busypoll.Window // the reader's
}

// A client that sends a request as soon as it has the reply to the last one finds the reader
// asleep, and to wake it takes longer than the request itself. So the reader looks for the
// next one for a while. Not where there are other clients, who have more use for the
// processor.
var pollSocket = busypoll.Window{Most: 32 * time.Microsecond, Worth: 64 * time.Microsecond}

// lastRead is the socket that was read last.
var lastRead atomic.Pointer[socket]

// poll looks for something for a while, and tells whether it has arrived.
func (s *socket) poll() bool {
	if runtime.NumCPU() == 1 || !s.window.Open() {
		return false
	}
	for !s.pending() {
		if s.window.Over() {
			return false
		}
	}
	s.window.Found()
	return true
}

// newSocket takes conn over, which is closed. It is nil where conn is more than a socket of
// the kernel's: TLS, say.
func newSocket(conn net.Conn) (*socket, error) {
	switch conn.(type) {
	case *net.UnixConn, *net.TCPConn:
	default:
		return nil, nil
	}
	raw, err := conn.(syscall.Conn).SyscallConn()
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
	conn.Close() // first, since both are blocking from then on
	if err := unix.SetNonblock(fd, false); err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	return &socket{fd: fd, window: pollSocket}, nil
}

// Read implements io.Reader.
func (s *socket) Read(p []byte) (int, error) {
	for {
		n, err := unix.Read(s.fd, p)
		s.window.Woken()
		if lastRead.Swap(s) != s { // there are other clients
			s.window.Length = 0
		}
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

// writev sends all of bufs, and leaves it as it is. One goroutine at a time calls it.
func (s *socket) writev(bufs [][]byte) error {
	for skip := 0; ; {
		if bufs, skip = iovec.Rest(bufs, skip); len(bufs) == 0 {
			return nil
		}
		s.list = iovec.Append(s.list[:0], bufs, skip, math.MaxInt)
		n, err := send(s.fd, s.list)
		clear(s.list)
		switch {
		case err == unix.EINTR:
		case err != nil && s.isHungUp():
			return net.ErrClosed
		case err != nil:
			return err
		}
		skip += n
	}
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
func (s *socket) close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	lastRead.CompareAndSwap(s, nil)
	return unix.Close(s.fd)
}
