package qcow2

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	reader "github.com/lima-vm/go-qcow2reader"
	second "github.com/lima-vm/go-qcow2reader/image"

	"github.com/gnomon-vmm/gnomon/disk/block"
)

// qemu runs one of QEMU's tools in dir.
func qemu(t testing.TB, dir, tool string, args ...string) {
	t.Helper()
	path, err := exec.LookPath(tool)
	if err != nil {
		t.Skipf("%s is not installed", tool)
	}
	cmd := exec.Command(path, args...)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v\n%s", tool, strings.Join(args, " "), err, out)
	}
}

func create(t testing.TB, dir, name, size string, options ...string) {
	t.Helper()
	args := []string{"create", "-q", "-f", "qcow2"}
	for _, o := range options {
		args = append(args, "-o", o)
	}
	args = append(args, name)
	if size != "" {
		args = append(args, size)
	}
	qemu(t, dir, "qemu-img", args...)
}

// edit runs commands of qemu-io on an image.
func edit(t testing.TB, dir, name string, commands ...string) {
	t.Helper()
	args := []string{"-f", "qcow2"}
	for _, c := range commands {
		args = append(args, "-c", c)
	}
	qemu(t, dir, "qemu-io", append(args, name)...)
}

// mixed is content of which each kind of compression finds something: noise,
// text and holes.
func mixed(seed, size uint64) []byte {
	b := make([]byte, size)
	rng := rand.New(rand.NewPCG(seed, 1))
	noise := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)})
	for at := 0; at < len(b); {
		n := min(1+rng.IntN(100_000), len(b)-at)
		part := b[at : at+n]
		switch rng.IntN(3) {
		case 0:
			noise.Read(part)
		case 1:
			text := []byte("the shadow of a gnomon ")
			text[at%len(text)]++
			copy(part, bytes.Repeat(text, n/len(text)+1))
		}
		at += n
	}
	return b
}

func writeFile(t testing.TB, path string, b []byte) {
	t.Helper()
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

func mustOpen(t testing.TB, path string) *Node {
	t.Helper()
	n, err := Open(path, true)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.Close() })
	return n
}

