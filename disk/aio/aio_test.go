package aio

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// engines are those that tests are about.
var engines = []Engine{Threads, IOUring}

// fixture is a file that is open for direct I/O.
type fixture struct {
	*File
	path    string
	content []byte
	free    func() // what occupy returns
}

// newFile makes a file of size bytes of noise. align is 0 or what requests shall be
// aligned to.
func newFile(t *testing.T, size int64, o Options) *fixture {
	t.Helper()
	content := make([]byte, size)
	rand.NewChaCha8([32]byte{byte(size)}).Read(content)
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return openFile(t, path, content, o)
}

func openFile(t *testing.T, path string, content []byte, o Options) *fixture {
	t.Helper()
	flags := os.O_RDWR
	if o.Direct {
		flags |= unix.O_DIRECT
	}
	fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatalf("open for direct I/O (TMPDIR must be on a file system that has it): %v", err)
	}
	f, err := New(fd, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
		unix.Close(fd)
	})
	free := func() {}
	if f.ring != nil {
		free = sync.OnceFunc(occupy(f))
	}
	t.Cleanup(free)
	return &fixture{f, path, content, free}
}

// occupy has no request of f be the only one, so that the io_uring makes them all, until
// the function that it returns is called.
func occupy(f *File) func() {
	f.ring.mu.Lock()
	defer f.ring.mu.Unlock()
	s := f.ring.take()
	return func() { f.ring.end(s) }
}

// The io_uring makes requests but the only one.
func TestOnlyRequest(t *testing.T) {
	made := func(f *fixture) uint32 {
		before := *f.ring.sqTail
		p := alignedMemory(4096)
		if n, err := f.Readv([][]byte{p}, 8192); n != 4096 || err != nil || !bytes.Equal(p, f.content[8192:][:4096]) {
			t.Errorf("read: %d, %v, or something else", n, err)
		}
		return *f.ring.sqTail - before
	}
	o := Options{Engine: IOUring, Direct: true}
	f := newFile(t, 1<<20, o)
	if n := made(f); n != 1 {
		t.Errorf("the io_uring has made %d requests beside another", n)
	}
	alone := openFile(t, f.path, f.content, o)
	alone.free()
	if n := made(alone); n != 0 {
		t.Errorf("the io_uring has made %d requests that were the only ones", n)
	}
}

// each runs a test with each engine and alignment.
func each(t *testing.T, test func(t *testing.T, o Options)) {
	for _, engine := range engines {
		for _, o := range []Options{{Direct: true}, {Direct: true, Align: 4096}, {}} {
			o.Engine = engine
			t.Run(fmt.Sprintf("%s/direct=%v/align=%d", engine, o.Direct, o.Align), func(t *testing.T) { test(t, o) })
		}
	}
}

// scattered cuts n bytes of memory that begins anywhere into buffers, some of them
// empty; aligned ones if unit is not 1.
func scattered(rng *rand.Rand, n int, unit int) [][]byte {
	memory := alignedMemory(n + 4*unit + 64)
	if unit == 1 {
		memory = memory[rng.IntN(64):]
	}
	var bufs [][]byte
	for n > 0 {
		part := min(n, (1+rng.IntN(9000/unit+1))*unit)
		if rng.IntN(8) == 0 {
			part = 0
		}
		bufs = append(bufs, memory[:part:part])
		memory, n = memory[part:], n-part
	}
	return bufs
}

