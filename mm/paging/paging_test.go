package paging

import (
	"errors"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/gnomon-vmm/gnomon/mm/guestmem"
)

const mib, gib = 1 << 20, 1 << 30

func TestRandomTables(t *testing.T) {
	for seed := range uint64(4) {
		rng := rand.New(rand.NewPCG(seed, 3))
		g := newGuest(t, guestmem.Range{GPA: 0, Size: 96 * mib}, guestmem.Range{GPA: 4*gib + 3*pageSize, Size: 48*mib + 5*pageSize})
		five := seed%3 == 2
		roots := []Root{g.root(five)}
		g.fill(rng, roots[0], true, 6)
		for range rng.IntN(4) {
			roots = append(roots, g.root(five))
			g.shareKernel(roots[0], roots[len(roots)-1])
		}
		for _, root := range roots {
			g.fill(rng, root, false, 1+rng.IntN(8))
		}

		m, err := NewMap(g.mem, g.ranges, roots)
		if err != nil {
			t.Fatal(err)
		}
		want := modelOf(g.pages(roots), LinearRun/pageSize)
		want.check(t, m)
		if m.Stats().Truncated {
			t.Errorf("seed %d: truncated after %d tables", seed, m.Stats().Tables)
		}
		naive := modelOf(readTables(g.mem, g.ranges, roots), LinearRun/pageSize)
		naive.check(t, m)

		w := NewWalker(g.mem)
		for _, root := range roots {
			for gva, want := range g.maps[root] {
				offset := rng.Uint64N(want.Size)
				want.GPA += offset
				if got, err := w.Walk(root, gva+offset); err != nil || got != want {
					t.Fatalf("seed %d: GVA %#x: %+v (%v), want %+v", seed, gva+offset, got, err, want)
				}
			}
			for range 1000 {
				gva := root.extend(rng.Uint64())
				got, err := w.Walk(root, gva)
				if mapped := g.covered(root, gva, pageSize); mapped != (err == nil) || !mapped && !errors.Is(err, ErrNotPresent) {
					t.Fatalf("seed %d: GVA %#x: %+v, %v; mapped: %v", seed, gva, got, err, mapped)
				}
			}
		}
	}
}

func TestWalkCombinesLevels(t *testing.T) {
	g := newGuest(t, guestmem.Range{GPA: 0, Size: mib})
	root := g.root(false)
	const gva = 0x7f12_3456_7000
	g.mapPage(root, gva, Translation{GPA: 0x9000, Size: pageSize, Writable: true, User: true})
	w := NewWalker(g.mem)
	for level, table := range map[uint64]uint64{4: root.GPA, 3: pageSize, 2: 2 * pageSize, 1: 3 * pageSize} {
		index := uint64(gva) >> (12 + 9*(level-1)) & 511
		good := g.get(table, index)
		for _, test := range []struct {
			entry uint64
			want  Translation
			err   error
		}{
			{good &^ 2, Translation{GPA: 0x9abc, Size: pageSize, User: true}, nil},
			{good &^ 4, Translation{GPA: 0x9abc, Size: pageSize, Writable: true}, nil},
			{good | 1<<63, Translation{GPA: 0x9abc, Size: pageSize, Writable: true, User: true, NoExecute: true}, nil},
			{good &^ 1, Translation{}, ErrNotPresent},
			{0, Translation{}, ErrNotPresent},
		} {
			g.set(table, index, test.entry)
			got, err := w.Walk(root, gva+0xabc)
			got.Accessed, got.Dirty = false, false
			if got != test.want || !errors.Is(err, test.err) {
				t.Errorf("level %d, entry %#x: %+v, %v", level, test.entry, got, err)
			}
		}
		g.set(table, index, good)
		if level > 1 { // a large page there is not aligned, or too large
			g.set(table, index, good|0x80|0x4000)
			if got, err := w.Walk(root, gva); !errors.Is(err, ErrReserved) {
				t.Errorf("level %d, reserved bits: %+v, %v", level, got, err)
			}
			g.set(table, index, good|1<<51) // a table outside RAM
			if got, err := w.Walk(root, gva); !errors.Is(err, ErrTable) || !errors.Is(err, guestmem.ErrOutOfBounds) {
				t.Errorf("level %d, outside RAM: %+v, %v", level, got, err)
			}
			g.set(table, index, good)
		}
	}
	g.set(2*pageSize, gva>>21&511, 0x20_1083) // 2 MiB with PAT: bit 12 is no address
	if got, err := w.Walk(root, gva); err != nil || got.GPA != 0x20_0000+gva%(2*mib) || got.Size != 2*mib {
		t.Errorf("2 MiB with PAT: %+v, %v", got, err)
	}
}