// images are what QEMU's tools can make. Each makes image.qcow2 in dir.
var images = []struct {
	name string
	make func(t testing.TB, dir string)
	// alone: the second opinion fails on such images.
	alone bool
}{
	{name: "empty", make: func(t testing.TB, dir string) { create(t, dir, "image.qcow2", "10M") }},
	{name: "nothing at all", make: func(t testing.TB, dir string) { create(t, dir, "image.qcow2", "0") }, alone: true},
	{name: "version 2", make: converted("compat=0.10")},
	{name: "version 3", make: converted("compat=1.1")},
	{name: "refcounts of 1 bit", make: converted("refcount_bits=1")},
	{name: "refcounts of 64 bits", make: converted("refcount_bits=64")},
	{name: "lazy refcounts", make: converted("lazy_refcounts=on")},
	{name: "preallocated tables", make: func(t testing.TB, dir string) {
		create(t, dir, "image.qcow2", "5M", "preallocation=metadata")
		edit(t, dir, "image.qcow2", "write -P 7 100k 300k")
	}},
	{name: "compressed, zlib", make: converted("compression_type=zlib", "-c")},
	{name: "compressed, zstd", make: converted("compression_type=zstd", "-c")},
	{name: "compressed, zlib, version 2", make: converted("compat=0.10", "-c")},
	{name: "compressed, zlib, small clusters", make: converted("cluster_size=512", "-c"), alone: true},
	{name: "compressed, zstd, small clusters", make: converted("cluster_size=512,compression_type=zstd", "-c")},
	{name: "compressed, zlib, large clusters", make: converted("cluster_size=2M,compression_type=zlib", "-c")},
	{name: "compressed, zstd, large clusters", make: converted("cluster_size=2M,compression_type=zstd", "-c")},
	{name: "compressed, then written", make: func(t testing.TB, dir string) {
		converted("compression_type=zstd", "-c")(t, dir)
		edit(t, dir, "image.qcow2", "write -P 1 5000 200000", "write -z 512k 128k", "write -P 2 1000000 10")
	}},
	{name: "zeroes and discards", make: func(t testing.TB, dir string) {
		converted("compat=1.1")(t, dir)
		edit(t, dir, "image.qcow2", "write -z 0 1M", "write -z -u 2M 1M", "discard 3M 512k", "write -z 4100k 3k", "write -P 9 64k 64k")
	}},
	{name: "snapshots", make: func(t testing.TB, dir string) {
		converted("compat=1.1")(t, dir)
		qemu(t, dir, "qemu-img", "snapshot", "-c", "one", "image.qcow2")
		edit(t, dir, "image.qcow2", "write -P 1 0 1M")
		qemu(t, dir, "qemu-img", "snapshot", "-c", "two", "image.qcow2")
		edit(t, dir, "image.qcow2", "write -P 2 512k 1M")
	}},
	{name: "bitmaps", make: func(t testing.TB, dir string) {
		converted("compat=1.1")(t, dir)
		qemu(t, dir, "qemu-img", "bitmap", "--add", "image.qcow2", "b0")
	}},
	{name: "subclusters", make: func(t testing.TB, dir string) {
		converted("extended_l2=on,cluster_size=64k")(t, dir)
		edit(t, dir, "image.qcow2", "write -P 1 5000 2000", "write -z 512k 3k", "write -z 600k 100k", "discard 1M 64k", "write -P 2 1000000 10")
	}, alone: true},
	{name: "subclusters over a backing file", make: func(t testing.TB, dir string) {
		writeFile(t, filepath.Join(dir, "base.raw"), mixed(5, 5<<20))
		create(t, dir, "image.qcow2", "6M", "backing_file=base.raw,backing_fmt=raw,extended_l2=on,cluster_size=128k")
		edit(t, dir, "image.qcow2", "write -P 1 5000 2000", "write -z 512k 8k", "write -z 600k 300k", "write -P 2 1000000 10", "write -c -P 3 2M 128k")
	}, alone: true},
	{name: "data file", make: func(t testing.TB, dir string) {
		create(t, dir, "image.qcow2", "5M", "data_file=data.raw")
		edit(t, dir, "image.qcow2", "write -P 1 0 10k", "write -P 1 1M 200k", "write -z 1100k 64k", "write -P 2 3M 100")
	}, alone: true},
	{name: "raw data file", make: func(t testing.TB, dir string) {
		create(t, dir, "image.qcow2", "5M", "data_file=data.raw,data_file_raw=on")
		edit(t, dir, "image.qcow2", "write -P 1 0 10k", "write -P 1 1M 200k", "write -z 1100k 64k", "write -P 2 3M 100")
	}, alone: true},
	{name: "grown", make: func(t testing.TB, dir string) {
		converted("cluster_size=4k")(t, dir)
		qemu(t, dir, "qemu-img", "resize", "-q", "image.qcow2", "40M")
		edit(t, dir, "image.qcow2", "write -P 5 39M 1M")
	}},
	{name: "shrunk", make: func(t testing.TB, dir string) {
		converted("cluster_size=64k")(t, dir)
		qemu(t, dir, "qemu-img", "resize", "-q", "--shrink", "image.qcow2", "1234432")
	}},
	{name: "chain of three", make: chained("", "", 1)},
	{name: "chain of three, raw below", make: func(t testing.TB, dir string) {
		writeFile(t, filepath.Join(dir, "base.raw"), mixed(5, 5<<20))
		create(t, dir, "mid.qcow2", "", "backing_file=base.raw,backing_fmt=raw,cluster_size=4k")
		edit(t, dir, "mid.qcow2", "write -P 1 300000 400000", "write -z 2M 1M")
		create(t, dir, "image.qcow2", "", "backing_file=mid.qcow2,backing_fmt=qcow2")
		edit(t, dir, "image.qcow2", "write -P 2 500000 1000000", "write -z 2500k 1M")
	}},
	{name: "compressed over compressed", make: func(t testing.TB, dir string) {
		converted("compat=1.1", "-c")(t, dir)
		if err := os.Rename(filepath.Join(dir, "image.qcow2"), filepath.Join(dir, "base.qcow2")); err != nil {
			t.Fatal(err)
		}
		create(t, dir, "image.qcow2", "", "backing_file=base.qcow2,backing_fmt=qcow2")
		edit(t, dir, "image.qcow2", "write -c -P 9 1M 64k", "write -c -P 10 2M 64k")
	}},
	{name: "overlay larger than backing", make: chained("7M", "9M", 2)},
	{name: "overlay smaller than backing", make: chained("3M", "2M", 3)},
	{name: "middle smaller than both", make: chained("1500k", "9M", 4)},
	{name: "raw backing of odd size", make: func(t testing.TB, dir string) {
		writeFile(t, filepath.Join(dir, "base.raw"), mixed(6, 1_234_567))
		create(t, dir, "image.qcow2", "3M", "backing_file=base.raw,backing_fmt=raw")
	}},
	{name: "backing in another directory", make: func(t testing.TB, dir string) {
		if err := os.Mkdir(filepath.Join(dir, "sub"), 0o700); err != nil {
			t.Fatal(err)
		}
		writeFile(t, filepath.Join(dir, "sub", "base.raw"), mixed(7, 1<<20))
		create(t, filepath.Join(dir, "sub"), "mid.qcow2", "", "backing_file=base.raw,backing_fmt=raw")
		create(t, dir, "image.qcow2", "", "backing_file=sub/mid.qcow2,backing_fmt=qcow2")
	}},
	{name: "backing by absolute path", make: func(t testing.TB, dir string) {
		writeFile(t, filepath.Join(dir, "base:raw"), mixed(8, 1<<20))
		create(t, dir, "image.qcow2", "", "backing_file="+dir+"/base:raw,backing_fmt=raw")
	}},
}

