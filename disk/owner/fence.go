package owner

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// ErrFence is an owner that may still be able to write and could not be shut out.
var ErrFence = errors.New("fence")

const (
	// settle is longer than the interval at which file systems stamp changes: a
	// file whose stamp is that old gets another one with its next change.
	settle = 20 * time.Millisecond
	// copyAttempts bounds how often a disk is copied again because a late
	// write came between.
	copyAttempts = 10
)

// replaceDisk puts a copy of the disk, shared with it where the file system can, in
// the disk's place. Descriptors that others have go on to lead to the old file, which
// has no name any more: whatever they write late is lost, and the space is
// given back when they are closed. claim is the caller's claim
// directory: if a successor has removed it the disk stays as it is (errRaced).
// The returned file is the new one, locked as takeAnchor does.
func replaceDisk(ctx context.Context, d directory, claim string) (*os.File, error) {
	src, err := os.Open(d.image)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrFence, err)
	}
	defer src.Close()
	st, err := src.Stat()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrFence, err)
	}
	if !st.Mode().IsRegular() {
		return nil, fmt.Errorf("%w: %s is not a regular file, so it cannot be replaced", ErrFence, d.image)
	}
	if sys, ok := sysStat(st); ok && sys.Nlink != 1 {
		return nil, fmt.Errorf("%w: %s has %d names, so it cannot be replaced", ErrFence, d.image, sys.Nlink)
	}
	temp := filepath.Join(d.path, claim, copyName)
	dst, err := os.OpenFile(temp, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, fenceError(err)
	}
	err = fillCopy(ctx, dst, src)
	if err == nil {
		err = copyAttributes(dst, src, st)
	}
	if err == nil {
		err = dst.Sync()
	}
	if err == nil {
		err = lockAnchor(dst)
	}
	if err == nil {
		// Not there any more: a successor has shut us out.
		err = os.Rename(temp, d.image)
	}
	if err != nil {
		dst.Close()
		os.Remove(temp)
		return nil, fenceError(err)
	}
	if err := syncDirectory(filepath.Dir(d.image)); err != nil {
		dst.Close()
		return nil, err
	}
	return dst, nil
}

func fenceError(err error) error {
	if errors.Is(err, os.ErrNotExist) {
		return errRaced
	}
	return fmt.Errorf("%w: %w", ErrFence, err)
}

// fillCopy makes dst what src is at one instant.
func fillCopy(ctx context.Context, dst, src *os.File) error {
	for range copyAttempts {
		before, err := settled(ctx, src)
		if err != nil {
			return err
		}
		if err := unix.IoctlFileClone(int(dst.Fd()), int(src.Fd())); err == nil {
			return nil
		}
		if err := copySparse(ctx, dst, src, before.size); err != nil {
			return err
		}
		after, err := stampOf(src)
		if err != nil {
			return err
		}
		if after == before {
			return nil
		}
	}
	return errors.New("the old owner changes the disk while it is copied")
}

// stamp is what changes with each change of a file.
type stamp struct {
	changed, modified unix.StatxTimestamp
	size              int64
}

func stampOf(f *os.File) (stamp, error) {
	var st unix.Statx_t
	err := unix.Statx(int(f.Fd()), "", unix.AT_EMPTY_PATH|unix.AT_STATX_FORCE_SYNC, unix.STATX_CTIME|unix.STATX_MTIME|unix.STATX_SIZE, &st)
	return stamp{st.Ctime, st.Mtime, int64(st.Size)}, err
}

// settled waits until the file has not changed for a while.
func settled(ctx context.Context, f *os.File) (stamp, error) {
	last, err := stampOf(f)
	for err == nil {
		if err := pause(ctx, settle); err != nil {
			return stamp{}, err
		}
		var s stamp
		if s, err = stampOf(f); s == last {
			break
		}
		last = s
	}
	return last, err
}

// copySparse copies what src holds as data; the rest of dst are holes.
func copySparse(ctx context.Context, dst, src *os.File, size int64) error {
	if err := dst.Truncate(0); err != nil {
		return err
	}
	if err := dst.Truncate(size); err != nil {
		return err
	}
	for at := int64(0); at < size; {
		start, err := unix.Seek(int(src.Fd()), at, unix.SEEK_DATA)
		if err == unix.ENXIO {
			return nil // only a hole is left
		}
		if err != nil {
			return err
		}
		if at, err = unix.Seek(int(src.Fd()), start, unix.SEEK_HOLE); err != nil {
			return err
		}
		if err := copyRange(ctx, dst, src, start, at); err != nil {
			return err
		}
	}
	return nil
}

// copyRange lets the file system copy, or the kernel.
func copyRange(ctx context.Context, dst, src *os.File, from, to int64) error {
	const most = 16 << 20 // of one call, to hear of a cancellation
	for from < to {
		if err := ctx.Err(); err != nil {
			return err
		}
		in, out := from, from
		n, err := unix.CopyFileRange(int(src.Fd()), &in, int(dst.Fd()), &out, int(min(most, to-from)), 0)
		if err != nil {
			return err
		}
		if n == 0 {
			return nil // the file has become shorter, which its stamp tells
		}
		from += int64(n)
	}
	return nil
}

func copyAttributes(dst, src *os.File, st os.FileInfo) error {
	if sys, ok := sysStat(st); ok && (int(sys.Uid) != os.Geteuid() || int(sys.Gid) != os.Getegid()) {
		if err := dst.Chown(int(sys.Uid), int(sys.Gid)); err != nil {
			return err
		}
	}
	if err := dst.Chmod(st.Mode().Perm()); err != nil {
		return err
	}
	return copyXattrs(dst, src)
}

// copyXattrs copies labels and access lists.
func copyXattrs(dst, src *os.File) error {
	names := make([]byte, 64<<10) // the most that Linux has
	n, err := unix.Flistxattr(int(src.Fd()), names)
	if err == unix.ENOTSUP {
		return nil
	}
	if err != nil {
		return err
	}
	value := make([]byte, 64<<10)
	for names = names[:n]; len(names) > 0; {
		name := unix.ByteSliceToString(names)
		names = names[min(len(name)+1, len(names)):]
		v, err := unix.Fgetxattr(int(src.Fd()), name, value)
		if err != nil {
			return err
		}
		if err := unix.Fsetxattr(int(dst.Fd()), name, value[:v], 0); err != nil {
			return fmt.Errorf("attribute %s: %w", name, err)
		}
	}
	return nil
}

// pause waits for d or until ctx ends.
func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
