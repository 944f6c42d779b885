package pager

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/gnomon-vmm/gnomon/mm/uffd"
)

// serve answers the guest's faults. What is demanded is brought by this
// goroutine itself: to wake another would cost more than the rest.
func (p *Pager) serve() {
	l := new(loader)
	for {
		n, err := p.u.ReadFaults(l.faults[:])
		if err != nil {
			if !errors.Is(err, uffd.ErrClosed) {
				p.fail(fmt.Errorf("%w: %w", ErrLoad, err))
			}
			return
		}
		now := time.Now()
		for _, f := range l.faults[:n] {
			if at := p.placeAt(f.Addr); at.r != nil {
				p.counts.guestFaults.Add(1)
				p.guestFault(l, at, now)
			}
		}
	}
}

// fail notes an error that is no block's.
func (p *Pager) fail(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed || p.complete || errors.Is(err, ErrClosed) {
		return
	}
	if p.firstErr == nil {
		p.firstErr = err
	}
	p.arrivals.Broadcast()
	p.report(err)
}

// guestFault answers one fault, or leaves it to whoever loads the page. A fault
// whose page cannot be had is never answered.
func (p *Pager) guestFault(l *loader, at place, since time.Time) {
	var err error
	st, loc := at.r.get(at.i), p.src.Find(at.pfn())
	switch {
	case st == hole || isZero(loc) && st != present:
		err = p.zeroAround(l, at)
	case st == present && p.holdLate(at, loc, since):
		return
	case st == present:
		// It was given back since, as a balloon does, and is zeros now; or the fault
		// is late, and is answered by there being a page.
		err = p.zeroRun(at, 1)
	default:
		for at.r.get(at.i) < hole {
			todo, err := p.plan(l, at, loc, since)
			if err == nil {
				err = p.perform(l, todo, at, loc)
			}
			if err != nil || todo == wait {
				return // release answers, and counts the time
			}
		}
		err = p.u.Wake(at.r.addrOf(at.i), pageSize)
	}
	if err != nil {
		p.fail(err)
		return
	}
	p.counts.stalled.Add(int64(time.Since(since)))
}

