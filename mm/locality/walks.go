// Package locality knows which pages belong together. A checkpoint's blocks lie
// in the order of the guest's virtual addresses, so a block is one
// neighbourhood, and the next block is the next neighbourhood; what is left to
// find out, while the guest runs, is how its neighbourhoods are being walked.
package locality

// maxWalks is how many walks are told apart: a few threads of a guest, each
// with a stream or two.
const maxWalks = 8

// sureWindow is the window of a walk that can no longer be chance. Such a walk
// may seem to jump, by some windows, over blocks that others have loaded.
const sureWindow = 4

// Walks recognises, among the blocks that are demanded, walks that go from one
// block to the next or to the one before, and says what to load ahead of them:
// one block at first, then twice as much each time. A block that continues no
// walk is left alone, so random accesses cost one block each. It is not safe for
// concurrent use, and does not allocate.
type Walks struct {
	walks  [maxWalks]walk
	ahead  int // blocks ahead of a walk
	blocks int
	clock  uint64
}

// walk is one that may be going on.
type walk struct {
	// Blocks from lo to before hi were demanded or asked for ahead.
	lo, hi int
	// window is how many blocks were asked for last; 0: no direction seen yet.
	window  int
	forward bool
	used    uint64 // the clock when it was last seen; 0: free
}

// NewWalks makes Walks for a checkpoint of so many blocks that ask for at most
// ahead blocks ahead of one.
func NewWalks(blocks, ahead int) *Walks { return &Walks{ahead: ahead, blocks: blocks} }

// Demand tells that block b is demanded, either because it is missing or
// because it was asked for and has not come yet; it returns the blocks, from
// from to before to, to ask for now, those next to the walker first if forward
// is true and last if not. There are none when from == to. loaded tells whether
// a block is there already.
func (w *Walks) Demand(b int, loaded func(b int) bool) (from, to int, forward bool) {
	w.clock++
	oldest := &w.walks[0]
	for i := range w.walks {
		s := &w.walks[i]
		if s.used == 0 {
			if oldest.used != 0 {
				oldest = s
			}
			continue
		}
		if from, to, ok := s.advance(b, w.ahead, w.blocks, loaded); ok {
			s.used = w.clock
			return from, to, s.forward
		}
		if s.used < oldest.used {
			oldest = s
		}
	}
	*oldest = walk{lo: b, hi: b + 1, used: w.clock}
	return 0, 0, true
}

// advance takes b as the walk's next demand, if it can be.
func (s *walk) advance(b, ahead, blocks int, loaded func(b int) bool) (from, to int, ok bool) {
	switch {
	case b >= s.lo && b < s.hi:
		// The walker has caught up with what was asked for: ask for more, so that
		// it comes while the walker is busy with this.
		if s.forward && s.hi-b <= s.window {
			s.window = min(2*s.window, ahead)
			from, to = s.hi, min(s.hi+s.window, blocks)
			s.lo, s.hi = b, to
		} else if !s.forward && b-s.lo < s.window {
			s.window = min(2*s.window, ahead)
			from, to = max(s.lo-s.window, 0), s.lo
			s.lo, s.hi = from, b+1
		}
		return from, to, true
	case (s.window == 0 || s.forward) && s.reaches(s.hi, b, loaded):
		s.forward = true
		s.window = min(max(2*s.window, 1), ahead)
		from, to = b+1, min(b+1+s.window, blocks)
		s.lo, s.hi = b, max(to, b+1)
		return from, max(to, from), true
	case (s.window == 0 || !s.forward) && s.reaches(b+1, s.lo, loaded):
		s.forward = false
		s.window = min(max(2*s.window, 1), ahead)
		from, to = max(b-s.window, 0), b
		s.lo, s.hi = from, b+1
		return from, to, true
	default:
		return 0, 0, false
	}
}

// reaches tells whether b is next after the blocks before end, or would be had
// others not loaded all that lies between.
func (s *walk) reaches(end, b int, loaded func(b int) bool) bool {
	if b < end || b > end && (s.window < sureWindow || b-end > 4*s.window) {
		return false
	}
	for ; end < b; end++ {
		if !loaded(end) {
			return false
		}
	}
	return true
}
