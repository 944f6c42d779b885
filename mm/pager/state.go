package pager

import (
	"sync/atomic"

	"github.com/gnomon-vmm/gnomon/mm/guestmem"
	"github.com/gnomon-vmm/gnomon/mm/uffd"
)

// state of a page, two bits of a word.
type state uint32

const (
	missing state = iota // not looked at yet
	loading              // somebody has taken it upon himself to install it
	hole                 // all zeros and not installed; the host may use it as it is
	present              // installed; a fault on it means that it was discarded since, or is late
)

// region is a guestmem.Region with what is known of its pages.
type region struct {
	first  uint64  // page number of its first page
	pages  uint64  // how many it has
	addr   uintptr // of the guest's mapping
	states []atomic.Uint32
	// fetched has a bit for each page that was installed because it, or a page
	// near it, was demanded.
	fetched []atomic.Uint64
	guest   []byte // the guest's mapping, never to be touched
}

const statesPerWord = 16

func newRegion(r *guestmem.Region) *region {
	pages := r.Size / guestmem.PageSize
	return &region{
		first: r.GPA / guestmem.PageSize, pages: pages, addr: uffd.Address(r.GuestBytes()), guest: r.GuestBytes(),
		states:  make([]atomic.Uint32, (pages+statesPerWord-1)/statesPerWord),
		fetched: make([]atomic.Uint64, (pages+63)/64),
	}
}

func (r *region) get(i uint64) state {
	return state(r.states[i/statesPerWord].Load() >> (i % statesPerWord * 2) & 3)
}

// change replaces one state by another, if it is the one that the page has.
func (r *region) change(i uint64, from, to state) bool {
	word, shift := &r.states[i/statesPerWord], i%statesPerWord*2
	for {
		old := word.Load()
		if state(old>>shift&3) != from {
			return false
		}
		if word.CompareAndSwap(old, old&^(3<<shift)|uint32(to)<<shift) {
			return true
		}
	}
}

// arrived marks n pages from page i on as present, whatever they were.
func (r *region) arrived(i, n uint64) {
	for ; n > 0; i, n = i+1, n-1 {
		r.states[i/statesPerWord].Or(uint32(present) << (i % statesPerWord * 2))
	}
}

// markFetched counts n pages from page i on among those that Usage looks at.
func (r *region) markFetched(i, n uint64) {
	for ; n > 0; i, n = i+1, n-1 {
		r.fetched[i/64].Or(1 << (i % 64))
	}
}

func (r *region) addrOf(i uint64) uintptr { return r.addr + uintptr(i)*guestmem.PageSize }

// place is a page of RAM.
type place struct {
	r *region
	i uint64 // index of the page in the region
}

func (at place) pfn() uint64 { return at.r.first + at.i }

// place finds a page by its number; r is nil when it is not RAM.
func (p *Pager) place(pfn uint64) place {
	for _, r := range p.regions {
		if pfn-r.first < r.pages {
			return place{r, pfn - r.first}
		}
	}
	return place{}
}

// placeAt finds a page by an address in the guest's mapping.
func (p *Pager) placeAt(addr uintptr) place {
	for _, r := range p.regions {
		if i := uint64(addr-r.addr) / guestmem.PageSize; addr >= r.addr && i < r.pages {
			return place{r, i}
		}
	}
	return place{}
}
