package qcow2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/raw"
)

func descriptors(t *testing.T) int {
	t.Helper()
	d, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(d)
}

func TestOnlyToRead(t *testing.T) {
	dir := t.TempDir()
	create(t, dir, "image.qcow2", "1M")
	path := filepath.Join(dir, "image.qcow2")
	n := mustOpen(t, path)
	for name, err := range map[string]error{
		"write":        n.Writev([][]byte{make([]byte, 512)}, 0),
		"discard":      n.Discard(0, 512),
		"write zeroes": n.WriteZeroes(0, 512, true),
	} {
		if !errors.Is(err, block.ErrReadOnly) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := n.Flush(); err != nil || !n.ReadOnly() {
		t.Errorf("flush: %v, read-only %v", err, n.ReadOnly())
	}
	for _, off := range []int64{-1, 1<<20 + 1, 1<<20 - 511, 1<<63 - 1, -1 << 63} {
		if err := n.Readv([][]byte{make([]byte, 512)}, off); !errors.Is(err, block.ErrOutOfRange) {
			t.Errorf("read at %d: %v", off, err)
		}
	}
	for _, bufs := range [][][]byte{nil, {nil}, {{}, {}}} {
		if err := n.Readv(bufs, 1<<20); err != nil {
			t.Errorf("read of nothing: %v", err)
		}
	}
}

func TestInfoAndClose(t *testing.T) {
	dir := t.TempDir()
	writeFile(t, filepath.Join(dir, "base.raw"), mixed(1, 1<<20))
	create(t, dir, "mid.qcow2", "", "backing_file=base.raw,backing_fmt=raw,cluster_size=4k")
	create(t, dir, "image.qcow2", "2M", "backing_file=mid.qcow2,backing_fmt=qcow2")
	before := descriptors(t)
	path := filepath.Join(dir, "image.qcow2")
	n := mustOpen(t, path)
	info := n.Info()
	if info.Format != "qcow2" || info.Filename != path || info.VirtualSize != 2<<20 || info.ClusterSize != 64<<10 || info.ActualSize == 0 {
		t.Errorf("top: %+v", info)
	}
	mid := info.Backing
	if mid == nil || mid.Format != "qcow2" || mid.Filename != filepath.Join(dir, "mid.qcow2") || mid.VirtualSize != 1<<20 || mid.ClusterSize != 4096 {
		t.Fatalf("middle: %+v", mid)
	}
	if base := mid.Backing; base == nil || base.Format != "raw" || base.Filename != filepath.Join(dir, "base.raw") || base.Backing != nil {
		t.Errorf("base: %+v", base)
	}
	// The whole chain is locked against writers, and open to readers.
	for _, name := range []string{"image.qcow2", "mid.qcow2", "base.raw"} {
		if _, err := raw.Open(filepath.Join(dir, name), false); !errors.Is(err, block.ErrInUse) {
			t.Errorf("%s can be written meanwhile: %v", name, err)
		}
	}
	mustOpen(t, filepath.Join(dir, "mid.qcow2")).Close()
	if err := n.Close(); err != nil {
		t.Error(err)
	}
	if after := descriptors(t); after != before {
		t.Errorf("%d descriptors before, %d after", before, after)
	}
	writer, err := raw.Open(filepath.Join(dir, "mid.qcow2"), false)
	if err != nil {
		t.Fatal(err)
	}
	defer writer.Close()
	if _, err := Open(path, true); !errors.Is(err, block.ErrInUse) || !errors.Is(err, ErrBacking) {
		t.Errorf("backing file in use: %v", err)
	}
	if after := descriptors(t); after != before+1 {
		t.Errorf("%d descriptors before, %d after a failed open", before, after-1)
	}
}

// TestRefused: what this package does not read, it refuses by its name, and
// leaves no descriptor behind.
func TestRefused(t *testing.T) {
	overlay := func(name, format string) func(t *testing.T, dir string) {
		return func(t *testing.T, dir string) {
			create(t, dir, "image.qcow2", "1M")
			args := []string{"rebase", "-u", "-b", name}
			if format != "" {
				args = append(args, "-F", format)
			}
			qemu(t, dir, "qemu-img", append(args, "image.qcow2")...)
		}
	}
	patched := func(at int64, b []byte, options ...string) func(t *testing.T, dir string) {
		return func(t *testing.T, dir string) {
			create(t, dir, "image.qcow2", "1M", options...)
			patch(t, filepath.Join(dir, "image.qcow2"), at, b)
		}
	}
	for _, tt := range []struct {
		name string
		make func(t *testing.T, dir string)
		is   error
		says []string
	}{
		{"no data file", func(t *testing.T, dir string) {
			create(t, dir, "image.qcow2", "1M", "data_file=data.raw")
			if err := os.Remove(filepath.Join(dir, "data.raw")); err != nil {
				t.Fatal(err)
			}
		}, ErrBacking, []string{"data file", "data.raw"}},
		{"data file is the image", func(t *testing.T, dir string) {
			create(t, dir, "image.qcow2", "1M", "data_file=data.raw")
			if err := os.Remove(filepath.Join(dir, "data.raw")); err != nil {
				t.Fatal(err)
			}
			if err := os.Link(filepath.Join(dir, "image.qcow2"), filepath.Join(dir, "data.raw")); err != nil {
				t.Fatal(err)
			}
		}, ErrBacking, []string{"loop"}},
		{"LUKS", patched(32, be32(2)), ErrUnsupported, []string{"LUKS", "qemu-img convert"}},
		{"AES", patched(32, be32(1)), ErrUnsupported, []string{"AES", "qemu-img convert"}},
		{"encryption 3", patched(32, be32(3)), ErrUnsupported, []string{"encryption method 3"}},
		{"unknown bit", patched(72, be64(1<<40|1<<63)), ErrUnsupported, []string{"bit 40", "bit 63"}},
		{"unknown bit that the image names", func(t *testing.T, dir string) {
			create(t, dir, "image.qcow2", "1M")
			path := filepath.Join(dir, "image.qcow2")
			b, _ := os.ReadFile(path)
			at := bytes.Index(b, []byte("extended L2"))
			if at < 0 {
				t.Fatal("no feature name table")
			}
			patch(t, path, int64(at-1), append([]byte{9}, "sundial\x00"...))
			patch(t, path, 72, be64(1<<9))
		}, ErrUnsupported, []string{"bit 9", `"sundial"`}},
		{"L1 table is the header", patched(40, be64(0)), ErrHeader, []string{"L1 table at 0x0"}},
		{"version 4", patched(4, be32(4)), ErrUnsupported, []string{"version 4"}},
		{"version 1", patched(4, be32(1)), ErrUnsupported, []string{"version 1"}},
		{"not an image", func(t *testing.T, dir string) {
			writeFile(t, filepath.Join(dir, "image.qcow2"), mixed(1, 4096))
		}, ErrHeader, []string{"does not start"}},
		{"empty file", func(t *testing.T, dir string) { writeFile(t, filepath.Join(dir, "image.qcow2"), nil) }, ErrHeader, []string{"does not start"}},
		{"compression 2", func(t *testing.T, dir string) {
			patched(104, []byte{2}, "compression_type=zstd")(t, dir)
		}, ErrUnsupported, []string{"compression type 2"}},
		{"zstd without its bit", patched(104, []byte{1}), ErrHeader, []string{"compression type 1"}},
		{"bit without zstd", patched(72, be64(FeatureCompression)), ErrHeader, []string{"compression"}},
		{"cluster size 2^8", patched(20, be32(8)), ErrHeader, []string{"2^8"}},
		{"cluster size 2^22", patched(20, be32(22)), ErrHeader, []string{"2^22"}},
		{"refcount order", patched(96, be32(7)), ErrHeader, []string{"2^7"}},
		{"short header", patched(100, be32(96)), ErrHeader, []string{"96"}},
		{"long header", patched(100, be32(1<<20)), ErrHeader, []string{"1048576"}},
		{"giant L1", patched(36, be32(maxL1Bytes/8+1)), ErrHeader, []string{"L1 table of 4194305"}},
		{"L1 too small", patched(24, be64(1<<40)), ErrHeader, []string{"L1 table of 1"}},
		{"giant size", patched(24, be64(1<<63-1)), ErrHeader, []string{"L1 table"}},
		{"negative size", patched(24, be64(1<<63)), ErrHeader, []string{"virtual size"}},
		{"L1 not at a cluster", patched(40, be64(512)), ErrHeader, []string{"0x200"}},
		{"L1 behind the file", patched(40, be64(1<<40)), ErrCorrupt, []string{"0x10000000000"}},
		{"L1 at the end of numbers", patched(40, be64(1<<63-1<<16)), ErrCorrupt, []string{"L1 table"}},
		{"L1 in the negative", patched(40, be64(1<<63)), ErrHeader, []string{"L1 table"}},
		{"extension too long", patched(116, be32(1<<31)), ErrHeader, []string{"too long"}},
		{"name of backing file outside", patched(8, append(be64(1<<30), be32(4)...)), ErrHeader, []string{"backing file name"}},
		{"name of backing file too long", patched(8, append(be64(1024), be32(1024)...)), ErrHeader, []string{"1024 bytes"}},
		{"name with zero bytes", patched(8, append(be64(60000), be32(4)...)), ErrHeader, []string{"backing file name"}},

		{"no such backing file", overlay("none.raw", "raw"), ErrBacking, []string{"none.raw"}},
		{"json", overlay(`json:{"driver":"raw","file":{"driver":"file","filename":"/etc/passwd"}}`, "raw"), ErrBacking, []string{"json:", "qemu-img rebase"}},
		{"nbd", overlay("nbd://localhost/x", "raw"), ErrBacking, []string{"protocol", "nbd"}},
		{"file protocol", overlay("file:base.raw", "raw"), ErrBacking, []string{"protocol"}},
		{"itself", overlay("image.qcow2", "qcow2"), ErrBacking, []string{"loop"}},
		{"itself by another name", func(t *testing.T, dir string) {
			overlay("link.qcow2", "qcow2")(t, dir)
			if err := os.Symlink("image.qcow2", filepath.Join(dir, "link.qcow2")); err != nil {
				t.Fatal(err)
			}
		}, ErrBacking, []string{"loop"}},
		{"loop of two", func(t *testing.T, dir string) {
			create(t, dir, "image.qcow2", "1M")
			create(t, dir, "b.qcow2", "1M", "backing_file=image.qcow2,backing_fmt=qcow2")
			overlay("b.qcow2", "qcow2")(t, dir)
		}, ErrBacking, []string{"loop"}},
		{"other format", overlay("base.vmdk", "vmdk"), ErrBacking, []string{`"vmdk"`}},
		{"no format", func(t *testing.T, dir string) {
			create(t, dir, "base.qcow2", "1M")
			overlay("base.qcow2", "qcow2")(t, dir)
			path := filepath.Join(dir, "image.qcow2")
			b, _ := os.ReadFile(path)
			at := bytes.Index(b, be32(extBackingFormat))
			patch(t, path, int64(at), be32(0x12345678))
		}, ErrBacking, []string{"qemu-img rebase -u -F"}},
		{"not qcow2 below", func(t *testing.T, dir string) {
			writeFile(t, filepath.Join(dir, "base.qcow2"), mixed(3, 1<<20))
			overlay("base.qcow2", "qcow2")(t, dir)
		}, ErrHeader, []string{"base.qcow2"}},
		{"directory below", overlay(".", "raw"), ErrBacking, nil},
		{"deep chain", deepChain, ErrBacking, []string{"more than 64"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			tt.make(t, dir)
			before := descriptors(t)
			path := filepath.Join(dir, "image.qcow2")
			n, err := Open(path, true)
			if n != nil || !errors.Is(err, tt.is) {
				t.Fatalf("opened: %v, %v", n != nil, err)
			}
			for _, s := range append(tt.says, dir) {
				if !strings.Contains(err.Error(), s) {
					t.Errorf("%q does not say %q", err, s)
				}
			}
			if strings.Contains(err.Error(), "\n") {
				t.Errorf("more than a line: %q", err)
			}
			if after := descriptors(t); after != before {
				t.Errorf("%d descriptors before, %d after", before, after)
			}
		})
	}
}

// deepChain makes one image more than may lie one on another.
func deepChain(t *testing.T, dir string) {
	t.Helper()
	for i := range maxChain + 1 {
		name := fmt.Sprint(i)
		if i == 0 {
			name = "image.qcow2"
		}
		args := []string{"create", "-q", "-u", "-f", "qcow2"}
		if i < maxChain {
			args = append(args, "-b", fmt.Sprint(i+1), "-F", "qcow2")
		}
		qemu(t, dir, "qemu-img", append(args, name, "1M")...)
	}
	mustOpen(t, filepath.Join(dir, "1")).Close() // as deep as it may be
}

// TestMarked: images that need a repair before they are written can be read.
func TestMarked(t *testing.T) {
	dir := t.TempDir()
	converted("lazy_refcounts=on")(t, dir)
	want := expected(t, dir)
	path := filepath.Join(dir, "image.qcow2")
	for _, tt := range []struct {
		bits           uint64
		dirty, corrupt bool
	}{{0, false, false}, {FeatureDirty, true, false}, {FeatureCorrupt, false, true}, {FeatureDirty | FeatureCorrupt, true, true}} {
		patch(t, path, 72, be64(tt.bits))
		n := mustOpen(t, path)
		if h := n.Header(); h.Dirty() != tt.dirty || h.Corrupt() != tt.corrupt {
			t.Errorf("bits %d: dirty %v, corrupt %v", tt.bits, h.Dirty(), h.Corrupt())
		}
		if !bytes.Equal(readAll(t, n), want) {
			t.Errorf("bits %d: content differs", tt.bits)
		}
		n.Close()
	}
}

// small makes an image of noise with tiny clusters and returns its path, and
// where its first L2 table is.
func small(t *testing.T, options ...string) (path string, l2 int64) {
	t.Helper()
	dir := t.TempDir()
	writeFile(t, filepath.Join(dir, "source"), bytes.Repeat([]byte("gnomon, sundial "), 1<<12))
	args := []string{"convert", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=512"}
	qemu(t, dir, "qemu-img", append(append(args, options...), "source", "image.qcow2")...)
	path = filepath.Join(dir, "image.qcow2")
	n := mustOpen(t, path)
	defer n.Close()
	return path, int64(n.l1[0] & offsetMask)
}

// TestDamagedTables: what tables say that cannot be is an error of that read.
func TestDamagedTables(t *testing.T) {
	for _, tt := range []struct {
		name    string
		inL1    bool
		version string
		entry   uint64
		says    string
	}{
		{"L2 table behind the file", true, "1.1", 1 << 40, "0x10000000000"},
		{"L2 table at the end of numbers", true, "1.1", offsetMask, "L2 table"},
		{"cluster behind the file", false, "1.1", 1 << 41, "0x20000000000"},
		{"cluster at the end of numbers", false, "1.1", offsetMask, "lies behind"},
		{"zero cluster in version 2", false, "0.10", entryZero, "zero cluster"},
		{"compressed cluster behind the file", false, "1.1", entryCompressed | 1<<42, "lies behind"},
		{"compressed cluster at the end of numbers", false, "1.1", entryCompressed | (entryCompressed - 1), "lies behind"},
		{"compressed cluster of noise", false, "1.1", entryCompressed | 3, "compressed cluster at 0x3"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path, l2 := small(t, "-o", "compat="+tt.version)
			n := mustOpen(t, path)
			at := l2 + 8
			if tt.inL1 {
				at = n.header.L1Offset
			}
			n.Close()
			patch(t, path, at, be64(tt.entry))
			n = mustOpen(t, path)
			err := n.Readv([][]byte{make([]byte, 2048)}, 0)
			if !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("read: %v", err)
			}
			// The rest can be read, as the node outlives its errors.
			b := make([]byte, 512)
			if err := n.Readv([][]byte{b}, 48<<10); err != nil || !bytes.HasPrefix(b, []byte("gnomon, sundial")) {
				t.Errorf("elsewhere: %v", err)
			}
		})
	}
}

