package raw

import (
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// iovecs is the kernel's form of a list of buffers. x/sys would allocate one
// for each call with more than a few buffers, as scattered guest pages are.
type iovecs struct{ list [maxVectors]unix.Iovec }

var iovecPool = sync.Pool{New: func() any { return new(iovecs) }}

// preadv and pwritev move what one system call moves of the bytes of bufs
// behind the first skip, which lie in bufs[0].

func preadv(fd int, bufs [][]byte, skip int, off int64) (int, error) {
	return moveOnce(unix.SYS_PREADV, fd, bufs, skip, off)
}

func pwritev(fd int, bufs [][]byte, skip int, off int64) (int, error) {
	return moveOnce(unix.SYS_PWRITEV, fd, bufs, skip, off)
}

func moveOnce(call uintptr, fd int, bufs [][]byte, skip int, off int64) (int, error) {
	v := iovecPool.Get().(*iovecs)
	n := 0
	for _, b := range bufs[:min(len(bufs), maxVectors)] {
		b, skip = b[skip:], 0
		v.list[n].Base = unsafe.SliceData(b)
		v.list[n].SetLen(len(b))
		n++
	}
	// The buffers stay alive: v.list points to them.
	got, _, errno := unix.Syscall6(call, uintptr(fd), uintptr(unsafe.Pointer(&v.list)), uintptr(n), uintptr(off), 0, 0)
	clear(v.list[:n])
	iovecPool.Put(v)
	if errno != 0 {
		return 0, errno
	}
	return int(got), nil
}
