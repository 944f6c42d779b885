package nbd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/gnomon-vmm/gnomon/disk/block"
)

// memory is a disk in memory that knows its holes by granules, and counts.
type memory struct {
	mu       sync.Mutex
	bytes    []byte         // guarded by mu
	holes    map[int64]bool // guarded by mu: granules that are holes
	flushes  int            // guarded by mu
	readOnly bool
	fail     error           // guarded by mu: what reads and writes return
	hold     func(off int64) // guarded by mu: called by reads
	unmapped []bool          // guarded by mu: what WriteZeroes was told
}

const granule = 64 << 10

func newMemory(size int64) *memory {
	m := &memory{bytes: make([]byte, size), holes: map[int64]bool{}}
	for g := range (size + granule - 1) / granule {
		m.holes[g] = true
	}
	return m
}

// content is what the disk holds, and flushCount how often it was flushed.
func (m *memory) content() []byte {
	m.mu.Lock()
	defer m.mu.Unlock()
	return bytes.Clone(m.bytes)
}

func (m *memory) flushCount() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.flushes
}

// failWith makes reads and writes fail.
func (m *memory) failWith(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.fail = err
}

// holdWith has reads call f.
func (m *memory) holdWith(f func(off int64)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.hold = f
}

func (m *memory) check(off, n int64) error {
	if off < 0 || n < 0 || off+n > int64(len(m.bytes)) {
		return fmt.Errorf("%w: %d bytes at %d", block.ErrOutOfRange, n, off)
	}
	return nil
}

func (m *memory) Readv(bufs [][]byte, off int64) error {
	m.mu.Lock()
	if hold := m.hold; hold != nil {
		m.mu.Unlock()
		hold(off)
		m.mu.Lock()
	}
	defer m.mu.Unlock()
	if err := errors.Join(m.fail, m.check(off, total(bufs))); err != nil {
		return err
	}
	for _, b := range bufs {
		off += int64(copy(b, m.bytes[off:]))
	}
	return nil
}

func (m *memory) Writev(bufs [][]byte, off int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := errors.Join(m.fail, m.check(off, total(bufs))); err != nil {
		return err
	}
	for _, b := range bufs {
		for g := off / granule; len(b) > 0 && g <= (off+int64(len(b))-1)/granule; g++ {
			delete(m.holes, g)
		}
		off += int64(copy(m.bytes[off:], b))
	}
	return nil
}

func (m *memory) Flush() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.flushes++
	return nil
}

func (m *memory) Discard(off, n int64) error { return m.WriteZeroes(off, n, true) }

func (m *memory) WriteZeroes(off, n int64, unmap bool) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.check(off, n); err != nil {
		return err
	}
	m.unmapped = append(m.unmapped, unmap)
	clear(m.bytes[off : off+n])
	if unmap {
		for g := (off + granule - 1) / granule; (g+1)*granule <= off+n; g++ {
			m.holes[g] = true
		}
	}
	return nil
}

func (m *memory) Size() int64      { return int64(len(m.bytes)) }
func (m *memory) ReadOnly() bool   { return m.readOnly }
func (m *memory) Info() block.Info { return block.Info{Format: "memory"} }
func (m *memory) Close() error     { return nil }

func (m *memory) Map(off, n int64) (block.Extent, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.check(off, n); err != nil {
		return block.Extent{}, err
	}
	hole := m.holes[off/granule]
	end := off
	for end < off+n && m.holes[end/granule] == hole {
		end = (end/granule + 1) * granule
	}
	return block.Extent{Start: off, Length: min(end-off, n), Present: true, Data: !hole, Zero: hole, Offset: -1}, nil
}

// runsBitmap is a bitmap of some runs.
type runsBitmap struct {
	name string
	runs [][2]int64
}

func (b runsBitmap) Name() string { return b.name }

