package raw

import (
	"math"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// copyLimit is how much one preadv copies out of the page cache: 0.2 ms.
const copyLimit = 1 << 20

// iovecs is the kernel's form of a list of buffers. x/sys would allocate one
// for each call with more than a few buffers, as scattered guest pages are.
type iovecs struct{ list [maxVectors]unix.Iovec }

var iovecPool = sync.Pool{New: func() any { return new(iovecs) }}

// preadv and pwritev move what one system call moves of the bytes of bufs
// behind the first skip, which lie in bufs[0].

// preadv takes what is in the page cache without telling Go's scheduler of the
// system call: its monitor would otherwise wake every 20 us of a large copy, on
// a processor that the copy needs. Such a call does not wait for a disk, and
// copyLimit bounds how long it may hold up a collection of garbage.
func preadv(fd int, bufs [][]byte, skip int, off int64) (int, error) {
	v := iovecPool.Get().(*iovecs)
	defer iovecPool.Put(v)
	n := v.fill(bufs, skip, copyLimit)
	got, _, errno := unix.RawSyscall6(unix.SYS_PREADV2, uintptr(fd), uintptr(unsafe.Pointer(&v.list)), uintptr(n), uintptr(off), 0, unix.RWF_NOWAIT)
	if errno != 0 {
		// Not in the cache, or on a file system that cannot tell.
		n = v.fill(bufs, skip, math.MaxInt)
		got, _, errno = unix.Syscall6(unix.SYS_PREADV, uintptr(fd), uintptr(unsafe.Pointer(&v.list)), uintptr(n), uintptr(off), 0, 0)
	}
	clear(v.list[:n])
	if errno != 0 {
		return 0, errno
	}
	return int(got), nil
}

func pwritev(fd int, bufs [][]byte, skip int, off int64) (int, error) {
	v := iovecPool.Get().(*iovecs)
	defer iovecPool.Put(v)
	n := v.fill(bufs, skip, math.MaxInt)
	got, _, errno := unix.Syscall6(unix.SYS_PWRITEV, uintptr(fd), uintptr(unsafe.Pointer(&v.list)), uintptr(n), uintptr(off), 0, 0)
	clear(v.list[:n])
	if errno != 0 {
		return 0, errno
	}
	return int(got), nil
}

// fill lists the bytes of bufs behind the first skip, up to limit bytes, and
// tells in how many vectors. The list keeps the buffers alive.
func (v *iovecs) fill(bufs [][]byte, skip, limit int) int {
	n := 0
	for _, b := range bufs[:min(len(bufs), maxVectors)] {
		b, skip = b[skip:], 0
		b = b[:min(len(b), limit)]
		if limit -= len(b); len(b) == 0 && limit == 0 {
			break
		}
		v.list[n].Base = unsafe.SliceData(b)
		v.list[n].SetLen(len(b))
		n++
	}
	return n
}
