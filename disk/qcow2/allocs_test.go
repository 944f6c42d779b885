//go:build !race

// The race detector makes pools forget what they hold.

package qcow2

import (
	"path/filepath"
	"testing"
)

func TestNoAllocations(t *testing.T) {
	dir := t.TempDir()
	writeFile(t, filepath.Join(dir, "source"), mixed(2, 4<<20))
	qemu(t, dir, "qemu-img", "convert", "-S", "0", "-O", "qcow2", "source", "base.qcow2")
	create(t, dir, "image.qcow2", "8M", "backing_file=base.qcow2,backing_fmt=qcow2")
	edit(t, dir, "image.qcow2", "write -P 1 512k 512k", "write -z 2M 512k")
	n := mustOpen(t, filepath.Join(dir, "image.qcow2"))
	for _, count := range []int{1, 2, 64} {
		bufs := make([][]byte, count)
		for i := range bufs {
			bufs[i] = make([]byte, 4096)
		}
		for name, off := range map[string]int64{"own": 512 << 10, "backing": 0, "both": 500 << 10, "zero": 2 << 20, "behind the backing": 5 << 20} {
			if a := testing.AllocsPerRun(100, func() { n.Readv(bufs, off) }); a >= 1 {
				t.Errorf("%s, %d buffers: %v allocations", name, count, a)
			}
		}
	}
}
