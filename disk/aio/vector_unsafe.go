package aio

import (
	"math"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/internal/iovec"
)

// vector is the kernel's form of a list of buffers. It keeps them alive.
type vector struct {
	list [iovec.Max]unix.Iovec
	n    int
}

var vectors = sync.Pool{New: func() any { return new(vector) }}

// fill lists the bytes of bufs behind the first skip, which lie in bufs[0]; as many
// buffers as there is room for.
func (v *vector) fill(bufs [][]byte, skip int) {
	v.n = len(iovec.Append(v.list[:0], bufs, skip, math.MaxInt))
}

func (v *vector) release() {
	clear(v.list[:v.n])
	v.n = 0
	vectors.Put(v)
}

// moveHere makes a request by the calling thread.
func moveHere(op operation, fd int, v *vector, off int64) (int, error) {
	call := uintptr(unix.SYS_PREADV)
	if op == opWrite {
		call = unix.SYS_PWRITEV
	}
	got, _, errno := unix.Syscall6(call, uintptr(fd), uintptr(unsafe.Pointer(&v.list)), uintptr(v.n), uintptr(off), 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(got), nil
}

// aligned returns how many bytes bufs have, and whether the file takes them as they
// are, at off.
func (f *File) aligned(bufs [][]byte, off int64) (n int64, ok bool) {
	together := off
	for _, b := range bufs {
		n += int64(len(b))
		together |= int64(len(b))
	}
	ok = together&(f.align-1) == 0
	if ok && f.memory > 1 {
		for _, b := range bufs {
			if uintptr(unsafe.Pointer(unsafe.SliceData(b)))&uintptr(f.memory-1) != 0 && len(b) > 0 {
				return n, false
			}
		}
	}
	return n, ok
}

// alignedMemory is memory that suits any file.
func alignedMemory(n int) []byte {
	b := make([]byte, n+maxAlignment)
	skip := -uintptr(unsafe.Pointer(&b[0])) & (maxAlignment - 1)
	return b[skip:][:n:n]
}
