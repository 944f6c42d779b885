package paging

import (
	"encoding/binary"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/gnomon-vmm/gnomon/mm/guestmem"
)

// leafPage is 4 KiB of a mapping, in the order in which a walk meets it.
type leafPage struct {
	Place
	pfn   uint64
	upper bool // mapped by the upper half
}

// model is what a Map must say, made without any of its short cuts.
type model struct {
	order  []uint64
	places map[uint64]Place // by pfn
}

// modelOf orders pages that lie in RAM. linearPages is how long a linear
// mapping is at least.
func modelOf(pages []leafPage, linearPages int) model {
	m := model{places: map[uint64]Place{}}
	var linear []leafPage
	for len(pages) > 0 {
		n := slices.IndexFunc(pages, func(p leafPage) bool {
			return p.Space != pages[0].Space || p.upper != pages[0].upper || p.GVA-p.pfn*pageSize != pages[0].GVA-pages[0].pfn*pageSize
		})
		if n < 0 {
			n = len(pages)
		}
		if n >= linearPages {
			linear = append(linear, pages[:n]...)
		} else {
			for _, p := range pages[:n] {
				m.add(p)
			}
		}
		pages = pages[n:]
	}
	slices.SortStableFunc(linear, func(a, b leafPage) int { return int(int64(a.pfn) - int64(b.pfn)) })
	for _, p := range linear {
		m.add(p)
	}
	return m
}

func (m *model) add(p leafPage) {
	if _, there := m.places[p.pfn]; !there {
		m.places[p.pfn] = p.Place
		m.order = append(m.order, p.pfn)
	}
}

// check compares all a Map says with the model.
func (m *model) check(t *testing.T, got *Map) {
	t.Helper()
	if i, want := difference(got.Order(), m.order); i >= 0 {
		t.Fatalf("order: %d pages, want %d; first difference at %d: %s", len(got.Order()), len(m.order), i, want)
	}
	for pfn, want := range m.places {
		gpa := pfn*pageSize + pfn%pageSize
		want.GVA += pfn % pageSize
		if place, ok := got.Lookup(gpa); !ok || place != want {
			t.Fatalf("GPA %#x is seen at %+x (%v), want %+x", gpa, place, ok, want)
		}
	}
	for _, p := range got.ram.parts {
		for pfn := p.first; pfn < p.end; pfn++ {
			_, want := m.places[pfn]
			if _, ok := got.Lookup(pfn * pageSize); ok != want {
				t.Fatalf("page %#x: found %v, want %v", pfn, ok, want)
			}
		}
	}
}

func difference(got, want []uint64) (int, string) {
	for i := range max(len(got), len(want)) {
		if i >= len(got) || i >= len(want) || got[i] != want[i] {
			return i, fmt.Sprintf("%x, want %x", got[min(i, len(got)):min(i+8, len(got))], want[min(i, len(want)):min(i+8, len(want))])
		}
	}
	return -1, ""
}

// reading finds all pages of RAM that tables map, each table once at each level.
type reading struct {
	mem    Memory
	ranges []guestmem.Range
	seen   map[[2]uint64]bool // level, GPA
	pages  []leafPage
}

func readTables(mem Memory, ranges []guestmem.Range, roots []Root) []leafPage {
	r := reading{mem: mem, ranges: ranges, seen: map[[2]uint64]bool{}}
	for _, upper := range []bool{false, true} {
		for space, root := range roots {
			if slices.Index(roots, root) == space {
				r.table(root, root.levels(), root.GPA, Place{space, 0}, upper)
			}
		}
	}
	return r.pages
}

func (r *reading) table(root Root, level int, gpa uint64, at Place, upper bool) {
	var p [8]byte
	top := level == root.levels()
	if r.mem.Read(gpa, p[:]) != nil {
		return
	}
	if !top {
		if r.seen[[2]uint64{uint64(level), gpa}] {
			return
		}
		r.seen[[2]uint64{uint64(level), gpa}] = true
	}
	for i := range uint64(512) {
		if top && (i >= 256) != upper {
			continue
		}
		_ = r.mem.Read(gpa+i*8, p[:])
		e := binary.LittleEndian.Uint64(p[:])
		size := uint64(1) << (12 + 9*(level-1))
		gva := at.GVA + i*size
		if top && upper { // the address has ones above its top bit
			gva |= ^uint64(0) << (12 + 9*level - 1)
		}
		to := e & 0xf_ffff_ffff_f000
		switch {
		case e&1 == 0:
		case level == 1 || e&0x80 != 0 && level <= 3 && (to%size == 0 || to%size == 0x1000):
			r.page(Place{at.Space, gva}, to&^(size-1), size, upper)
		case e&0x80 == 0:
			r.table(root, level-1, to, Place{at.Space, gva}, upper)
		}
	}
}

func (r *reading) page(at Place, gpa, size uint64, upper bool) {
	for _, g := range r.ranges {
		for a := max(g.GPA, gpa); a < min(g.GPA+g.Size, gpa+size); a += pageSize {
			r.pages = append(r.pages, leafPage{Place{at.Space, at.GVA + a - gpa}, a / pageSize, upper})
		}
	}
}

