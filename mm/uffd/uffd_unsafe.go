package uffd

import (
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Address is where a mapping lies. The garbage collector knows nothing of it.
func Address(b []byte) uintptr { return uintptr(unsafe.Pointer(unsafe.SliceData(b))) }

func keepAlive(b []byte) { runtime.KeepAlive(unsafe.SliceData(b)) }

func userfaultfd(flags uintptr) (int, unix.Errno) {
	fd, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, flags, 0, 0)
	return int(fd), errno
}

// ioctl makes an ioctl whose argument is a number.
func ioctl(fd int, request, arg uintptr) (int, unix.Errno) {
	n, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, arg)
	return int(n), errno
}

// ioctlPtr makes an ioctl whose argument is a pointer, which does not escape.
func ioctlPtr[T any](fd int, request uintptr, arg *T) unix.Errno {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(unsafe.Pointer(arg)))
	return errno
}

// readMessages reads as many messages as there are and fit.
func readMessages(fd int, m []message) (int, unix.Errno) {
	n, _, errno := unix.Syscall(unix.SYS_READ, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(m))), uintptr(len(m))*unsafe.Sizeof(message{}))
	if errno != 0 {
		return 0, errno
	}
	return int(n / unsafe.Sizeof(message{})), 0
}
