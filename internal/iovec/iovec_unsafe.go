// Package iovec has lists of buffers as the kernel's vectored calls take them. x/sys would
// allocate one for each call with more than a few buffers, as scattered guest pages are.
package iovec

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// Max is how many buffers one call takes (IOV_MAX).
const Max = 1024

// Append adds the bytes of bufs behind the first skip, which lie in bufs[0], to list: at most
// limit bytes, and as many buffers as make it Max. Empty ones are left out. The list keeps
// the buffers alive until it is cleared.
func Append(list []unix.Iovec, bufs [][]byte, skip, limit int) []unix.Iovec {
	for _, b := range bufs {
		b, skip = b[skip:], 0
		if len(b) == 0 {
			continue
		}
		if limit == 0 || len(list) == Max {
			break
		}
		b = b[:min(len(b), limit)]
		limit -= len(b)
		list = append(list, unix.Iovec{Base: unsafe.SliceData(b), Len: uint64(len(b))})
	}
	return list
}

// Rest is what is left of bufs when their first n bytes are done: the buffers from the first
// that is not, and how many bytes of that one are.
func Rest(bufs [][]byte, n int) (rest [][]byte, skip int) {
	for len(bufs) > 0 && n >= len(bufs[0]) {
		n -= len(bufs[0])
		bufs = bufs[1:]
	}
	return bufs, n
}
