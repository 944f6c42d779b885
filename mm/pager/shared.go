package pager

import (
	"bytes"
	"math/bits"
	"sync"
	"sync/atomic"
)

// shared keeps the bytes that several pages have, from when their block is read
// until the last of them is loaded, so that no block is read twice.
type shared struct {
	ready chan struct{} // closed when once and more are complete
	stop  atomic.Bool   // nobody will want them any more
	// For each block, a bit for each slot that some page, or more than one, is in.
	once, more []uint64

	mu    sync.Mutex
	pages map[slotID][]byte // guarded by mu
}

type slotID struct {
	block Block
	slot  int
}

const (
	maxShared   = 8192    // pages, 32 MiB
	maxSurveyed = 1 << 24 // pages of RAM, 64 GiB; looking at more takes too long
)

// survey finds out which slots are shared. It takes some 6 ns a page.
func (s *shared) survey(p *Pager) {
	defer close(s.ready)
	var pages uint64
	for _, r := range p.regions {
		pages += r.pages
	}
	if pages > maxSurveyed {
		return
	}
	once, more := make([]uint64, p.src.Blocks()), make([]uint64, p.src.Blocks())
	for _, r := range p.regions {
		for pfn := r.first; pfn < r.first+r.pages; pfn++ {
			if pfn%4096 == 0 && s.stop.Load() {
				return
			}
			if loc := p.src.Find(pfn); !isZero(loc) {
				bit := uint64(1) << (loc.Slot % BlockPages)
				more[loc.Block] |= once[loc.Block] & bit
				once[loc.Block] |= bit
			}
		}
	}
	s.once, s.more = once, more
}

// keep keeps those of a block's pages that others are equal to; own has a bit for
// each slot that is still the page's that it was made for.
func (s *shared) keep(b Block, own uint64, block []byte) {
	<-s.ready
	if s.once == nil {
		return
	}
	wanted := s.more[b] | s.once[b]&^own
	if wanted == 0 {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for ; wanted != 0 && len(s.pages) < maxShared; wanted &= wanted - 1 {
		id := slotID{b, bits.TrailingZeros64(wanted)}
		if s.pages[id] == nil {
			s.pages[id] = bytes.Clone(block[id.slot*pageSize:][:pageSize])
		}
	}
}

// page copies a page that was kept to dst, unless that is nil, and tells whether
// there is one.
func (s *shared) page(loc Location, dst []byte) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	page := s.pages[slotID{loc.Block, loc.Slot}]
	if dst != nil {
		copy(dst, page)
	}
	return page != nil
}
