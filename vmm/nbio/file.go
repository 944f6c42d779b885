// Package nbio reads and writes file descriptors without waiting, and tells by
// callback when waiting is over. It is how devices move bytes straight between
// guest memory and a tap device or a socket: the device's worker makes the call,
// and the Go run-time's poller does the waiting on another goroutine.
package nbio

import (
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/internal/iovec"
)

// ErrAgain is returned when a call would have to wait.
var ErrAgain = errors.New("would block")

// File is one descriptor. Readv must not be called by two goroutines at once,
// nor Writev; the two may overlap.
type File struct {
	file *os.File
	raw  syscall.RawConn

	in, out direction

	closing chan struct{}
	once    sync.Once
	done    sync.WaitGroup // the two watchers
}

// direction is what reading and writing each have.
type direction struct {
	ready func()        // called when it may be tried again
	arm   chan struct{} // has an element when the watcher shall wait
	iov   []unix.Iovec  // reused from call to call
	call  func(fd uintptr)
	n     int
	errno syscall.Errno
}

// New takes over fd. onReadable is called when Readv may succeed after it
// returned ErrAgain, and once at first; onWritable when Writev may. They run on
// goroutines of the File, and may call Readv and Writev, but not Close.
func New(fd int, name string, onReadable, onWritable func()) (*File, error) {
	if err := unix.SetNonblock(fd, true); err != nil {
		return nil, errors.Join(fmt.Errorf("make %s non-blocking: %w", name, err), unix.Close(fd))
	}
	f := &File{file: os.NewFile(uintptr(fd), name), closing: make(chan struct{})}
	raw, err := f.file.SyscallConn()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("poll %s: %w", name, err), f.file.Close())
	}
	f.raw = raw
	f.in = direction{ready: onReadable, arm: make(chan struct{}, 1)}
	f.out = direction{ready: onWritable, arm: make(chan struct{}, 1)}
	f.in.call = func(fd uintptr) { f.in.n, f.in.errno = vectored(unix.SYS_READV, fd, f.in.iov) }
	f.out.call = func(fd uintptr) { f.out.n, f.out.errno = vectored(unix.SYS_WRITEV, fd, f.out.iov) }
	f.in.arm <- struct{}{}
	f.done.Add(2)
	go f.watch(&f.in, raw.Read, unix.POLLIN)
	go f.watch(&f.out, raw.Write, unix.POLLOUT)
	return f, nil
}

// watch waits for readiness whenever it is armed, and says so.
func (f *File) watch(d *direction, wait func(func(uintptr) bool) error, events int16) {
	defer f.done.Done()
	// The run-time's poller is edge-triggered: the level is looked at after it
	// has begun to watch for the edge, so neither can be missed.
	isReady := func(fd uintptr) bool {
		p := [1]unix.PollFd{{Fd: int32(fd), Events: events}}
		n, err := unix.Poll(p[:], 0)
		return n > 0 || (err != nil && !errors.Is(err, unix.EINTR))
	}
	for {
		select {
		case <-f.closing:
			return
		case <-d.arm:
		}
		if err := wait(isReady); err != nil {
			return
		}
		if d.ready != nil {
			d.ready()
		}
	}
}

// Readv reads into the pieces of p in order. It returns ErrAgain when there is
// nothing to read yet, and io.EOF at the end.
func (f *File) Readv(p [][]byte) (int, error) {
	n, err := f.run(&f.in, p, "read")
	if err == nil && n == 0 && len(f.in.iov) > 0 {
		return 0, io.EOF
	}
	return n, err
}

// Writev writes the pieces of p in order and returns how many bytes went. It
// returns ErrAgain when none could.
func (f *File) Writev(p [][]byte) (int, error) { return f.run(&f.out, p, "write") }

func (f *File) run(d *direction, p [][]byte, verb string) (int, error) {
	d.iov = iovec.Append(d.iov[:0], p, 0, math.MaxInt)
	if len(d.iov) == 0 {
		return 0, nil
	}
	for {
		// Control holds the descriptor open against a Close that overlaps.
		if err := f.raw.Control(d.call); err != nil {
			return 0, fmt.Errorf("%s %s: %w", verb, f.file.Name(), err)
		}
		switch d.errno {
		case 0:
			return d.n, nil
		case unix.EINTR:
		case unix.EAGAIN:
			select {
			case d.arm <- struct{}{}:
			default:
			}
			return 0, ErrAgain
		default:
			return 0, fmt.Errorf("%s %s: %w", verb, f.file.Name(), d.errno)
		}
	}
}

// Control calls fn with the descriptor, which stays open while fn runs.
func (f *File) Control(fn func(fd uintptr)) error { return f.raw.Control(fn) }

// Close closes the descriptor and waits until no callback runs any more.
func (f *File) Close() error {
	var err error
	f.once.Do(func() {
		close(f.closing)
		err = f.file.Close()
	})
	f.done.Wait()
	return err
}
