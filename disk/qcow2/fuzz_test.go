package qcow2

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/gnomon-vmm/gnomon/disk/block"
)

// memory is a file's content as a node.
type memory struct {
	block.Node
	b []byte
}

func (m memory) Size() int64  { return (int64(len(m.b)) + sector - 1) / sector * sector }
func (m memory) Close() error { return nil }

func (m memory) Readv(bufs [][]byte, off int64) error {
	for _, b := range bufs {
		if off < 0 || off > m.Size() || int64(len(b)) > m.Size()-off {
			return block.ErrOutOfRange // nobody may ask for what is not there
		}
		clear(b)
		if off < int64(len(m.b)) {
			copy(b, m.b[off:])
		}
		off += int64(len(b))
	}
	return nil
}

// FuzzOpen opens arbitrary files as an image, and reads the disk's start, its
// end, and a stretch between. Backing files are the image itself as a raw one.
func FuzzOpen(f *testing.F) {
	for _, tt := range []struct {
		options string
		flags   []string
	}{
		{"cluster_size=512", nil},
		{"cluster_size=512,compat=0.10", nil},
		{"cluster_size=512", []string{"-c"}},
		{"cluster_size=4k,compression_type=zstd", []string{"-c"}},
		{"cluster_size=512,backing_fmt=raw,backing_file=source", nil},
		{"cluster_size=64k,extended_l2=on", nil},
		{"cluster_size=512,lazy_refcounts=on", nil},
	} {
		dir := f.TempDir()
		writeFile(f, filepath.Join(dir, "source"), mixed(3, 40<<10))
		args := append([]string{"convert", "-O", "qcow2", "-o", tt.options}, tt.flags...)
		qemu(f, dir, "qemu-img", append(args, "source", "image.qcow2")...)
		b, err := os.ReadFile(filepath.Join(dir, "image.qcow2"))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b[:min(len(b), 64<<10)])
		f.Add(b[:512])
	}
	info, err := os.Stat(".")
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		c := newChain()
		c.openFile = func(string, bool) (block.Node, fs.FileInfo, error) { return memory{b: b}, info, nil }
		n, err := c.openImage(memory{b: b}, "image")
		if err != nil {
			if !errors.Is(err, ErrHeader) && !errors.Is(err, ErrUnsupported) && !errors.Is(err, ErrBacking) && !errors.Is(err, ErrCorrupt) {
				t.Errorf("unexpected kind of error: %v", err)
			}
			return
		}
		defer n.Close()
		length := min(n.Size(), 64<<10)
		buf := make([]byte, length)
		for _, off := range []int64{0, n.Size() - length, n.Size() / 2} {
			off = min(off, n.Size()-length)
			if err := n.Readv([][]byte{buf[:length/3], buf[length/3:]}, off); err != nil && !errors.Is(err, ErrCorrupt) {
				t.Errorf("read at %d of %d: %v", off, n.Size(), err)
			}
		}
		for _, cache := range []*cache{c.tables, c.clusters} {
			if cache.used > cache.limit {
				t.Errorf("a cache holds %d bytes", cache.used)
			}
		}
	})
}
