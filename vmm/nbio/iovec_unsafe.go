package nbio

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// vectored is readv or writev on iov, which is not empty.
func vectored(call, fd uintptr, iov []unix.Iovec) (int, syscall.Errno) {
	n, _, errno := unix.Syscall(call, fd, uintptr(unsafe.Pointer(unsafe.SliceData(iov))), uintptr(len(iov)))
	return int(n), errno
}
