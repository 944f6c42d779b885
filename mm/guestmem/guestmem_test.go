package guestmem

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// Two adjacent regions, a hole, one more, and one a page below the end of addresses.
var layout = []Range{
	{0, 4 * PageSize},
	{4 * PageSize, 3 * PageSize},
	{1 << 32, 70 * PageSize},
	{math.MaxUint64 - 2*PageSize + 1 - PageSize, 2 * PageSize},
}

func newMemory(t testing.TB) *Memory {
	t.Helper()
	m, err := New(layout)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	return m
}

// inRAM tells whether n bytes from gpa on are RAM, by looking at each range.
func inRAM(gpa, n uint64) bool {
	for n > 0 {
		i := slices.IndexFunc(layout, func(r Range) bool { return gpa >= r.GPA && gpa <= r.GPA+(r.Size-1) })
		if i < 0 {
			return false
		}
		step := min(n, layout[i].GPA+(layout[i].Size-1)-gpa+1)
		if n -= step; n > 0 && gpa+step < gpa {
			return false
		}
		gpa += step
	}
	return true
}

func TestNewRefuses(t *testing.T) {
	before := descriptors(t)
	for _, ranges := range [][]Range{
		nil,
		{{0, 0}},
		{{0, 100}},
		{{100, PageSize}},
		{{PageSize, PageSize}, {0, PageSize}},
		{{0, 2 * PageSize}, {PageSize, PageSize}},
		{{math.MaxUint64 &^ (PageSize - 1), 2 * PageSize}},
		{{0, 1 << 47}},
		{{0, 1 << 63}, {1 << 63, 1 << 62}},
		{{0, 1 << 63}, {1 << 63, 1<<63 - PageSize}},
	} {
		m, err := New(ranges)
		if m != nil || !errors.Is(err, ErrSize) {
			t.Errorf("%x: %v", ranges, err)
		}
	}
	if after := descriptors(t); after != before {
		t.Errorf("%d descriptors before, %d after", before, after)
	}
}

func descriptors(t *testing.T) int {
	t.Helper()
	d, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(d)
}

func TestRegions(t *testing.T) {
	before := descriptors(t)
	m := newMemory(t)
	var size uint64
	for i, r := range m.Regions() {
		if r.Range != layout[i] || r.Offset != size || uint64(len(r.Bytes())) != r.Size || r.End() != r.GPA+r.Size {
			t.Errorf("region %d: %+v", i, r.Range)
		}
		// The region's bytes and the memfd's are the same.
		r.Bytes()[5] = byte(i + 1)
		var b [1]byte
		if _, err := unix.Pread(m.FD(), b[:], int64(r.Offset+5)); err != nil || b[0] != byte(i+1) {
			t.Errorf("region %d in the memfd: %d, %v", i, b[0], err)
		}
		size += r.Size
	}
	if m.Size() != size {
		t.Errorf("size %d, want %d", m.Size(), size)
	}
	// Who gets the descriptor cannot take memory from under us.
	if err := unix.Ftruncate(m.FD(), 0); err == nil {
		t.Error("the memfd can be cut")
	}
	if err := unix.Ftruncate(m.FD(), int64(size)*2); err == nil {
		t.Error("the memfd can grow")
	}
	if err := m.Close(); err != nil {
		t.Error(err)
	}
	if err := m.Close(); err != nil {
		t.Errorf("second close: %v", err)
	}
	if _, err := m.Slice(0, 1); !errors.Is(err, ErrOutOfBounds) {
		t.Errorf("slice of closed memory: %v", err)
	}
	if after := descriptors(t); after != before {
		t.Errorf("%d descriptors before, %d after", before, after)
	}
}

