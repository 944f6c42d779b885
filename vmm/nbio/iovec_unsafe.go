package nbio

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// appendPieces adds the non-empty pieces of p to iov, up to maxPieces in all.
func appendPieces(iov []unix.Iovec, p [][]byte) []unix.Iovec {
	for _, b := range p {
		if len(b) == 0 {
			continue
		}
		if len(iov) == maxPieces {
			break
		}
		iov = append(iov, unix.Iovec{Base: unsafe.SliceData(b), Len: uint64(len(b))})
	}
	return iov
}

// vectored is readv or writev on iov, which is not empty.
func vectored(call, fd uintptr, iov []unix.Iovec) (int, syscall.Errno) {
	n, _, errno := unix.Syscall(call, fd, uintptr(unsafe.Pointer(unsafe.SliceData(iov))), uintptr(len(iov)))
	return int(n), errno
}
