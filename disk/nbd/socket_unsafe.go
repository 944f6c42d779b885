package nbd

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// send sends what one call sends of list, which is not empty. What does not have to wait it
// sends without telling Go's scheduler.
func send(fd int, list []unix.Iovec) (int, error) {
	message := unix.Msghdr{Iov: unsafe.SliceData(list), Iovlen: uint64(len(list))}
	n, _, errno := unix.RawSyscall(unix.SYS_SENDMSG, uintptr(fd), uintptr(unsafe.Pointer(&message)), unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT)
	if errno != 0 {
		n, _, errno = unix.Syscall(unix.SYS_SENDMSG, uintptr(fd), uintptr(unsafe.Pointer(&message)), unix.MSG_NOSIGNAL)
	}
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}

// pending tells whether something has arrived that was not read.
func (s *socket) pending() bool {
	var n int32
	_, _, errno := unix.RawSyscall(unix.SYS_IOCTL, uintptr(s.fd), unix.TIOCINQ, uintptr(unsafe.Pointer(&n)))
	return errno == 0 && n > 0
}