func TestBounds(t *testing.T) {
	m := newMemory(t)
	last := layout[3]
	for _, tt := range []struct {
		gpa, n      uint64
		slice, copy bool // whether it is possible
	}{
		{0, 0, true, true},
		{0, 4 * PageSize, true, true},
		{0, 4*PageSize + 1, false, true},
		{4*PageSize - 1, 1, true, true},
		{4*PageSize - 1, 2, false, true},
		{0, 7 * PageSize, false, true},
		{0, 7*PageSize + 1, false, false},
		{7*PageSize - 1, 1, true, true},
		{7 * PageSize, 1, false, false},
		{1<<32 - 1, 2, false, false},
		{1 << 32, 70 * PageSize, true, true},
		{1<<32 + 1, 70 * PageSize, false, false},
		{last.GPA, last.Size, true, true},
		{last.GPA + last.Size - 1, 1, true, true},
		{last.GPA + last.Size - 1, 2, false, false},
		{last.GPA + 1, PageSize * 3, false, false}, // passes the end of addresses
	} {
		if _, err := m.Slice(tt.gpa, tt.n); (err == nil) != tt.slice || err != nil && !errors.Is(err, ErrOutOfBounds) {
			t.Errorf("Slice(%#x, %d): %v", tt.gpa, tt.n, err)
		}
		p := make([]byte, tt.n)
		for name, err := range map[string]error{"Read": m.Read(tt.gpa, p), "Write": m.Write(tt.gpa, p)} {
			if (err == nil) != tt.copy || err != nil && !errors.Is(err, ErrOutOfBounds) {
				t.Errorf("%s(%#x, %d): %v", name, tt.gpa, tt.n, err)
			}
		}
	}
	for _, n := range []uint64{math.MaxUint64, math.MaxUint64 - 100, 1 << 63, 1<<64 - PageSize} {
		for _, gpa := range []uint64{0, 1, PageSize, 1 << 32, last.GPA, last.GPA + 1} {
			if _, err := m.Slice(gpa, n); !errors.Is(err, ErrOutOfBounds) {
				t.Errorf("Slice(%#x, %#x): %v", gpa, n, err)
			}
			if err := m.Discard(gpa, n); !errors.Is(err, ErrOutOfBounds) {
				t.Errorf("Discard(%#x, %#x): %v", gpa, n, err)
			}
			m.MarkDirty(gpa, n)
		}
	}
	s, err := m.Slice(10, 20)
	if err != nil || len(s) != 20 || cap(s) != 20 {
		t.Errorf("a slice of %d bytes reaches to %d", len(s), cap(s))
	}
}

// TestModel works on the memory and on a map of pages.
func TestModel(t *testing.T) {
	m := newMemory(t)
	model := map[uint64]*[PageSize]byte{} // pages by GPA
	dirty := map[uint64]bool{}
	for _, r := range layout {
		for p := uint64(0); p < r.Size; p += PageSize {
			model[r.GPA+p] = new([PageSize]byte)
		}
	}
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	tracking := false
	for step := range 20000 {
		r := layout[rng.IntN(len(layout))]
		gpa := r.GPA + rng.Uint64N(r.Size+PageSize) - min(r.GPA, rng.Uint64N(PageSize))
		n := rng.Uint64N(1 << rng.IntN(16))
		ok := inRAM(gpa, n)
		switch op := rng.IntN(8); op {
		case 0, 1:
			p := make([]byte, n)
			err := m.Read(gpa, p)
			if ok != (err == nil) {
				t.Fatalf("step %d: Read(%#x, %d): %v", step, gpa, n, err)
			}
			for i := range p {
				if ok && p[i] != model[(gpa+uint64(i))&^(PageSize-1)][(gpa+uint64(i))%PageSize] {
					t.Fatalf("step %d: Read(%#x, %d) is wrong at %d", step, gpa, n, i)
				}
			}
		case 2, 3:
			p := make([]byte, n)
			for i := range p {
				p[i] = byte(rng.Uint32())
			}
			err := m.Write(gpa, p)
			if ok != (err == nil) {
				t.Fatalf("step %d: Write(%#x, %d): %v", step, gpa, n, err)
			}
			for i := uint64(0); ok && i < n; i++ {
				page := (gpa + i) &^ (PageSize - 1)
				model[page][(gpa+i)%PageSize] = p[i]
				if tracking {
					dirty[page] = true
				}
			}
		case 4:
			s, err := m.Slice(gpa, n)
			if err != nil {
				if ok && rangeOf(gpa) == rangeOf(gpa+max(n, 1)-1) && rangeOf(gpa) >= 0 {
					t.Fatalf("step %d: Slice(%#x, %d): %v", step, gpa, n, err)
				}
				continue
			}
			for i := range s {
				if s[i] != model[(gpa+uint64(i))&^(PageSize-1)][(gpa+uint64(i))%PageSize] {
					t.Fatalf("step %d: Slice(%#x, %d) is wrong at %d", step, gpa, n, i)
				}
			}
		case 5:
			err := m.Discard(gpa, n)
			if err != nil {
				continue
			}
			for page := (gpa + PageSize - 1) &^ (PageSize - 1); page-gpa < n && n-(page-gpa) >= PageSize; page += PageSize {
				*model[page] = [PageSize]byte{}
				if tracking {
					dirty[page] = true
				}
			}
		case 6:
			if rng.IntN(40) == 0 {
				tracking = !tracking
				m.TrackDirty(tracking)
				clear(dirty)
			}
		case 7:
			if rng.IntN(10) > 0 {
				continue
			}
			var got []uint64
			m.TakeDirty(func(gpa uint64) { got = append(got, gpa) })
			if !slices.IsSorted(got) {
				t.Fatalf("step %d: dirty pages are not ascending: %x", step, got)
			}
			if len(got) != len(dirty) {
				t.Fatalf("step %d: %d pages are dirty, want %d", step, len(got), len(dirty))
			}
			for _, gpa := range got {
				if !dirty[gpa] {
					t.Fatalf("step %d: page %#x is not dirty", step, gpa)
				}
			}
			clear(dirty)
		}
	}
}

