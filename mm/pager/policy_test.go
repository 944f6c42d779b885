package pager

import (
	"errors"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/gnomon-vmm/gnomon/mm/checkpoint"
)

func TestParsePolicy(t *testing.T) {
	for s, want := range map[string]Policy{
		"none": 0, "physical": Physical, "locality": Locality, "recorded": Recorded,
		"locality,recorded": Locality | Recorded, "physical,locality,recorded": Physical | Locality | Recorded,
	} {
		if got, err := ParsePolicy(s); err != nil || got != want || got.String() != s {
			t.Errorf("%s: %v, %v", s, got, err)
		}
	}
	for _, s := range []string{"", "none,locality", "local", "locality,", "Locality"} {
		if got, err := ParsePolicy(s); !errors.Is(err, ErrPolicy) {
			t.Errorf("%q: %v, %v", s, got, err)
		}
	}
	if _, err := ParsePolicy("locality,none"); err == nil || !strings.Contains(err.Error(), "none goes with no other") {
		t.Error(err)
	}
}

// figures are a run's Stats and how many prefetched pages were used.
type figures struct {
	Stats
	used, unused int
	set          []Block
}

// run restores a machine without the background and has its guest touch pages.
func run(t *testing.T, f *fake, o Options, touched []uint64) figures {
	t.Helper()
	m := newMachine(t, f, o)
	m.p.Start()
	c := m.vcpu()
	for _, pfn := range touched {
		if _, err := c.read(pfn, 8); err != nil {
			t.Fatal(err)
		}
	}
	m.quiesce()
	if err := m.p.Close(); err != nil {
		t.Fatal(err)
	}
	set := map[uint64]bool{}
	for _, pfn := range touched {
		set[pfn] = true
	}
	got := figures{Stats: m.p.Stats()}
	got.used, got.unused = m.p.UsageOf(func(pfn uint64) bool { return set[pfn] })
	if got.used+got.unused != int(got.Installed()) {
		t.Errorf("%d pages used, %d not, %d installed", got.used, got.unused, got.Installed())
	}
	m.p.mu.Lock()
	got.set = slices.Clone(m.p.demanded)
	m.p.mu.Unlock()
	t.Logf("%v: %+v, used %d, unused %d", o.Policy, got.Stats, got.used, got.unused)
	return got
}

func (s *figures) wantUnused(t *testing.T, percent int) {
	t.Helper()
	if s.unused*100 > percent*int(s.Installed()) {
		t.Errorf("%d of %d installed pages were not used, want at most %d %%", s.unused, s.Installed(), percent)
	}
}

// TestWalkFaults: a guest walks 64 MiB by virtual addresses; physically the
// pages lie anywhere.
func TestWalkFaults(t *testing.T) {
	const pages = 64 << 20 / pageSize
	f, order := scattered(pages, 1)
	none := run(t, f, Options{}, order)
	if none.GuestFaults < pages {
		t.Errorf("%d faults for %d pages without prefetch", none.GuestFaults, pages)
	}
	physical := run(t, f, Options{Policy: Physical}, order)
	backwards := slices.Clone(order)
	slices.Reverse(backwards)
	for name, walk := range map[string][]uint64{"up": order, "down": backwards} {
		clear(f.reads)
		got := run(t, f, Options{Policy: Locality}, walk)
		if got.GuestFaults*100 > 2*none.GuestFaults || got.GuestFaults*10 > physical.GuestFaults {
			t.Errorf("%s: %d faults by locality, %d without, %d by physical neighbours", name, got.GuestFaults, none.GuestFaults, physical.GuestFaults)
		}
		got.wantUnused(t, 25)
		f.readOnce(t)
		recorded := run(t, f, Options{Policy: Locality | Recorded, Recorded: got.set}, walk)
		if recorded.GuestFaults*100 > none.GuestFaults || recorded.GuestFaults > pages/BlockPages/8 {
			t.Errorf("%s: %d faults with a recorded set", name, recorded.GuestFaults)
		}
	}
}

