// Package changes records which blocks of a disk change, in a file beside it, so
// that any number of backup applications can each ask what changed since its own
// last backup. The file is described in docs/changes-format.md.
//
// Each block has a counter on disk: the epoch in which it changed last. In memory
// there is one bit for each block, which goes to the counter later. Before the
// first write into a region, a run of blocks, a durable mark says that all of it
// may have changed. So a crash loses nothing: what is marked counts as changed.
package changes

import (
	"errors"
	"fmt"
	"math/bits"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gnomon-vmm/gnomon/disk/block"
)

// What is known in memory of a region, as bits.
const (
	marked   = 1 << iota // durably: the region may have changed
	touched              // written to since the last tick
	recorded             // has a record
	hot      = marked | touched
)

const (
	// tickEvery is how often a recorder that has something to do says that it
	// lives, and looks for regions that nobody writes to any more.
	tickEvery = 10 * time.Second
	// aliveFor is how long after it said that it lives a recorder may still be at
	// it: a disk that changed later was changed by others.
	aliveFor = 3 * tickEvery
	// patience is for how many ticks a region stays marked after its last write. It
	// is doubled when marks are made too often.
	minPatience = 6
	maxPatience = 240
	// busyMarks are marks, lately, that are too many.
	busyMarks = 16
	// steadyMarks is for how many marks, lately, twice as many regions are marked
	// at once: so any workload has marked all it needs soon.
	steadyMarks = 4
)

// Recorder records the changes of a disk. Record may be called at any time and
// concurrently, and so may the others, but for what Pending.Raise says.
type Recorder struct {
	shift   uint // of the block size
	size    int64
	words   []atomic.Uint64 // a bit for each block: changed, and not in its record yet
	regions []atomic.Uint32 // bits of marked and so on
	// awake tells that the sidecar says that there is a recorder; while it is false
	// nothing may be written to the disk.
	awake atomic.Bool

	store    store
	identify func(block.Node) diskIdentity
	now      func() time.Time
	report   func(error)

	// op is held by whatever reads or writes records, and from Prepare to Raise.
	// Record never takes it.
	op       sync.Mutex
	idle     []uint8 // ticks since each region was touched; guarded by op
	patience int     // guarded by op
	node     block.Node
	closed   bool // guarded by op
	identity [32]byte

	// meta guards the rest. It is taken after op.
	meta  sync.Mutex
	head  *header
	state []byte // of each region, as the sidecar has it
	marks int    // lately: half of them is forgotten at each tick
	err   error  // why nothing is recorded any more

	stop    chan struct{}
	stopped sync.WaitGroup
}

var _ block.Recorder = (*Recorder)(nil)

// Record tells that n bytes from off on are about to change. When it returns they
// can change: it waits for the sidecar where a region is written to that was not
// for a while.
func (r *Recorder) Record(off, n int64) {
	if off < 0 || n <= 0 || off >= r.size {
		return // the disk refuses it, or does nothing
	}
	first, last := uint64(off)>>r.shift, uint64(off+min(n, r.size-off)-1)>>r.shift
	// The bits are set before the regions are looked at, and who takes a region's
	// mark away takes its bits later: one of both sees the other.
	for i := first / 64; i <= last/64; i++ {
		mask := ^uint64(0)
		if i == first/64 {
			mask <<= first % 64
		}
		if i == last/64 {
			mask &= ^uint64(0) >> (63 - last%64)
		}
		if r.words[i].Load()&mask != mask {
			r.words[i].Or(mask)
		}
	}
	for i := first / regionBlocks; i <= last/regionBlocks; i++ {
		if s := r.regions[i].Load(); s&hot != hot && r.regions[i].Or(touched)&marked == 0 || !r.awake.Load() {
			r.mark(int(i), int(last/regionBlocks))
			return
		}
	}
}

// mark marks the regions from first to last durably.
func (r *Recorder) mark(first, last int) {
	r.meta.Lock()
	defer r.meta.Unlock()
	if r.err == nil {
		if err := r.markLocked(first, last); err != nil {
			r.failLocked(fmt.Errorf("%w: mark regions: %w", ErrSidecar, err))
		}
	}
	for i := first; i <= last; i++ {
		r.regions[i].Or(touched)
	}
}

