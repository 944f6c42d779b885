package pager

import (
	"slices"
	"sync"
	"time"

	"github.com/gnomon-vmm/gnomon/mm/guestmem"
	"github.com/gnomon-vmm/gnomon/mm/locality"
)

// blockState says who sees to a block that is loaded whole.
type blockState uint8

const (
	blockIdle    blockState = iota // nobody
	blockLoading                   // whoever demanded it, or the background
	blockDone                      // all its pages are installed
	blockFailed                    // it cannot be read; queue.failed says why
	// blockBatch + i: it belongs to batches[i], of which some are still to come.
	blockBatch
)

// maxBatches bounds how much is asked for ahead.
const maxBatches = 16

// batch is some blocks that are loaded by the workers, one after the other. A
// guest that faults on one of them has caught up with the workers; it is not
// woken before the last block of the batch has come, lest it stumble over each.
// Meanwhile the workers turn to what comes after.
type batch struct {
	blocks [maxWindow]Block
	n      int // how many blocks
	next   int // the first that no worker has taken
	left   int // those not installed yet; 0: the batch is free
}

const noBatch = -1

// installed counts a block, and tells whether it was the last.
func (b *batch) installed() bool {
	b.left--
	return b.left == 0
}

// held is a fault that somebody else's work will answer.
type held struct {
	at    place
	since time.Time
	batch int // not before this batch is through, or noBatch
	// again says that the page is not one of those that come, but equals one; when
	// that block is done, its own turn comes.
	again bool
	block Block
}

// queue is what there is to do. Pager.mu guards it all.
type queue struct {
	blocks   []blockState
	idle     int             // how many blocks are idle
	failed   map[Block]error // why a block is blockFailed
	firstErr error
	complete bool // nothing is missing

	batches [maxBatches]batch
	ready   []int // batches of which some blocks are not taken, in order
	held    []held

	walks    *locality.Walks // nil without Locality
	loaded   func(b int) bool
	recorded []Block // ascending; what of them is idle is to be loaded
	cursor   int     // in recorded

	background bool
	hurry      bool  // background with all workers
	step       Block // the background's next block
	stepping   int   // workers in the background
	demands    int   // under way; the background waits for them
	sweep      sweep // the background's last pass

	wanted   sync.Cond // there is something to do, or the end has come
	arrivals sync.Cond // pages have come, or an error, or the end
	waiting  int       // who waits for arrivals

	demanded []Block  // in the order of demand, and what was brought along
	seen     []uint64 // a bit for each block that is in demanded
}

func (q *queue) init(blocks int, o Options) {
	q.blocks = make([]blockState, blocks)
	q.idle = blocks
	q.failed = map[Block]error{}
	q.ready = make([]int, 0, maxBatches)
	q.held = make([]held, 0, 64)
	q.walks = newWalks(blocks, o)
	q.loaded = func(b int) bool { return q.blocks[b] == blockDone }
	q.background = o.Background
	q.seen = make([]uint64, (blocks+63)/64)
	if o.Policy&Recorded != 0 {
		q.recorded = slices.Clone(o.Recorded)
		slices.Sort(q.recorded)
		q.recorded = slices.Compact(q.recorded)
		n, _ := slices.BinarySearch(q.recorded, Block(blocks)) // what lies behind the file is no block
		q.recorded = q.recorded[:n]
	}
}

// note adds a block to those that a later run should begin with.
func (q *queue) note(b Block) {
	if word, bit := &q.seen[b/64], uint64(1)<<(b%64); *word&bit == 0 {
		*word |= bit
		q.demanded = append(q.demanded, b)
	}
}

// take marks an idle block as somebody's.
func (q *queue) take(b Block, s blockState) {
	q.blocks[b] = s
	q.idle--
}

// newBatch returns the number of a free batch, or noBatch.
func (q *queue) newBatch() int {
	for i := range q.batches {
		if q.batches[i].left == 0 {
			q.batches[i] = batch{}
			return i
		}
	}
	return noBatch
}

// add puts a block into a batch if nobody sees to it yet.
func (q *queue) add(i int, b Block) {
	if q.blocks[b] == blockIdle {
		q.take(b, blockBatch+blockState(i))
		batch := &q.batches[i]
		batch.blocks[batch.n] = b
		batch.n++
		batch.left++
	}
}

// askAhead asks for the blocks from from to before to, unless too much is asked
// for already. It tells whether there is something new for the workers.
func (q *queue) askAhead(from, to int, forward bool) bool {
	if from == to {
		return false
	}
	i := q.newBatch()
	if i == noBatch {
		return false
	}
	for b := from; b < to; b++ {
		if at := Block(b); forward {
			q.add(i, at)
		} else {
			q.add(i, Block(to-1-(b-from)))
		}
	}
	for _, b := range q.batches[i].blocks[:q.batches[i].n] {
		q.note(b)
	}
	if q.batches[i].n > 0 {
		q.ready = append(q.ready, i)
	}
	return q.batches[i].n > 0
}

