package guestmem

import (
	"errors"
	"unsafe"

	"golang.org/x/sys/unix"
)

// mapShared maps size bytes of a memfd where huge pages can be.
func mapShared(fd int, offset int64, size uint64) ([]byte, error) {
	// There is a place in so much room; what is around it is given back.
	room := uintptr(size) + HugePage
	space, err := unix.MmapPtr(-1, 0, nil, room, unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return nil, err
	}
	before := -uintptr(space) & (HugePage - 1)
	start := unsafe.Add(space, before)
	_, err = unix.MmapPtr(fd, offset, start, uintptr(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_NORESERVE|unix.MAP_FIXED)
	if err == nil && before > 0 {
		err = unix.MunmapPtr(space, before)
	}
	if err == nil {
		err = unix.MunmapPtr(unsafe.Add(start, size), HugePage-before)
	}
	if err != nil {
		return nil, errors.Join(err, unix.MunmapPtr(space, room))
	}
	return unsafe.Slice((*byte)(start), size), nil
}

func unmap(b []byte) error {
	return unix.MunmapPtr(unsafe.Pointer(unsafe.SliceData(b)), uintptr(len(b)))
}

// resident is how many pages of b, a huge page, the host has.
func resident(b []byte) (count int) {
	var pages [HugePage / PageSize]byte
	_, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)), uintptr(unsafe.Pointer(&pages)))
	if errno != 0 {
		return 0
	}
	for _, p := range pages {
		count += int(p & 1)
	}
	return count
}
