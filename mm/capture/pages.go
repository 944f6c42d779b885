package capture

import (
	"bytes"
	"sync"
	"sync/atomic"
)

// A page's state. From frozen on it changes so:
//
//	pending ──> busy ──> free                the sweeper took it
//	pending ──> busy ──> copied ──> free     a writer came first; then the sweeper
//	pending ──> busy ──> zero ──> free       the same, and there was nothing in it
//	pending ──> free                         a hole
//	pending ──> wanted ──> busyWanted        a writer came, and there was no room
//	busy ──> busyWanted                      a writer came while it was being copied
//
// Whoever ends busyWanted lets the writer go.
const (
	free       uint32 = iota // saved, or not to be saved: may be written
	pending                  // as at the instant, not saved
	wanted                   // pending, and a writer waits
	busy                     // being copied
	busyWanted               // being copied, and a writer waits
	zero                     // kept: all zero at the instant; may be written
	copied                   // kept: in the slot that the upper bits tell; may be written

	stateBits = 3
	stateMask = 1<<stateBits - 1
	maxSlots  = 1 << (32 - stateBits)
)

// pages is the state of each page, and room for those that are kept.
type pages struct {
	state []atomic.Uint32 // by index

	side []byte // slots: the bytes of room
	room *Side

	// extra has the slots behind side; Freeze makes them.
	extra []byte

	mu      sync.Mutex
	unused  []uint32 // guarded by mu: slots of side
	reuse   []uint32 // guarded by mu: slots of extra
	highest int      // guarded by mu: the most slots of side that were in use
}

func (p *pages) init(states []atomic.Uint32, room *Side) {
	p.state = states
	p.room, p.side = room, room.bytes
	p.unused = make([]uint32, len(p.side)/pageSize)
	for i := range p.unused {
		p.unused[i] = uint32(len(p.unused) - 1 - i)
	}
}

// slot is the bytes of a slot.
func (p *pages) slot(n uint32) []byte {
	side, at := p.side, int(n)*pageSize
	if at >= len(side) {
		side, at = p.extra, at-len(side)
	}
	return side[at : at+pageSize : at+pageSize]
}

// get takes a slot of side.
func (p *pages) get() (uint32, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	last := len(p.unused) - 1
	if last < 0 {
		return 0, false
	}
	n := p.unused[last]
	p.unused = p.unused[:last]
	p.highest = max(p.highest, len(p.side)/pageSize-last)
	return n, true
}

// left is how many slots of side are free.
func (p *pages) left() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.unused)
}

// put gives a slot back.
func (p *pages) put(n uint32) {
	if int(n) >= len(p.side)/pageSize {
		return // used once
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.unused = append(p.unused, n)
}

// reserve makes room for n pages that must be kept whatever room there is.
func (p *pages) reserve(n int) {
	p.extra = make([]byte, n*pageSize)
	p.reuse = make([]uint32, n)
	for i := range p.reuse {
		p.reuse[i] = uint32(len(p.side)/pageSize + i)
	}
}

// keepReserved keeps a page in reserved room, and tells whether it is to be
// saved at all. Nobody else uses the states meanwhile.
func (p *pages) keepReserved(i uint32, content []byte) bool {
	switch s := p.state[i].Load(); s & stateMask {
	case pending:
	case copied: // it has room
		copy(p.slot(s>>stateBits), content)
		return true
	default:
		return false
	}
	n := p.reserved()
	copy(p.slot(n), content)
	p.state[i].Store(n<<stateBits | copied)
	return true
}

// reserved takes a slot of extra.
func (p *pages) reserved() uint32 {
	last := len(p.reuse) - 1
	n := p.reuse[last]
	p.reuse = p.reuse[:last]
	return n
}

// writable tells whether a page in this state may be written.
func writable(state uint32) bool {
	switch state & stateMask {
	case free, zero, copied:
		return true
	}
	return false
}

var zeroPage [pageSize]byte

func isZero(page []byte) bool { return bytes.Equal(page, zeroPage[:]) }
