package aio

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/internal/iovec"
)

// Ring is an io_uring of one goroutine, which begins requests of any number of files and
// hears of their ends. Requests cost it no memory.
type Ring struct {
	shared
	slots    [ringEntries]started
	free     []uint8
	unpushed bool // there may be requests that the kernel has not been told of
}

// started is a request under way, or a part of one.
type started struct {
	vector *vector // or nil
	length int64   // bytes
	whole  uint8   // the slot of the request's first part, where the following is

	request *block.Request
	parts   int // that have not ended
	err     error
}

// maxPart is the most that the kernel is asked for at once, of memory that lies side by
// side. A device takes some hundred segments, and memory in pages of 4 KiB has one for each:
// what is more, the kernel would have to split, which it does in a thread of its own only.
const maxPart = 512 << 10

// large is from where a request is told to the kernel by itself. What is told together and
// lies side by side in the file becomes one request of the device, of some megabytes:
// then all of it ends at once, and the device does less at the same time.
const large = 256 << 10

var _ block.Ring = (*Ring)(nil)

// NewRing returns a Ring that signals an eventfd when requests have ended, after Arm.
func NewRing(eventfd int) (*Ring, error) {
	r := &Ring{}
	if err := r.setUp(ringEntries); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrRing, explain(err))
	}
	if err := r.signal(eventfd); err != nil {
		return nil, errors.Join(fmt.Errorf("%w: %w", ErrRing, err), r.tearDown())
	}
	r.quiet(true)
	for i := range r.slots {
		r.free = append(r.free, uint8(i))
	}
	return r, nil
}

// Close ends the use of the ring. No requests are under way.
func (r *Ring) Close() error { return r.tearDown() }

// Start implements block.Ring. The kernel hears of a small request at the next Submit.
func (r *Ring) Start(q *block.Request, fd int) bool {
	if len(r.free) == 0 {
		return false
	}
	length, buffers, last := int64(0), 0, 0
	for i, b := range q.Bufs {
		if len(b) > 0 {
			length += int64(len(b))
			buffers, last = buffers+1, i
		}
	}
	if buffers == 0 || buffers > iovec.Max {
		return false
	}
	if buffers > 1 {
		r.startVector(q, fd, length)
	} else if !r.startParts(q, fd, q.Bufs[last]) {
		return false
	}
	r.unpushed = true
	if length >= large {
		r.Submit()
	}
	return true
}

// startVector is Start of a request for several buffers.
func (r *Ring) startVector(q *block.Request, fd int, length int64) {
	v := vectors.Get().(*vector)
	v.fill(q.Bufs, 0)
	op := opRead
	if q.Write {
		op = opWrite
	}
	index := r.take()
	r.slots[index] = started{vector: v, length: length, whole: index, request: q, parts: 1}
	r.push(uint64(index), op, fd, v, q.Off)
}

// startParts is Start of a request for one buffer.
func (r *Ring) startParts(q *block.Request, fd int, buf []byte) bool {
	parts := (len(buf) + maxPart - 1) / maxPart
	if parts > len(r.free) {
		return false
	}
	whole := r.take()
	r.slots[whole] = started{request: q, parts: parts}
	for index, off := whole, q.Off; ; index = r.take() {
		part := buf[:min(maxPart, len(buf))]
		r.slots[index].length, r.slots[index].whole = int64(len(part)), whole
		r.pushBuffer(uint64(index), q.Write, fd, part, off)
		off, buf = off+int64(len(part)), buf[len(part):]
		if len(buf) == 0 {
			return true
		}
	}
}

// take takes a free slot, which there is.
func (r *Ring) take() uint8 {
	index := r.free[len(r.free)-1]
	r.free = r.free[:len(r.free)-1]
	return index
}

// give gives a slot back.
func (r *Ring) give(index uint8) {
	r.slots[index] = started{}
	r.free = append(r.free, index)
}

// UnderWay is how many requests have not ended.
func (r *Ring) UnderWay() int { return ringEntries - len(r.free) }

// Submit tells the kernel of what was started.
func (r *Ring) Submit() {
	if r.unpushed {
		r.unpushed = false
		r.submit(0)
	}
}

// Reap ends requests that the kernel is done with. Those that it did not do as a whole
// end with block.ErrAgain.
func (r *Ring) Reap() {
	r.quiet(true)
	for {
		index, result, ok := r.pop()
		if !ok {
			return
		}
		r.ended(uint8(index%ringEntries), result)
	}
}

// ended ends a part, and the request whose last it is.
func (r *Ring) ended(index uint8, result int32) {
	s := r.slots[index]
	whole := &r.slots[s.whole]
	if s.vector != nil {
		s.vector.release()
	}
	switch {
	case result == -int32(unix.EINTR), result == -int32(unix.EAGAIN), result >= 0 && int64(result) < s.length:
		whole.err = block.ErrAgain
	case result < 0 && whole.err == nil:
		whole.err = unix.Errno(-result)
	}
	whole.parts--
	if index != s.whole {
		r.give(index)
	}
	if whole.parts == 0 {
		request, err := whole.request, whole.err
		r.give(s.whole)
		request.End(err)
	}
}

// Ended tells whether there are requests for Reap to end. It costs no system call: the
// kernel interrupts the thread that told it of a request to note that one is done.
func (r *Ring) Ended() bool { return r.completed() }

// Arm has the eventfd be signalled when the next request ends. It returns true where
// some have ended before that could take effect: the kernel notes that one is done, and
// looks only then, behind a fence, whether to signal.
func (r *Ring) Arm() bool {
	r.quiet(false)
	return r.completed()
}

// Start begins a request where the file's io_uring would do it, and the file takes it as
// it is; see block.Starter.
func (f *File) Start(r *block.Request) bool {
	if f.ring == nil {
		return false
	}
	n, ok := f.aligned(r.Bufs, r.Off)
	if !ok {
		return false
	}
	if !r.Write || f.align == 1 {
		return r.Ring.Start(r, f.fd)
	}
	if !f.writes.tryLock(r.Off, r.Off+n, false) {
		return false
	}
	if r.Enter(f, n) {
		if r.Ring.Start(r, f.fd) {
			return true
		}
		r.Leave()
	}
	f.writes.unlock(r.Off, r.Off+n, false)
	return false
}

// Ended implements block.Ender: a write of n bytes has ended.
func (f *File) Ended(r *block.Request, n int64, _ error) {
	f.writes.unlock(r.Off, r.Off+n, false)
}
