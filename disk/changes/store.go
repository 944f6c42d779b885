package changes

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/disk/block"
)

// store is where a sidecar is kept.
type store interface {
	io.ReaderAt
	io.WriterAt
	// Sync makes what was written durable.
	Sync() error
	// Invalidate makes sure that nobody takes the sidecar for a true one any more.
	Invalidate() error
	// Replace has the store hold content, and nothing else, durably and in one step.
	Replace(content []byte) error
	Close() error
}

// fileStore is a sidecar in a file, which it keeps locked.
type fileStore struct {
	path string
	file *os.File // nil: there is none yet
}

// openStore opens the sidecar at path, if there is one.
func openStore(path string) (*fileStore, error) {
	for {
		f, err := os.OpenFile(path, os.O_RDWR|unix.O_NONBLOCK, 0) // not to wait for the other end of a FIFO
		if errors.Is(err, fs.ErrNotExist) {
			return &fileStore{path: path}, nil
		}
		if err != nil {
			return nil, err
		}
		info, err := f.Stat()
		if err == nil && !info.Mode().IsRegular() {
			err = fmt.Errorf("%w: %s is not a regular file", ErrSidecar, path)
		}
		if err == nil {
			err = lock(f)
		}
		if err != nil {
			f.Close()
			return nil, err
		}
		// Whoever had it may have put another in its place before letting go.
		if now, err := os.Stat(path); err == nil && os.SameFile(info, now) {
			return &fileStore{path: path, file: f}, nil
		}
		f.Close()
	}
}

func lock(f *os.File) error {
	err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if err == unix.EWOULDBLOCK {
		return fmt.Errorf("%w: %s", block.ErrInUse, f.Name())
	}
	return err
}

func (s *fileStore) ReadAt(b []byte, off int64) (int, error) {
	if s.file == nil {
		return 0, io.EOF
	}
	return s.file.ReadAt(b, off)
}

func (s *fileStore) WriteAt(b []byte, off int64) (int, error) { return s.file.WriteAt(b, off) }

func (s *fileStore) Sync() error {
	for {
		if err := unix.Fdatasync(int(s.file.Fd())); err != unix.EINTR {
			return err
		}
	}
}

func (s *fileStore) Invalidate() error {
	removed := os.Remove(s.path)
	if removed == nil {
		removed = syncDirectory(s.path)
	}
	if removed == nil {
		return nil
	}
	emptied := s.file.Truncate(0)
	if emptied == nil {
		emptied = s.file.Sync()
	}
	if emptied == nil {
		return nil
	}
	return errors.Join(removed, emptied)
}

func (s *fileStore) Replace(content []byte) error {
	f, err := os.CreateTemp(filepath.Dir(s.path), filepath.Base(s.path)+".*.new")
	if err != nil {
		return err
	}
	fail := func(err error) error {
		return errors.Join(err, f.Close(), os.Remove(f.Name()))
	}
	if err := lock(f); err != nil {
		return fail(err)
	}
	if _, err := f.Write(content); err != nil {
		return fail(err)
	}
	if err := f.Sync(); err != nil {
		return fail(err)
	}
	if s.file != nil {
		err = os.Rename(f.Name(), s.path)
	} else { // two may have found none: one of them makes it
		if err = os.Link(f.Name(), s.path); errors.Is(err, fs.ErrExist) {
			err = fmt.Errorf("%w: %s", block.ErrInUse, s.path)
		}
		err = errors.Join(err, os.Remove(f.Name()))
	}
	if err != nil {
		return errors.Join(err, f.Close())
	}
	if s.file != nil {
		s.file.Close()
	}
	s.file = f
	return syncDirectory(s.path)
}

func syncDirectory(path string) error {
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func (s *fileStore) Close() error {
	if s.file == nil {
		return nil
	}
	return s.file.Close()
}
