package hostinfo

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// uffdHandshake makes UFFDIO_API, which fills in the features.
func uffdHandshake(fd int, api *uffdioAPIArg) error {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uffdioAPI, uintptr(unsafe.Pointer(api)))
	if errno != 0 {
		return errno
	}
	return nil
}
