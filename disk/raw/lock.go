package raw

import (
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/disk/block"
)

// Image locks are QEMU's (its block/file-posix.c): open file description
// read locks on single bytes. Whoever does something to the image holds the
// byte lockUses+p, whoever does not let others do it holds lockForbids+p, for
// each permission p. They are asked about with write locks, which conflict.
const (
	lockUses    = 100
	lockForbids = 200

	permRead   = 0 // consistent read
	permWrite  = 1
	permResize = 3
)

// A lock is tried so often, with pauses in between. The kernel takes down the io_uring of
// a process that was killed some 20 ms after its end, and with it the last use of its files.
const lockTries = 40

var pauseForLock = func() { time.Sleep(5 * time.Millisecond) }

// lock takes the locks of a reader or of a writer; both keep other writers out.
func lock(fd int, readOnly bool) error {
	for tries := 1; ; tries++ {
		err := tryLock(fd, readOnly)
		if !errors.Is(err, block.ErrInUse) || tries == lockTries {
			return err
		}
		if err := unlock(fd); err != nil { // so that of two that wait one gets it
			return err
		}
		pauseForLock()
	}
}

// tryLock is lock without waiting. It may leave some of the locks behind when it fails.
func tryLock(fd int, readOnly bool) error {
	uses := []int64{permRead}
	if !readOnly {
		uses = append(uses, permWrite, permResize)
	}
	forbids := []int64{permWrite, permResize}
	for _, p := range uses {
		if err := setLock(fd, lockUses+p); err != nil {
			return err
		}
	}
	for _, p := range forbids {
		if err := setLock(fd, lockForbids+p); err != nil {
			return err
		}
	}
	// Our own marks stand; whoever comes now sees them, so of two that
	// arrive together at least one gives way.
	for _, p := range uses {
		if err := testLock(fd, lockForbids+p); err != nil {
			return err
		}
	}
	for _, p := range forbids {
		if err := testLock(fd, lockUses+p); err != nil {
			return err
		}
	}
	return nil
}

// downgrade makes a writer's locks those of a reader.
func downgrade(fd int) error {
	for _, p := range []int64{permWrite, permResize} {
		l := unix.Flock_t{Type: unix.F_UNLCK, Whence: 0, Start: lockUses + p, Len: 1}
		if err := unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &l); err != nil {
			return fmt.Errorf("unlock image: %w", err)
		}
	}
	return nil
}

// unlock lets go of all locks.
func unlock(fd int) error {
	l := unix.Flock_t{Type: unix.F_UNLCK, Whence: 0, Start: lockUses, Len: 2 * (lockForbids - lockUses)}
	if err := unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &l); err != nil {
		return fmt.Errorf("unlock image: %w", err)
	}
	return nil
}

func setLock(fd int, at int64) error {
	l := unix.Flock_t{Type: unix.F_RDLCK, Whence: 0, Start: at, Len: 1}
	switch err := unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &l); err {
	case nil:
		return nil
	case unix.EAGAIN, unix.EACCES:
		return inUse()
	default:
		return fmt.Errorf("lock image: %w", err)
	}
}

func testLock(fd int, at int64) error {
	l := unix.Flock_t{Type: unix.F_WRLCK, Whence: 0, Start: at, Len: 1}
	if err := unix.FcntlFlock(uintptr(fd), unix.F_OFD_GETLK, &l); err != nil {
		return fmt.Errorf("ask for locks on image: %w", err)
	}
	if l.Type != unix.F_UNLCK {
		return inUse()
	}
	return nil
}

func inUse() error {
	return fmt.Errorf("%w: end that machine, or give each its own copy", block.ErrInUse)
}
