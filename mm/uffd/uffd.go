// Package uffd is userfaultfd(2), typed: page faults in a range of our own
// memory come as messages, and whoever reads them says what the page shall
// hold. It has no policy. The ioctls and structures are those of
// linux/userfaultfd.h and ioctl_userfaultfd(2).
package uffd

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// Errors, each of which wraps its cause. Calls that are made for every fault
// (Copy, ZeroPage, Continue, WriteProtect, Wake) return the bare errno instead.
var (
	ErrOpen     = errors.New("userfaultfd cannot be opened")
	ErrRegister = errors.New("userfaultfd cannot watch the range")
	ErrRead     = errors.New("userfaultfd cannot be read")
	ErrClosed   = errors.New("userfaultfd is closed")
)

// Features are what a kernel may be able to do, UFFD_FEATURE_*.
type Features uint64

// The features. Those that add events other than faults are not offered: with
// them, every ioctl may answer EAGAIN until the events are read.
const (
	FeatureWP                      Features = 1 << 0  // write protection of anonymous memory, and flags that say so
	FeatureMissingShmem            Features = 1 << 5  // Missing on memfd
	FeatureThreadID                Features = 1 << 8  // Fault.Thread
	FeatureMinorShmem              Features = 1 << 10 // Minor on memfd
	FeatureExactAddress            Features = 1 << 11 // Fault.Addr within its page
	FeatureWPShmem                 Features = 1 << 12 // WP on memfd
	FeatureWPUnpopulated           Features = 1 << 13 // protects pages of anonymous memory that are not there yet, too
	allowedFeatures                         = FeatureWP | FeatureMissingShmem | FeatureThreadID | FeatureMinorShmem | FeatureExactAddress | FeatureWPShmem | FeatureWPUnpopulated
	userfaultfdAPI                          = 0xaa
	faultEvent                              = 0x12
	faultFlagWrite, faultFlagWP             = 1, 2
	faultFlagMinor                          = 4
	copyDontWake, copyWP                    = 1, 2
	protectWP, protectDontWake              = 1, 2
	zeroDontWake, continueDontWake          = 1, 1
)

var featureNames = []struct {
	feature Features
	name    string
}{
	{FeatureWP, "PAGEFAULT_FLAG_WP"},
	{FeatureMissingShmem, "MISSING_SHMEM"},
	{FeatureThreadID, "THREAD_ID"},
	{FeatureMinorShmem, "MINOR_SHMEM"},
	{FeatureExactAddress, "EXACT_ADDRESS"},
	{FeatureWPShmem, "WP_HUGETLBFS_SHMEM"},
	{FeatureWPUnpopulated, "WP_UNPOPULATED"},
}

// String lists the features by the kernel's names.
func (f Features) String() string {
	var names []string
	for _, n := range featureNames {
		if f&n.feature != 0 {
			names = append(names, n.name)
			f &^= n.feature
		}
	}
	if f != 0 || len(names) == 0 {
		names = append(names, fmt.Sprintf("%#x", uint64(f)))
	}
	return strings.Join(names, "|")
}

// Mode says which faults are wanted.
type Mode uint64

// The modes, which may be combined.
const (
	Missing Mode = 1 << 0 // no page is there
	WP      Mode = 1 << 1 // a write to a page that WriteProtect protects
	Minor   Mode = 1 << 2 // the memfd has the page, the mapping does not
)

// Fault is one access that waits for an answer.
type Fault struct {
	Addr   uintptr // page aligned, unless FeatureExactAddress
	Write  bool    // the access writes
	WP     bool    // the page is there but protected; WriteProtect lifts it
	Minor  bool    // the page is in the memfd; Continue maps it
	Thread uint32  // who waits, with FeatureThreadID
}

// FD is a userfaultfd. Its methods may be called from any goroutine.
type FD struct {
	// mu is held for reading during every system call, so that Close cannot
	// give the descriptors' numbers away under one.
	mu     sync.RWMutex
	fd     int // -1 once closed
	wakeFD int // an eventfd that ends ReadFaults
}

// Supported are the features that the kernel has.
func Supported() (Features, error) {
	fd, err := create()
	if err != nil {
		return 0, fmt.Errorf("%w: %w", ErrOpen, err)
	}
	defer unix.Close(fd)
	api := apiArg{api: userfaultfdAPI}
	if errno := ioctlPtr(fd, nrAPI, &api); errno != 0 {
		return 0, fmt.Errorf("%w: UFFDIO_API: %w", ErrOpen, errno)
	}
	return Features(api.features), nil
}

