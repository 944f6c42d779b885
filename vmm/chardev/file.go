package chardev

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// file is a file that takes output. There is no input. Until it is connected
// the file keeps what it held, and one that Open made goes with Close: a machine
// that does not come to run leaves no trace.
type file struct {
	label     string
	f         *os.File
	made      bool // by openFile
	empty     bool // the file is to be emptied
	connected atomic.Bool
	failure   failure
}

func openFile(s Spec, o Options) (Backend, error) {
	// To open a FIFO would wait for its reader; a file that is not there is made.
	if info, err := os.Stat(s.Path); err == nil {
		if err := checkMode(info.Mode()); err != nil {
			return nil, err
		}
	}
	b := &file{label: o.Label, empty: !s.Append, failure: failure{tell: o.Failed}}
	const flags = os.O_WRONLY | os.O_APPEND | unix.O_NONBLOCK | unix.O_NOCTTY
	var err error
	b.f, err = os.OpenFile(s.Path, flags|os.O_CREATE|os.O_EXCL, 0o666)
	b.made = err == nil
	if errors.Is(err, fs.ErrExist) {
		b.f, err = os.OpenFile(s.Path, flags, 0)
	}
	if err != nil {
		return nil, err
	}
	if err := checkLocks(b.f); err != nil {
		b.f.Close()
		return nil, err
	}
	return b, nil
}

func checkMode(mode fs.FileMode) error {
	switch {
	case mode.IsRegular(), mode&fs.ModeCharDevice != 0:
		return nil
	case mode.IsDir():
		return errors.New("is a directory: name a file in it")
	}
	return errors.New("is neither a regular file nor a character device: name another file, or a socket (unix:PATH) for a program to read from")
}

// checkLocks refuses a file that somebody uses as a disk. Package disk/raw and
// QEMU (its block/file-posix.c) lock bytes from 100 and 200 on, one for each of
// up to 64 permissions.
func checkLocks(f *os.File) error {
	lock := unix.Flock_t{Type: unix.F_WRLCK, Start: 100, Len: 200}
	// What cannot be locked, such as a device, is not locked.
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, &lock); err == nil && lock.Type != unix.F_UNLCK {
		return fmt.Errorf("%s is in use as a machine's disk: name another file", f.Name())
	}
	return nil
}

func (f *file) Write(p []byte) (int, error) {
	n, err := f.f.Write(p)
	f.failure.check(err)
	return n, err
}

func (f *file) Connect(Frontend) {
	if f.empty {
		// What cannot be emptied, such as a terminal, holds nothing to lose.
		_ = f.f.Truncate(0)
	}
	f.connected.Store(true)
}

func (f *file) Info() Info { return Info{f.label, "file", f.connected.Load()} }

func (f *file) Close() error {
	var err error
	if f.made && !f.connected.Load() {
		err = os.Remove(f.f.Name())
	}
	return errors.Join(err, f.f.Close())
}
