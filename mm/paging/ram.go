package paging

import (
	"fmt"

	"github.com/gnomon-vmm/gnomon/mm/guestmem"
)

// ram numbers the pages of RAM, so that a bitmap has a bit for each.
type ram struct {
	parts []part // ascending
	pages uint64
}

// part is a stretch of RAM, by page number.
type part struct {
	first, end uint64
	bit        uint64 // number of first
}

// maxPages is how many pages can be numbered: 16 TiB of RAM, less one page.
const maxPages = 1<<32 - 1

func newRAM(ranges []guestmem.Range) (*ram, error) {
	r := &ram{}
	var end uint64
	for _, g := range ranges {
		if g.Size == 0 || (g.GPA|g.Size)%pageSize != 0 || g.GPA+g.Size < g.GPA || g.GPA < end {
			return nil, fmt.Errorf("%w: %d bytes at GPA %#x: ranges must be whole pages, ascending and disjoint", ErrRAM, g.Size, g.GPA)
		}
		end = g.GPA + g.Size
		p := part{first: g.GPA >> pageShift, end: end >> pageShift, bit: r.pages}
		r.pages += p.end - p.first
		r.parts = append(r.parts, p)
	}
	if r.pages > maxPages {
		return nil, fmt.Errorf("%w: %d pages, at most %d can be numbered", ErrRAM, r.pages, uint64(maxPages))
	}
	return r, nil
}

// part returns the stretch that holds a page, or false when it is not RAM.
func (r *ram) part(pfn uint64) (part, bool) {
	for _, p := range r.parts {
		if pfn-p.first < p.end-p.first {
			return p, true
		}
	}
	return part{}, false
}

// bit is the number of a page, or false when it is not RAM.
func (r *ram) bit(pfn uint64) (uint64, bool) {
	p, ok := r.part(pfn)
	return p.bit + pfn - p.first, ok
}

// bitmap has a bit for each page of a ram.
type bitmap []uint64

func (r *ram) bitmap() bitmap { return make(bitmap, (r.pages+63)/64) }

func (b bitmap) has(bit uint64) bool { return b[bit/64]>>(bit%64)&1 != 0 }
func (b bitmap) set(bit uint64)      { b[bit/64] |= 1 << (bit % 64) }
func (b bitmap) clear(bit uint64)    { b[bit/64] &^= 1 << (bit % 64) }

// mask covers the bits from and up to n bits later that lie in from's word, and
// tells how many they are.
func mask(from, n uint64) (m, covered uint64) {
	covered = min(64-from%64, n)
	return ^uint64(0) >> (64 - covered) << (from % 64), covered
}

// setAll sets n bits.
func (b bitmap) setAll(from, n uint64) {
	for n > 0 {
		m, covered := mask(from, n)
		b[from/64] |= m
		from, n = from+covered, n-covered
	}
}
