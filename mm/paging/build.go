package paging

import (
	"fmt"
	"math/bits"
)

// builder walks all address spaces once and puts RAM into their order.
//
// Each table is expanded once at each level, wherever it is met again, so that
// tables that share, repeat or contain themselves cost no more than others.
type builder struct {
	mem    Memory
	ram    *ram
	limits limits

	tables    int
	truncated bool
	buf       [6]table  // by level
	expanded  [5]bitmap // by level, from 1 to 4: tables that need no second look

	space   int
	order   []uint64
	places  []placed
	nextGVA uint64 // that continues the last of places, or noGVA
	taken   bitmap // pages in order

	run       run
	linear    bitmap // pages that a linear mapping holds
	gigabytes map[uint64]struct{}
	stretches []stretch
}

// run is what may turn out to be a linear mapping: the latest pages, as long as
// all lie at the same distance from their addresses.
type run struct {
	distance uint64 // GVA - GPA
	pages    uint64
	linear   bool
	// What order and places held before it.
	order, places int
}

// noGVA is no page's address.
const noGVA = 1

func newBuilder(mem Memory, r *ram, l limits) *builder {
	b := &builder{mem: mem, ram: r, limits: l, gigabytes: map[uint64]struct{}{}}
	b.taken, b.linear = r.bitmap(), r.bitmap()
	for level := 1; level < len(b.expanded); level++ {
		b.expanded[level] = r.bitmap()
	}
	// Memory that is not mapped is never touched.
	b.order = make([]uint64, 0, r.pages)
	return b
}

// walk goes through the user halves of all roots, then their upper halves.
func (b *builder) walk(roots []Root) error {
	done := make(map[Root]struct{}, len(roots))
	spaces := make([]int, 0, len(roots))
	for space, root := range roots {
		if _, again := done[root]; !again {
			done[root] = struct{}{}
			spaces = append(spaces, space)
		}
	}
	for _, first := range []int{0, kernelHalf} {
		for _, space := range spaces {
			root := roots[space]
			b.space, b.nextGVA, b.run = space, noGVA, run{}
			t, err := b.read(root.levels(), root.GPA)
			if err != nil {
				return err
			}
			if t == nil {
				continue
			}
			base := root.extend(uint64(first) << shift(root.levels()))
			if err := b.entries(t, root.levels(), first, first+kernelHalf, base); err != nil {
				return err
			}
		}
	}
	return nil
}

// read reads a table into the buffer of its level. It returns nil when the
// table is not RAM or too many were read.
func (b *builder) read(level int, gpa uint64) (*table, error) {
	if _, ok := b.ram.bit(gpa >> pageShift); !ok {
		return nil, nil
	}
	if b.tables >= b.limits.tables {
		b.truncated = true
		return nil, nil
	}
	b.tables++
	t := &b.buf[level]
	if err := b.mem.Read(gpa, t[:]); err != nil {
		return nil, fmt.Errorf("%w: level %d at GPA %#x: %w", ErrTable, level, gpa, err)
	}
	return t, nil
}

// table expands the table at gpa, whose first entry maps gva.
func (b *builder) table(level int, gpa, gva uint64) error {
	bit, ok := b.ram.bit(gpa >> pageShift)
	if !ok || b.expanded[level].has(bit) {
		return nil
	}
	t, err := b.read(level, gpa)
	if t == nil || err != nil {
		return err
	}
	b.expanded[level].set(bit)
	if level == 1 {
		b.smallPages(t, gva)
		return nil
	}
	return b.entries(t, level, 0, entriesPerTable, gva)
}

// entries expands entries from to end of a table; the first of them maps gva.
func (b *builder) entries(t *table, level, from, end int, gva uint64) error {
	for i := from; i < end; i, gva = i+1, gva+1<<shift(level) {
		switch e := t.entry(i); e.kind(level) {
		case subtable:
			if err := b.table(level-1, e.address(), gva); err != nil {
				return err
			}
		case leaf:
			b.largePage(gva, e.page(level), 1<<(shift(level)-pageShift))
		}
	}
	return nil
}

