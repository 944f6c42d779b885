package netdev

import (
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/vmm/nbio"
	"github.com/gnomon-vmm/gnomon/vmm/virtio"
)

// ErrTap is the stage of errors from tap interfaces.
var ErrTap = errors.New("tap")

// Tap is a tap interface of the host. Frames go straight between guest memory
// and the kernel, with the guest's offloads.
type Tap struct {
	name    string
	created bool // by OpenTap: it goes when the Tap is closed
	file    *nbio.File

	mu                 sync.Mutex
	readable, writable func() // nil while stopped; guarded by mu
}

var _ virtio.NetBackend = (*Tap)(nil)

// checkTapName refuses what the kernel would not take as an interface name.
func checkTapName(name string) error {
	if name == "" || len(name) >= unix.IFNAMSIZ || name == "." || name == ".." || strings.ContainsAny(name, "/: \t\n%") {
		return fmt.Errorf("tap=%s: want an interface name of 1 to %d characters", name, unix.IFNAMSIZ-1)
	}
	return nil
}

// OpenTap attaches to the tap interface called name, or makes one where there
// is none; that one lasts until Close and has no addresses yet.
func OpenTap(name string) (*Tap, error) {
	if err := checkTapName(name); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrTap, err)
	}
	_, lookupErr := net.InterfaceByName(name)
	t := &Tap{name: name, created: lookupErr != nil}
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("%w %s: %w", ErrTap, name, openError(err))
	}
	// The interface must be attached before the poller sees the descriptor.
	if err := t.attach(fd); err != nil {
		return nil, errors.Join(fmt.Errorf("%w %s: %w", ErrTap, name, err), unix.Close(fd))
	}
	t.file, err = nbio.New(fd, "tap "+name, func() { t.notify(true) }, func() { t.notify(false) })
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrTap, err)
	}
	return t, nil
}

func openError(err error) error {
	switch {
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return fmt.Errorf("no permission for /dev/net/tun: run as root, give this user access to it, or use --net user: %w", err)
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return fmt.Errorf("/dev/net/tun is missing: load the kernel module (modprobe tun), or use --net user: %w", err)
	}
	return fmt.Errorf("open /dev/net/tun: %w", err)
}

// attach ties fd to the interface and sets the length of the frames' header.
func (t *Tap) attach(fd int) error {
	request, err := unix.NewIfreq(t.name)
	if err != nil {
		return err
	}
	request.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, request); err != nil {
		switch {
		case errors.Is(err, unix.EPERM) && t.created:
			return fmt.Errorf("no permission to make the interface: let an administrator make it with "+
				"'ip tuntap add mode tap name %s user USER', or use --net user: %w", t.name, err)
		case errors.Is(err, unix.EPERM):
			return fmt.Errorf("the interface belongs to another user: let its owner run this, "+
				"or have it made with 'ip tuntap add mode tap name %s user USER': %w", t.name, err)
		case errors.Is(err, unix.EBUSY):
			return fmt.Errorf("the interface is in use by another program: stop that, or choose another name: %w", err)
		case errors.Is(err, unix.EINVAL) && !t.created:
			return fmt.Errorf("%s is not a single-queue tap interface: choose another name, or make it with "+
				"'ip tuntap add mode tap name NAME': %w", t.name, err)
		}
		return fmt.Errorf("TUNSETIFF: %w", err)
	}
	if err := unix.IoctlSetPointerInt(fd, unix.TUNSETVNETHDRSZ, virtio.NetHeaderSize); err != nil {
		return fmt.Errorf("TUNSETVNETHDRSZ: %w", err)
	}
	if err := unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, 0); err != nil {
		return fmt.Errorf("TUNSETOFFLOAD: %w", err)
	}
	return nil
}

// notify passes on that the descriptor may be read, or written.
func (t *Tap) notify(read bool) {
	t.mu.Lock()
	f := t.writable
	if read {
		f = t.readable
	}
	t.mu.Unlock()
	if f != nil {
		f()
	}
}

// Offloads are all: the kernel does what the receiving end does not.
func (t *Tap) Offloads() uint64 {
	return virtio.NetOffloadHostCSum | virtio.NetOffloadHostTSO4 | virtio.NetOffloadHostTSO6 | virtio.NetOffloadHostECN |
		virtio.NetOffloadGuestCSum | virtio.NetOffloadGuestTSO4 | virtio.NetOffloadGuestTSO6 | virtio.NetOffloadGuestECN
}

// Start tells the kernel which frames the guest can take, and begins.
func (t *Tap) Start(features uint64, readable, writable func()) error {
	if err := t.setOffloads(features); err != nil {
		return fmt.Errorf("%w %s: %w", ErrTap, t.name, err)
	}
	t.mu.Lock()
	t.readable, t.writable = readable, writable
	t.mu.Unlock()
	readable() // a frame may wait already, and its notice may be past
	return nil
}

func (t *Tap) setOffloads(features uint64) error {
	flags := 0
	if features&virtio.NetOffloadGuestCSum != 0 {
		flags |= unix.TUN_F_CSUM
		for feature, flag := range map[uint64]int{
			virtio.NetOffloadGuestTSO4: unix.TUN_F_TSO4,
			virtio.NetOffloadGuestTSO6: unix.TUN_F_TSO6,
			virtio.NetOffloadGuestECN:  unix.TUN_F_TSO_ECN,
		} {
			if features&feature != 0 {
				flags |= flag
			}
		}
	}
	var err error
	controlErr := t.file.Control(func(fd uintptr) { err = unix.IoctlSetInt(int(fd), unix.TUNSETOFFLOAD, flags) })
	if err = errors.Join(controlErr, err); err != nil {
		return fmt.Errorf("TUNSETOFFLOAD %#x: %w", flags, err)
	}
	return nil
}

// Stop is as NetBackend says. Frames wait in, or overflow, the kernel's queue.
func (t *Tap) Stop() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.readable, t.writable = nil, nil
}

// Send is as NetBackend says.
func (t *Tap) Send(frame [][]byte) error {
	_, err := t.file.Writev(frame)
	return err
}

// Receive is as NetBackend says.
func (t *Tap) Receive(p [][]byte) (int, error) { return t.file.Readv(p) }

// Describe names the interface.
func (t *Tap) Describe() string { return "tap " + t.name }

// Close detaches from the interface; one that OpenTap made is gone.
func (t *Tap) Close() error { return t.file.Close() }
