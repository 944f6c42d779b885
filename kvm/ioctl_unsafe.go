package kvm

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ioctl makes an ioctl whose argument is a number.
func ioctl(fd int, request, arg uintptr) (int, syscall.Errno) {
	n, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, arg)
	return int(n), errno
}

// ioctlPtr makes an ioctl whose argument is a pointer. The argument does not
// escape, so the caller's variable can stay on its stack.
func ioctlPtr[T any](fd int, request uintptr, arg *T) (int, syscall.Errno) {
	n, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(unsafe.Pointer(arg)))
	return int(n), errno
}
