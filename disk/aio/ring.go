package aio

import (
	"fmt"
	"os"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// operation is one of IORING_OP_READV and so on.
type operation uint8

const (
	opRead        operation = 1
	opWrite       operation = 2
	opReadBuffer  operation = 22
	opWriteBuffer operation = 23
)

// ringEntries is how many requests a ring has under way at most; more wait.
const ringEntries = 128

// ring is an io_uring that any number of goroutines use. One of those that wait for
// a request, the leader, waits in the kernel and takes completions for all; the
// others sleep until it wakes them. When its own request is done it hands over to
// one of them. A request that is the only one is made by the calling thread, which takes
// the kernel less. So one request alone costs one system call and wakes nobody.
//
// Requests are given to the kernel together: who is about to do so lets other
// goroutines run first, whose requests go along.
type ring struct {
	shared // with the kernel; its submission side is guarded by mu, its completions are the leader's

	mu        sync.Mutex
	room      sync.Cond // on mu: a slot is free
	slots     [ringEntries]slot
	free      []*slot // guarded by mu
	gathering bool    // somebody is going to submit what there is; guarded by mu
	led       bool    // there is a leader; guarded by mu
	last      *slot   // of the list of requests that are not done, by their age; guarded by mu
	closed    bool    // guarded by mu
}

// slot is a request under way.
type slot struct {
	index  uint64
	older  *slot // guarded by ring.mu
	newer  *slot // guarded by ring.mu
	vector *vector
	result int32     // what the kernel made of it, once done
	done   bool      // guarded by ring.mu
	wake   chan bool // its owner is done, or else the leader
}

func newRing() (*ring, error) {
	r := &ring{}
	r.room.L = &r.mu
	if err := r.setUp(ringEntries); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrRing, explain(err))
	}
	r.free = make([]*slot, 0, ringEntries)
	for i := range r.slots {
		r.slots[i] = slot{index: uint64(i), wake: make(chan bool, 1)}
		r.free = append(r.free, &r.slots[i])
	}
	return r, nil
}

// explain says what keeps us from having a ring.
func explain(err error) error {
	switch err {
	case unix.ENOSYS:
		return fmt.Errorf("the kernel has none, or a sandbox hides it: %w", err)
	case unix.EPERM, unix.EACCES:
		return fmt.Errorf("not allowed here (/proc/sys/kernel/io_uring_disabled, or a sandbox): %w", err)
	case unix.ENOMEM:
		return fmt.Errorf("no memory for it (ulimit -l on old kernels): %w", err)
	}
	return err
}

// do makes one request and returns how many bytes it moved.
func (r *ring) do(op operation, fd int, v *vector, off int64) (int, error) {
	r.mu.Lock()
	for len(r.free) == 0 && !r.closed {
		r.room.Wait()
	}
	if r.closed {
		r.mu.Unlock()
		return 0, os.ErrClosed
	}
	if len(r.free) == ringEntries {
		s := r.take()
		r.mu.Unlock()
		n, err := moveHere(op, fd, v, off)
		r.end(s)
		return n, err
	}
	s := r.begin(v)
	r.push(s.index, op, fd, v, off)
	switch {
	case !r.led:
		r.led = true
		r.mu.Unlock()
		r.lead(s)
	case r.gathering:
		r.mu.Unlock()
		r.await(s)
	default: // the leader sleeps in the kernel
		r.gather()
		r.mu.Unlock()
		r.submit(0)
		r.await(s)
	}
	result := s.result
	r.end(s)
	if result < 0 {
		return 0, unix.Errno(-result)
	}
	return int(result), nil
}

// take takes a slot. Preconditions: mu is held; one is free.
func (r *ring) take() *slot {
	s := r.free[len(r.free)-1]
	r.free = r.free[:len(r.free)-1]
	return s
}

// begin begins a request. Preconditions: mu is held; a slot is free.
func (r *ring) begin(v *vector) *slot {
	s := r.take()
	s.vector, s.done = v, false
	s.older, s.newer = r.last, nil
	if r.last != nil {
		r.last.newer = s
	}
	r.last = s
	return s
}

func (r *ring) end(s *slot) {
	r.mu.Lock()
	s.vector = nil
	r.free = append(r.free, s)
	if r.closed {
		r.room.Broadcast()
	} else {
		r.room.Signal()
	}
	r.mu.Unlock()
}

// gather lets goroutines run that may have requests, too. Preconditions: mu is held;
// it is let go of meanwhile.
func (r *ring) gather() {
	r.gathering = true
	r.mu.Unlock()
	runtime.Gosched()
	r.mu.Lock()
	r.gathering = false
}

// await returns when the request is done.
func (r *ring) await(s *slot) {
	if done := <-s.wake; !done {
		r.lead(s)
	}
}

// lead takes completions until the request is done itself.
func (r *ring) lead(s *slot) {
	r.mu.Lock()
	for {
		woken := r.reap(s)
		if s.done {
			r.led = r.last != nil
			if r.last != nil {
				r.last.wake <- false
			}
			r.mu.Unlock()
			return
		}
		if woken > 0 {
			r.gather()
			if r.completed() {
				continue
			}
		}
		r.mu.Unlock()
		r.submit(1)
		r.mu.Lock()
	}
}

// reap takes what is complete, and wakes those who wait for it, but for the owner of
// me. Preconditions: mu is held, by the leader.
func (r *ring) reap(me *slot) (woken int) {
	for {
		index, result, ok := r.pop()
		if !ok {
			return woken
		}
		s := &r.slots[index%ringEntries]
		if s.older != nil {
			s.older.newer = s.newer
		}
		if s.newer != nil {
			s.newer.older = s.older
		} else {
			r.last = s.older
		}
		s.result, s.done = result, true
		if s != me {
			woken++
			s.wake <- true
		}
	}
}

// submit gives the kernel what there is, and waits until so many requests are complete.
func (r *shared) submit(complete uint32) {
	for {
		err := r.enter(complete)
		switch err {
		case 0:
		case unix.EINTR:
			if complete > 0 {
				return // the leader looks again
			}
			continue
		default:
			// Out of memory for now, most likely. Whatever it is: the kernel may have
			// requests, which have to be waited for.
			time.Sleep(time.Millisecond)
			if complete > 0 {
				return
			}
			continue
		}
		if complete > 0 || !r.unsubmitted() {
			return
		}
	}
}

// close waits for the requests under way.
func (r *ring) close() error {
	r.mu.Lock()
	if r.closed {
		r.mu.Unlock()
		return nil
	}
	r.closed = true
	r.room.Broadcast()
	for len(r.free) < ringEntries {
		r.room.Wait()
	}
	r.mu.Unlock()
	return r.tearDown()
}