func rangeOf(gpa uint64) int {
	return slices.IndexFunc(layout, func(r Range) bool { return gpa-r.GPA < r.Size })
}

func TestNothingIsCopiedOnError(t *testing.T) {
	m := newMemory(t)
	m.TrackDirty(true)
	p := bytes.Repeat([]byte{1}, 2*PageSize)
	if err := m.Write(6*PageSize, p); !errors.Is(err, ErrOutOfBounds) {
		t.Fatal(err)
	}
	if s, _ := m.Slice(6*PageSize, PageSize); bytes.IndexByte(s, 1) >= 0 {
		t.Error("a part of the write was done")
	}
	m.TakeDirty(func(gpa uint64) { t.Errorf("page %#x is dirty", gpa) })
	if err := m.Read(6*PageSize, p); !errors.Is(err, ErrOutOfBounds) || p[0] != 1 {
		t.Errorf("a part of the read was done: %v", err)
	}
}

// TestMarkDirty: a mark belongs to the region in which it starts, and to the
// pages that its bytes touch.
func TestMarkDirty(t *testing.T) {
	m := newMemory(t)
	m.MarkDirty(0, 100) // not tracked yet
	m.TrackDirty(true)
	for _, tt := range []struct {
		gpa, n uint64
		want   []uint64
	}{
		{0, 0, nil},
		{0, 1, []uint64{0}},
		{PageSize - 1, 2, []uint64{0, PageSize}},
		{PageSize, PageSize, []uint64{PageSize}},
		{2 * PageSize, 10 * PageSize, []uint64{2 * PageSize, 3 * PageSize}},
		{8 * PageSize, 100, nil},
		{1<<32 + 63*PageSize, 2 * PageSize, []uint64{1<<32 + 63*PageSize, 1<<32 + 64*PageSize}},
		{1<<32 + 69*PageSize, math.MaxUint64, []uint64{1<<32 + 69*PageSize}},
		{1<<32 + 69*PageSize, math.MaxUint64 - 1<<32 - 69*PageSize + 1, []uint64{1<<32 + 69*PageSize}},
	} {
		m.MarkDirty(tt.gpa, tt.n)
		var got []uint64
		m.TakeDirty(func(gpa uint64) { got = append(got, gpa) })
		if !slices.Equal(got, tt.want) {
			t.Errorf("MarkDirty(%#x, %#x): %#x, want %#x", tt.gpa, tt.n, got, tt.want)
		}
	}
}

// TestDirtyMarksAreNotLost marks and takes at once; each page written must
// come, then or later.
func TestDirtyMarksAreNotLost(t *testing.T) {
	m := newMemory(t)
	m.TrackDirty(true)
	const pages = 70
	var marked, taken [pages]int
	var writers sync.WaitGroup
	for w := range 2 {
		writers.Go(func() {
			for p := w; p < pages; p += 2 {
				m.MarkDirty(1<<32+uint64(p)*PageSize, 1)
				marked[p]++
			}
		})
	}
	done := make(chan struct{})
	go func() { writers.Wait(); close(done) }()
	take := func() { m.TakeDirty(func(gpa uint64) { taken[(gpa-1<<32)/PageSize]++ }) }
	for running := true; running; {
		select {
		case <-done:
			running = false
		default:
		}
		take()
	}
	if marked != taken {
		t.Errorf("marked %v\ntaken %v", marked, taken)
	}
}

func blocks(t *testing.T, m *Memory) int64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Fstat(m.FD(), &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512 / PageSize
}

