package raw

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/internal/iovec"
)

// newDisk makes a file of size bytes of noise and opens it.
func newDisk(t *testing.T, size int64) (n *Node, path string, content []byte) {
	t.Helper()
	content = noise(size)
	path = filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return open(t, path, false), path, content
}

func open(t *testing.T, path string, readOnly bool) *Node {
	t.Helper()
	n, err := Open(path, readOnly)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.Close() })
	return n
}

func noise(n int64) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{byte(n)}).Read(b)
	return b
}

// split cuts p into buffers of random lengths, some of them empty.
func split(rng *rand.Rand, p []byte) [][]byte {
	var bufs [][]byte
	for len(p) > 0 {
		n := min(rng.IntN(3000), len(p))
		if rng.IntN(4) == 0 {
			n = 0
		}
		bufs = append(bufs, p[:n:n])
		p = p[n:]
	}
	return bufs
}

// operate does things to a disk and to an array of bytes. Devices discard whole blocks
// only: with them it is left out.
func operate(t *testing.T, n *Node, model []byte, rng *rand.Rand, steps int, discards bool) {
	t.Helper()
	kinds, size := 6, int64(len(model))
	if discards {
		kinds = 7
	}
	for step := range steps {
		off := rng.Int64N(size + 1)
		length := rng.Int64N(min(size-off, 1<<rng.IntN(18)) + 1)
		area := model[off : off+length]
		var err error
		switch op := rng.IntN(kinds); op {
		case 0, 1:
			got := make([]byte, length)
			if err = n.Readv(split(rng, got), off); err == nil && !bytes.Equal(got, area) {
				t.Fatalf("step %d: read of %d at %d is not what was written", step, length, off)
			}
		case 2, 3:
			for i := range area {
				area[i] = byte(rng.Uint32())
			}
			err = n.Writev(split(rng, bytes.Clone(area)), off)
		case 4, 5:
			clear(area)
			err = n.WriteZeroes(off, length, op == 4)
		case 6:
			clear(area) // what a hole punched in a file reads as
			err = n.Discard(off, length)
		}
		if err != nil {
			t.Fatalf("step %d: %v", step, err)
		}
	}
}

func TestModel(t *testing.T) {
	const size = 1 << 20
	n, path, model := newDisk(t, size)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	operate(t, n, model, rng, 3000, true)
	if err := n.Flush(); err != nil {
		t.Error(err)
	}
	if err := n.Close(); err != nil {
		t.Error(err)
	}
	if err := n.Close(); err != nil {
		t.Errorf("second close: %v", err)
	}
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, model) {
		t.Error("the file is not what was written")
	}
}

func TestManyBuffers(t *testing.T) {
	n, _, content := newDisk(t, 1<<20)
	var bufs [][]byte
	got := make([]byte, 6000)
	for i := range got {
		if i == 1000 { // more empty ones than a call takes
			for range 2*iovec.Max + 5 {
				bufs = append(bufs, nil)
			}
		}
		bufs = append(bufs, got[i:i+1])
	}
	if err := n.Readv(bufs, 700); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, content[700:6700]) {
		t.Error("read into 6000 buffers is wrong")
	}
	for i := range got {
		got[i] ^= 0xff
	}
	if err := n.Writev(bufs, 700); err != nil {
		t.Fatal(err)
	}
	back := make([]byte, len(got))
	if err := n.Readv([][]byte{back}, 700); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, back) {
		t.Error("write from 6000 buffers is wrong")
	}
	for _, empty := range [][][]byte{nil, {}, {nil, nil}} {
		if err := errors.Join(n.Readv(empty, 1<<20), n.Writev(empty, 0)); err != nil {
			t.Errorf("%v: %v", empty, err)
		}
	}
}

// TestShortTransfers moves by a call that takes a random part each time, is
// interrupted, and ends at some point.
func TestShortTransfers(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for range 500 {
		source := noise(int64(1 + rng.IntN(20000)))
		end := rng.IntN(len(source) + 1)
		got := bytes.Repeat([]byte{0xaa}, len(source))
		interrupts := 0
		move := func(fd int, bufs [][]byte, skip int, off int64) (int, error) {
			if fd != 77 {
				t.Fatalf("descriptor %d", fd)
			}
			if rng.IntN(3) == 0 {
				interrupts++
				return 0, syscall.EINTR
			}
			left := min(1+rng.IntN(5000), end-int(off))
			moved := 0
			for _, b := range bufs {
				c := copy(b[skip:], source[int(off)+moved:int(off)+left])
				skip, moved = 0, moved+c
				if moved == left {
					break
				}
			}
			return moved, nil
		}
		bufs := split(rng, got)
		rest, err := transfer(move, 77, bufs, 0)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got[:end], source[:end]) {
			t.Fatal("moved bytes are wrong")
		}
		if left := total(rest.bufs) - int64(rest.skip); left != int64(len(source)-end) {
			t.Fatalf("%d bytes remain, want %d", left, len(source)-end)
		}
		rest.clear()
		if !bytes.Equal(got[end:], make([]byte, len(got)-end)) || !bytes.Equal(got[:end], source[:end]) {
			t.Fatal("clear cleared something else than the remainder")
		}
	}
	fail := func(int, [][]byte, int, int64) (int, error) { return 0, syscall.EIO }
	if _, err := transfer(fail, 0, [][]byte{{1}}, 0); !errors.Is(err, syscall.EIO) {
		t.Errorf("error %v", err)
	}
}

