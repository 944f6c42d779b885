package nbd

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// vector is the kernel's form of a list of buffers. It keeps them alive.
type vector struct {
	list [64]unix.Iovec
	rest []unix.Iovec // of list: what is not sent
}

// fill lists as many of bufs as there is room for, and returns the others.
func (v *vector) fill(bufs [][]byte) [][]byte {
	v.rest = v.list[:0]
	for len(bufs) > 0 && len(v.rest) < len(v.list) {
		if b := bufs[0]; len(b) > 0 {
			v.rest = append(v.rest, unix.Iovec{Base: unsafe.SliceData(b), Len: uint64(len(b))})
		}
		bufs = bufs[1:]
	}
	return bufs
}

// send sends what is not sent, or a part of it.
func (v *vector) send(fd int) (int, error) {
	message := unix.Msghdr{Iov: &v.rest[0], Iovlen: uint64(len(v.rest))}
	n, _, errno := unix.RawSyscall(unix.SYS_SENDMSG, uintptr(fd), uintptr(unsafe.Pointer(&message)), unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT)
	if errno == 0 {
		return int(n), nil
	}
	n, _, errno = unix.Syscall(unix.SYS_SENDMSG, uintptr(fd), uintptr(unsafe.Pointer(&message)), unix.MSG_NOSIGNAL)
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

// skip tells that n bytes more are sent.
func (v *vector) skip(n int) {
	for n > 0 {
		first := &v.rest[0]
		if uint64(n) < first.Len {
			first.Base = (*byte)(unsafe.Add(unsafe.Pointer(first.Base), n))
			first.Len -= uint64(n)
			return
		}
		n -= int(first.Len)
		*first = unix.Iovec{}
		v.rest = v.rest[1:]
	}
}

func (v *vector) length() int { return len(v.rest) }

// toHugePage is how far a huge page begins behind b.
func toHugePage(b []byte) int {
	return int(-uintptr(unsafe.Pointer(unsafe.SliceData(b))) & (chunkSize - 1))
}