// TestUnalignedTables needs clusters that are larger than the unit of offsets.
func TestUnalignedTables(t *testing.T) {
	dir := t.TempDir()
	converted("compat=1.1")(t, dir)
	path := filepath.Join(dir, "image.qcow2")
	n := mustOpen(t, path)
	l1, l2 := n.header.L1Offset, int64(n.l1[0]&offsetMask)
	n.Close()
	for _, tt := range []struct {
		at, to int64
		says   string
	}{{l2, 512, "cluster 0 at 0x200"}, {l1, l2 + 512, "L2 table"}} {
		patch(t, path, tt.at, be64(uint64(tt.to)))
		n := mustOpen(t, path)
		if err := n.Readv([][]byte{make([]byte, 512)}, 0); !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), tt.says) {
			t.Errorf("%#x: %v", tt.to, err)
		}
		n.Close()
	}
	// A table that is to be written is copied first, from where there is one.
	if err := func() error {
		n, err := Open(path, false)
		if err != nil {
			return err
		}
		defer n.Close()
		return n.Writev([][]byte{make([]byte, 512)}, 0)
	}(); !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), "L2 table") {
		t.Errorf("write: %v", err)
	}
	// A table that maps itself is odd, and harmless.
	patch(t, path, l1, be64(uint64(l1)))
	n = mustOpen(t, path)
	readAllowed(t, n)
}

