package owner

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// ErrAnchor is a disk on which the lock of its owner cannot be taken.
var ErrAnchor = errors.New("owner's lock on the disk")

// anchorByte is the byte of the disk that is locked; no other program's locks are
// known to be there (QEMU's are at 100 to 299).
const anchorByte = 0x676e6f6d6f6e // "gnomon"

var errAnchorHeld = errors.New("the disk is locked by an owner")

// takeAnchor opens the disk's file and locks it for its owner: an open file
// description lock, taken before the owner file is written and let go of when the
// disk has been closed. The kernel keeps it as long as the process lives, be
// it frozen or not, and lets go when it ends, so where it is free nobody can
// write any more who could before. errAnchorHeld: somebody has it.
func takeAnchor(path string) (*os.File, error) {
	for range attempts {
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrAnchor, err)
		}
		if err := lockAnchor(f); err != nil {
			f.Close()
			return nil, err
		}
		same, err := anchors(f, path)
		if err == nil && same {
			return f, nil
		}
		f.Close()
		if err != nil {
			return nil, err
		}
	}
	return nil, fmt.Errorf("%w: %s is replaced all the time", ErrAnchor, path)
}

func lockAnchor(f *os.File) error {
	l := unix.Flock_t{Type: unix.F_WRLCK, Start: anchorByte, Len: 1}
	switch err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &l); err {
	case nil:
		return nil
	case unix.EAGAIN, unix.EACCES:
		return errAnchorHeld
	default:
		return fmt.Errorf("%w: %w", ErrAnchor, err)
	}
}

// anchors tells whether f is the file that path names now.
func anchors(f *os.File, path string) (bool, error) {
	has, err := f.Stat()
	if err != nil {
		return false, fmt.Errorf("%w: %w", ErrAnchor, err)
	}
	named, err := os.Stat(path)
	if err != nil {
		return false, fmt.Errorf("%w: %w", ErrAnchor, err)
	}
	return os.SameFile(has, named), nil
}
