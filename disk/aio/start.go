package aio

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/disk/block"
)

// Ring is an io_uring of one goroutine, which begins requests of any number of files and
// hears of their ends. Requests cost it no memory.
type Ring struct {
	shared
	slots    [ringEntries]started
	free     []uint8
	unpushed bool // there may be requests that the kernel has not been told of
}

// started is a request under way.
type started struct {
	request *block.Request
	vector  *vector // or nil
	length  int64   // bytes
}

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

// Start implements block.Ring. The kernel hears of it at the next Submit.
func (r *Ring) Start(q *block.Request, fd int) bool {
	if len(r.free) == 0 {
		return false
	}
	s := started{request: q}
	buffers, last := 0, 0
	for i, b := range q.Bufs {
		if len(b) > 0 {
			s.length += int64(len(b))
			buffers, last = buffers+1, i
		}
	}
	if buffers == 0 || buffers > maxVectors {
		return false
	}
	index := r.free[len(r.free)-1]
	r.free = r.free[:len(r.free)-1]
	if buffers == 1 {
		r.pushBuffer(uint64(index), q.Write, fd, q.Bufs[last], q.Off)
	} else {
		s.vector = vectors.Get().(*vector)
		s.vector.fill(q.Bufs, 0)
		op := opRead
		if q.Write {
			op = opWrite
		}
		r.push(uint64(index), op, fd, s.vector, q.Off)
	}
	r.slots[index], r.unpushed = s, true
	return true
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
		s := r.slots[index%ringEntries]
		r.slots[index%ringEntries] = started{}
		r.free = append(r.free, uint8(index))
		if s.vector != nil {
			s.vector.release()
		}
		var err error
		switch {
		case result == -int32(unix.EINTR), result == -int32(unix.EAGAIN), result >= 0 && int64(result) < s.length:
			err = block.ErrAgain
		case result < 0:
			err = unix.Errno(-result)
		}
		s.request.End(err)
	}
}

// Arm has the eventfd be signalled when the next request ends. It returns true where
// some have ended before that could take effect.
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
