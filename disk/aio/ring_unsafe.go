package aio

import (
	"errors"
	"fmt"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The kernel's interface (linux/io_uring.h).
const (
	offSQRing = 0
	offSQEs   = 0x10000000

	enterGetEvents = 1

	featSingleMmap   = 1 << 0
	featNoDrop       = 1 << 1
	featSubmitStable = 1 << 2

	registerEventFD           = 4
	completionEventFDDisabled = 1 << 0
)

// submission is struct io_uring_sqe.
type submission struct {
	opcode   uint8
	flags    uint8
	priority uint16
	fd       int32
	off      uint64
	addr     uint64
	length   uint32
	rwFlags  uint32
	userData uint64
	_        [3]uint64
}

// completion is struct io_uring_cqe.
type completion struct {
	userData uint64
	result   int32
	flags    uint32
}

type submissionOffsets struct {
	head, tail, mask, entries, flags, dropped, array, _ uint32
	userAddr                                            uint64
}

type completionOffsets struct {
	head, tail, mask, entries, overflow, cqes, flags, _ uint32
	userAddr                                            uint64
}

// parameters is struct io_uring_params.
type parameters struct {
	sqEntries, cqEntries, flags, threadCPU, threadIdle, features, wqFD uint32
	_                                                                  [3]uint32
	sq                                                                 submissionOffsets
	cq                                                                 completionOffsets
}

// shared is what a ring shares with the kernel. Each end of a queue is moved by one
// side and read by the other.
type shared struct {
	fd              int
	queues, entries []byte // mapped
	sqHead, sqTail  *uint32
	cqHead, cqTail  *uint32
	cqFlags         *uint32
	sqes            []submission
	cqes            []completion
}

// setUp makes a ring of n entries, a power of two, and twice as many completions.
func (r *shared) setUp(n uint32) error {
	var p parameters
	fd, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, uintptr(n), uintptr(unsafe.Pointer(&p)), 0)
	if errno != 0 {
		return errno
	}
	r.fd = int(fd)
	if err := r.mapQueues(&p); err != nil {
		return errors.Join(err, r.tearDown())
	}
	return nil
}

func (r *shared) mapQueues(p *parameters) (err error) {
	const needed = featSingleMmap | featNoDrop | featSubmitStable
	if p.features&needed != needed {
		return fmt.Errorf("the kernel is too old: it has the features %#x of %#x", p.features&needed, needed)
	}
	size := max(p.sq.array+p.sqEntries*4, p.cq.cqes+p.cqEntries*uint32(unsafe.Sizeof(completion{})))
	const access, flags = unix.PROT_READ | unix.PROT_WRITE, unix.MAP_SHARED | unix.MAP_POPULATE
	if r.queues, err = unix.Mmap(r.fd, offSQRing, int(size), access, flags); err != nil {
		return fmt.Errorf("map queues: %w", err)
	}
	if r.entries, err = unix.Mmap(r.fd, offSQEs, int(p.sqEntries)*int(unsafe.Sizeof(submission{})), access, flags); err != nil {
		return fmt.Errorf("map entries: %w", err)
	}
	at := func(off uint32) *uint32 { return (*uint32)(unsafe.Pointer(&r.queues[off])) }
	r.sqHead, r.sqTail, r.cqHead, r.cqTail = at(p.sq.head), at(p.sq.tail), at(p.cq.head), at(p.cq.tail)
	r.cqFlags = at(p.cq.flags)
	r.sqes = unsafe.Slice((*submission)(unsafe.Pointer(&r.entries[0])), p.sqEntries)
	r.cqes = unsafe.Slice((*completion)(unsafe.Pointer(&r.queues[p.cq.cqes])), p.cqEntries)
	// Entries are used in their order.
	array := unsafe.Slice(at(p.sq.array), p.sqEntries)
	for i := range array {
		array[i] = uint32(i)
	}
	return nil
}

func (r *shared) tearDown() error {
	var errs []error
	for _, m := range [][]byte{r.queues, r.entries} {
		if m != nil {
			errs = append(errs, unix.Munmap(m))
		}
	}
	return errors.Join(append(errs, unix.Close(r.fd))...)
}

// push writes an entry, which the kernel takes with the next call of enter.
// Preconditions: mu is held; no more than ringEntries are under way.
func (r *shared) push(index uint64, op operation, fd int, v *vector, off int64) {
	tail := *r.sqTail
	r.sqes[tail&uint32(len(r.sqes)-1)] = submission{
		opcode: uint8(op), fd: int32(fd), off: uint64(off), userData: index,
		addr: uint64(uintptr(unsafe.Pointer(&v.list))), length: uint32(v.n),
	}
	atomic.StoreUint32(r.sqTail, tail+1)
}

// pushBuffer is push for a single buffer. Preconditions: those of push.
func (r *shared) pushBuffer(index uint64, write bool, fd int, buf []byte, off int64) {
	op := opReadBuffer
	if write {
		op = opWriteBuffer
	}
	tail := *r.sqTail
	r.sqes[tail&uint32(len(r.sqes)-1)] = submission{
		opcode: uint8(op), fd: int32(fd), off: uint64(off), userData: index,
		addr: uint64(uintptr(unsafe.Pointer(unsafe.SliceData(buf)))), length: uint32(len(buf)),
	}
	atomic.StoreUint32(r.sqTail, tail+1)
}

// signal has an eventfd be signalled for each completion, unless quiet.
func (r *shared) signal(eventfd int) error {
	fd := int32(eventfd)
	_, _, errno := unix.Syscall6(unix.SYS_IO_URING_REGISTER, uintptr(r.fd), registerEventFD, uintptr(unsafe.Pointer(&fd)), 1, 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// quiet has completions not be signalled, or be signalled again.
func (r *shared) quiet(on bool) {
	flags := uint32(0)
	if on {
		flags = completionEventFDDisabled
	}
	atomic.StoreUint32(r.cqFlags, flags) // and a fence
}

// unsubmitted tells whether there are entries that the kernel has not taken yet.
func (r *shared) unsubmitted() bool {
	return atomic.LoadUint32(r.sqHead) != atomic.LoadUint32(r.sqTail)
}

// enter has the kernel take entries, and waits for so many completions.
func (r *shared) enter(complete uint32) unix.Errno {
	flags := uintptr(0)
	if complete > 0 {
		flags = enterGetEvents
	}
	entries := atomic.LoadUint32(r.sqTail) - atomic.LoadUint32(r.sqHead)
	_, _, errno := unix.Syscall6(unix.SYS_IO_URING_ENTER, uintptr(r.fd), uintptr(entries), uintptr(complete), flags, 0, 0)
	return errno
}

// completed tells whether pop has something.
func (r *shared) completed() bool { return *r.cqHead != atomic.LoadUint32(r.cqTail) }

// pop takes the next completion. It is the leader's.
func (r *shared) pop() (index uint64, result int32, ok bool) {
	head := *r.cqHead
	if head == atomic.LoadUint32(r.cqTail) {
		return 0, 0, false
	}
	c := &r.cqes[head&uint32(len(r.cqes)-1)]
	index, result = c.userData, c.result
	atomic.StoreUint32(r.cqHead, head+1)
	return index, result, true
}