// smallPages is entries for a table of 4 KiB pages, where the time goes.
func (b *builder) smallPages(t *table, gva uint64) {
	var in part // the one that held the last page
	for i := range entriesPerTable {
		e := t.entry(i)
		if e&present == 0 {
			continue
		}
		pfn := e.address() >> pageShift
		if pfn-in.first >= in.end-in.first {
			at, ok := b.ram.part(pfn)
			if !ok {
				continue
			}
			in = at
		}
		bit := in.bit + pfn - in.first
		at := gva + uint64(i)*pageSize
		if b.extendRun(at, pfn, 1) {
			b.linear.set(bit)
			b.stretch(at, pfn, 1)
		} else if !b.taken.has(bit) {
			b.taken.set(bit)
			b.place(at)
			b.order = append(b.order, pfn)
			b.nextGVA = at + pageSize
		}
	}
}

// largePage expands a page of so many 4 KiB pages, as far as it is RAM.
func (b *builder) largePage(gva, gpa, pages uint64) {
	pfn := gpa >> pageShift
	var inRAM uint64
	for _, p := range b.ram.parts {
		if first, end := max(p.first, pfn), min(p.end, pfn+pages); first < end {
			inRAM += end - first
		}
	}
	if inRAM == 0 {
		return
	}
	linear := b.extendRun(gva, pfn, inRAM)
	if linear && pages == 1<<(shift(3)-pageShift) {
		// Marking 1 GiB is much work for one entry: once is enough.
		if _, again := b.gigabytes[pfn]; again {
			return
		}
		b.gigabytes[pfn] = struct{}{}
	}
	for _, p := range b.ram.parts {
		first, end := max(p.first, pfn), min(p.end, pfn+pages)
		if first >= end {
			continue
		}
		bit, at := p.bit+first-p.first, gva+(first-pfn)*pageSize
		if linear {
			b.linear.setAll(bit, end-first)
			b.stretch(at, first, end-first)
		} else {
			b.take(at, first, bit, end-first)
		}
	}
}

// take puts those of n pages into the order that are not there.
func (b *builder) take(gva, pfn, bit, n uint64) {
	for n > 0 {
		m, covered := mask(bit, n)
		for fresh := m &^ b.taken[bit/64]; fresh != 0; fresh &= fresh - 1 {
			ahead := uint64(bits.TrailingZeros64(fresh)) - bit%64
			b.place(gva + ahead*pageSize)
			b.order = append(b.order, pfn+ahead)
			b.nextGVA = gva + (ahead+1)*pageSize
		}
		b.taken[bit/64] |= m
		gva, pfn, bit, n = gva+covered*pageSize, pfn+covered, bit+covered, n-covered
	}
}

// place notes where the page that comes next in the order is seen.
func (b *builder) place(gva uint64) {
	if gva != b.nextGVA {
		b.places = append(b.places, placed{len(b.order), Place{b.space, gva}})
	}
}

// extendRun counts the next pages in GVA order and tells whether they belong to
// a linear mapping. When they make one of the pages before them, these leave
// the order.
func (b *builder) extendRun(gva, pfn, pages uint64) bool {
	r := &b.run
	if distance := gva - pfn*pageSize; distance != r.distance || r.pages == 0 {
		*r = run{distance: distance, order: len(b.order), places: len(b.places)}
	}
	r.pages += pages
	if !r.linear && r.pages >= b.limits.linearPages {
		r.linear = true
		for _, pfn := range b.order[r.order:] {
			bit, _ := b.ram.bit(pfn)
			b.taken.clear(bit)
			b.linear.set(bit)
			b.stretch(pfn*pageSize+r.distance, pfn, 1)
		}
		b.order, b.places, b.nextGVA = b.order[:r.order], b.places[:r.places], noGVA
	}
	return r.linear
}

// stretch keeps where a linear mapping is.
func (b *builder) stretch(gva, pfn, pages uint64) {
	if n := len(b.stretches); n > 0 {
		last := &b.stretches[n-1]
		if last.Space == b.space && pfn == last.pfn+last.pages && gva == last.GVA+last.pages*pageSize {
			last.pages += pages
			return
		}
	}
	if len(b.stretches) < b.limits.stretches {
		b.stretches = append(b.stretches, stretch{pfn, pages, Place{b.space, gva}})
	}
}

// appendLinear adds what only linear mappings hold, in physical order.
func (b *builder) appendLinear(order []uint64) []uint64 {
	for _, p := range b.ram.parts {
		for pfn := p.first; pfn < p.end; {
			bit := p.bit + pfn - p.first
			m, covered := mask(bit, p.end-pfn)
			for left := m & b.linear[bit/64] &^ b.taken[bit/64]; left != 0; left &= left - 1 {
				order = append(order, pfn+uint64(bits.TrailingZeros64(left))-bit%64)
			}
			pfn += covered
		}
	}
	return order
}