func init() {
	for bits := minClusterBits; bits <= maxClusterBits; bits++ {
		images = append(images, images[3])
		i := &images[len(images)-1]
		i.name = fmt.Sprintf("clusters of %d bytes", 1<<bits)
		i.make = converted(fmt.Sprintf("cluster_size=%d", 1<<bits))
	}
}

// converted makes an image of mixed content whose size no cluster size divides.
func converted(options string, flags ...string) func(testing.TB, string) {
	return func(t testing.TB, dir string) {
		t.Helper()
		writeFile(t, filepath.Join(dir, "source"), mixed(uint64(len(options)), 5<<20+3*512))
		args := append([]string{"convert", "-f", "raw", "-O", "qcow2", "-o", options}, flags...)
		qemu(t, dir, "qemu-img", append(args, "source", "image.qcow2")...)
	}
}

// chained makes a chain of three images, the upper two with the given sizes.
func chained(mid, top string, seed uint64) func(testing.TB, string) {
	return func(t testing.TB, dir string) {
		t.Helper()
		writeFile(t, filepath.Join(dir, "source"), mixed(seed, 5<<20))
		qemu(t, dir, "qemu-img", "convert", "-c", "-O", "qcow2", "source", "base.qcow2")
		create(t, dir, "mid.qcow2", mid, "backing_file=base.qcow2,backing_fmt=qcow2,cluster_size=8k")
		edit(t, dir, "mid.qcow2", "write -P 1 100000 300000", "write -z 700k 100k", "write -P 3 1M 20k")
		create(t, dir, "image.qcow2", top, "backing_file=mid.qcow2,backing_fmt=qcow2,cluster_size=32k")
		edit(t, dir, "image.qcow2", "write -P 2 250000 300000", "write -z 1500k 400k", "write -P 4 720k 8k")
	}
}