func (r *Recorder) markLocked(first, last int) error {
	sync := !r.awake.Load()
	if sync {
		if err := r.writeHeaderLocked(); err != nil {
			return err
		}
	}
	missing := false
	for i := first; i <= last; i++ {
		missing = missing || r.state[i] != regionMarked
	}
	if missing {
		// Who marks often marks more at once.
		around := 1 << min(r.marks/steadyMarks, 16)
		first, last = first/around*around, min(last/around*around+around, len(r.state))-1
		for s := first / perMark; s <= last/perMark; s++ {
			if err := r.setStatesLocked(s, max(first, s*perMark), min(last, s*perMark+perMark-1)); err != nil {
				return err
			}
		}
		r.marks++
		sync = true
	}
	if sync {
		if err := r.store.Sync(); err != nil {
			return err
		}
	}
	r.awake.Store(true)
	for i := first; i <= last; i++ {
		r.regions[i].Or(marked)
	}
	return nil
}

// setStatesLocked marks regions of one sector and writes it.
func (r *Recorder) setStatesLocked(sector, first, last int) error {
	for i := first; i <= last; i++ {
		r.state[i] = regionMarked
	}
	return r.writeMarksLocked(sector)
}

func (r *Recorder) writeMarksLocked(sector int) error {
	var b [markSize]byte
	encodeMarks(b[:], r.head.id, sector, r.state)
	_, err := r.store.WriteAt(b[:], marksAt+int64(sector)*markSize)
	return err
}

// writeHeaderLocked writes the header with the next sequence number. It is not
// durable yet.
func (r *Recorder) writeHeaderLocked() error {
	r.head.sequence++
	r.head.state, r.head.alive = stateOpen, r.now().UnixNano()
	return r.putHeaderLocked()
}

func (r *Recorder) putHeaderLocked() error {
	_, err := r.store.WriteAt(r.head.encode(), int64(r.head.sequence%2)*slotSize)
	return err
}

// saveHeaderLocked makes the header durable.
func (r *Recorder) saveHeaderLocked() error {
	if err := r.writeHeaderLocked(); err != nil {
		return err
	}
	if err := r.store.Sync(); err != nil {
		return err
	}
	r.awake.Store(true)
	return nil
}

// failLocked ends the recording: the disk goes on, and all of it counts as changed
// until the next backup has begun a new sidecar.
func (r *Recorder) failLocked(err error) {
	if r.err != nil {
		return
	}
	// Whoever finds the sidecar none the less sees that its recorder is long dead.
	r.err = errors.Join(err, r.store.Invalidate())
	for i := range r.regions {
		r.regions[i].Or(hot)
	}
	r.awake.Store(true)
	if r.report != nil {
		r.report(r.err)
	}
}

// takeRegion takes the bits of a region.
func (r *Recorder) takeRegion(region int) (set [regionBlocks / 64]uint64, any bool) {
	for i := range set {
		if w := region*len(set) + i; w < len(r.words) && r.words[w].Load() != 0 {
			set[i] = r.words[w].Swap(0)
			any = true
		}
	}
	return set, any
}

// flushRegion brings a region's bits to its record, which is not durable yet, and
// tells changed of them, where not nil. The region is marked. op is held.
func (r *Recorder) flushRegion(region int, epoch uint32, changed func(off, n int64)) error {
	set, any := r.takeRegion(region)
	if !any {
		return nil
	}
	var rec record
	if r.regions[region].Load()&recorded != 0 {
		if _, err := readAll(r.store, rec[:], recordAt(region)); err != nil {
			return err
		}
		if !sealed(rec[:], r.head.id, region) {
			for i := range regionBlocks { // what it said is lost
				rec.setCounter(i, epoch)
			}
		}
	}
	for w, v := range set {
		for ; v != 0; v &= v - 1 {
			i := w*64 + bits.TrailingZeros64(v)
			rec.setCounter(i, epoch)
			if changed != nil {
				changed((int64(region)*regionBlocks+int64(i))<<r.shift, 1<<r.shift)
			}
		}
	}
	seal(rec[:], r.head.id, region)
	if _, err := r.store.WriteAt(rec[:], recordAt(region)); err != nil {
		return err
	}
	r.regions[region].Or(recorded)
	return nil
}

