//go:build !race

// The race detector makes pools forget what they hold.

package qcow2

import (
	"errors"
	"path/filepath"
	"testing"

	"github.com/gnomon-vmm/gnomon/disk/bitmap"
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

// Reads, and writes in place, of an image that is written do not allocate either,
// nor do those that bitmaps record.
func TestNoAllocationsWhileWriting(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "image.qcow2")
	if err := Create(path, CreateOptions{Size: 64 << 20}); err != nil {
		t.Fatal(err)
	}
	n, err := Open(path, false)
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	b, err := bitmap.New("b", n.Size(), 0)
	if err != nil {
		t.Fatal(err)
	}
	bufs := [][]byte{make([]byte, 64<<10), make([]byte, 64<<10)}
	if err := errors.Join(n.AddBitmap(b), n.Writev(bufs, 1<<20), n.Flush()); err != nil {
		t.Fatal(err)
	}
	for name, f := range map[string]func() error{
		"read":             func() error { return n.Readv(bufs, 1<<20) },
		"read nothing":     func() error { return n.Readv(bufs, 8<<20) },
		"write":            func() error { return n.Writev(bufs, 1<<20) },
		"write a part":     func() error { return n.Writev([][]byte{bufs[0][:512]}, 1<<20+512) },
		"map":              func() error { _, err := n.Map(1<<20, 1<<20); return err },
		"zeroes on zeroes": func() error { return n.WriteZeroes(9<<20, 4096, true) },
	} {
		if a := testing.AllocsPerRun(100, func() { err = errors.Join(err, f()) }); a >= 1 {
			t.Errorf("%s: %v allocations", name, a)
		}
	}
	if err != nil {
		t.Error(err)
	}
}
