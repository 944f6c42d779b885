//go:build !race

// The race detector makes pools forget what they hold.

package aio

import "testing"

func TestNoAllocations(t *testing.T) {
	for _, engine := range engines {
		f := newFile(t, 4<<20, Options{Engine: engine, Direct: true})
		for _, tt := range []struct {
			name     string
			bufs     [][]byte
			off      int64
			requests int
		}{
			{"aligned", [][]byte{alignedMemory(4096)}, 8192, 1},
			{"64 buffers", [][]byte{}, 0, 1},
			{"unaligned", [][]byte{make([]byte, 5000)}, 777, 1},
			{"1.5 MiB, unaligned", [][]byte{make([]byte, 3<<19)}, 777, 2},
		} {
			if len(tt.bufs) == 0 {
				for range 64 {
					tt.bufs = append(tt.bufs, alignedMemory(4096))
				}
			}
			if a := testing.AllocsPerRun(50, func() { f.Readv(tt.bufs, tt.off) }); a >= 1 {
				t.Errorf("%s: %s: Readv allocates %v times", engine, tt.name, a)
			}
			if a := testing.AllocsPerRun(50, func() { f.Writev(tt.bufs, tt.off, 4<<20) }); a >= 1 {
				t.Errorf("%s: %s: Writev allocates %v times", engine, tt.name, a)
			}
		}
	}
}
