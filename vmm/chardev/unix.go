package chardev

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/internal/unixsock"
)

// acceptRetry is how long the server waits when the process is out of
// descriptors, instead of spinning.
const acceptRetry = 100 * time.Millisecond

// unixServer is a listening unix socket that serves one client at a time; the
// next waits until that one is gone.
type unixServer struct {
	label    string
	path     string
	listener int
	made     unix.Stat_t // the socket file, so that Close removes no other
	in       *input
	out      output
	server   sync.WaitGroup

	mu     sync.Mutex
	client bool // guarded by mu: somebody is connected
	closed bool // guarded by mu
}

func openUnix(path string, o Options) (Backend, error) {
	if err := unixsock.Clear(path); err != nil {
		return nil, err
	}
	s := &unixServer{label: o.Label, path: path}
	s.out.use(-1, 0)
	in, err := newInput()
	if err != nil {
		return nil, err
	}
	s.in = in
	if err := s.listen(); err != nil {
		in.signal.close()
		return nil, err
	}
	s.server.Add(1)
	go s.serve()
	return s, nil
}

func (s *unixServer) listen() error {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return fmt.Errorf("create socket: %w", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: s.path}); err != nil {
		unix.Close(fd)
		return fmt.Errorf("bind socket: %w", err)
	}
	if err := errors.Join(unix.Lstat(s.path, &s.made), unix.Listen(fd, 1)); err != nil {
		unix.Close(fd)
		os.Remove(s.path)
		return fmt.Errorf("listen on socket: %w", err)
	}
	s.listener = fd
	return nil
}

func (s *unixServer) Write(p []byte) (int, error) { return s.out.Write(p) }

func (s *unixServer) Connect(f Frontend) { s.in.connect(f) }

func (s *unixServer) Info() Info {
	s.mu.Lock()
	defer s.mu.Unlock()
	name := "unix:" + s.path + ",server=on"
	if !s.client {
		name = "disconnected:" + name
	}
	return Info{s.label, name, s.in.connected()}
}

// serve accepts clients until Close.
func (s *unixServer) serve() {
	defer s.server.Done()
	for !s.in.isClosed() {
		if s.in.signal.wait(s.listener, unix.POLLIN) == 0 {
			continue
		}
		fd, _, err := unix.Accept4(s.listener, unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK)
		switch {
		case errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) || errors.Is(err, unix.ECONNABORTED):
			continue
		case err != nil: // out of descriptors or memory: later, perhaps
			time.Sleep(acceptRetry)
			continue
		}
		s.setClient(fd)
		s.read(fd)
		s.setClient(-1)
		unix.Close(fd)
	}
}

func (s *unixServer) setClient(fd int) {
	s.out.use(fd, outputPiece)
	s.mu.Lock()
	s.client = fd >= 0
	s.mu.Unlock()
}

// read reads from a client until it is gone. One that has only ended its own
// sending stays connected for the output.
func (s *unixServer) read(fd int) {
	buf := make([]byte, 4096)
	ended := false
	for !s.in.isClosed() {
		room, events := min(len(buf), s.in.room()), int16(unix.POLLIN)
		if room == 0 || ended {
			events = 0 // only its hanging up
		}
		happened := s.in.signal.wait(fd, events)
		switch {
		case happened == 0:
			continue
		case happened&(unix.POLLHUP|unix.POLLERR) != 0:
			s.takeRest(fd, buf)
			return
		}
		n, err := unix.Read(fd, buf[:room])
		switch {
		case err == unix.EINTR || err == unix.EAGAIN:
		case err != nil:
			return
		case n == 0:
			ended = true
		default:
			s.in.push(buf[:n], inputLimit)
		}
	}
}

// takeRest takes what a client that is gone had sent, so that the next one
// can be served even while the guest takes no input.
func (s *unixServer) takeRest(fd int, buf []byte) {
	for {
		n, err := unix.Read(fd, buf)
		switch {
		case err == unix.EINTR:
		case err != nil || n <= 0:
			return
		default:
			s.in.push(buf[:n], inputHardLimit)
		}
	}
}

func (s *unixServer) Close() error {
	s.mu.Lock()
	closed := s.closed
	s.closed = true
	s.mu.Unlock()
	if closed {
		return nil
	}
	s.in.close()
	s.server.Wait()
	unix.Close(s.listener)
	s.in.signal.close()
	var now unix.Stat_t
	if unix.Lstat(s.path, &now) != nil || now.Dev != s.made.Dev || now.Ino != s.made.Ino {
		return nil // somebody else's by now
	}
	if err := os.Remove(s.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove socket: %w", err)
	}
	return nil
}
