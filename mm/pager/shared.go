package pager

import (
	"bytes"
	"math/bits"
	"sync"
)

// shared keeps the bytes that several pages have, from when their block is read
// until the last of them is loaded, so that no block is read twice.
type shared struct {
	mu    sync.Mutex
	pages map[slotID][]byte // guarded by mu
}

type slotID struct {
	block Block
	slot  int
}

const maxShared = 8192 // pages, 32 MiB

// keep keeps those of a block's pages that others are equal to: slots has a bit
// for each.
func (s *shared) keep(b Block, slots uint64, block []byte) {
	if slots == 0 {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for ; slots != 0 && len(s.pages) < maxShared; slots &= slots - 1 {
		id := slotID{b, bits.TrailingZeros64(slots)}
		if s.pages[id] == nil && (id.slot+1)*pageSize <= len(block) {
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
