// Package unixsock has what every unix socket that we listen on needs before it
// is bound.
package unixsock

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// MaxPath is the longest path of a unix socket, in bytes (sun_path without its NUL).
const MaxPath = 107

// Clear makes way for a socket at path: a socket file that nobody listens on
// any more is removed. What another process listens on, and what is not a socket,
// stays and is an error, which says what to do.
func Clear(path string) error {
	if path == "" || len(path) > MaxPath {
		return fmt.Errorf("socket path %q has %d bytes: 1 to %d are possible", path, len(path), MaxPath)
	}
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case info.Mode().Type() != fs.ModeSocket:
		return fmt.Errorf("%s exists and is not a socket: remove it or choose another path", path)
	}
	// Not blocking: a listener whose backlog is full still listens.
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return fmt.Errorf("create socket: %w", err)
	}
	defer unix.Close(fd)
	switch err := unix.Connect(fd, &unix.SockaddrUnix{Name: path}); {
	case errors.Is(err, unix.ECONNREFUSED):
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("replace stale socket: %w", err)
		}
		return nil
	case err == nil || errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EPROTOTYPE):
		return fmt.Errorf("%s is in use: another process listens there; end it or choose another path", path)
	default:
		return fmt.Errorf("see who has socket %s: %w", path, err)
	}
}
