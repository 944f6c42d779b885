package paging

import (
	"sort"
	"sync"

	"github.com/gnomon-vmm/gnomon/mm/guestmem"
)

// Bounds on the work of NewMap. Memory that is well behaved does not meet them.
const (
	// PagesPerTable bounds how many page tables are read: one for so many pages
	// of RAM. Some hundred processes that all map most of memory come near it.
	PagesPerTable = 4
	// minTables may be read however small the RAM is.
	minTables = 1024

	// LinearRun is from how many bytes on a stretch of virtual memory that lies
	// in RAM as it is, page after page, counts as a linear mapping. A kernel's
	// direct map of all RAM is one.
	LinearRun = 16 << 20

	// maxStretches is how many pieces of linear mappings are kept for Lookup.
	maxStretches = 4096
)

// limits are the bounds of one Map.
type limits struct {
	tables      int
	linearPages uint64
	stretches   int
}

func limitsFor(r *ram) limits {
	return limits{
		tables:      minTables + int(r.pages/PagesPerTable),
		linearPages: LinearRun / pageSize,
		stretches:   maxStretches,
	}
}

// Place is where a guest sees a page: an address space, as an index into the
// roots that NewMap was given, and an address in it.
type Place struct {
	Space int
	GVA   uint64
}

// Stats tells what building a Map took.
type Stats struct {
	Tables    int  // page tables read, roots included
	Truncated bool // PagesPerTable stopped it: some pages' places are not known
}

// Map is the reverse of a guest's page tables, as they were when it was built.
// It may be used by several goroutines.
type Map struct {
	ram   *ram
	order []uint64 // see Order
	// places tell where the guest sees order[:linearFrom]; stretches tell it of the rest.
	places     []placed
	linearFrom int
	stretches  []stretch
	stats      Stats

	rankOnce sync.Once
	rank     []uint32 // by number of the page: 1 + its index in order, or 0
}

// placed is the place of order[index] and of what follows it, one page after
// the other, up to the next one's index.
type placed struct {
	index int
	Place
}

// stretch is a piece of a linear mapping.
type stretch struct {
	pfn, pages uint64
	Place
}

// NewMap reads the page tables of all roots in ram, the machine's RAM. It fails
// when a table that is RAM cannot be read, or the ranges overlap or descend;
// what the tables hold is never an error.
//
// A page that is mapped several times counts where it is mapped first: in the
// user (lower) halves of the roots, in the order in which they are given, then
// in their upper halves. Linear mappings of at least LinearRun bytes come last,
// in whichever half they are: the order of their pages is that of RAM anyway,
// and other mappings of the same pages say more.
func NewMap(mem Memory, ram []guestmem.Range, roots []Root) (*Map, error) {
	r, err := newRAM(ram)
	if err != nil {
		return nil, err
	}
	return newMap(mem, r, roots, limitsFor(r))
}

func newMap(mem Memory, r *ram, roots []Root, l limits) (*Map, error) {
	b := newBuilder(mem, r, l)
	if err := b.walk(roots); err != nil {
		return nil, err
	}
	m := &Map{
		ram: r, order: b.order, places: b.places, linearFrom: len(b.order), stretches: b.stretches,
		stats: Stats{Tables: b.tables, Truncated: b.truncated},
	}
	m.order = b.appendLinear(m.order)
	return m, nil
}

// Order is the page numbers (GPA / 4096) of all pages of RAM that are mapped,
// each once, in guest-virtual order: for each address space its user half; then
// the upper halves, of which each piece that roots share counts once; then
// what only linear mappings hold, in physical order. The caller must not change it.
func (m *Map) Order() []uint64 { return m.order }

// Stats tells what building the map took.
func (m *Map) Stats() Stats { return m.stats }

// Lookup tells where the guest sees the page that holds gpa: the place by which
// Order ranks it. It reports false for what is not mapped, not RAM, or beyond
// the bounds.
func (m *Map) Lookup(gpa uint64) (Place, bool) {
	m.rankOnce.Do(m.buildRank)
	pfn := gpa >> pageShift
	bit, ok := m.ram.bit(pfn)
	if !ok || m.rank[bit] == 0 {
		return Place{}, false
	}
	if index := int(m.rank[bit] - 1); index < m.linearFrom {
		next := sort.Search(len(m.places), func(i int) bool { return m.places[i].index > index })
		p := m.places[next-1]
		return Place{Space: p.Space, GVA: p.GVA + uint64(index-p.index)*pageSize + gpa%pageSize}, true
	}
	for _, s := range m.stretches {
		if pfn-s.pfn < s.pages {
			return Place{Space: s.Space, GVA: s.GVA + (pfn-s.pfn)*pageSize + gpa%pageSize}, true
		}
	}
	return Place{}, false
}

func (m *Map) buildRank() {
	m.rank = make([]uint32, m.ram.pages)
	for i, pfn := range m.order {
		bit, _ := m.ram.bit(pfn)
		m.rank[bit] = uint32(i + 1)
	}
}
