package bitmap

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"sync"
	"testing"
)

func mustNew(t testing.TB, size, granularity int64) *Bitmap {
	t.Helper()
	b, err := New("b", size, granularity)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// model is a bitmap of bytes: which are within changed granules.
type model struct {
	granule int64
	set     []bool
}

func (m *model) change(off, n int64, to bool) {
	if n <= 0 {
		return
	}
	for i := off / m.granule; i <= (off+n-1)/m.granule; i++ {
		m.set[i] = to
	}
}

func check(t *testing.T, b *Bitmap, m *model) {
	t.Helper()
	count := int64(0)
	for i, v := range m.set {
		if v {
			count++
		}
		if b.Get(int64(i)*m.granule) != v {
			t.Fatalf("bit %d: %v", i, !v)
		}
	}
	if b.Count() != count {
		t.Fatalf("%d bits, counted %d", count, b.Count())
	}
	covered := int64(0)
	for off := int64(0); ; {
		start, n := b.Next(off)
		if n == 0 {
			break
		}
		end := start + n
		if !b.Get(start) || !b.Get(end-1) || end < b.Size() && b.Get(end) || start > off && b.Get(start-1) {
			t.Fatalf("run of %d at %d", n, start)
		}
		covered += (n + m.granule - 1) / m.granule
		off = end
	}
	if covered != count {
		t.Fatalf("runs of %d granules, want %d", covered, count)
	}
	p := make([]byte, (b.Bits()+7)/8)
	b.Bytes(p, 0)
	again := mustNew(t, b.Size(), b.Granularity())
	again.SetBytes(p, 0)
	q := make([]byte, len(p))
	again.Bytes(q, 0)
	if !bytes.Equal(p, q) || again.Count() != count {
		t.Fatal("bytes differ after a round trip")
	}
}

func TestAgainstModel(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for _, size := range []int64{512, 513, 64 * 512, 65*512 - 1, 100_000, 1 << 20} {
		for _, granularity := range []int64{512, 4096} {
			b := mustNew(t, size, granularity)
			m := &model{granule: granularity, set: make([]bool, b.Bits())}
			for i := range 300 {
				off := r.Int64N(size)
				n := min(r.Int64N(1+size>>r.IntN(10)), size-off)
				if i%3 == 0 {
					b.Clear(off, n)
				} else {
					b.Set(off, n)
				}
				m.change(off, n, i%3 != 0)
				if i%20 == 0 {
					check(t, b, m)
				}
			}
			check(t, b, m)
			b.ClearAll()
			if _, n := b.Next(0); n != 0 || b.Count() != 0 {
				t.Fatal("something is set")
			}
		}
	}
}

func TestOutsideDoesNotMatter(t *testing.T) {
	b := mustNew(t, 100_000, 512)
	b.Set(-10, 5)
	b.Set(100_000, 1)
	b.Set(5, 0)
	b.Set(1<<62, 1<<62)
	if b.Count() != 0 || b.Get(-1) || b.Get(1<<62) {
		t.Errorf("%d bits", b.Count())
	}
	b.Set(-1<<40, 1<<62)
	if b.Count() != b.Bits() {
		t.Errorf("%d bits of %d", b.Count(), b.Bits())
	}
	if start, n := b.Next(-5); start != 0 || n != 100_000 {
		t.Errorf("%d at %d", n, start)
	}
}

func TestMerge(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	const size = 1<<20 + 7
	for _, g := range [][2]int64{{512, 512}, {512, 65536}, {65536, 512}} {
		a, b := mustNew(t, size, g[0]), mustNew(t, size, g[1])
		m := &model{granule: g[0], set: make([]bool, a.Bits())}
		for range 40 {
			off := r.Int64N(size)
			n := min(r.Int64N(20000), size-off)
			a.Set(off, n)
			m.change(off, n, true)
			b.Set(size-off-1, min(n, off+1))
		}
		for off := int64(0); off < size; off += g[0] {
			for at := off; at < min(size, off+g[0]); at += 512 {
				if b.Get(at) {
					m.change(at, 1, true)
				}
			}
		}
		if err := a.Merge(b); err != nil {
			t.Fatal(err)
		}
		check(t, a, m)
		if c := a.Copy("c", false); c.Count() != a.Count() || c.Name() != "c" || c.Enabled() {
			t.Error("the copy differs")
		}
	}
	if err := mustNew(t, 512, 512).Merge(mustNew(t, 1024, 512)); !errors.Is(err, ErrSize) {
		t.Errorf("other size: %v", err)
	}
}

func TestResize(t *testing.T) {
	b := mustNew(t, 1<<20, 512)
	b.Set(0, 1<<20)
	for _, size := range []int64{1<<20 - 100, 70_000, 513, 2 << 20} {
		if err := b.Resize(size); err != nil {
			t.Fatal(err)
		}
		if want := min(b.Bits(), 2); b.Count() != b.Bits() && b.Count() != want {
			t.Errorf("size %d: %d bits of %d", size, b.Count(), b.Bits())
		}
	}
	if start, n := b.Next(0); start != 0 || n != 1024 {
		t.Errorf("grown: %d at %d", n, start)
	}
}

func TestRefused(t *testing.T) {
	for _, g := range []int64{-1, 1, 256, 768, 1 << 32} {
		if _, err := New("b", 1<<20, g); !errors.Is(err, ErrGranularity) {
			t.Errorf("granularity %d: %v", g, err)
		}
	}
	if _, err := New("b", 1<<62, 512); !errors.Is(err, ErrGranularity) {
		t.Errorf("too fine: %v", err)
	}
}

func TestConcurrent(t *testing.T) {
	b := mustNew(t, 1<<20, 512)
	var wg sync.WaitGroup
	for w := range int64(4) {
		wg.Go(func() {
			for i := w; i < b.Bits(); i += 4 {
				b.Record(i*512, 1)
			}
			for i := w; i < b.Bits(); i += 8 {
				b.Clear(i*512, 1)
			}
		})
	}
	wg.Wait()
	if b.Count() != b.Bits()/2 {
		t.Errorf("%d bits of %d", b.Count(), b.Bits())
	}
	b.SetEnabled(false)
	b.Record(0, 1<<20)
	if b.Count() != b.Bits()/2 {
		t.Error("recorded while disabled")
	}
}

func TestNoAllocations(t *testing.T) {
	b := mustNew(t, 1<<40, DefaultGranularity)
	off := int64(0)
	if a := testing.AllocsPerRun(100, func() {
		b.Record(off, 1<<20)
		b.Next(off)
		off += 3 << 20
	}); a != 0 {
		t.Errorf("%v allocations", a)
	}
}
