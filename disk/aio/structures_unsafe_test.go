package aio

import (
	"testing"
	"unsafe"
)

// The structures are as long as the kernel's, whose places are given by them.
func TestStructures(t *testing.T) {
	for name, sizes := range map[string][2]uintptr{
		"io_uring_sqe":      {unsafe.Sizeof(submission{}), 64},
		"io_uring_cqe":      {unsafe.Sizeof(completion{}), 16},
		"io_uring_params":   {unsafe.Sizeof(parameters{}), 120},
		"io_sqring_offsets": {unsafe.Sizeof(submissionOffsets{}), 40},
		"io_cqring_offsets": {unsafe.Sizeof(completionOffsets{}), 40},
	} {
		if sizes[0] != sizes[1] {
			t.Errorf("%s has %d bytes, the kernel's %d", name, sizes[0], sizes[1])
		}
	}
}