// A file is what an array of bytes is, whatever requests are made.
func TestModel(t *testing.T) {
	const size = 3<<20 + 700 // no whole block
	each(t, func(t *testing.T, o Options) {
		f := newFile(t, size, o)
		rng := rand.New(rand.NewPCG(1, 2))
		fill := rand.NewChaCha8([32]byte{9})
		for i := range 250 {
			off, n := rng.Int64N(size), 1+rng.Int64N(20000)
			if rng.IntN(20) == 0 {
				n = 1 + rng.Int64N(5<<19) // several times what goes through aligned memory
			}
			unit := 1
			switch rng.IntN(4) {
			case 0: // aligned in all respects
				unit = 4096
				off, n = off&^4095, (n+4095)&^4095
			case 1: // but for the memory
				off, n = off&^4095, (n+4095)&^4095
			case 2:
				n = min(n, 100)
			}
			if rng.IntN(2) == 0 {
				bufs := scattered(rng, int(n), unit)
				got, err := f.Readv(bufs, off)
				want := f.content[off:min(size, off+n)]
				if err != nil || got != int64(len(want)) {
					t.Fatalf("request %d: read %d at %d of %d: %d, %v", i, n, off, size, got, err)
				}
				if !bytes.Equal(bytes.Join(bufs, nil)[:got], want) {
					t.Fatalf("request %d: read %d at %d: something else", i, n, off)
				}
				continue
			}
			if n = min(n, size-off); unit != 1 {
				n &^= 4095
			}
			bufs := scattered(rng, int(n), unit)
			at := off
			for _, b := range bufs {
				fill.Read(b)
				at += int64(copy(f.content[at:], b))
			}
			if err := f.Writev(bufs, off, size); err != nil {
				t.Fatalf("request %d: write %d at %d: %v", i, n, off, err)
			}
		}
		got, err := os.ReadFile(f.path)
		if err != nil || !bytes.Equal(got, f.content) {
			t.Fatalf("%d bytes, %v: not those that were written to %d", len(got), err, len(f.content))
		}
	})
}

// Writes of neighbours in one block do not undo each other, nor writes of whole
// blocks.
func TestNeighbours(t *testing.T) {
	each(t, func(t *testing.T, o Options) {
		const size, writers, rounds = 64 << 10, 16, 20
		f := newFile(t, size, o)
		// Writer i owns the bytes i, i+writers, ... in runs of 100.
		const run = 100
		var all sync.WaitGroup
		for w := range writers {
			all.Go(func() {
				rng := rand.New(rand.NewPCG(uint64(w), 0))
				p := make([]byte, run)
				for i := range rounds {
					at := (rng.IntN(size/run/writers)*writers + w) * run
					for k := range p {
						p[k] = byte(i)
					}
					if err := f.Writev([][]byte{p}, int64(at), size); err != nil {
						t.Error(err)
						return
					}
					copy(f.content[at:], p)
					back := make([]byte, run)
					if n, err := f.Readv([][]byte{back}, int64(at)); err != nil || n != run || !bytes.Equal(back, p) {
						t.Errorf("writer %d: at %d: %d, %v: what it wrote is not there", w, at, n, err)
						return
					}
				}
			})
		}
		all.Wait()
		if got, err := os.ReadFile(f.path); err != nil || !bytes.Equal(got, f.content) {
			t.Fatalf("%v: a write was undone by another", err)
		}
	})
}

// Many goroutines at once get what is theirs, more than the ring has room for.
func TestManyGoroutines(t *testing.T) {
	const size, block, goroutines = 8 << 20, 4096, 3 * ringEntries
	each(t, func(t *testing.T, o Options) {
		f := newFile(t, size, o)
		f.free()
		var all sync.WaitGroup
		for g := range goroutines {
			all.Go(func() {
				rng := rand.New(rand.NewPCG(uint64(g), 1))
				p := alignedMemory(block)
				own := int64(g) * block // each writes its own block, and reads any behind those
				for range 8 {
					for i := range p {
						p[i] = byte(g)
					}
					if err := f.Writev([][]byte{p}, own, size); err != nil {
						t.Error(err)
						return
					}
					at := goroutines*block + rng.Int64N(size/block-goroutines)*block
					if n, err := f.Readv([][]byte{p}, at); err != nil || n != block || !bytes.Equal(p, f.content[at:at+block]) {
						t.Errorf("read at %d: %d, %v: not what is there", at, n, err)
						return
					}
				}
			})
		}
		all.Wait()
		got, err := os.ReadFile(f.path)
		if err != nil {
			t.Fatal(err)
		}
		for g := range goroutines {
			if b := got[g*block:][:block]; b[0] != byte(g) || b[block-1] != byte(g) {
				t.Fatalf("block %d has %x", g, b[0])
			}
		}
		if f.ring != nil {
			if f.ring.led || f.ring.last != nil || len(f.ring.free) != ringEntries {
				t.Errorf("led %v, last %v, %d slots free: the ring is not idle", f.ring.led, f.ring.last, len(f.ring.free))
			}
		}
	})
}