func TestDiscardFreesMemory(t *testing.T) {
	m := newMemory(t)
	if got := blocks(t, m); got != 0 {
		t.Fatalf("%d pages before anything was touched", got)
	}
	if err := m.Write(1<<32, bytes.Repeat([]byte{1}, 70*PageSize)); err != nil {
		t.Fatal(err)
	}
	if got := blocks(t, m); got != 70 {
		t.Fatalf("%d pages, 70 written", got)
	}
	for _, tt := range []struct {
		at, n uint64
		left  int64
	}{
		{0, 10 * PageSize, 60},
		{10 * PageSize, PageSize - 1, 60},      // no whole page
		{10*PageSize + 1, 3 * PageSize, 58},    // 11 and 12
		{69*PageSize + 1, PageSize - 1, 58},    // the end of the last
		{20*PageSize + 5, 10, 58},              // within one
		{0, 20 * PageSize, 50},                 // partly discarded before
		{19 * PageSize, PageSize, 50},          // gone already
		{21*PageSize - 1, 49*PageSize + 1, 1},  // all but one
		{0, 70 * PageSize, 0},                  // everything
		{35 * PageSize, 0, 0},                  // nothing
		{70*PageSize - PageSize, PageSize, 0},  // the last page
		{PageSize / 2, PageSize + PageSize, 0}, // unaligned, nothing there
	} {
		if err := m.Discard(1<<32+tt.at, tt.n); err != nil {
			t.Fatalf("Discard(%#x, %#x): %v", tt.at, tt.n, err)
		}
		if got := blocks(t, m); got != tt.left {
			t.Errorf("%d pages after Discard(%#x, %#x), want %d", got, tt.at, tt.n, tt.left)
		}
	}
	s, err := m.Slice(1<<32, 70*PageSize)
	if err != nil {
		t.Fatal(err)
	}
	if i := slices.IndexFunc(s, func(b byte) bool { return b != 0 }); i >= 0 {
		t.Errorf("byte %#x is not zero", i)
	}
	if err := m.Discard(6*PageSize, 2*PageSize); !errors.Is(err, ErrOutOfBounds) {
		t.Errorf("discard behind RAM: %v", err)
	}
}

func TestNoAllocations(t *testing.T) {
	m := newMemory(t)
	m.TrackDirty(true)
	p := make([]byte, 2*PageSize)
	for name, f := range map[string]func(){
		"Slice":     func() { m.Slice(1<<32+5, 100) },
		"Read":      func() { m.Read(3*PageSize, p) },
		"Write":     func() { m.Write(3*PageSize, p) },
		"MarkDirty": func() { m.MarkDirty(1<<32, 100) },
	} {
		if a := testing.AllocsPerRun(100, f); a != 0 {
			t.Errorf("%s: %v allocations", name, a)
		}
	}
}

func FuzzBounds(f *testing.F) {
	for _, gpa := range []uint64{0, 7*PageSize - 1, 1 << 32, math.MaxUint64, math.MaxUint64 - 2*PageSize} {
		for _, n := range []uint64{0, 1, PageSize, 7 * PageSize, math.MaxUint64} {
			f.Add(gpa, n)
		}
	}
	m := newMemory(f)
	m.TrackDirty(true)
	f.Fuzz(func(t *testing.T, gpa, n uint64) {
		s, err := m.Slice(gpa, n)
		if err == nil && (uint64(len(s)) != n || !inRAM(gpa, n)) {
			t.Errorf("Slice(%#x, %#x) has %d bytes", gpa, n, len(s))
		}
		if err != nil && n > 0 && inRAM(gpa, n) && rangeOf(gpa) == rangeOf(gpa+n-1) {
			t.Errorf("Slice(%#x, %#x): %v", gpa, n, err)
		}
		m.TakeDirty(func(uint64) {}) // what the last input left
		m.MarkDirty(gpa, n)
		m.TakeDirty(func(page uint64) {
			if page > gpa || gpa-page >= PageSize {
				if page < gpa || page-gpa >= n {
					t.Errorf("MarkDirty(%#x, %#x) marks %#x", gpa, n, page)
				}
			}
		})
		p := make([]byte, n%(9*PageSize))
		want := inRAM(gpa, uint64(len(p)))
		for name, err := range map[string]error{"Read": m.Read(gpa, p), "Write": m.Write(gpa, p)} {
			if want != (err == nil) {
				t.Errorf("%s(%#x, %d): %v", name, gpa, len(p), err)
			}
		}
		if err := m.Discard(gpa, n); err == nil && n > 0 && !inRAM(gpa, n) {
			t.Errorf("Discard(%#x, %#x) outside RAM", gpa, n)
		}
	})
}

func Example() {
	m, err := New([]Range{{GPA: 0, Size: 1 << 20}})
	if err != nil {
		panic(err)
	}
	defer m.Close()
	if err := m.Write(0x1000, []byte("gnomon")); err != nil {
		panic(err)
	}
	s, _ := m.Slice(0x1003, 3)
	fmt.Println(string(s))
	// Output: mon
}