// readAllowed reads everything; it may fail, by an error of this package.
func readAllowed(t testing.TB, n *Node) {
	t.Helper()
	b := make([]byte, 32<<10)
	for off := int64(0); off < min(n.Size(), 8<<20); off += int64(len(b)) {
		b := b[:min(int64(len(b)), n.Size()-off)]
		if err := n.Readv([][]byte{b}, off); err != nil && !errors.Is(err, ErrCorrupt) {
			t.Fatalf("read at %d: %v", off, err)
		}
	}
}

// TestCutOff: a file that lost its end is refused, or the reads that need what
// is missing fail; none yields anything else than the disk's content.
func TestCutOff(t *testing.T) {
	for _, options := range [][]string{nil, {"-c"}, {"-c", "-o", "compression_type=zstd"}} {
		path, _ := small(t, options...)
		want := bytes.Repeat([]byte("gnomon, sundial "), 1<<12)
		whole, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		var refused, failed, fine int
		for size := len(whole); size >= 0; size -= 509 {
			writeFile(t, path, whole[:size])
			n, err := Open(path, true)
			if err != nil {
				if !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrHeader) {
					t.Fatalf("cut to %d: %v", size, err)
				}
				refused++
				continue
			}
			for off := 0; off < len(want); off += 512 {
				got := make([]byte, 512)
				err := n.Readv([][]byte{got}, int64(off))
				switch {
				case err == nil && bytes.Equal(got, want[off:off+512]):
					fine++
				case errors.Is(err, ErrCorrupt):
					failed++
				case err == nil && size%512 != 0 && (options != nil || bytes.HasPrefix(want[off:], bytes.TrimRight(got, "\x00"))):
					// Files end with whole sectors, or seem to; what lacks of the last one is
					// zero, for QEMU as well. So the stream of a compressed cluster may go on there.
				default:
					t.Fatalf("cut to %d: read at %d: %v, %q", size, off, err, got[:16])
				}
			}
			n.Close()
		}
		if refused == 0 || failed == 0 || fine == 0 {
			t.Errorf("%d refused, %d reads failed, %d fine", refused, failed, fine)
		}
	}
}

