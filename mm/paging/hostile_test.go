package paging

import (
	"encoding/binary"
	"math/rand/v2"
	"testing"

	"github.com/gnomon-vmm/gnomon/mm/guestmem"
)

// These tests would run for hours, or out of memory, without the bounds.

// sane checks what holds for every order.
func sane(t *testing.T, m *Map) {
	t.Helper()
	seen := make(map[uint64]bool, len(m.Order()))
	for _, pfn := range m.Order() {
		if _, ok := m.ram.bit(pfn); !ok || seen[pfn] {
			t.Fatalf("page %#x is no RAM, or twice in the order", pfn)
		}
		seen[pfn] = true
	}
}

func (g *guest) newMap(roots ...Root) *Map {
	g.t.Helper()
	m, err := NewMap(g.mem, g.ranges, roots)
	if err != nil {
		g.t.Fatal(err)
	}
	return m
}

// fillTable has every entry of a table be the same.
func (g *guest) fillTable(gpa, e uint64) {
	for i := range uint64(512) {
		g.set(gpa, i, e)
	}
}

// Four tables, each 512 times in the one above it, map 2^36 pages.
func TestSharedTablesAreExpandedOnce(t *testing.T) {
	for _, five := range []bool{false, true} {
		g := newGuest(t, guestmem.Range{GPA: 0, Size: 4 * mib})
		root := Root{g.table(), five}
		last := root.GPA
		for range root.levels() - 1 {
			next := g.table()
			g.fillTable(last, next|0x27)
			last = next
		}
		for i := range uint64(512) {
			g.set(last, i, (1023-i)*pageSize|0x67)
		}
		m := g.newMap(root)
		sane(t, m)
		// The root is read for each half, the others at one level each.
		if want := root.levels() + 1; m.Stats().Tables != want || len(m.Order()) != 512 || m.Order()[0] != 1023 {
			t.Errorf("5 levels %v: %d tables read, want %d; %d pages", five, m.Stats().Tables, want, len(m.Order()))
		}
	}
}

// A table all of whose entries point to itself is a table of every level and
// the page that it maps.
func TestSelfMap(t *testing.T) {
	for _, five := range []bool{false, true} {
		g := newGuest(t, guestmem.Range{GPA: 0, Size: mib})
		root := Root{5 * pageSize, five}
		g.fillTable(root.GPA, root.GPA|0x67)
		m := g.newMap(root, root)
		sane(t, m)
		if want := root.levels() + 1; m.Stats().Tables != want || len(m.Order()) != 1 || m.Order()[0] != 5 {
			t.Errorf("5 levels %v: %d tables read, want %d; order %x", five, m.Stats().Tables, want, m.Order())
		}
		for _, gva := range []uint64{0, 0x7fff_ffff_ffff, 1 << 63 >> 15, ^uint64(0)} {
			got, err := NewWalker(g.mem).Walk(root, root.extend(gva))
			if err != nil || got.GPA != root.GPA+gva%pageSize {
				t.Errorf("GVA %#x: %+v, %v", gva, got, err)
			}
		}
	}
}

// Every page of RAM is a table that points to others at random.
func TestNumberOfTablesIsBounded(t *testing.T) {
	g := newGuest(t, guestmem.Range{GPA: 0, Size: 64 * mib})
	const pages = 64 * mib / pageSize
	rng := rand.New(rand.NewPCG(1, 2))
	ram := g.mem.Regions()[0].Bytes()
	for i := 0; i < len(ram); i += 8 {
		binary.LittleEndian.PutUint64(ram[i:], rng.Uint64N(pages)*pageSize|0x67)
	}
	roots := make([]Root, pages)
	for i := range roots {
		roots[i].GPA = uint64(i) * pageSize
	}
	m := g.newMap(roots...)
	sane(t, m)
	if want := minTables + pages/PagesPerTable; m.Stats().Tables != want || !m.Stats().Truncated {
		t.Errorf("%+v, want %d tables", m.Stats(), want)
	}
}

// 8192 tables of 1 GiB pages, four million of them, map 10^12 pages.
func TestGigabytesAreMarkedOnce(t *testing.T) {
	g := newGuest(t, guestmem.Range{GPA: 0, Size: 3 * gib}, guestmem.Range{GPA: 4 * gib, Size: 5 * gib})
	rng := rand.New(rand.NewPCG(1, 2))
	var p [pageSize]byte
	var roots []Root
	for range 16 {
		root := Root{GPA: g.table()}
		roots = append(roots, root)
		for i := range uint64(512) {
			g.set(root.GPA, i, g.next|0x27)
			for j := 0; j < len(p); j += 8 {
				binary.LittleEndian.PutUint64(p[j:], rng.Uint64N(16)*gib|0xe7)
			}
			if err := g.mem.Write(g.table(), p[:]); err != nil {
				t.Fatal(err)
			}
		}
	}
	m := g.newMap(roots...)
	sane(t, m)
	if want := 8 * gib / pageSize; len(m.Order()) != want {
		t.Errorf("%d pages in order, want %d", len(m.Order()), want)
	}
	if n := len(m.stretches); n > 16 {
		t.Errorf("%d stretches", n)
	}
}

// A linear mapping of every other page has as many pieces as pages.
func TestStretchesAreBounded(t *testing.T) {
	g := newGuest(t, guestmem.Range{GPA: 0, Size: 96 * mib})
	root := g.root(false)
	const pages = 48 * mib / pageSize / 2
	for i := range uint64(pages) {
		g.mapPage(root, 0x7000_0000_0000+2*i*pageSize, Translation{GPA: (8192 + 2*i) * pageSize, Size: pageSize})
	}
	m := g.newMap(root)
	sane(t, m)
	if len(m.Order()) != pages || len(m.stretches) != maxStretches {
		t.Errorf("%d pages in order, want %d; %d stretches", len(m.Order()), pages, len(m.stretches))
	}
	if got, ok := m.Lookup((8192 + 2*(maxStretches-1)) * pageSize); !ok || got.GVA != 0x7000_0000_0000+2*(maxStretches-1)*pageSize {
		t.Errorf("the last stretch: %+x, %v", got, ok)
	}
	if got, ok := m.Lookup((8192 + 2*maxStretches) * pageSize); ok {
		t.Errorf("beyond the bound: %+x", got)
	}
}

// changing is memory that holds something else whenever it is read.
type changing struct {
	rng *rand.Rand
	ram *ram
}

func (c changing) Read(_ uint64, p []byte) error {
	last := c.ram.parts[len(c.ram.parts)-1].end
	for i := 0; i+8 <= len(p); i += 8 {
		e := c.rng.Uint64N(last)*pageSize | c.rng.Uint64N(pageSize)
		if c.rng.IntN(100) == 0 {
			e = c.rng.Uint64()
		}
		binary.LittleEndian.PutUint64(p[i:], e)
	}
	return nil
}

func TestChangingMemory(t *testing.T) {
	ranges := []guestmem.Range{{GPA: 0, Size: 8 * mib}, {GPA: 4 * gib, Size: 3 * mib}}
	r, err := newRAM(ranges)
	if err != nil {
		t.Fatal(err)
	}
	for seed := range uint64(4) {
		mem := changing{rand.New(rand.NewPCG(seed, 1)), r}
		roots, err := FindRoots(mem, ranges, Root{}, Root{FiveLevel: true})
		if err != nil {
			t.Fatal(err)
		}
		m, err := NewMap(mem, ranges, roots)
		if err != nil {
			t.Fatal(err)
		}
		sane(t, m)
		for pfn := range uint64(4096) {
			m.Lookup(pfn * pageSize)
		}
	}
}
