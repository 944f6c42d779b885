// Package aio reads and writes a file past the page cache (O_DIRECT), by an
// io_uring or by the calling threads. Requests need no alignment: what the file
// system cannot take as it is goes through aligned memory.
package aio

import (
	"errors"
	"fmt"
	"io"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/internal/iovec"
)

// Engine is how requests get to the kernel.
type Engine string

// Engines, in QEMU's words.
const (
	// Auto is IOUring where the kernel lets us use it, and Threads otherwise.
	Auto Engine = ""
	// Threads has each request made by the calling thread, which waits for it.
	Threads Engine = "threads"
	// IOUring has requests of several goroutines given to the kernel together.
	IOUring Engine = "io_uring"
)

// Errors of New, wrapped with what they concern.
var (
	ErrRing   = errors.New("io_uring")
	ErrDirect = errors.New("direct I/O")
)

// Options say how a File does its requests.
type Options struct {
	Engine Engine
	// Direct tells that the file was opened with O_DIRECT.
	Direct bool
	// Align, where not 0, is the alignment of direct requests in bytes, a power of
	// two; otherwise the kernel is asked for it.
	Align int64
}

// File reads and writes an open file. Its methods may be called concurrently.
type File struct {
	fd     int
	align  int64 // of offsets and lengths, bytes; 1: any will do
	memory int64 // of addresses, bytes; 1: any will do
	ring   *ring // nil: the threads engine
	why    error // why Auto has become Threads; or nil
	writes ranges

	cached atomic.Int64 // the same file without O_DIRECT, plus 1; 0: not open
}

// New returns a File over fd, which stays the caller's, is closed after the File, and
// is not O_NONBLOCK.
// Errors wrap ErrRing where IOUring was asked for and cannot be used, and
// ErrDirect where the file system has no direct I/O.
func New(fd int, o Options) (*File, error) {
	f := &File{fd: fd, align: 1, memory: 1}
	f.writes.changed.L = &f.writes.mu
	if o.Direct {
		var err error
		if f.align, f.memory, err = alignment(fd); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrDirect, err)
		}
		if o.Align != 0 {
			f.align, f.memory = o.Align, o.Align
		}
	}
	if o.Engine == Threads {
		return f, nil
	}
	var err error
	if f.ring, err = newRing(); err != nil {
		if o.Engine == IOUring {
			return nil, err
		}
		f.why = err
	}
	return f, nil
}

// Probe tells why no io_uring can be used here; nil: it can.
func Probe() error {
	r, err := newRing()
	if err != nil {
		return err
	}
	return r.close()
}

// Engine is the one in use, and why it is not the better one, or nil.
func (f *File) Engine() (Engine, error) {
	if f.ring == nil {
		return Threads, f.why
	}
	return IOUring, nil
}

// Close waits for requests under way; later ones fail with os.ErrClosed where an
// io_uring is used.
func (f *File) Close() error {
	var err error
	if f.ring != nil {
		err = f.ring.close()
	}
	if fd := f.cached.Swap(0); fd != 0 {
		err = errors.Join(err, unix.Close(int(fd-1)))
	}
	return err
}

// Readv fills bufs from off on and returns how much there was before the file's end.
func (f *File) Readv(bufs [][]byte, off int64) (int64, error) {
	n, ok := f.aligned(bufs, off)
	if !ok {
		return f.readAround(bufs, off, n)
	}
	return f.transfer(opRead, bufs, off)
}

// Writev writes bufs from off on. Where blocks must be written as a whole, bytes
// before limit around them stay as they are, and the file gets no longer than limit
// or the end of bufs.
func (f *File) Writev(bufs [][]byte, off, limit int64) error {
	n, ok := f.aligned(bufs, off)
	if f.align == 1 {
		return f.write(bufs, off, n)
	}
	if !ok {
		return f.writeAround(bufs, off, n, limit)
	}
	f.writes.lock(off, off+n, false)
	defer f.writes.unlock(off, off+n, false)
	return f.write(bufs, off, n)
}

// Change calls change, which alters the n bytes at off of the file by other
// means, while no block that is partly theirs is being written as a whole.
func (f *File) Change(off, n int64, change func() error) error {
	if f.align == 1 {
		return change()
	}
	f.writes.lock(off, off+n, false)
	defer f.writes.unlock(off, off+n, false)
	return change()
}

func (f *File) write(bufs [][]byte, off, n int64) error {
	done, err := f.transfer(opWrite, bufs, off)
	if err == nil && done < n {
		return io.ErrShortWrite
	}
	return err
}

// transfer moves bufs, which are aligned, by as many requests as it takes, until
// one moves nothing or less than a block. It leaves bufs as it was.
func (f *File) transfer(op operation, bufs [][]byte, off int64) (int64, error) {
	done, skip := int64(0), 0
	for {
		if bufs, skip = iovec.Rest(bufs, skip); len(bufs) == 0 {
			return done, nil
		}
		got, err := f.move(op, bufs, skip, off+done)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return done, err
		}
		whole := int64(got) &^ (f.align - 1)
		if whole == 0 {
			return done + int64(got), nil
		}
		done += whole
		skip += int(whole)
	}
}

// move makes one request.
func (f *File) move(op operation, bufs [][]byte, skip int, off int64) (int, error) {
	v := vectors.Get().(*vector)
	defer v.release()
	v.fill(bufs, skip)
	if f.ring != nil {
		return f.ring.do(op, f.fd, v, off)
	}
	return moveHere(op, f.fd, v, off)
}