// A file ends where it ends: reads tell, and writes do not make it longer than they
// must.
func TestEnd(t *testing.T) {
	each(t, func(t *testing.T, o Options) {
		const size = 10000
		f := newFile(t, size, o)
		for _, tt := range []struct{ off, n, want int64 }{{9000, 4000, 1000}, {8192, 4096, 1808}, {0, 16384, size}, {12288, 4096, 0}, {9999, 1, 1}, {10000, 1, 0}} {
			p := alignedMemory(int(tt.n))
			got, err := f.Readv([][]byte{p}, tt.off)
			if err != nil || got != tt.want || !bytes.Equal(p[:got], f.content[min(tt.off, size):][:got]) {
				t.Errorf("read %d at %d: %d, %v; want %d", tt.n, tt.off, got, err, tt.want)
			}
		}
		// The limit is where the disk ends, within the file's last block.
		limit := int64(10240)
		if o.Align == 4096 {
			limit = 10100
		}
		for _, tt := range []struct{ off, n, length int64 }{{9000, 10, max(size, size)}, {10020, 30, 10050}, {8000, 2100, 10100}} {
			p := bytes.Repeat([]byte{byte(tt.n)}, int(tt.n))
			if err := f.Writev([][]byte{p}, tt.off, limit); err != nil {
				t.Fatal(err)
			}
			info, err := os.Stat(f.path)
			if err != nil || info.Size() > limit || info.Size() < tt.length {
				t.Errorf("write %d at %d: the file has %d bytes, of at most %d", tt.n, tt.off, info.Size(), limit)
			}
			back := make([]byte, tt.n)
			if n, err := f.Readv([][]byte{back}, tt.off); err != nil || n != tt.n || !bytes.Equal(back, p) {
				t.Errorf("write %d at %d: %d, %v: it is not there", tt.n, tt.off, n, err)
			}
		}
	})
}

// Requests under way end before the file is closed, later ones fail.
func TestClose(t *testing.T) {
	for _, direct := range []bool{true, false} {
		path := filepath.Join(t.TempDir(), "file")
		if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); err != nil {
			t.Fatal(err)
		}
		flags := unix.O_RDWR | unix.O_CLOEXEC
		if direct {
			flags |= unix.O_DIRECT
		}
		fd, err := unix.Open(path, flags, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		f, err := New(fd, Options{Engine: IOUring, Direct: direct})
		if err != nil {
			t.Fatal(err)
		}
		var all sync.WaitGroup
		begun := make(chan struct{}, 64)
		for range cap(begun) {
			all.Go(func() {
				p := alignedMemory(4096)
				for i := 0; ; i++ {
					n, err := f.Readv([][]byte{p}, int64(i%256)*4096)
					if i == 1 {
						begun <- struct{}{}
					}
					if errors.Is(err, os.ErrClosed) {
						return
					}
					if err != nil || n != 4096 {
						t.Errorf("%d, %v", n, err)
						return
					}
				}
			})
		}
		for range cap(begun) {
			<-begun
		}
		if err := f.Close(); err != nil {
			t.Error(err)
		}
		all.Wait()
		if err := f.Close(); err != nil {
			t.Errorf("closed twice: %v", err)
		}
	}
}

// The kernel's errors reach who asked.
func TestErrors(t *testing.T) {
	for _, engine := range engines {
		path := filepath.Join(t.TempDir(), "file")
		if err := os.WriteFile(path, make([]byte, 8192), 0o600); err != nil {
			t.Fatal(err)
		}
		fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECT|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		f, err := New(fd, Options{Engine: engine, Direct: true})
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range [][]byte{alignedMemory(4096), make([]byte, 10)} {
			if err := f.Writev([][]byte{p}, 0, 8192); !errors.Is(err, unix.EBADF) {
				t.Errorf("%s: write of %d to a file that is open for reading: %v", engine, len(p), err)
			}
		}
		if n, err := f.Readv([][]byte{alignedMemory(4096)}, -4096); !errors.Is(err, unix.EINVAL) {
			t.Errorf("%s: read before the beginning: %d, %v", engine, n, err)
		}
		// It goes on after that.
		if n, err := f.Readv([][]byte{alignedMemory(4096)}, 4096); n != 4096 || err != nil {
			t.Errorf("%s: %d, %v", engine, n, err)
		}
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	}
}