// Open makes a userfaultfd that tells of faults in kernel mode too, as KVM's
// are. That needs root, or CAP_SYS_PTRACE, or access to /dev/userfaultfd, or
// vm.unprivileged_userfaultfd=1. A feature that the kernel lacks is named.
func Open(features Features) (*FD, error) {
	if extra := features &^ allowedFeatures; extra != 0 {
		return nil, fmt.Errorf("%w: features %v are not for this package: %w", ErrOpen, extra, unix.EINVAL)
	}
	supported, err := Supported()
	if err != nil {
		return nil, err
	}
	if lacking := features &^ supported; lacking != 0 {
		return nil, fmt.Errorf("%w: the kernel lacks %v: %w", ErrOpen, lacking, unix.EOPNOTSUPP)
	}
	fd, err := create()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrOpen, err)
	}
	api := apiArg{api: userfaultfdAPI, features: uint64(features)}
	if errno := ioctlPtr(fd, nrAPI, &api); errno != 0 {
		unix.Close(fd)
		return nil, fmt.Errorf("%w: UFFDIO_API with %v: %w", ErrOpen, features, errno)
	}
	wakeFD, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("%w: eventfd: %w", ErrOpen, err)
	}
	return &FD{fd: fd, wakeFD: wakeFD}, nil
}

// create returns a new descriptor, which has yet to agree on an API.
func create() (int, error) {
	fd, errno := userfaultfd(unix.O_CLOEXEC | unix.O_NONBLOCK)
	if errno == 0 {
		return fd, nil
	}
	if errno != unix.EPERM {
		return -1, fmt.Errorf("userfaultfd: %w", errno)
	}
	device, err := os.OpenFile("/dev/userfaultfd", os.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("userfaultfd: %w; root, CAP_SYS_PTRACE or vm.unprivileged_userfaultfd=1 would do, or else: %w", errno, err)
	}
	defer device.Close()
	fd, errno = ioctl(int(device.Fd()), nrNew, unix.O_CLOEXEC|unix.O_NONBLOCK)
	if errno != 0 {
		return -1, fmt.Errorf("/dev/userfaultfd: %w", errno)
	}
	return fd, nil
}

// Close lets go of all ranges; whoever waits in one meets the page again as if
// it had never been watched. ReadFaults returns.
func (u *FD) Close() error {
	u.interrupt()
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.fd < 0 {
		return nil
	}
	err := errors.Join(unix.Close(u.fd), unix.Close(u.wakeFD))
	u.fd, u.wakeFD = -1, -1
	return err
}

// interrupt has every ReadFaults, now and later, find the eventfd readable.
func (u *FD) interrupt() {
	u.mu.RLock()
	defer u.mu.RUnlock()
	if u.fd >= 0 {
		one := [8]byte{1}
		// It can fail only because the counter is full, and then it is readable.
		_, _ = unix.Write(u.wakeFD, one[:])
	}
}

// do makes an ioctl unless the descriptor is closed, which is EBADF.
func do[T any](u *FD, request uintptr, arg *T) unix.Errno {
	u.mu.RLock()
	defer u.mu.RUnlock()
	if u.fd < 0 {
		return unix.EBADF
	}
	return ioctlPtr(u.fd, request, arg)
}

// Register watches n bytes from addr on, whole pages of mappings that no other
// userfaultfd watches (EBUSY). Registering again adds nothing: the last mode holds.
func (u *FD) Register(addr, n uintptr, mode Mode) error {
	arg := registerArg{addr: uint64(addr), n: uint64(n), mode: uint64(mode)}
	if errno := do(u, nrRegister, &arg); errno != 0 {
		return fmt.Errorf("%w: %d bytes at %#x, mode %d: %w", ErrRegister, n, addr, mode, errno)
	}
	return nil
}

// Unregister stops watching, and wakes who waits in the range.
func (u *FD) Unregister(addr, n uintptr) error {
	arg := rangeArg{addr: uint64(addr), n: uint64(n)}
	if errno := do(u, nrUnregister, &arg); errno != 0 {
		return fmt.Errorf("%w any longer: %d bytes at %#x: %w", ErrRegister, n, addr, errno)
	}
	return nil
}

// CopyMode changes what Copy does.
type CopyMode uint64

// Copy's modes, which may be combined.
const (
	CopyDontWake CopyMode = copyDontWake // leave who waits there asleep until Wake
	CopyWP       CopyMode = copyWP       // and protect the pages, where WP is registered
)

// Copy installs src, whole pages, from addr on, and wakes who waits there. It
// returns how many bytes it installed, and why not all:
// EEXIST when the next page is there already, ENOENT when the range is not
// registered (any longer), ESRCH when the process is ending, EAGAIN while the
// layout of the address space changes, ENOSPC or ENOMEM, EBADF when closed.
func (u *FD) Copy(addr uintptr, src []byte, mode CopyMode) (int, error) {
	done := 0
	for done < len(src) {
		arg := copyArg{
			dst: uint64(addr) + uint64(done), src: uint64(Address(src[done:])), n: uint64(len(src) - done), mode: uint64(mode),
		}
		n, err := partial(do(u, nrCopy, &arg), arg.n, &arg.copied)
		keepAlive(src)
		done += n
		if err != nil {
			return done, err
		}
	}
	return done, nil
}