// counter counts the reads of a file.
type counter struct {
	block.Node
	reads int
}

func (c *counter) Readv(bufs [][]byte, off int64) error {
	c.reads++
	return c.Node.Readv(bufs, off)
}

func TestNeighboursAreReadAtOnce(t *testing.T) {
	dir := t.TempDir()
	writeFile(t, filepath.Join(dir, "source"), mixed(2, 16<<20))
	qemu(t, dir, "qemu-img", "convert", "-S", "0", "-O", "qcow2", "-o", "cluster_size=4k", "source", "image.qcow2")
	n := mustOpen(t, filepath.Join(dir, "image.qcow2"))
	c := &counter{Node: n.file}
	n.file = c
	readAll(t, n)
	// 8 tables of 512 entries each, and what they lie between.
	if c.reads > 2*8+2 {
		t.Errorf("%d reads for 16 MiB in 4096 clusters that lie side by side", c.reads)
	}
	c.reads = 0
	readAll(t, n)
	if c.reads > 8+2 {
		t.Errorf("%d reads with all tables known", c.reads)
	}
}

// TestCachesAreBounded reads an image whose tables and clusters are more than
// the caches hold.
func TestCachesAreBounded(t *testing.T) {
	dir := t.TempDir()
	writeFile(t, filepath.Join(dir, "source"), mixed(2, 4<<20))
	qemu(t, dir, "qemu-img", "convert", "-c", "-O", "qcow2", "-o", "cluster_size=512", "source", "image.qcow2")
	n := mustOpen(t, filepath.Join(dir, "image.qcow2"))
	want := readAll(t, n)
	n.tables, n.clusters = newCache(2000), newCache(10_000)
	if !bytes.Equal(readAll(t, n), want) {
		t.Error("small caches read something else")
	}
	for _, c := range []*cache{n.tables, n.clusters} {
		var held int64
		for e := c.recent.Front(); e != nil; e = e.Next() {
			held += int64(len(e.Value.(*piece).data))
		}
		if held != c.used || held > c.limit || held == 0 || c.recent.Len() != len(c.entries) {
			t.Errorf("%d bytes held, %d counted, %d allowed; %d in the list, %d in the map", held, c.used, c.limit, c.recent.Len(), len(c.entries))
		}
	}
}

