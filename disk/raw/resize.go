package raw

import (
	"errors"
	"fmt"
	"io"
	"io/fs"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/disk/block"
)

var _ block.Resizer = (*Node)(nil)

// ErrDevice is what a block device cannot be asked for.
var ErrDevice = errors.New("a block device")

// Resize implements block.Resizer. A block device has the size that it has, and one that
// has become larger or smaller by other means is taken as it is.
func (n *Node) Resize(size int64) error {
	return n.Extend(size, func() error { return nil })
}

// Extend is Resize to size, with the disk's new end filled by fill. The file has the new
// size when that has succeeded, and the old one, with what fill took given back, when it
// has not. Interrupted by the end of the process, it has what fill wrote.
func (n *Node) Extend(size int64, fill func() error) error {
	if n.readOnly {
		return block.ErrReadOnly
	}
	if err := n.extend(size, fill); err != nil {
		return fmt.Errorf("disk %s: resize: %w", n.file.Name(), err)
	}
	return nil
}

func (n *Node) extend(size int64, fill func() error) error {
	info, err := n.file.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return n.resizeDevice(size)
	}
	old := n.size.Load()
	n.Grow(size)
	if err = fill(); err == nil {
		err = n.file.Truncate(size)
	}
	if err != nil {
		n.size.Store(old)
		return errors.Join(withoutPath(err), withoutPath(n.file.Truncate(info.Size())))
	}
	n.size.Store(size)
	return nil
}

func (n *Node) resizeDevice(size int64) error {
	has, err := n.file.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	if size != has {
		return fmt.Errorf("%w has the size that it has, %d bytes: it is resized by what made it (lvresize, losetup -c)", ErrDevice, has)
	}
	n.size.Store(size)
	return nil
}

// withoutPath is an error without the path that a message names already.
func withoutPath(err error) error {
	var at *fs.PathError
	if errors.As(err, &at) {
		return fmt.Errorf("%s: %w", at.Op, at.Err)
	}
	return err
}

// Allocate has the host's file system keep space for a range, also of what lies behind
// the file's end, which stays where it is. What the range holds stays.
func (n *Node) Allocate(off, length int64) error {
	if err := n.checkWrite(off, length); err != nil {
		return err
	}
	if err := n.fallocate(unix.FALLOC_FL_KEEP_SIZE, off, length); err != nil {
		return fmt.Errorf("allocate %d bytes at %d: %w", length, off, err)
	}
	return nil
}
