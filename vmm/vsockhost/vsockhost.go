// Package vsockhost is the host side of guests' vsock connections: unix
// sockets, by Firecracker's convention. What a guest connects to at port P of the
// host is whoever listens on PATH_P. Who wants a port of the guest connects to
// PATH, writes "CONNECT P\n", and reads "OK N\n", N being its own port, before
// the bytes begin.
package vsockhost

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/internal/unixsock"
	"github.com/gnomon-vmm/gnomon/vmm/nbio"
	"github.com/gnomon-vmm/gnomon/vmm/virtio"
)

// ErrListen is the stage of errors from taking a path.
var ErrListen = errors.New("listen for vsock connections")

const (
	// maxPath leaves room for _PORT in a socket address.
	maxPath = unixsock.MaxPath - len("_4294967295")
	// maxGreeters is how many clients may be about to say what they want.
	maxGreeters = 64
	// greetTimeout is how long a client has to say it.
	greetTimeout = 10 * time.Second
	// maxGreeting is the longest request.
	maxGreeting = len("CONNECT 4294967295\n")
)

// Device is what connections from the host are given to; virtio.Vsock is one.
type Device interface {
	Open(guestPort uint32, call virtio.VsockCall) error
}

// Host is the host side of one guest's connections.
type Host struct {
	path     string
	listener *net.UnixListener

	mu       sync.Mutex
	greeting map[*net.UnixConn]struct{} // clients that have not been given to the device; guarded by mu
	closed   bool                       // guarded by mu
	work     sync.WaitGroup
}

var _ virtio.VsockHost = (*Host)(nil)

// Listen takes path, where only this user may connect. A socket that nobody
// listens on any more is replaced; anything else that is there is an error.
func Listen(path string) (*Host, error) {
	if path == "" || len(path) > maxPath {
		return nil, fmt.Errorf("%w: path %q: 1 to %d bytes are possible", ErrListen, path, maxPath)
	}
	if err := unixsock.Clear(path); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrListen, err)
	}
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrListen, err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("%w: %w", ErrListen, err), listener.Close())
	}
	return &Host{path: path, listener: listener, greeting: map[*net.UnixConn]struct{}{}}, nil
}

// Path is where the host listens.
func (h *Host) Path() string { return h.path }

// Serve begins to take connections for device.
func (h *Host) Serve(device Device) {
	h.work.Add(1)
	go func() {
		defer h.work.Done()
		greeters := make(chan struct{}, maxGreeters)
		for {
			conn, err := h.listener.AcceptUnix()
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err != nil { // out of descriptors: someone may close some
				time.Sleep(10 * time.Millisecond)
				continue
			}
			greeters <- struct{}{}
			h.work.Add(1)
			go func() {
				defer h.work.Done()
				defer func() { <-greeters }()
				h.greet(conn, device)
			}()
		}
	}()
}

// greet reads what a client wants and asks the device for it.
func (h *Host) greet(conn *net.UnixConn, device Device) {
	h.mu.Lock()
	if h.closed {
		h.mu.Unlock()
		conn.Close()
		return
	}
	h.greeting[conn] = struct{}{}
	h.mu.Unlock()
	_ = conn.SetReadDeadline(time.Now().Add(greetTimeout))
	port, err := readGreeting(conn)
	if err == nil {
		err = device.Open(port, &call{host: h, conn: conn})
	}
	if err != nil {
		h.forget(conn)
		conn.Close()
	}
}

func (h *Host) forget(conn *net.UnixConn) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.greeting, conn)
}

// readGreeting reads "CONNECT PORT\n" and not a byte more.
func readGreeting(conn *net.UnixConn) (uint32, error) {
	var line []byte
	for len(line) < maxGreeting {
		var b [1]byte
		if _, err := conn.Read(b[:]); err != nil {
			return 0, err
		}
		if b[0] == '\n' {
			break
		}
		line = append(line, b[0])
	}
	digits, ok := strings.CutPrefix(strings.TrimSuffix(string(line), "\r"), "CONNECT ")
	if !ok {
		return 0, fmt.Errorf("%q: want CONNECT PORT", line)
	}
	port, err := strconv.ParseUint(digits, 10, 32)
	return uint32(port), err
}

// call is a client that waits for the guest.
type call struct {
	host *Host
	conn *net.UnixConn
}

// Accepted tells the client, and makes its connection a stream.
func (c *call) Accepted(hostPort uint32, readable, writable func()) (virtio.VsockStream, error) {
	c.host.forget(c.conn)
	defer c.conn.Close()
	raw, err := c.conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	fd, dupErr := -1, error(nil)
	if err := raw.Control(func(old uintptr) { fd, dupErr = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0) }); err != nil {
		return nil, err
	}
	if dupErr != nil {
		return nil, dupErr
	}
	if _, err := unix.Write(fd, fmt.Appendf(nil, "OK %d\n", hostPort)); err != nil { // into an empty buffer
		return nil, errors.Join(err, unix.Close(fd))
	}
	return newStream(fd, fmt.Sprintf("vsock client %d", hostPort), readable, writable)
}

// Refused hangs up.
func (c *call) Refused() {
	c.host.forget(c.conn)
	c.conn.Close()
}

// Dial connects to PATH_PORT.
func (h *Host) Dial(port uint32, readable, writable func()) (virtio.VsockStream, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	path := fmt.Sprintf("%s_%d", h.path, port)
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: path}); err != nil { // EAGAIN too: its queue is full
		return nil, errors.Join(fmt.Errorf("connect to %s: %w", path, err), unix.Close(fd))
	}
	return newStream(fd, path, readable, writable)
}

// Close stops listening and removes the socket. Streams are closed by who
// has them.
func (h *Host) Close() error {
	err := h.listener.Close()
	h.mu.Lock()
	h.closed = true
	for conn := range h.greeting {
		conn.Close()
	}
	h.mu.Unlock()
	h.work.Wait()
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// stream is a unix socket as the device wants it.
type stream struct{ *nbio.File }

func newStream(fd int, name string, readable, writable func()) (virtio.VsockStream, error) {
	f, err := nbio.New(fd, name, readable, writable)
	if err != nil {
		return nil, err
	}
	return stream{f}, nil
}

// CloseWrite shuts the sending direction down.
func (s stream) CloseWrite() error {
	var err error
	if e := s.Control(func(fd uintptr) { err = unix.Shutdown(int(fd), unix.SHUT_WR) }); e != nil {
		return e
	}
	return err
}

// HungUp tells whether the peer has closed both directions.
func (s stream) HungUp() bool {
	hungUp := true
	_ = s.Control(func(fd uintptr) {
		p := [1]unix.PollFd{{Fd: int32(fd)}}
		n, err := unix.Poll(p[:], 0)
		hungUp = err == nil && n > 0 && p[0].Revents&(unix.POLLHUP|unix.POLLERR) != 0
	})
	return hungUp
}
