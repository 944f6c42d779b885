package raw

import (
	"math"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/internal/iovec"
)

// copyLimit is how much one preadv copies out of the page cache: 0.2 ms.
const copyLimit = 1 << 20

var lists = sync.Pool{New: func() any { return new([iovec.Max]unix.Iovec) }}

// preadv and pwritev move what one system call moves of the bytes of bufs
// behind the first skip, which lie in bufs[0].

// preadv takes what is in the page cache without telling Go's scheduler of the
// system call: its monitor would otherwise wake every 20 us of a large copy, on
// a processor that the copy needs. Such a call does not wait for a disk, and
// copyLimit bounds how long it may hold up a collection of garbage.
func preadv(fd int, bufs [][]byte, skip int, off int64) (int, error) {
	list := lists.Get().(*[iovec.Max]unix.Iovec)
	defer lists.Put(list)
	n := len(iovec.Append(list[:0], bufs, skip, copyLimit))
	got, _, errno := unix.RawSyscall6(unix.SYS_PREADV2, uintptr(fd), uintptr(unsafe.Pointer(list)), uintptr(n), uintptr(off), 0, unix.RWF_NOWAIT)
	if errno != 0 {
		// Not in the cache, or on a file system that cannot tell.
		n = len(iovec.Append(list[:0], bufs, skip, math.MaxInt))
		got, _, errno = unix.Syscall6(unix.SYS_PREADV, uintptr(fd), uintptr(unsafe.Pointer(list)), uintptr(n), uintptr(off), 0, 0)
	}
	clear(list[:n])
	if errno != 0 {
		return 0, errno
	}
	return int(got), nil
}

func pwritev(fd int, bufs [][]byte, skip int, off int64) (int, error) {
	list := lists.Get().(*[iovec.Max]unix.Iovec)
	defer lists.Put(list)
	n := len(iovec.Append(list[:0], bufs, skip, math.MaxInt))
	got, _, errno := unix.Syscall6(unix.SYS_PWRITEV, uintptr(fd), uintptr(unsafe.Pointer(list)), uintptr(n), uintptr(off), 0, 0)
	clear(list[:n])
	if errno != 0 {
		return 0, errno
	}
	return int(got), nil
}