func TestUnalignedTail(t *testing.T) {
	n, path, content := newDisk(t, 1000)
	if n.Size() != 1024 {
		t.Fatalf("size %d, want 1024", n.Size())
	}
	for off := int64(0); off < 1024; off += 37 {
		got := bytes.Repeat([]byte{0xaa}, int(1024-off))
		if err := n.Readv([][]byte{got[:len(got)/3], got[len(got)/3:]}, off); err != nil {
			t.Fatal(err)
		}
		want := make([]byte, 1024)
		copy(want, content)
		if !bytes.Equal(got, want[off:]) {
			t.Fatalf("read at %d: %x", off, got)
		}
	}
	if err := n.Writev([][]byte{{1, 2}}, 1022); err != nil {
		t.Fatal(err)
	}
	if got, _ := os.ReadFile(path); !bytes.Equal(got, append(append(bytes.Clone(content), make([]byte, 22)...), 1, 2)) {
		t.Errorf("the file's tail is %x", got[990:])
	}
}

func TestBounds(t *testing.T) {
	n, _, _ := newDisk(t, 4096)
	b := [][]byte{make([]byte, 512)}
	for _, off := range []int64{-1, -512, 4096, 3585, 1<<63 - 1, -1 << 63} {
		for name, err := range map[string]error{
			"read": n.Readv(b, off), "write": n.Writev(b, off), "discard": n.Discard(off, 512), "zero": n.WriteZeroes(off, 512, true),
		} {
			if !errors.Is(err, block.ErrOutOfRange) {
				t.Errorf("%s at %d: %v", name, off, err)
			}
		}
	}
	for _, length := range []int64{-1, 4097, 1<<63 - 1, -1 << 63} {
		if err := n.Discard(0, length); !errors.Is(err, block.ErrOutOfRange) {
			t.Errorf("discard of %d: %v", length, err)
		}
		if err := n.WriteZeroes(1, length, false); !errors.Is(err, block.ErrOutOfRange) {
			t.Errorf("zeroes of %d: %v", length, err)
		}
	}
}

func TestReadOnly(t *testing.T) {
	n, path, content := newDisk(t, 4096)
	n.Close()
	n = open(t, path, true)
	if !n.ReadOnly() {
		t.Error("not read-only")
	}
	for name, err := range map[string]error{
		"write": n.Writev([][]byte{{1}}, 0), "discard": n.Discard(0, 512), "zero": n.WriteZeroes(0, 512, true),
	} {
		if !errors.Is(err, block.ErrReadOnly) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := n.Flush(); err != nil {
		t.Error(err)
	}
	if got, _ := os.ReadFile(path); !bytes.Equal(got, content) {
		t.Error("the file changed")
	}
}

func allocated(t *testing.T, path string) int64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

func TestHoles(t *testing.T) {
	const mib = 1 << 20
	n, path, content := newDisk(t, 4*mib)
	if err := n.Flush(); err != nil {
		t.Fatal(err)
	}
	full := allocated(t, path)
	if full < 4*mib {
		t.Fatalf("%d bytes allocated for 4 MiB", full)
	}
	for i, give := range []func() error{
		func() error { return n.Discard(0, mib) },
		func() error { return n.WriteZeroes(2*mib, mib, true) },
	} {
		if err := give(); err != nil {
			t.Fatal(err)
		}
		if got, want := allocated(t, path), full-int64(i+1)*mib; got > want {
			t.Errorf("%d bytes allocated, want at most %d", got, want)
		}
	}
	if err := n.WriteZeroes(3*mib, mib/2, false); err != nil {
		t.Fatal(err)
	}
	if got, least := allocated(t, path), full-2*mib; got < least {
		t.Errorf("zeroes that keep their space gave it back: %d bytes allocated, want %d", got, least)
	}
	clear(content[:mib])
	clear(content[2*mib : 3*mib+mib/2])
	got := make([]byte, 4*mib)
	if err := n.Readv([][]byte{got}, 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, content) {
		t.Error("wrong content")
	}
	info := n.Info()
	if info.Format != "raw" || info.Filename != path || info.VirtualSize != 4*mib || info.ActualSize != allocated(t, path) {
		t.Errorf("info %+v", info)
	}
}

func TestConcurrent(t *testing.T) {
	const part = 64 << 10
	n, _, content := newDisk(t, 8*part)
	var wg sync.WaitGroup
	for w := range int64(8) {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(w), 0))
			own := content[w*part : (w+1)*part]
			for range 100 {
				off := rng.Int64N(part)
				p := own[off : off+rng.Int64N(part-off)+1]
				for i := range p {
					p[i]++
				}
				if err := n.Writev(split(rng, p), w*part+off); err != nil {
					t.Error(err)
				}
				got := make([]byte, part)
				if err := n.Readv(split(rng, got), w*part); err != nil || !bytes.Equal(got, own) {
					t.Errorf("worker %d: read differs, error %v", w, err)
					return
				}
			}
		})
	}
	wg.Wait()
}

