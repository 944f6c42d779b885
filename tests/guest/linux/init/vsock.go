//go:build linux

package main

import (
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/tests/guest/wire"
)

// listenVsock serves requests and echoes on vsock, if the machine has one.
func (a *agent) listenVsock() {
	if _, err := os.Stat("/sys/bus/virtio/drivers/vmw_vsock_virtio_transport"); err != nil {
		return
	}
	for port, serve := range map[uint32]func(*os.File){
		wire.VsockAgentPort: func(f *os.File) { a.serve(f) },
		wire.VsockEchoPort:  func(f *os.File) { echo(f) },
	} {
		if err := acceptVsock(port, serve); err != nil {
			fmt.Fprintf(os.Stderr, "init: vsock port %d: %v\n", port, err)
		}
	}
}

func acceptVsock(port uint32, serve func(*os.File)) error {
	fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	if err := unix.Bind(fd, &unix.SockaddrVM{CID: unix.VMADDR_CID_ANY, Port: port}); err != nil {
		_ = unix.Close(fd)
		return err
	}
	if err := unix.Listen(fd, 16); err != nil {
		_ = unix.Close(fd)
		return err
	}
	go func() {
		for {
			// Blocking: Accept4 holds a thread, which sleeps for free.
			conn, _, err := unix.Accept4(fd, unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK)
			if err == unix.EINTR || err == unix.ECONNABORTED {
				continue
			}
			if err != nil {
				fmt.Fprintf(os.Stderr, "init: vsock port %d: accept: %v\n", port, err)
				return
			}
			go func() {
				f := os.NewFile(uintptr(conn), "vsock")
				defer f.Close()
				serve(f)
			}()
		}
	}()
	return nil
}

// dialPatience is how long a connection may take to be made: by itself the
// kernel waits for two seconds, in which a slow host may have done nothing.
const dialPatience = 60 // seconds

// dialVsock connects to a port of the host (cid 2) or of another guest.
func dialVsock(cid, port uint32) (*os.File, error) {
	fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	if err := unix.SetsockoptTimeval(fd, unix.AF_VSOCK, unix.SO_VM_SOCKETS_CONNECT_TIMEOUT, &unix.Timeval{Sec: dialPatience}); err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	if err := unix.Connect(fd, &unix.SockaddrVM{CID: cid, Port: port}); err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), "vsock"), nil
}

// echo sends back what it receives until the peer is done.
func echo(rw io.ReadWriter) {
	// The wrappers keep io.Copy from trying splice and its kin, which cost
	// system calls and do nothing here.
	_, _ = io.Copy(struct{ io.Writer }{rw}, struct{ io.Reader }{rw})
}