// flushAll brings all bits to their records. op is held.
func (r *Recorder) flushAll(changed func(off, n int64)) error {
	for i := range r.regions {
		if err := r.flushRegion(i, r.head.epoch, changed); err != nil {
			return fmt.Errorf("%w: write counters: %w", ErrSidecar, err)
		}
	}
	return nil
}

// coolBatch is how many regions lose their marks at once.
const coolBatch = 1024

// cool takes away the marks of regions, which have to do until they are written to
// again. op is held.
func (r *Recorder) cool(list []int) error {
	for _, i := range list {
		r.regions[i].And(^uint32(marked))
	}
	for _, i := range list {
		if err := r.flushRegion(i, r.head.epoch, nil); err != nil {
			return fmt.Errorf("%w: write counters: %w", ErrSidecar, err)
		}
	}
	if err := r.store.Sync(); err != nil {
		return fmt.Errorf("%w: %w", ErrSidecar, err)
	}
	r.meta.Lock()
	defer r.meta.Unlock()
	sector := -1
	for k, i := range list {
		s := r.regions[i].Load()
		switch {
		case s&marked != 0: // it was written to meanwhile
		case s&recorded != 0:
			r.state[i] = regionRecorded
		default:
			r.state[i] = regionEmpty
		}
		sector = i / perMark
		if k == len(list)-1 || list[k+1]/perMark != sector {
			if err := r.writeMarksLocked(sector); err != nil {
				return fmt.Errorf("%w: unmark regions: %w", ErrSidecar, err)
			}
		}
	}
	return nil
}

// tick says that the recorder lives, if it has recorded anything since the last
// one, and takes away the marks of regions that have not been written to for long.
func (r *Recorder) tick() {
	r.op.Lock()
	defer r.op.Unlock()
	r.meta.Lock()
	dead := r.closed || r.err != nil
	r.meta.Unlock()
	if dead {
		return
	}
	err := r.tickAll()
	r.meta.Lock()
	defer r.meta.Unlock()
	if err != nil {
		r.failLocked(err)
	}
}

func (r *Recorder) tickAll() error {
	active := false
	list := make([]int, 0, 64)
	r.meta.Lock()
	calm := r.marks < steadyMarks // else what loses its mark may soon need it again
	r.meta.Unlock()
	for i := range r.regions {
		s := r.regions[i].Load()
		if s&touched != 0 {
			r.regions[i].And(^uint32(touched))
			r.idle[i], active = 0, true
			continue
		}
		if s&marked == 0 {
			continue
		}
		r.idle[i] = uint8(min(int(r.idle[i])+1, 255))
		if int(r.idle[i]) < r.patience || !calm {
			continue
		}
		r.idle[i] = 0 // when it is marked again, which may be for its neighbours
		if list = append(list, i); len(list) == coolBatch {
			if err := r.cool(list); err != nil {
				return err
			}
			list = list[:0]
		}
	}
	if len(list) > 0 {
		if err := r.cool(list); err != nil {
			return err
		}
	}
	r.meta.Lock()
	defer r.meta.Unlock()
	if r.marks > busyMarks {
		r.patience = min(2*r.patience, maxPatience)
	} else if r.marks < steadyMarks {
		r.patience = max(r.patience-1, minPatience)
	}
	r.marks /= 2
	if !active {
		r.awake.Store(false)
		return nil
	}
	if err := r.saveHeaderLocked(); err != nil {
		return fmt.Errorf("%w: %w", ErrSidecar, err)
	}
	return nil
}

// run ticks until the recorder is closed.
func (r *Recorder) run() {
	t := time.NewTicker(tickEvery)
	defer t.Stop()
	for {
		select {
		case <-r.stop:
			return
		case <-t.C:
			r.tick()
		}
	}
}