// ZeroPage installs n bytes of zeros, whole pages. Its results are Copy's.
func (u *FD) ZeroPage(addr, n uintptr, dontWake bool) (int, error) {
	done := 0
	for done < int(n) {
		arg := zeroArg{addr: uint64(addr) + uint64(done), n: uint64(n) - uint64(done), mode: flag(dontWake, zeroDontWake)}
		step, err := partial(do(u, nrZeroPage, &arg), arg.n, &arg.zeroed)
		done += step
		if err != nil {
			return done, err
		}
	}
	return done, nil
}

// Continue maps pages that the memfd has, the answer to a Minor fault. Its
// results are Copy's; EFAULT says that the memfd has no such page.
func (u *FD) Continue(addr, n uintptr, dontWake bool) (int, error) {
	done := 0
	for done < int(n) {
		arg := continueArg{addr: uint64(addr) + uint64(done), n: uint64(n) - uint64(done), mode: flag(dontWake, continueDontWake)}
		step, err := partial(do(u, nrContinue, &arg), arg.n, &arg.mapped)
		done += step
		if err != nil {
			return done, err
		}
	}
	return done, nil
}

// partial makes sense of an ioctl that says EAGAIN both when it did a part,
// whose size or error is then in result, and when it must not do anything now.
func partial(errno unix.Errno, asked uint64, result *int64) (int, error) {
	switch {
	case errno == 0:
		return int(asked), nil
	case errno == unix.EAGAIN && *result > 0:
		return int(*result), nil
	default:
		return 0, errno
	}
}

// WriteProtect protects n bytes of whole pages, or lifts protection and, unless
// dontWake, wakes who waits there. ENOENT: not registered for WP; EAGAIN: the
// layout of the address space changes, nothing was done or not all of it.
func (u *FD) WriteProtect(addr, n uintptr, protect, dontWake bool) error {
	arg := protectArg{addr: uint64(addr), n: uint64(n), mode: flag(protect, protectWP) | flag(dontWake && !protect, protectDontWake)}
	if errno := do(u, nrWriteProtect, &arg); errno != 0 {
		return errno
	}
	return nil
}

// Wake wakes who waits in n bytes of whole pages; they try their access again.
func (u *FD) Wake(addr, n uintptr) error {
	arg := rangeArg{addr: uint64(addr), n: uint64(n)}
	if errno := do(u, nrWake, &arg); errno != 0 {
		return errno
	}
	return nil
}

// maxFaults is the most that one ReadFaults takes.
const maxFaults = 16

// ReadFaults waits for faults and returns how many it stored. The calling
// thread sleeps in the system call: what a fault costs more than anything is
// hand-offs from thread to thread. After Close it returns ErrClosed.
func (u *FD) ReadFaults(into []Fault) (int, error) {
	u.mu.RLock()
	defer u.mu.RUnlock()
	var messages [maxFaults]message
	for {
		if u.fd < 0 {
			return 0, ErrClosed
		}
		fds := [2]unix.PollFd{{Fd: int32(u.fd), Events: unix.POLLIN}, {Fd: int32(u.wakeFD), Events: unix.POLLIN}}
		if _, err := unix.Poll(fds[:], -1); err != nil && err != unix.EINTR {
			return 0, fmt.Errorf("%w: poll: %w", ErrRead, err)
		}
		if fds[1].Revents != 0 {
			return 0, ErrClosed
		}
		if fds[0].Revents == 0 {
			continue
		}
		n, errno := readMessages(u.fd, messages[:min(len(into), maxFaults)])
		if errno == unix.EAGAIN || errno == unix.EINTR {
			continue // whoever waited was woken by other means
		}
		if errno != 0 {
			return 0, fmt.Errorf("%w: %w", ErrRead, errno)
		}
		faults := 0
		for _, m := range messages[:n] {
			if m.event != faultEvent {
				continue
			}
			into[faults] = Fault{
				Addr: uintptr(m.addr), Write: m.flags&faultFlagWrite != 0,
				WP: m.flags&faultFlagWP != 0, Minor: m.flags&faultFlagMinor != 0, Thread: m.thread,
			}
			faults++
		}
		if faults > 0 {
			return faults, nil
		}
	}
}

func flag(on bool, bit uint64) uint64 {
	if on {
		return bit
	}
	return 0
}