// holdLate puts a fault on a page that has come meanwhile on hold, if more of
// its batch is to come.
func (p *Pager) holdLate(at place, loc Location, since time.Time) bool {
	if isZero(loc) {
		return false
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.blocks[loc.Block]
	if s < blockBatch || p.closed {
		return false
	}
	p.hold(held{at: at, since: since, batch: int(s - blockBatch)})
	return true
}

// Touch loads the pages of n bytes from gpa on that are missing. It is cheap
// when none is.
func (p *Pager) Touch(gpa, n uint64) error {
	if n == 0 {
		return nil
	}
	for pfn, last := gpa/pageSize, (gpa+n-1)/pageSize; pfn <= last; pfn++ {
		at := p.place(pfn)
		if at.r == nil {
			continue
		}
		if at.r.get(at.i) < hole {
			if err := p.touchPage(at); err != nil {
				return err
			}
		}
	}
	return nil
}

// touchPage is Touch for a page that is not there. What is all zeros need not
// be: the host's mapping has zeros where the memfd has nothing.
func (p *Pager) touchPage(at place) error {
	loc := p.src.Find(at.pfn())
	if isZero(loc) {
		at.r.change(at.i, missing, hole)
		return nil
	}
	p.counts.deviceFaults.Add(1)
	since := time.Now()
	defer func() { p.counts.stalled.Add(int64(time.Since(since))) }()
	l := p.loaders.Get().(*loader)
	defer p.loaders.Put(l)
	for at.r.get(at.i) < hole {
		todo, err := p.plan(l, at, loc, time.Time{})
		if err == nil {
			err = p.perform(l, todo, at, loc)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// action is what whoever wants a page does now.
type action int

const (
	nothing   action = iota // the page is there
	wait                    // somebody else brings it
	takeBlock               // load the block, which is taken already
	takePage                // load the page alone, or with some neighbours
)

// plan decides how a page that is not zeros comes. If it is to wait, a guest's
// fault has been put on hold, and a device, which gives no time, has been waiting
// already. An error has been reported.
func (p *Pager) plan(l *loader, at place, loc Location, since time.Time) (action, error) {
	own, err := p.owns(at, loc)
	if err != nil {
		return nothing, p.giveUp(loc.Block, err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	b, st, s := loc.Block, at.r.get(at.i), p.blocks[loc.Block]
	switch {
	case st == present:
		return nothing, nil
	case p.closed:
		return nothing, fmt.Errorf("%w: page at GPA %#x", ErrClosed, at.pfn()*pageSize)
	case s == blockFailed:
		return nothing, p.failed[b]
	}
	batch, again := noBatch, false
	stored := !own && p.shared.page(loc, nil)
	switch {
	case s >= blockBatch && !stored:
		// A page that is not the block's own comes by a second try.
		batch, again = int(s-blockBatch), !own
		p.promote(batch)
		if own && p.lookAhead(b) {
			p.wanted.Broadcast()
		}
	case st == loading:
	case s == blockLoading && !stored:
		again = !own
	default:
		p.note(b)
		if own && s == blockIdle && p.started {
			if i, ok := slices.BinarySearch(p.recorded, b); ok {
				batch = p.batchRecorded(i, p.o.Window)
			}
			if batch != noBatch {
				p.promote(batch)
				p.wanted.Broadcast()
				break
			}
		}
		p.demands++
		if p.walks == nil || stored || s != blockIdle {
			return takePage, nil
		}
		p.take(b, blockLoading)
		if l.walking = own && p.started && p.lookAhead(b); l.walking {
			p.wanted.Broadcast()
		}
		return takeBlock, nil
	}
	if since.IsZero() {
		p.waiting++
		p.arrivals.Wait()
		p.waiting--
	} else {
		p.hold(held{at: at, since: since, batch: batch, block: b, again: again})
	}
	return wait, nil
}

// lookAhead tells the walks of a demand, and asks for what they want. mu is held.
func (p *Pager) lookAhead(b Block) bool {
	return p.walks != nil && p.askAhead(p.walks.Demand(int(b), p.loaded))
}

// perform does what plan decided.
func (p *Pager) perform(l *loader, todo action, at place, loc Location) error {
	switch todo {
	case takeBlock:
		err := p.loadBlock(l, loc.Block, at, demand)
		p.finish(loc.Block, err, demand)
		return err
	case takePage:
		err := p.loadPages(l, at, loc)
		p.mu.Lock()
		p.endDemand()
		p.release(noBatch)
		p.mu.Unlock()
		return err
	default:
		return nil
	}
}

// loadPages loads one page and, as the policy says, some that it can have with
// little more work. An error has been reported.
func (p *Pager) loadPages(l *loader, at place, loc Location) error {
	if !at.r.change(at.i, missing, loading) {
		return nil // somebody was faster, and whoever asked looks again
	}
	if err := p.loadPage(l.gather[:], at, loc); err != nil {
		return err
	}
	if err := p.install(at, l.gather[:pageSize], demand, true); err != nil {
		return p.failPage(at, loc.Block, err)
	}
	lo, hi := at.i, at.i
	switch {
	case p.o.Policy&Physical != 0:
		lo, hi = around(at, uint64(p.o.Pages))
	case p.o.Policy&Locality != 0:
		lo, hi = around(at, l.equals.next(at.pfn()))
	}
	// Adjacent pages are gathered and installed together.
	run := uint64(0)
	for i := lo; i < hi; i++ {
		near := place{at.r, i}
		end := i
		if nearby, ok := p.alongWith(near, loc); ok && near.r.change(i, missing, loading) {
			if p.loadPage(l.gather[run*pageSize:], near, nearby) == nil {
				if run++; run < BlockPages && i+1 < hi {
					continue
				}
				end = i + 1
			}
		}
		if run == 0 {
			continue
		}
		if err := p.install(place{at.r, end - run}, l.gather[:run*pageSize], ahead, true); err != nil {
			return p.failPage(place{at.r, end - run}, loc.Block, err)
		}
		run = 0
	}
	return nil
}

// around is the aligned group of so many pages in which a page lies.
func around(at place, pages uint64) (lo, hi uint64) {
	first := at.pfn() / pages * pages
	return max(first, at.r.first) - at.r.first, min(first+pages-at.r.first, at.r.pages)
}

// alongWith tells whether a page near one that is demanded is brought with it,
// and from where.
func (p *Pager) alongWith(near place, loc Location) (Location, bool) {
	if near.r.get(near.i) != missing {
		return Location{}, false
	}
	nearby := p.src.Find(near.pfn())
	if isZero(nearby) || p.o.Policy&Physical != 0 {
		return nearby, !isZero(nearby)
	}
	// The demanded page equals one of another neighbourhood. If pages near it do,
	// too, their bytes may be at hand.
	if p.shared.page(nearby, nil) {
		return nearby, true
	}
	own, err := p.owns(near, nearby)
	return nearby, nearby.Block == loc.Block && !own && err == nil
}

// loadPage reads a page that is marked as loading.
func (p *Pager) loadPage(buf []byte, at place, loc Location) error {
	if p.shared.page(loc, buf) {
		return nil
	}
	if err := p.cache.page(p, loc.Block, loc.Slot, buf); err != nil {
		return p.failPage(at, loc.Block, err)
	}
	return nil
}

// failPage gives up a page that is marked as loading, and its block.
func (p *Pager) failPage(at place, b Block, err error) error {
	at.r.change(at.i, loading, missing)
	return p.giveUp(b, err)
}

// giveUp notes that a block that nobody has taken cannot be had.
func (p *Pager) giveUp(b Block, err error) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.blocks[b] == blockIdle {
		p.take(b, blockFailed)
	}
	p.failBlock(b, err)
	p.arrivals.Broadcast()
	return err
}
