package locality

import (
	"math/rand/v2"
	"testing"
)

// memory loads what Walks asks for at once, and counts demands.
type memory struct {
	*Walks
	loaded  []bool
	demands int
	ahead   int
}

func newMemory(blocks, ahead int) *memory {
	return &memory{Walks: NewWalks(blocks, ahead), loaded: make([]bool, blocks)}
}

func (m *memory) has(b int) bool { return m.loaded[b] }

func (m *memory) access(t *testing.T, b int) {
	t.Helper()
	if m.loaded[b] {
		return
	}
	m.demands++
	m.loaded[b] = true
	from, to, _ := m.Demand(b, m.has)
	if from < 0 || from > to || to > len(m.loaded) || b >= from && b < to || to-from > m.Walks.ahead {
		t.Fatalf("demand for block %d of %d asks for %d to %d", b, len(m.loaded), from, to)
	}
	for ; from < to; from++ {
		if !m.loaded[from] {
			m.ahead++
		}
		m.loaded[from] = true
	}
}

func TestWalkUp(t *testing.T) {
	m := newMemory(1024, 16)
	for b := range 1024 {
		m.access(t, b)
	}
	// 1 2 4 8 16 16 ... blocks after each demanded one
	if want := 6 + (1024-1-2-3-5-9)/17; m.demands > want {
		t.Errorf("%d demands, want at most %d", m.demands, want)
	}
}

func TestWalkDown(t *testing.T) {
	m := newMemory(1024, 16)
	for b := 1023; b >= 0; b-- {
		m.access(t, b)
	}
	if want := 6 + (1024-1-2-3-5-9)/17; m.demands > want {
		t.Errorf("%d demands, want at most %d", m.demands, want)
	}
}

// TestSeveralWalks: they take turns, up and down, among random accesses.
func TestSeveralWalks(t *testing.T) {
	m := newMemory(8192, 16)
	rng := rand.New(rand.NewPCG(1, 1))
	random := 0
	for i := range 1000 {
		for _, b := range []int{i, 2000 + i, 4999 - i, 6999 - i} {
			m.access(t, b)
		}
		if b := 7000 + rng.IntN(1192); i%10 == 0 && !m.loaded[b] {
			m.access(t, b)
			random++
		}
	}
	if got, want := m.demands-random, 4*70; got > want {
		t.Errorf("%d demands by 4 walks, want at most %d", got, want)
	}
}

// TestRandomAccess: what is not walked is left alone.
func TestRandomAccess(t *testing.T) {
	m := newMemory(1<<20, 64)
	rng := rand.New(rand.NewPCG(2, 2))
	for range 2000 {
		m.access(t, rng.IntN(1<<20))
	}
	if m.ahead > 50 {
		t.Errorf("%d blocks ahead of 2000 random accesses", m.ahead)
	}
}

// TestChase: random accesses within a small stretch, of which more and more is
// loaded, are not taken for walks out of it.
func TestChase(t *testing.T) {
	for seed := range uint64(200) {
		m := newMemory(256, 16)
		for _, page := range rand.New(rand.NewPCG(seed, 3)).Perm(4096) {
			m.access(t, 100+page/64)
		}
		outside := 0
		for b, is := range m.loaded {
			if is && (b < 100 || b >= 164) {
				outside++
			}
		}
		if outside*100 > 20*(64+outside) {
			t.Errorf("seed %d: %d blocks outside of the 64", seed, outside)
		}
	}
}

// TestWalkOverLoaded: what others have loaded does not end a walk.
func TestWalkOverLoaded(t *testing.T) {
	m := newMemory(1024, 16)
	for b := range 1024 {
		m.loaded[b] = b/10%3 == 1
	}
	for b := range 1024 {
		m.access(t, b)
	}
	if m.demands > 60 {
		t.Errorf("%d demands", m.demands)
	}
	m = newMemory(1024, 16)
	for b := range 1024 {
		m.loaded[b] = b/10%3 == 1
	}
	for b := 1023; b >= 0; b-- {
		m.access(t, b)
	}
	if m.demands > 60 {
		t.Errorf("%d demands downwards", m.demands)
	}
}

// TestCatchUp: a walker that waits for what was asked for has the next asked
// for, twice as much, and no more while that is to come.
func TestCatchUp(t *testing.T) {
	w := NewWalks(1000, 16)
	none := func(int) bool { return false }
	expect := func(b, from, to int, forward bool) {
		t.Helper()
		gotFrom, gotTo, gotForward := w.Demand(b, none)
		if gotTo-gotFrom != to-from || from != to && (gotFrom != from || gotForward != forward) {
			t.Fatalf("block %d asks for %d to %d, forward %v, want %d to %d, %v", b, gotFrom, gotTo, gotForward, from, to, forward)
		}
	}
	expect(100, 0, 0, true)
	expect(101, 102, 103, true)
	expect(102, 103, 105, true) // not there yet
	expect(103, 105, 109, true)
	expect(103, 0, 0, true) // there is enough
	expect(104, 0, 0, true)
	expect(105, 109, 117, true)
	expect(50, 0, 0, true)
	expect(49, 48, 49, false)
	expect(48, 46, 48, false)
	expect(47, 42, 46, false)
	expect(47, 0, 0, false)
	expect(999, 0, 0, true)
	expect(998, 997, 998, false)
	expect(0, 0, 0, true)
	expect(1, 2, 3, true)
}

func TestEnds(t *testing.T) {
	m := newMemory(1, 16)
	m.access(t, 0)
	m = newMemory(40, 0)
	for b := range 40 {
		m.access(t, b)
	}
	if m.demands != 40 {
		t.Errorf("%d demands without a window", m.demands)
	}
}

func TestNoAllocations(t *testing.T) {
	w := NewWalks(1<<20, 16)
	loaded := func(int) bool { return false }
	b := 0
	if n := testing.AllocsPerRun(1000, func() { w.Demand(b, loaded); b += 7; b %= 1 << 20 }); n != 0 {
		t.Errorf("%v allocations a demand", n)
	}
}

func FuzzWalks(f *testing.F) {
	f.Add([]byte{1, 2, 3, 200, 199, 198, 4, 5, 6}, byte(8))
	f.Add([]byte{0, 255, 254, 0, 1, 253}, byte(0))
	f.Fuzz(func(t *testing.T, demands []byte, ahead byte) {
		w := NewWalks(256, int(ahead))
		var loaded [256]bool
		for i, d := range demands {
			b := int(d)
			from, to, _ := w.Demand(b, func(b int) bool { return loaded[b] })
			if from < 0 || to > 256 || from > to || b >= from && b < to || to-from > int(ahead) {
				t.Fatalf("demand %d for block %d asks for %d to %d", i, b, from, to)
			}
			loaded[b] = i%3 > 0
		}
	})
}
