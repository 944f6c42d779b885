package capture

import (
	"context"
	"errors"
	"fmt"
	"math/bits"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// Writer is where pages go: a *checkpoint.Writer. Several goroutines call it.
type Writer interface {
	// BlockAt takes up to BlockPages pages: their numbers, and their bytes, which
	// it does not keep. order is the block's place among the others, whenever its
	// turn comes.
	BlockAt(order uint64, pfns []uint64, pages [][]byte) error
	// Zero takes pages that are zero.
	Zero(pfns ...uint64) error
}

// BlockPages is how many pages one Block has, but for the last.
const BlockPages = 64

// Save writes the memory as it was at Freeze, while the machine runs: the pages
// of order in that order, then the others by their number. Numbers in order
// that are not RAM, or come again, are ignored. Pages that nobody ever touched
// are told by Zero, before all others.
//
// progress, if not nil, is called now and then with how many of the pages are
// done; not by two goroutines at once.
//
// When Save returns, the capture is over and nothing is protected any more,
// whether it succeeded or ctx, Close or an error of w ended it.
func (c *Capture) Save(ctx context.Context, w Writer, order []uint64, progress func(done, total uint64)) error {
	c.saving.Lock()
	defer c.saving.Unlock()
	c.mu.Lock()
	if c.phase != frozen {
		defer c.mu.Unlock()
		return fmt.Errorf("%w: %w", ErrSave, c.misplaced())
	}
	c.mu.Unlock()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stop := context.AfterFunc(c.life, func() { cancel(ErrClosed) })
	defer stop()

	err := c.save(ctx, cancel, w, order, progress)
	if err == nil && c.isOver.Load() {
		err = ErrClosed // pages may have been written before they were saved, though ctx was not ended yet
	}
	c.saved = err == nil
	c.letGo()
	if err == nil {
		err = c.closed
	}
	if err != nil {
		c.mu.Lock()
		defer c.mu.Unlock()
		return fmt.Errorf("%w: %w", ErrSave, errors.Join(err, c.failed))
	}
	return nil
}

func (c *Capture) save(ctx context.Context, cancel context.CancelCauseFunc, w Writer, order []uint64, progress func(done, total uint64)) error {
	c.mu.Lock()
	early := c.early
	c.mu.Unlock()
	holes := uint64(0)
	if !early { // then nothing is pending
		var err error
		if holes, err = c.sayHoles(ctx, w); err != nil {
			return err
		}
	}
	s := &sweep{Capture: c, ctx: ctx, w: w, progress: progress, done: holes, settled: early}
	s.plan(order)
	s.total = holes + uint64(len(s.sequence))
	s.report(0)
	var workers sync.WaitGroup
	for range min(c.workers, max(1, len(s.claimed))) {
		workers.Go(func() {
			if err := s.work(); err != nil {
				cancel(err)
			}
		})
	}
	workers.Wait()
	return context.Cause(ctx)
}

// sayHoles finds the pages that the memfd does not have, tells w of them, and
// returns how many they are. A page that is still pending when it is seen to be
// a hole was one at the instant of Freeze: nobody has written it since.
func (c *Capture) sayHoles(ctx context.Context, w Writer) (uint64, error) {
	var pfns [512]uint64
	n, total := 0, uint64(0)
	flush := func() error {
		if n == 0 {
			return nil
		}
		total += uint64(n)
		c.count.holes.Add(uint64(n))
		err := w.Zero(pfns[:n]...)
		n = 0
		return errors.Join(err, context.Cause(ctx))
	}
	hole := func(from, to uint64) error {
		for i := from; i < to; i++ {
			if !c.pages.state[i].CompareAndSwap(pending, free) {
				continue
			}
			r := c.regionAt(uint32(i))
			pfns[n] = r.firstPFN + i - r.firstIndex
			if n++; n == len(pfns) {
				if err := flush(); err != nil {
					return err
				}
			}
		}
		return nil
	}
	scan := c.holesAmongAll
	if c.fewPending() {
		scan = c.holesAmongPending
	}
	if err := scan(hole); err != nil {
		return total, err
	}
	err := flush()
	return total, err
}

// fewPending tells whether so few pages are to be saved that asking for each is
// cheaper than going through all.
func (c *Capture) fewPending() bool {
	c.mu.Lock()
	partial := c.partial
	c.mu.Unlock()
	if !partial {
		return false
	}
	n := 0
	for i := range c.pages.state {
		if c.pages.state[i].Load() != free {
			n++
		}
	}
	return n < len(c.pages.state)/8
}

// holesAmongAll calls hole for each run of pages that the memfd does not have.
func (c *Capture) holesAmongAll(hole func(from, to uint64) error) error {
	end := uint64(len(c.pages.state))
	for at := uint64(0); at < end; {
		data, err := c.seek(at, unix.SEEK_DATA)
		if err != nil {
			return err
		}
		if err := hole(at, data); err != nil {
			return err
		}
		if data == end {
			break
		}
		if at, err = c.seek(data, unix.SEEK_HOLE); err != nil {
			return err
		}
	}
	return nil
}

// holesAmongPending does the same for the pages that are to be saved. It never
// asks where data ends: the answer takes time that grows with the data.
func (c *Capture) holesAmongPending(hole func(from, to uint64) error) error {
	end := uint64(len(c.pages.state))
	for at := uint64(0); at < end; at++ {
		if c.pages.state[at].Load() != pending {
			continue
		}
		data, err := c.seek(at, unix.SEEK_DATA)
		if err != nil {
			return err
		}
		if err := hole(at, data); err != nil {
			return err
		}
		at = data
	}
	return nil
}

// seek returns the first page from one on that the memfd has, or has not.
func (c *Capture) seek(page uint64, whence int) (uint64, error) {
	at, err := unix.Seek(c.mem.FD(), int64(page*pageSize), whence)
	if err == unix.ENXIO {
		return uint64(len(c.pages.state)), nil
	}
	if err != nil {
		return 0, fmt.Errorf("find which pages were ever touched: %w", err)
	}
	return uint64(at) / pageSize, nil
}

// sweep is one Save.
type sweep struct {
	*Capture
	ctx      context.Context
	w        Writer
	progress func(done, total uint64)
	total    uint64

	sequence []uint32 // the indices of all pages to save, in order
	position []uint32 // by index: the page's place in sequence + 1; 0 if it has none; nil if settled
	settled  bool     // all are copied: nobody wants one earlier
	claimed  []atomic.Bool
	next     atomic.Uint64 // the block after the last that came in its turn

	mu   sync.Mutex
	done uint64 // guarded by mu: pages
}

// plan lays the pages to save into blocks.
func (s *sweep) plan(order []uint64) {
	left, n := make([]uint64, (len(s.pages.state)+63)/64), 0 // a bit for each page that has no place yet
	for i := range s.pages.state {
		if s.pages.state[i].Load() != free {
			left[i/64] |= 1 << (i % 64)
			n++
		}
	}
	s.sequence = make([]uint32, 0, n)
	for _, pfn := range order {
		if i, ok := s.indexOf(pfn); ok && left[i/64]&(1<<(i%64)) != 0 {
			left[i/64] &^= 1 << (i % 64)
			s.sequence = append(s.sequence, i)
		}
	}
	for w, word := range left {
		for ; word != 0; word &= word - 1 {
			s.sequence = append(s.sequence, uint32(w*64+bits.TrailingZeros64(word)))
		}
	}
	if !s.settled {
		s.position = make([]uint32, len(s.pages.state))
		for n, i := range s.sequence {
			s.position[i] = uint32(n + 1)
		}
	}
	s.claimed = make([]atomic.Bool, (len(s.sequence)+BlockPages-1)/BlockPages)
}

// work saves blocks until none is left.
func (s *sweep) work() error {
	b := &sweepBlock{}
	data := make([]byte, BlockPages*pageSize)
	for n := range b.room {
		b.room[n] = data[n*pageSize : (n+1)*pageSize]
	}
	for {
		block, ok := s.pick()
		if !ok {
			return nil
		}
		if err := context.Cause(s.ctx); err != nil {
			return err
		}
		indices := s.sequence[block*BlockPages : min((block+1)*BlockPages, uint64(len(s.sequence)))]
		s.gather(b, indices)
		err := s.w.BlockAt(block, b.pfns[:len(indices)], b.pages[:len(indices)])
		s.letGo(b, indices)
		if err != nil {
			return err
		}
		s.report(uint64(len(indices)))
	}
}

// sweepBlock is a block that is being saved.
type sweepBlock struct {
	pfns  [BlockPages]uint64
	pages [BlockPages][]byte
	held  uint64             // a bit for each of them that is saved from where it is
	room  [BlockPages][]byte // for the others
}

// gather brings the pages of a block together as they were at the instant. Where the machine
// stands still, and where they were kept, they are saved from where they are, and otherwise
// are copied, so that who waits to write one need not wait for more than that.
func (s *sweep) gather(b *sweepBlock, indices []uint32) {
	for n, i := range indices {
		r := s.regionAt(i)
		b.pfns[n] = r.firstPFN + uint64(i) - r.firstIndex
		switch {
		case !s.take(i):
			b.pages[n] = s.kept(i)
			b.held |= 1 << n
		case s.still:
			b.pages[n] = s.hostPage(i)
			b.held |= 1 << n
		default:
			b.pages[n] = b.room[n]
			copy(b.pages[n], s.hostPage(i))
			s.settle(i, free)
			s.count.swept.Add(1)
		}
	}
}

// kept is a page that was kept when somebody wanted to write it. Until it is let go
// nobody else uses what it was kept in.
func (s *sweep) kept(i uint32) []byte {
	if state := s.pages.state[i].Load(); state&stateMask == copied {
		return s.pages.slot(state >> stateBits)
	}
	return zeroPage[:]
}

// letGo lets the pages of a block go that gather has held.
func (s *sweep) letGo(b *sweepBlock, indices []uint32) {
	for ; b.held != 0; b.held &= b.held - 1 {
		i := indices[bits.TrailingZeros64(b.held)]
		switch state := s.pages.state[i].Load(); state & stateMask {
		case copied:
			s.pages.state[i].Store(free)
			s.pages.put(state >> stateBits)
		case zero:
			s.pages.state[i].Store(free)
		default: // busy
			s.settle(i, free)
			s.count.swept.Add(1)
		}
	}
}

// pick returns the block to save next: one with a page that somebody waits for,
// or else the first that nobody has.
func (s *sweep) pick() (uint64, bool) {
	for {
		var block uint64
		select {
		case i := <-s.urgent:
			if s.position[i] == 0 {
				continue
			}
			block = uint64(s.position[i]-1) / BlockPages
		default:
			if block = s.next.Add(1) - 1; block >= uint64(len(s.claimed)) {
				return 0, false
			}
		}
		if !s.claimed[block].Swap(true) {
			return block, true
		}
	}
}

func (s *sweep) report(pages uint64) {
	if s.progress == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.done += pages
	s.progress(s.done, s.total)
}