// guest builds page tables in memory, from its lowest page on.
type guest struct {
	t      testing.TB
	mem    *guestmem.Memory
	ranges []guestmem.Range
	next   uint64                          // GPA of the next table
	maps   map[Root]map[uint64]Translation // what was mapped, by first GVA
}

func newGuest(t testing.TB, ranges ...guestmem.Range) *guest {
	t.Helper()
	mem, err := guestmem.New(ranges)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { mem.Close() })
	return &guest{t: t, mem: mem, ranges: ranges, next: ranges[0].GPA, maps: map[Root]map[uint64]Translation{}}
}

func (g *guest) table() uint64 {
	g.next += pageSize
	return g.next - pageSize
}

func (g *guest) root(fiveLevel bool) Root {
	r := Root{g.table(), fiveLevel}
	g.maps[r] = map[uint64]Translation{}
	return r
}

func (g *guest) get(gpa uint64, index uint64) uint64 {
	var p [8]byte
	if err := g.mem.Read(gpa+index*8, p[:]); err != nil {
		g.t.Fatal(err)
	}
	return binary.LittleEndian.Uint64(p[:])
}

func (g *guest) set(gpa uint64, index, e uint64) {
	if err := g.mem.Write(gpa+index*8, binary.LittleEndian.AppendUint64(nil, e)); err != nil {
		g.t.Fatal(err)
	}
}

// mapPage maps a page as tr says; the tables above it allow everything.
func (g *guest) mapPage(root Root, gva uint64, tr Translation) {
	at, level := root.GPA, root.levels()
	for ; uint64(1)<<(12+9*(level-1)) != tr.Size; level-- {
		index := gva >> (12 + 9*(level-1)) & 511
		if g.get(at, index)&1 == 0 {
			g.set(at, index, g.table()|0x27)
		}
		at = g.get(at, index) & 0xf_ffff_ffff_f000
	}
	e := tr.GPA | 1
	for bit, on := range map[uint64]bool{1: tr.Writable, 2: tr.User, 5: tr.Accessed, 6: tr.Dirty, 7: level > 1, 63: tr.NoExecute} {
		if on {
			e |= 1 << bit
		}
	}
	g.set(at, gva>>(12+9*(level-1))&511, e)
	g.maps[root][gva] = tr
}

// shareKernel gives a root the upper half of another.
func (g *guest) shareKernel(from, to Root) {
	for i := uint64(256); i < 512; i++ {
		g.set(to.GPA, i, g.get(from.GPA, i))
	}
	for gva, tr := range g.maps[from] {
		if int64(gva) < 0 {
			g.maps[to][gva] = tr
		}
	}
}

// pages is what was mapped in RAM, as a walk that knows which upper halves are
// shared would find it: those of later roots count once.
func (g *guest) pages(roots []Root) (pages []leafPage) {
	r := reading{ranges: g.ranges}
	for _, upper := range []bool{false, true} {
		for space, root := range roots {
			if upper && space > 0 {
				break
			}
			for _, gva := range slices.Sorted(maps.Keys(g.maps[root])) {
				if int64(gva) < 0 == upper {
					tr := g.maps[root][gva]
					r.page(Place{space, gva}, tr.GPA, tr.Size, upper)
				}
			}
		}
	}
	return r.pages
}

// fill maps pages at random: stretches of addresses in both halves, of all
// sizes of page, some of them linear, some outside RAM.
func (g *guest) fill(rng *rand.Rand, root Root, upper bool, stretches int) {
	for range stretches {
		size := []uint64{1 << 12, 1 << 12, 1 << 21, 1 << 30}[rng.IntN(4)]
		n := uint64(rng.IntN(20) + 1)
		if size == 1<<12 {
			n = uint64(rng.IntN(3000) + 1)
		}
		gva := rng.Uint64N(1<<46) &^ (size - 1)
		if upper {
			gva = -gva - n*size
		}
		in := g.ranges[rng.IntN(len(g.ranges))]
		linear := rng.IntN(3) == 0
		gpa := (in.GPA + rng.Uint64N(in.Size)) &^ (size - 1)
		for i := range n {
			switch {
			case linear:
				gpa += size
			case rng.IntN(50) == 0:
				gpa = rng.Uint64N(1<<50) &^ (size - 1)
			default:
				gpa = (in.GPA + rng.Uint64N(in.Size)) &^ (size - 1)
			}
			if g.covered(root, gva+i*size, size) || rng.IntN(30) == 0 {
				continue
			}
			tr := Translation{GPA: gpa, Size: size}
			for _, flag := range []*bool{&tr.Writable, &tr.User, &tr.NoExecute, &tr.Accessed, &tr.Dirty} {
				*flag = rng.IntN(2) == 0
			}
			g.mapPage(root, gva+i*size, tr)
		}
	}
}

// covered tells whether any of the addresses is mapped, or has tables for
// smaller pages.
func (g *guest) covered(root Root, gva, size uint64) bool {
	for _, s := range []uint64{1 << 12, 1 << 21, 1 << 30} {
		if tr, ok := g.maps[root][gva&^(s-1)]; ok && tr.Size == s {
			return true
		}
	}
	if size == 1<<12 {
		return false
	}
	for other := range g.maps[root] {
		if other-gva < size {
			return true
		}
	}
	return false
}