func TestCanonical(t *testing.T) {
	g := newGuest(t, guestmem.Range{GPA: 0, Size: mib})
	w := NewWalker(g.mem)
	for _, test := range []struct {
		gva        uint64
		four, five bool
	}{
		{0, true, true},
		{1<<47 - 1, true, true},
		{1 << 47, false, true},
		{1<<56 - 1, false, true},
		{1 << 56, false, false},
		{1 << 63, false, false},
		{0xfeff_ffff_ffff_ffff, false, false},
		{0xff00_0000_0000_0000, false, true},
		{0xffff_7fff_ffff_ffff, false, true},
		{0xffff_8000_0000_0000, true, true},
		{^uint64(0), true, true},
	} {
		for _, five := range []bool{false, true} {
			_, err := w.Walk(Root{0, five}, test.gva)
			if canonical := !errors.Is(err, ErrNotCanonical); canonical != (test.four && !five || test.five && five) {
				t.Errorf("%#x, 5 levels %v: %v", test.gva, five, err)
			}
		}
	}
}

func TestWalkDoesNotAllocate(t *testing.T) {
	g := newGuest(t, guestmem.Range{GPA: 0, Size: mib})
	root := g.root(true)
	g.mapPage(root, 0x7000, Translation{GPA: 0x9000, Size: pageSize})
	w := NewWalker(g.mem)
	if n := testing.AllocsPerRun(100, func() {
		if _, err := w.Walk(root, 0x7000); err != nil {
			t.Fatal(err)
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func TestRootOfCPU(t *testing.T) {
	for _, test := range []struct {
		cr0, cr3, cr4, efer uint64
		want                Root
		ok                  bool
	}{
		{0x8001_0033, 0x20_1000, 0x620, 0x500, Root{0x20_1000, false}, true},
		{0x8001_0033, 1<<63 | 3<<61 | 0x20_1fff, 0x1620, 0x500, Root{0x20_1000, true}, true},
		{0x0001_0033, 0x20_1000, 0x620, 0x500, Root{}, false}, // no paging
		{0x8001_0033, 0x20_1000, 0x620, 0x100, Root{}, false}, // not in long mode
	} {
		if got, ok := RootOfCPU(test.cr0, test.cr3, test.cr4, test.efer); got != test.want || ok != test.ok {
			t.Errorf("%+v: %+v, %v", test, got, ok)
		}
	}
}

// User mappings win over the kernel's, the kernel's over its direct map, and
// what only the direct map has comes last, as in RAM.
func TestOrderPrefersWhatSaysMost(t *testing.T) {
	const ramSize = 32 * mib
	g := newGuest(t, guestmem.Range{GPA: 0, Size: ramSize})
	first, second := g.root(false), g.root(false)
	const direct, vmalloc = 0xffff_8880_0000_0000, 0xffff_c900_0000_0000
	for gpa := uint64(0); gpa < ramSize; gpa += 2 * mib {
		g.mapPage(first, direct+gpa, Translation{GPA: gpa, Size: 2 * mib})
	}
	small := func(root Root, gva uint64, pfns ...uint64) {
		for i, pfn := range pfns {
			g.mapPage(root, gva+uint64(i)*pageSize, Translation{GPA: pfn * pageSize, Size: pageSize, User: int64(gva) > 0})
		}
	}
	small(first, vmalloc, 5000, 4001, 6000, 4000)
	g.shareKernel(first, second)
	small(first, 0x7fff_0000_0000, 7000)
	small(first, 0x40_0000, 4003, 4002, 4001)
	small(second, 0x1000, 7001, 4001, 7000, 300)

	want := []uint64{4003, 4002, 4001, 7000, 7001, 300, 5000, 6000, 4000}
	for pfn := range uint64(ramSize / pageSize) {
		if !slices.Contains(want, pfn) {
			want = append(want, pfn)
		}
	}
	m, err := NewMap(g.mem, g.ranges, []Root{first, second, first})
	if err != nil {
		t.Fatal(err)
	}
	if i, diff := difference(m.Order(), want); i >= 0 {
		t.Errorf("order differs at %d: %s", i, diff)
	}
	for gpa, want := range map[uint64]Place{
		4001*pageSize + 5: {0, 0x40_2005}, 300 * pageSize: {1, 0x4000}, 6000 * pageSize: {0, vmalloc + 0x2000}, 123456: {0, direct + 123456},
	} {
		if got, ok := m.Lookup(gpa); !ok || got != want {
			t.Errorf("%#x is seen at %+x, %v; want %+x", gpa, got, ok, want)
		}
	}
	if _, ok := m.Lookup(ramSize); ok {
		t.Error("found what is not RAM")
	}
}

// Nothing goes on from one space to the next: neither stretches of virtual
// order, nor linear mappings, though addresses and pages would fit.
func TestSpacesAreApart(t *testing.T) {
	g := newGuest(t, guestmem.Range{GPA: 0, Size: 64 * mib})
	var roots []Root
	space := func(gva, gpa, size uint64) {
		root := g.root(false)
		roots = append(roots, root)
		for at := uint64(0); at < size; at += pageSize {
			g.mapPage(root, gva+at, Translation{GPA: gpa + at, Size: pageSize})
		}
	}
	const high = 0x7000_0000_0000
	space(0x1000_0000, 60*mib, 2*pageSize)
	space(0x1000_2000, 60*mib+2*pageSize, pageSize)
	space(high, 36*mib, 10*mib) // too short to be linear
	space(high+10*mib, 46*mib, 10*mib)
	space(2*mib, 2*mib, LinearRun)
	space(2*mib+LinearRun, 2*mib+LinearRun, LinearRun)

	var want []uint64
	for _, r := range [][2]uint64{{60 * mib, 3 * pageSize}, {36 * mib, 20 * mib}, {2 * mib, 2 * LinearRun}} {
		for gpa := r[0]; gpa < r[0]+r[1]; gpa += pageSize {
			want = append(want, gpa/pageSize)
		}
	}
	m := g.newMap(roots...)
	if i, diff := difference(m.Order(), want); i >= 0 {
		t.Errorf("order differs at %d: %s", i, diff)
	}
	for gpa, want := range map[uint64]Place{
		60*mib + pageSize: {0, 0x1000_1000}, 60*mib + 2*pageSize: {1, 0x1000_2000}, 46*mib - 1: {2, high + 10*mib - 1}, 46 * mib: {3, high + 10*mib},
		2 * mib: {4, 2 * mib}, 2*mib + LinearRun - 1: {4, 2*mib + LinearRun - 1}, 2*mib + LinearRun: {5, 2*mib + LinearRun},
	} {
		if got, ok := m.Lookup(gpa); !ok || got != want {
			t.Errorf("%#x is seen at %+x, %v; want %+x", gpa, got, ok, want)
		}
	}
}

func TestBadRAM(t *testing.T) {
	for _, ranges := range [][]guestmem.Range{
		{{GPA: 0, Size: 0}},
		{{GPA: 1, Size: pageSize}},
		{{GPA: 0, Size: 100}},
		{{GPA: pageSize, Size: pageSize}, {GPA: 0, Size: pageSize}},
		{{GPA: 0, Size: 2 * pageSize}, {GPA: pageSize, Size: pageSize}},
		{{GPA: 0, Size: 1 << 45}},
		{{GPA: ^uint64(0) - pageSize + 1, Size: 2 * pageSize}},
	} {
		if _, err := NewMap(nil, ranges, nil); !errors.Is(err, ErrRAM) {
			t.Errorf("NewMap %x: %v", ranges, err)
		}
		if _, err := FindRoots(nil, ranges); !errors.Is(err, ErrRAM) {
			t.Errorf("FindRoots %x: %v", ranges, err)
		}
	}
	if m, err := NewMap(nil, nil, []Root{{}}); err != nil || len(m.Order()) != 0 {
		t.Errorf("no RAM: %v, %v", m, err)
	}
}

// damaged is memory of which a page cannot be read.
type damaged struct {
	Memory
	page uint64
}

var errDamaged = errors.New("damaged")

func (d damaged) Read(gpa uint64, p []byte) error {
	if gpa/pageSize == d.page {
		return errDamaged
	}
	return d.Memory.Read(gpa, p)
}

func TestDamagedTablesAreErrors(t *testing.T) {
	g := newGuest(t, guestmem.Range{GPA: 0, Size: mib})
	root := g.root(false)
	g.mapPage(root, 0x7000, Translation{GPA: 0x9000, Size: pageSize})
	g.mapPage(root, ^uint64(0xfff), Translation{GPA: 0x9000, Size: pageSize})
	for page := range g.next / pageSize {
		if _, err := NewMap(damaged{g.mem, page}, g.ranges, []Root{root}); !errors.Is(err, ErrTable) || !errors.Is(err, errDamaged) {
			t.Errorf("page %d: %v", page, err)
		}
		if _, err := FindRoots(damaged{g.mem, page}, g.ranges, root); !errors.Is(err, ErrTable) || !errors.Is(err, errDamaged) {
			t.Errorf("page %d: FindRoots: %v", page, err)
		}
	}
}
