package dirty

import (
	"errors"
	"fmt"
	"math/bits"

	"github.com/gnomon-vmm/gnomon/mm/guestmem"
)

// ErrRanges means that two bitmaps are not about the same memory.
var ErrRanges = errors.New("bitmaps of different memory")

// stretch is one range of RAM and where its bits begin.
type stretch struct {
	first, pages uint64 // page numbers
	words        []uint64
}

// Bitmap is a set of pages of RAM, a page being known by its number: its
// guest-physical address / guestmem.PageSize. One goroutine at a time may use it.
type Bitmap struct {
	stretches []stretch // ascending
}

// NewBitmap makes an empty set over ranges, which are ascending and disjoint.
func NewBitmap(ranges []guestmem.Range) *Bitmap {
	b := &Bitmap{}
	for _, r := range ranges {
		pages := r.Size / guestmem.PageSize
		b.stretches = append(b.stretches, stretch{
			first: r.GPA / guestmem.PageSize, pages: pages, words: make([]uint64, (pages+63)/64),
		})
	}
	return b
}

// NewBitmapOf makes an empty set over all of a machine's RAM.
func NewBitmapOf(mem *guestmem.Memory) *Bitmap {
	var ranges []guestmem.Range
	for _, r := range mem.Regions() {
		ranges = append(ranges, r.Range)
	}
	return NewBitmap(ranges)
}

// find returns the stretch that holds the page, or nil.
func (b *Bitmap) find(pfn uint64) *stretch {
	for i := range b.stretches {
		if s := &b.stretches[i]; pfn-s.first < s.pages {
			return s
		}
	}
	return nil
}

// Set adds a page. Pages outside RAM are ignored.
func (b *Bitmap) Set(pfn uint64) {
	if s := b.find(pfn); s != nil {
		at := pfn - s.first
		s.words[at/64] |= 1 << (at % 64)
	}
}

// Clear takes a page out.
func (b *Bitmap) Clear(pfn uint64) {
	if s := b.find(pfn); s != nil {
		at := pfn - s.first
		s.words[at/64] &^= 1 << (at % 64)
	}
}

// Has tells whether a page is in the set.
func (b *Bitmap) Has(pfn uint64) bool {
	s := b.find(pfn)
	if s == nil {
		return false
	}
	at := pfn - s.first
	return s.words[at/64]>>(at%64)&1 != 0
}

// SetRun adds n pages from pfn on; those outside RAM are ignored.
func (b *Bitmap) SetRun(pfn, n uint64) {
	end := pfn + n
	if end < pfn {
		end = ^uint64(0)
	}
	for i := range b.stretches {
		s := &b.stretches[i]
		from, to := max(pfn, s.first), min(end, s.first+s.pages)
		if from < to {
			setBits(s.words, from-s.first, to-s.first)
		}
	}
}

// setBits sets the bits from one to before another.
func setBits(words []uint64, from, to uint64) {
	for from < to {
		upTo := min(to, from|63+1)
		words[from/64] |= ^uint64(0) >> (64 - (upTo - from)) << (from % 64)
		from = upTo
	}
}

// SetAll makes the set all of RAM.
func (b *Bitmap) SetAll() {
	for i := range b.stretches {
		setBits(b.stretches[i].words, 0, b.stretches[i].pages)
	}
}

// Reset empties the set.
func (b *Bitmap) Reset() {
	for i := range b.stretches {
		clear(b.stretches[i].words)
	}
}

// Count is how many pages are in the set.
func (b *Bitmap) Count() uint64 {
	n := 0
	for i := range b.stretches {
		for _, w := range b.stretches[i].words {
			n += bits.OnesCount64(w)
		}
	}
	return uint64(n)
}

// Runs calls f for each run of neighbouring pages in the set, ascending, and
// as long as possible within a range of RAM. f must not change the set.
func (b *Bitmap) Runs(f func(pfn, n uint64)) {
	for i := range b.stretches {
		s := &b.stretches[i]
		var from uint64 // where the run under way began
		inRun := false
		for at, word := range s.words {
			// A word like the one before has no edges: most do not.
			if !inRun && word == 0 || inRun && word == ^uint64(0) {
				continue
			}
			for bit := uint64(0); bit < 64; {
				rest := word >> bit
				if inRun {
					rest = ^rest
				}
				skip := uint64(bits.TrailingZeros64(rest))
				if bit += skip; bit >= 64 {
					break
				}
				edge := uint64(at)*64 + bit
				if inRun {
					f(s.first+from, edge-from)
				}
				from, inRun = edge, !inRun
			}
		}
		if inRun {
			f(s.first+from, s.pages-from)
		}
	}
}

// Merge adds all pages of other, which must be over the same ranges.
func (b *Bitmap) Merge(other *Bitmap) error {
	if !b.SameMemory(other) {
		return fmt.Errorf("%w: %v and %v", ErrRanges, b, other)
	}
	for i := range b.stretches {
		words := b.stretches[i].words
		for j, w := range other.stretches[i].words {
			words[j] |= w
		}
	}
	return nil
}

// SameMemory tells whether both bitmaps are over the same ranges.
func (b *Bitmap) SameMemory(other *Bitmap) bool {
	if len(b.stretches) != len(other.stretches) {
		return false
	}
	for i, s := range b.stretches {
		if o := other.stretches[i]; s.first != o.first || s.pages != o.pages {
			return false
		}
	}
	return true
}

// String tells the size of the set and of its memory.
func (b *Bitmap) String() string {
	var pages uint64
	for _, s := range b.stretches {
		pages += s.pages
	}
	return fmt.Sprintf("%d of %d pages in %d ranges", b.Count(), pages, len(b.stretches))
}