func descriptors(t *testing.T) int {
	t.Helper()
	d, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(d)
}

func TestOpenErrors(t *testing.T) {
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	held := filepath.Join(dir, "held")
	if err := os.WriteFile(held, make([]byte, 512), 0o600); err != nil {
		t.Fatal(err)
	}
	open(t, held, false)
	before := descriptors(t)
	for _, tt := range []struct {
		path, says string
		is         error
	}{
		{filepath.Join(dir, "none"), "check the path", os.ErrNotExist},
		{dir, "", nil},
		{fifo, "neither a regular file nor a block device", nil},
		{"/dev/null", "neither a regular file nor a block device", nil},
		{held, "disk " + held, block.ErrInUse},
	} {
		for _, readOnly := range []bool{true, false} {
			if tt.path == fifo && !readOnly {
				continue // opening the writing end never waits
			}
			n, err := Open(tt.path, readOnly)
			if err == nil || n != nil || !strings.Contains(err.Error(), tt.says) || tt.is != nil && !errors.Is(err, tt.is) {
				t.Errorf("Open(%s, %v): %v, %v", tt.path, readOnly, n, err)
			}
		}
	}
	if after := descriptors(t); after != before {
		t.Errorf("%d descriptors before, %d after", before, after)
	}
}

func TestBlockDevice(t *testing.T) {
	n, path, content := newDisk(t, 1<<20)
	n.Close()
	dev := loop(t, path, 512)
	n = open(t, dev, false)
	if n.Size() != 1<<20 || n.granule < 512 {
		t.Fatalf("size %d, granule %d", n.Size(), n.granule)
	}
	if err := n.Writev([][]byte{[]byte("gnomon")}, 70000); err != nil {
		t.Fatal(err)
	}
	if err := n.WriteZeroes(4096, 8192, true); err != nil {
		t.Fatal(err)
	}
	if err := n.WriteZeroes(100, 1000, false); err != nil {
		t.Fatal(err)
	}
	if err := n.WriteZeroes(20000, 10, true); err != nil {
		t.Fatal(err)
	}
	if err := n.Discard(40001, 10); err != nil {
		t.Fatal(err)
	}
	if err := n.Discard(512<<10, 64<<10); err != nil {
		t.Fatal(err)
	}
	copy(content[70000:], "gnomon")
	clear(content[4096:12288])
	clear(content[100:1100])
	clear(content[20000:20010])
	clear(content[512<<10 : 576<<10])
	got := make([]byte, 1<<20)
	if err := n.Readv([][]byte{got}, 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, content) {
		t.Error("the device's content is wrong")
	}
	if _, err := Open(dev, false); !errors.Is(err, block.ErrInUse) {
		t.Errorf("second writer: %v", err)
	}
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	if got, _ := os.ReadFile(path); !bytes.Equal(got, content) {
		t.Error("the file below the device has other content")
	}
}

// The map names what the file system holds, and what it does not.
func TestMap(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, 1<<20); err != nil {
		t.Fatal(err)
	}
	n, err := Open(path, false)
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	for _, at := range []int64{128 << 10, 512 << 10} {
		if err := n.Writev([][]byte{bytes.Repeat([]byte{1}, 64<<10)}, at); err != nil {
			t.Fatal(err)
		}
	}
	var got []block.Extent
	for off := int64(0); off < n.Size(); {
		e, err := n.Map(off, n.Size()-off)
		if err != nil || e.Start != off || e.Length <= 0 {
			t.Fatalf("Map(%d): %+v, %v", off, e, err)
		}
		off += e.Length
		got = append(got, e)
	}
	extent := func(start, length int64, data bool) block.Extent {
		return block.Extent{Start: start, Length: length, Present: true, Data: data, Zero: !data, File: path, Offset: start}
	}
	want := []block.Extent{
		extent(0, 128<<10, false), extent(128<<10, 64<<10, true), extent(192<<10, 320<<10, false),
		extent(512<<10, 64<<10, true), extent(576<<10, 448<<10, false),
	}
	if !slices.Equal(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if _, err := n.Map(1<<20-512, 1024); !errors.Is(err, block.ErrOutOfRange) {
		t.Errorf("past the end: %v", err)
	}
}
