package qcow2

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/gnomon-vmm/gnomon/disk/block"
)

// FuzzOpen opens arbitrary files as an image, checks and repairs them, and reads and
// writes the disk's start, its end, and a stretch between. Backing files are the
// image itself as a raw one.
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
		{"cluster_size=512,refcount_bits=1", nil},
		{"cluster_size=1k,refcount_bits=64", nil},
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
	for _, arg := range []string{"bitmap --add image.qcow2 b", "snapshot -c one image.qcow2"} {
		dir := f.TempDir()
		create(f, dir, "image.qcow2", "40k", "cluster_size=1k")
		qemu(f, dir, "qemu-img", strings.Fields(arg)...)
		edit(f, dir, "image.qcow2", "write -P 1 3k 5k")
		b, err := os.ReadFile(filepath.Join(dir, "image.qcow2"))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	info, err := os.Stat(".")
	if err != nil {
		f.Fatal(err)
	}
	known := func(t *testing.T, what string, err error) {
		t.Helper()
		for _, is := range []error{nil, ErrHeader, ErrUnsupported, ErrBacking, ErrCorrupt, ErrBitmap, fs.ErrInvalid} {
			if errors.Is(err, is) {
				return
			}
		}
		t.Errorf("%s: unexpected kind of error: %v", what, err)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		c := newChain()
		c.openFile = func(string, bool) (block.Node, fs.FileInfo, error) {
			return &memory{b: b, readOnly: true}, info, nil
		}
		n, err := c.openImage(&memory{b: b, readOnly: true}, "image")
		known(t, "open", err)
		if err == nil {
			around(n.Size(), func(off, length int64) {
				buf := make([]byte, length)
				known(t, "read", n.Readv([][]byte{buf[:length/3], buf[length/3:]}, off))
				_, err := n.Map(off, length)
				known(t, "map", err)
			})
			all, err := n.Bitmaps()
			known(t, "bitmaps", err)
			for _, info := range all[:min(len(all), 3)] {
				_, err := n.Bitmap(info.Name)
				known(t, "bitmap", err)
			}
			n.Close()
		}
		for _, cache := range []*cache{c.tables, c.clusters} {
			if cache.used > cache.limit {
				t.Errorf("a cache holds %d bytes", cache.used)
			}
		}

		file := func() *memory { return &memory{b: bytes.Clone(b), limit: int64(len(b)) + 32<<20} }
		writeAll(t, file(), known)
		repaired := file()
		r, err := newChain().node(repaired, "image").check(t.Context(), CheckOptions{Repair: RepairAll})
		known(t, "repair", err)
		if err != nil {
			return
		}
		again, err := newChain().node(repaired, "image").check(t.Context(), CheckOptions{})
		if err != nil || r.Clean() && !again.Clean() {
			t.Fatalf("repaired: %+v\nafter it: %v, %+v", r, err, again)
		}
		if again.Clean() {
			before := &checker{ctx: t.Context(), n: newChain().node(repaired, "image"), report: &Report{}}
			if err := errors.Join(before.n.init(), before.run()); err != nil {
				t.Fatal(err)
			}
			writeAll(t, repaired, known)
			if again, err = newChain().node(repaired, "image").check(t.Context(), CheckOptions{}); err != nil || harmful(again, &before.refs) {
				t.Errorf("repaired and written: %v, %+v", err, again)
			}
		}
	})
}

// harmful tells that a report has more than leaks, and than entries that do not say
// that their cluster has one reference though it had several before: where two entries of
// a table share a cluster, as no program writes them, the second is left when the first
// goes.
func harmful(r *Report, before *references) bool {
	if int64(len(r.Problems)) < r.Corruptions+r.Leaks {
		return r.Corruptions != 0
	}
	for _, p := range r.Problems {
		var entry uint64
		flag, _ := fmt.Sscanf(p.Text, "entry 0x%x at", &entry)
		shared := flag == 1 && entry&entryOwn == 0 && before.get(int64(entry&offsetMask)>>before.bits) > 1
		if !p.Leak && !shared {
			return true
		}
	}
	return false
}

// around calls f for stretches of a disk.
func around(size int64, f func(off, length int64)) {
	length := min(size, 64<<10)
	for _, off := range []int64{0, size - length, size / 2} {
		f(min(off, size-length), length)
	}
}

// writeAll does everything to an image that can be done.
func writeAll(t *testing.T, file *memory, known func(*testing.T, string, error)) {
	t.Helper()
	n, err := inMemory(t, map[string]*memory{"image": file}, false)
	if errors.Is(err, fs.ErrNotExist) {
		return // its backing file
	}
	known(t, "open to write", err)
	if err != nil {
		return
	}
	around(n.Size(), func(off, length int64) {
		known(t, "write", n.Writev([][]byte{bytes.Repeat([]byte{3}, int(length/2))}, off))
		known(t, "compressed", n.WriteCompressed(make([]byte, length), off))
		known(t, "discard", n.Discard(off, length/3))
		known(t, "zeroes", n.WriteZeroes(off+length/2, length/3, false))
		known(t, "flush", n.Flush())
	})
	known(t, "shrink", n.Resize(n.Size()/2/sector*sector))
	known(t, "grow", n.Resize(n.Size()+1<<20))
	known(t, "close", n.Close())
}
