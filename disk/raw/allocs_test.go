//go:build !race

// The race detector makes pools forget what they hold.

package raw

import "testing"

func TestNoAllocations(t *testing.T) {
	n, _, _ := newDisk(t, 1<<20)
	for _, count := range []int{1, 3, 8, 64, 256, 1024} {
		bufs := make([][]byte, count)
		for i := range bufs {
			bufs[i] = make([]byte, 512)
		}
		if a := testing.AllocsPerRun(50, func() { n.Readv(bufs, 512) }); a >= 1 {
			t.Errorf("Readv with %d buffers allocates %v times", count, a)
		}
		if a := testing.AllocsPerRun(50, func() { n.Writev(bufs, 512) }); a >= 1 {
			t.Errorf("Writev with %d buffers allocates %v times", count, a)
		}
	}
}