func (b runsBitmap) NextDirty(off, end int64) (start, stop int64, err error) {
	for _, r := range b.runs {
		if start, stop = max(r[0], off), min(r[1], end); start < stop {
			return start, stop, nil
		}
	}
	return end, end, nil
}

// serve runs a server of the exports at a Unix socket of its own.
func serve(t testing.TB, o ServerOptions, exports ...Export) (*Server, string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "nbd") // short: a socket's path is at most 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	address := "unix:" + filepath.Join(dir, "s")
	l, err := Listen(address)
	if err != nil {
		t.Fatal(err)
	}
	return serveAt(t, l, o, exports...), address
}

func serveAt(t testing.TB, l net.Listener, o ServerOptions, exports ...Export) *Server {
	t.Helper()
	s := NewServer(o)
	for _, e := range exports {
		if err := s.Add(e); err != nil {
			t.Fatal(err)
		}
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	t.Cleanup(func() {
		s.Close()
		if err := <-served; !errors.Is(err, ErrClosed) {
			t.Errorf("Serve: %v", err)
		}
	})
	return s
}

func use(t testing.TB, address, export string, o ClientOptions) *Client {
	t.Helper()
	c, err := Dial(context.Background(), address, export, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// pattern fills b with what depends on off.
func pattern(b []byte, off int64) {
	for i := range b {
		at := off + int64(i)
		b[i] = byte(at>>9) ^ byte(at) | 1
	}
}

func TestReadsAndWrites(t *testing.T) {
	m := newMemory(40<<20 + 100)
	_, address := serve(t, ServerOptions{}, Export{Name: "a", Node: m, FastZero: true})
	c := use(t, address, "a", ClientOptions{})
	if c.Size() != m.Size() || c.ReadOnly() {
		t.Fatalf("size %d, read-only %v", c.Size(), c.ReadOnly())
	}
	for _, r := range []struct{ off, n int64 }{{0, 1}, {511, 4096}, {1 << 20, 300 << 10}, {40<<20 + 1, 99}, {3 << 20, 34 << 20}} {
		data := make([]byte, r.n)
		pattern(data, r.off)
		if err := c.Writev([][]byte{data[:r.n/3], {}, data[r.n/3:]}, r.off); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, r.n)
		if err := c.Readv([][]byte{got[:r.n/2], {}, got[r.n/2:]}, r.off); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, data) {
			t.Fatalf("%d bytes at %d are read wrong", r.n, r.off)
		}
	}
	whole := make([]byte, m.Size())
	for i := range whole {
		whole[i] = 0xaa // what a hole must replace
	}
	if err := c.Readv([][]byte{whole}, 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(whole, m.content()) {
		t.Fatal("the whole is read wrong")
	}
	if err := c.WriteZeroes(100, 1<<20, false); err != nil {
		t.Fatal(err)
	}
	if err := c.Discard(4<<20, 1<<20); err != nil {
		t.Fatal(err)
	}
	if now := m.content(); !block.IsZero(now[100:100+1<<20]) || !block.IsZero(now[4<<20:5<<20]) {
		t.Error("zeroes are not written")
	}
	m.mu.Lock()
	if len(m.unmapped) != 2 || m.unmapped[0] || !m.unmapped[1] {
		t.Errorf("unmap: %v", m.unmapped)
	}
	m.mu.Unlock()
	if err := c.Flush(); err != nil || m.flushCount() != 1 {
		t.Errorf("flush: %v, %d", err, m.flushCount())
	}
	if err := c.Readv([][]byte{make([]byte, 2)}, m.Size()-1); !errors.Is(err, block.ErrOutOfRange) {
		t.Errorf("a read behind the end: %v", err)
	}
	e, err := c.Map(4<<20, 2<<20)
	if err != nil || e.Start != 4<<20 || e.Length != 1<<20 || e.Data || !e.Zero {
		t.Errorf("map: %+v, %v", e, err)
	}
}

func errorIs(err error, all ...error) bool {
	for _, e := range all {
		if !errors.Is(err, e) {
			return false
		}
	}
	return true
}