// batchRecorded makes a batch of size recorded blocks, aligned, around the at-th,
// and returns its number, or noBatch if none of them is idle.
func (q *queue) batchRecorded(at, size int) int {
	i := q.newBatch()
	if i == noBatch {
		return noBatch
	}
	at = at / size * size
	for _, b := range q.recorded[at:min(at+size, len(q.recorded))] {
		q.add(i, b)
	}
	if q.batches[i].n == 0 {
		return noBatch
	}
	q.ready = append(q.ready, i)
	return i
}

// promote has a batch's blocks loaded before those of others.
func (q *queue) promote(i int) {
	if at := slices.Index(q.ready, i); at > 0 {
		copy(q.ready[1:at+1], q.ready[:at])
		q.ready[0] = i
	}
}

// hold remembers a fault that will be answered by whoever loads its page. A
// thread that was interrupted faults again, so a page may be held already. mu is
// held.
func (p *Pager) hold(h held) {
	p.counts.heldFaults.Add(1)
	for i := range p.held {
		if p.held[i].at == h.at {
			return
		}
	}
	p.held = append(p.held, h)
}

// work is a worker: it loads what is asked for ahead, then what was recorded,
// then, while nobody waits for a page, everything else.
func (p *Pager) work() {
	l := new(loader)
	for {
		b, origin, ok := p.nextJob()
		if !ok {
			return
		}
		if origin == sweeping {
			p.sweepStep(l)
			continue
		}
		p.finish(b, p.loadBlock(l, b, place{}, origin), origin)
	}
}

// nextJob waits for work. It returns false when there will be none.
func (p *Pager) nextJob() (Block, origin, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for {
		if p.closed || p.complete {
			return 0, 0, false
		}
		if len(p.ready) > 0 {
			b := &p.batches[p.ready[0]]
			block := b.blocks[b.next]
			if b.next++; b.next == b.n {
				p.ready = append(p.ready[:0], p.ready[1:]...)
			}
			return block, ahead, true
		}
		for p.cursor < len(p.recorded) && p.blocks[p.recorded[p.cursor]] != blockIdle {
			p.cursor++
		}
		if p.cursor < len(p.recorded) && p.batchRecorded(p.cursor, p.o.Window) != noBatch {
			p.wanted.Broadcast()
			continue
		}
		if p.background && p.firstErr == nil && p.demands == 0 && (p.hurry || p.stepping == 0) {
			for int(p.step) < len(p.blocks) && p.blocks[p.step] != blockIdle {
				p.step++
			}
			if int(p.step) < len(p.blocks) {
				b := p.step
				p.take(b, blockLoading)
				p.stepping++
				return b, background, true
			}
			if p.idle == 0 && p.stepping == 0 && p.allDone() {
				p.stepping++
				return 0, sweeping, true
			}
		}
		p.wanted.Wait()
	}
}

// allDone tells whether no block is being loaded. It is asked rarely.
func (q *queue) allDone() bool {
	for _, s := range q.blocks {
		if s != blockDone {
			return false
		}
	}
	return true
}

// finish notes that a block that somebody took has been loaded, or why it
// cannot be, and lets those go on who waited for that.
func (p *Pager) finish(b Block, err error, from origin) {
	p.mu.Lock()
	defer p.mu.Unlock()
	s, through := p.blocks[b], noBatch
	switch {
	case err != nil:
		p.blocks[b] = blockFailed
		p.failBlock(b, err)
	case s < blockBatch:
		p.blocks[b] = blockDone
	}
	if s >= blockBatch {
		if i := int(s - blockBatch); p.batches[i].installed() {
			through = i
			for _, b := range p.batches[i].blocks[:p.batches[i].n] {
				if p.blocks[b] == s {
					p.blocks[b] = blockDone
				}
			}
		}
	}
	switch from {
	case demand:
		p.endDemand()
	case background:
		p.stepping--
	}
	p.release(through)
}

// endDemand lets the background go on when no demand is under way. mu is held.
func (p *Pager) endDemand() {
	if p.demands--; p.demands == 0 && p.background {
		p.wanted.Signal()
	}
}

// failBlock notes that a block cannot be had. mu is held.
func (p *Pager) failBlock(b Block, err error) {
	if p.failed[b] != nil || p.closed {
		return
	}
	p.failed[b] = err
	if p.firstErr == nil {
		p.firstErr = err
	}
	p.report(err)
}

// release wakes whoever waits for a page that has come; through is a batch that
// is complete now, or noBatch. mu is held.
func (p *Pager) release(through int) {
	if p.waiting > 0 || p.firstErr != nil {
		p.arrivals.Broadcast()
	}
	kept := p.held[:0]
	for _, h := range p.held {
		if h.batch == through {
			h.batch = noBatch
		}
		come := h.at.r.get(h.at.i) == present || h.again && p.blocks[h.block] == blockDone
		if h.batch != noBatch || !come {
			kept = append(kept, h)
			continue
		}
		// An error can only be that the pager was closed, which has woken everybody.
		_ = p.u.Wake(h.at.r.addrOf(h.at.i), guestmem.PageSize)
		p.counts.stalled.Add(int64(time.Since(h.since)))
	}
	p.held = kept
}