// expected is the disk's content by QEMU.
func expected(t testing.TB, dir string) []byte {
	t.Helper()
	qemu(t, dir, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", "image.qcow2", "expected")
	b, err := os.ReadFile(filepath.Join(dir, "expected"))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func readAll(t testing.TB, n block.Node) []byte {
	t.Helper()
	b := bytes.Repeat([]byte{0xa5}, int(n.Size()))
	if err := n.Readv([][]byte{b}, 0); err != nil {
		t.Fatal(err)
	}
	return b
}

func firstDifference(a, b []byte) int {
	for i := range a {
		if i >= len(b) || a[i] != b[i] {
			return i
		}
	}
	return len(a)
}

// TestImages: what QEMU made is read, mapped and checked as QEMU does, and read as
// another reader does.
func TestImages(t *testing.T) {
	for _, tt := range images {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			tt.make(t, dir)
			want := expected(t, dir)
			path := filepath.Join(dir, "image.qcow2")
			n := mustOpen(t, path)
			if n.Size() != int64(len(want)) {
				t.Fatalf("size %d, want %d", n.Size(), len(want))
			}
			if got := readAll(t, n); !bytes.Equal(got, want) {
				t.Fatalf("content differs at %#x", firstDifference(got, want))
			}

			var other second.Image
			if !tt.alone {
				other = secondOpinion(t, path)
			}
			var wg sync.WaitGroup
			for w := range uint64(2) {
				opinion := other
				if w > 0 {
					opinion = nil // one asks it, as it is slow
				}
				wg.Go(func() { randomReads(t, n, opinion, want, w) })
			}
			wg.Wait()

			if r := agree(t, path); !r.Clean() {
				t.Errorf("%+v", r)
			}
			compareMaps(t, path)
			if tt.name == "preallocated tables" && !slices.EqualFunc(mapByUs(t, n), mapByQEMU(t, path), func(a, b mapped) bool { return a.Length == b.Length && a.Zero == b.Zero }) {
				t.Errorf("what was not written: %+v", mapByUs(t, n))
			}
		})
	}
}

func secondOpinion(t *testing.T, path string) second.Image {
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	img, err := reader.Open(f)
	if err != nil {
		t.Fatal(err)
	}
	if img.Readable() != nil {
		return nil
	}
	t.Cleanup(func() { img.Close() })
	return img
}

func randomReads(t *testing.T, n *Node, opinion second.Image, want []byte, seed uint64) {
	rng := rand.New(rand.NewPCG(seed, 2))
	for i := range 60 {
		off := rng.Int64N(int64(len(want)) + 1)
		length := rng.Int64N(min(int64(len(want))-off, 1<<rng.IntN(20)) + 1)
		got := bytes.Repeat([]byte{0xa5}, int(length))
		var bufs [][]byte
		for rest := got; len(rest) > 0; {
			cut := min(rng.IntN(9000), len(rest))
			bufs = append(bufs, rest[:cut:cut])
			rest = rest[cut:]
		}
		if err := n.Readv(bufs, off); err != nil {
			t.Errorf("read %d at %d: %v", length, off, err)
			return
		}
		if !bytes.Equal(got, want[off:off+length]) {
			t.Errorf("read %d at %d: differs at %d", length, off, firstDifference(got, want[off:]))
			return
		}
		if opinion == nil || length == 0 || i%20 != 0 {
			continue
		}
		other := make([]byte, length)
		if _, err := opinion.ReadAt(other, off); err != nil && err != io.EOF {
			t.Errorf("second opinion: read %d at %d: %v", length, off, err)
			return
		}
		if !bytes.Equal(got, other) {
			t.Errorf("second opinion: read %d at %d: differs at %d", length, off, firstDifference(got, other))
			return
		}
	}
}

// patch changes bytes of a file.
func patch(t testing.TB, path string, at int64, b []byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(b, at); err != nil {
		t.Fatal(err)
	}
}

func be32(v uint32) []byte { return binary.BigEndian.AppendUint32(nil, v) }
func be64(v uint64) []byte { return binary.BigEndian.AppendUint64(nil, v) }
