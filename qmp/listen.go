package qmp

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/internal/unixsock"
)

// socketMode is the mode of unix sockets: whoever may connect may do anything to the machine.
const socketMode = 0o600

// listener is a listening socket and, when it has one, the file it is found by.
type listener struct {
	net.Listener
	path string
	file os.FileInfo
}

// ListenOption changes what Listen allows.
type ListenOption func(*listenOptions)

type listenOptions struct{ anyHost bool }

// AllowRemote lets a TCP address be other than a loopback address. QMP has neither authentication nor encryption.
func AllowRemote() ListenOption { return func(o *listenOptions) { o.anyHost = true } }

// Listen serves connections to addr, which is written as for QEMU: unix:PATH or tcp:HOST:PORT, optionally followed by
// ,server=on and ,wait=off, which are what we do in any case. HOST must be a loopback address or localhost. A socket file
// that nobody listens on is replaced; its successor is removed by Close. Errors are ErrAddress, ErrListen and ErrClosed.
func (s *Server) Listen(addr string, opts ...ListenOption) error {
	var o listenOptions
	for _, opt := range opts {
		opt(&o)
	}
	network, address, err := ParseAddress(addr)
	if err != nil {
		return err
	}
	var l *listener
	if network == "unix" {
		l, err = listenUnix(address)
	} else {
		l, err = listenTCP(address, o.anyHost)
	}
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return errors.Join(ErrClosed, l.close())
	}
	s.listeners[l] = true
	s.wg.Add(1)
	go func() {
		defer s.wg.Done()
		s.accept(l)
	}()
	return nil
}

// ParseAddress splits an address, as Listen describes them, into what the net package wants. A path alone is taken for
// a unix socket. The error is ErrAddress.
func ParseAddress(addr string) (network, address string, err error) {
	address, options, _ := strings.Cut(addr, ",")
	for option := range strings.SplitSeq(options, ",") {
		switch option {
		case "", "server", "server=on", "nowait", "wait=off":
		default:
			return "", "", fmt.Errorf("%w: %q: option %q is not supported", ErrAddress, addr, option)
		}
	}
	if path, ok := strings.CutPrefix(address, "unix:"); ok {
		network, address = "unix", path
	} else if hostPort, ok := strings.CutPrefix(address, "tcp:"); ok {
		network, address = "tcp", hostPort
		if _, _, err := net.SplitHostPort(hostPort); err != nil {
			return "", "", fmt.Errorf("%w: %q: use tcp:HOST:PORT: %w", ErrAddress, addr, err)
		}
	} else if strings.Contains(address, "/") {
		network = "unix"
	} else {
		return "", "", fmt.Errorf("%w: %q: use unix:PATH or tcp:HOST:PORT", ErrAddress, addr)
	}
	if address == "" {
		return "", "", fmt.Errorf("%w: %q: the path is empty", ErrAddress, addr)
	}
	return network, address, nil
}

func listenUnix(path string) (*listener, error) {
	if err := unixsock.Clear(path); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrListen, err)
	}
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		// Linux gives the file the mode that the socket has when it is bound, so it never has another.
		var err error
		return errors.Join(c.Control(func(fd uintptr) { err = unix.Fchmod(int(fd), socketMode) }), err)
	}}
	l, err := config.Listen(context.Background(), "unix", path)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrListen, err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	info, err := os.Lstat(path)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%w: %w", ErrListen, err), l.Close())
	}
	return &listener{Listener: l, path: path, file: info}, nil
}

func listenTCP(address string, anyHost bool) (*listener, error) {
	resolved, err := net.ResolveTCPAddr("tcp", address)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrAddress, err)
	}
	if !anyHost && !resolved.IP.IsLoopback() {
		return nil, fmt.Errorf("%w: %s is not a loopback address, and QMP has no authentication", ErrAddress, address)
	}
	l, err := net.ListenTCP("tcp", resolved)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrListen, err)
	}
	return &listener{Listener: l}, nil
}

// close closes the socket and removes its file, unless that is somebody else's by now.
func (l *listener) close() error {
	if l.path != "" {
		if now, err := os.Lstat(l.path); err == nil && os.SameFile(now, l.file) {
			os.Remove(l.path)
		}
	}
	if err := l.Close(); err != nil {
		return fmt.Errorf("%w: %w", ErrListen, err)
	}
	return nil
}

// acceptRetry is the pause after running out of descriptors.
const acceptRetry = 50 * time.Millisecond

func (s *Server) accept(l *listener) {
	for {
		c, err := l.Accept()
		switch {
		case err == nil:
			if !s.start(c) {
				c.Close()
			}
		case errors.Is(err, net.ErrClosed):
			return
		default:
			select {
			case <-time.After(acceptRetry):
			case <-s.ctx.Done():
				return
			}
		}
	}
}

// Addrs returns the addresses that the server listens on.
func (s *Server) Addrs() []net.Addr {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []net.Addr
	for l := range s.listeners {
		out = append(out, l.Addr())
	}
	return out
}