// TestChaseFaults: a guest follows pointers at random within a heap of 16 MiB
// somewhere in its 64 MiB.
func TestChaseFaults(t *testing.T) {
	const pages = 64 << 20 / pageSize
	f, order := scattered(pages, 2)
	heap := order[pages/2+5:][:16<<20/pageSize]
	chase := make([]uint64, len(heap))
	for i, at := range rand.New(rand.NewPCG(7, 7)).Perm(len(heap)) {
		chase[i] = heap[at]
	}
	none := run(t, f, Options{}, chase)
	got := run(t, f, Options{Policy: Locality}, chase)
	if got.GuestFaults*10 > none.GuestFaults {
		t.Errorf("%d faults by locality, %d without", got.GuestFaults, none.GuestFaults)
	}
	got.wantUnused(t, 25)
	recorded := run(t, f, Options{Policy: Locality | Recorded, Recorded: got.set}, chase)
	if recorded.GuestFaults*100 > none.GuestFaults {
		t.Errorf("%d faults with a recorded set, %d without anything", recorded.GuestFaults, none.GuestFaults)
	}
	recorded.wantUnused(t, 25)
}

// TestSparseAccess: far from each other, pages cost their block and no more.
func TestSparseAccess(t *testing.T) {
	const pages = 64 << 20 / pageSize
	f, order := scattered(pages, 3)
	var touched []uint64
	for i := range 40 {
		touched = append(touched, order[(i*67%128*2)*BlockPages])
	}
	got := run(t, f, Options{Policy: Locality}, touched)
	if got.GuestFaults != 40 || got.BlockReads != 40 || got.Installed() != 40*BlockPages {
		t.Errorf("%+v", got.Stats)
	}
}

// TestRuns: where the guest's neighbourhoods are stretches of physical memory,
// as a kernel gives them out, a call installs many pages.
func TestRuns(t *testing.T) {
	rng := rand.New(rand.NewPCG(4, 4))
	const pages = 8192
	f := newFake(struct{ GPA, Size uint64 }{0, pages * pageSize})
	// Stretches of 1 to 32 pages in any order, some of them downwards.
	var stretches [][]uint64
	for pfn := uint64(0); pfn < pages; {
		var s []uint64
		for range min(uint64(1)<<rng.IntN(6), pages-pfn) {
			s = append(s, pfn)
			pfn++
		}
		if rng.IntN(3) == 0 {
			slices.Reverse(s)
		}
		stretches = append(stretches, s)
	}
	rng.Shuffle(len(stretches), func(i, j int) { stretches[i], stretches[j] = stretches[j], stretches[i] })
	order := slices.Concat(stretches...)
	f.add(order, BlockPages)
	m := newMachine(t, f, Options{Policy: Locality})
	m.p.Start()
	m.walk(order)
	s := m.p.Stats()
	if s.Installed() != pages || s.CopyCalls*4 > s.Installed() {
		t.Errorf("%d pages installed by %d calls", s.Installed(), s.CopyCalls)
	}
	t.Logf("%+v", s)
}

// TestZeros: what is not in the source costs few faults, and no memory far from
// where it is used.
func TestZeros(t *testing.T) {
	const pages = 16384
	f := newFake(struct{ GPA, Size uint64 }{0, pages * pageSize})
	f.add([]uint64{1000}, 1)
	for _, tt := range []struct {
		o      Options
		touch  []uint64
		faults uint64
		zeros  uint64 // most
	}{
		{Options{}, []uint64{7, 8, 9, 700}, 4, 4},
		{Options{Policy: Physical, Pages: 16}, []uint64{7, 8, 9, 700}, 2, 32},
		{Options{Policy: Locality}, []uint64{7, 8, 9, 5000, 9000, 13000}, 4, 4 * minStretch},
		{Options{Policy: Locality}, ascending(0, 8192), 30, 8192 + maxStretch},
	} {
		s := run(t, f, tt.o, tt.touch)
		if s.GuestFaults > tt.faults || s.ZeroPages > tt.zeros || s.ZeroPages+s.Installed() < uint64(len(tt.touch)) {
			t.Errorf("%v, %d pages: %+v", tt.o.Policy, len(tt.touch), s)
		}
	}
}

func ascending(from, to uint64) []uint64 {
	var s []uint64
	for ; from < to; from++ {
		s = append(s, from)
	}
	return s
}

// TestEqualPages: a heap full of the same bytes costs no fault a page, and its
// block is read once.
func TestEqualPages(t *testing.T) {
	const pages = 4096
	f := newFake(struct{ GPA, Size uint64 }{0, pages * pageSize})
	f.add([]uint64{0}, 1)
	for pfn := range uint64(pages) {
		f.at[pfn] = Location{Kind: checkpoint.Data}
	}
	got := run(t, f, Options{Policy: Locality}, ascending(0, pages))
	if got.GuestFaults > pages/256 || got.BlockReads > 1 {
		t.Errorf("%+v", got.Stats)
	}
}