func TestCacheForgetsTheOldest(t *testing.T) {
	c := newCache(30)
	for i := range int64(3) {
		c.put(key{1, i}, make([]byte, 10))
	}
	c.get(key{1, 0})
	c.put(key{1, 3}, make([]byte, 10))
	var kept []int64
	for i := range int64(4) {
		if c.get(key{1, i}) != nil {
			kept = append(kept, i)
		}
	}
	if !slices.Equal(kept, []int64{0, 2, 3}) {
		t.Errorf("kept %v", kept)
	}
	if c.get(key{2, 0}) != nil {
		t.Error("another image's piece")
	}
	c.put(key{1, 9}, make([]byte, 100)) // larger than the cache: kept alone
	if c.recent.Len() != 1 || c.get(key{1, 9}) == nil {
		t.Errorf("%d pieces", c.recent.Len())
	}
}

// TestDecompressionIsBounded: a stream that yields more than its cluster ends
// with the cluster, and one that yields less is damaged.
func TestDecompressionIsBounded(t *testing.T) {
	for _, method := range []string{"zlib", "zstd"} {
		dir := t.TempDir()
		// A cluster of 2 MiB in few bytes.
		writeFile(t, filepath.Join(dir, "source"), bytes.Repeat([]byte{7}, 2<<20))
		qemu(t, dir, "qemu-img", "convert", "-c", "-O", "qcow2", "-o", "cluster_size=2M,compression_type="+method, "source", "big.qcow2")
		big := mustOpen(t, filepath.Join(dir, "big.qcow2"))
		e, _, err := big.lookup(0, 1)
		if err != nil || e.kind != compressed {
			t.Fatalf("%+v, %v", e, err)
		}
		stream := make([]byte, e.csize)
		if err := big.file.Readv([][]byte{stream}, e.host); err != nil {
			t.Fatal(err)
		}
		for _, size := range []int{512, 4096, 2 << 20} {
			out := make([]byte, size)
			d := &decompressor{input: stream}
			if err := d.fill(out, big.header.Compression); err != nil || bytes.Count(out, []byte{7}) != size {
				t.Errorf("%s: %d bytes: %v", method, size, err)
			}
		}
		d := &decompressor{input: stream}
		for range 2 { // and the decompressor can be used again
			if err := d.fill(make([]byte, 2<<20+1), big.header.Compression); err == nil {
				t.Errorf("%s: more than is there", method)
			}
			if err := d.fill(make([]byte, 10), big.header.Compression); err != nil {
				t.Errorf("%s: after an error: %v", method, err)
			}
		}
	}
}

func TestFIFO(t *testing.T) {
	dir := t.TempDir()
	create(t, dir, "image.qcow2", "1M")
	if err := unix.Mkfifo(filepath.Join(dir, "fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	qemu(t, dir, "qemu-img", "rebase", "-u", "-b", "fifo", "-F", "raw", "image.qcow2")
	if _, err := Open(filepath.Join(dir, "image.qcow2"), true); !errors.Is(err, ErrBacking) {
		t.Errorf("backing file is a FIFO: %v", err)
	}
}

func TestUnknownExtensionsArePassedOver(t *testing.T) {
	dir := t.TempDir()
	create(t, dir, "image.qcow2", "1M")
	path := filepath.Join(dir, "image.qcow2")
	first, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	length := binary.BigEndian.Uint32(first[100:])
	ext := slices.Concat(be32(0xabcdef01), be32(5), make([]byte, 8), be32(extBackingFormat), be32(3), []byte("raw\x00\x00\x00\x00\x00"), be32(extEnd), be32(0))
	copy(first[length:], ext)
	h, err := ParseHeader(first)
	if err != nil || h.BackingFormat != "raw" {
		t.Errorf("%+v, %v", h, err)
	}
}
