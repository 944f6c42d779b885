// Package mirror moves a disk that is in use to another place: into the parent
// of its overlay (Consolidate), or to a copy. One ascending pass copies
// what is there; meanwhile each write behind the pass goes to both, so that
// nothing is copied twice and the pass ends. An overlay hands over to its parent what
// was copied there, so that later writes go to the parent alone. Then the disk's user is
// switched over, between two requests.
package mirror

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gnomon-vmm/gnomon/disk/block"
)

// ErrMirror is the stage of moving a disk.
var ErrMirror = errors.New("move disk")

const (
	clusterSize = 64 << 10
	stripes     = 4096 // locks, each for every 4096th cluster
)

// Options say how to move.
type Options struct {
	// Depth, where not 0: the target is the image of the source's own chain at this
	// depth, 1 its backing file. Only what the images before it hold is copied, and
	// a write to what they do not hold goes to the target alone. The source must be
	// a block.Mapper.
	Depth int
	// TargetIsZero tells that the target reads as zero, so that zeroes need no copying.
	TargetIsZero bool
	// Step is how many bytes the pass copies at once, a multiple of 64 KiB; 0: 256 KiB.
	Step int64
	// Progress, where not nil, is told how far the pass is, in bytes of the disk.
	Progress func(done, total int64)
	// Pause, where not nil, is called between two steps; it may wait, and end
	// the pass with an error.
	Pause func() error
}

// Figures tell what was moved, in bytes.
type Figures struct {
	Copied   int64 // by the pass
	Mirrored int64 // writes of the disk's user that went to the target too
	Diverted int64 // writes that went to the target alone
}

// Filter is a node in the place of the source while it is moved. Reads are the
// source's.
type Filter struct {
	block.Node // the source
	target     block.Node
	o          Options

	cursor atomic.Int64 // the pass is done with what lies before it; changed under the locks of what it passes
	// held has a bit for each cluster behind the cursor that the source holds, or
	// may hold a part of.
	held  []atomic.Uint64
	locks [stripes]sync.Mutex

	copied, mirrored, diverted atomic.Int64
	handsOver                  atomic.Bool  // what was copied may be the target's alone
	requests                   atomic.Int64 // of the disk's user

	turns turns     // of the pass and the disk's user
	over  *handOver // or nil; set before there are turns

	// Of the pass: whether it rests at all times, the requests that it has seen, when
	// there was a new one, what the host's page cache gave up, and how long it is still to
	// rest.
	alwaysRest bool
	seen       int64
	evictor    evictor
	lastUse    time.Time
	owed       time.Duration

	mu  sync.Mutex
	err error // the first of the target's; nothing more is sent there; guarded by mu
	bad atomic.Bool
}

// New makes a filter for a source on which there are no requests until the
// filter is in its place.
func New(source, target block.Node, o Options) (*Filter, error) {
	if source.Size() > target.Size() {
		return nil, fmt.Errorf("%w: the source has %d bytes, the target %d", ErrMirror, source.Size(), target.Size())
	}
	if _, ok := source.(block.Mapper); o.Depth > 0 && !ok {
		return nil, fmt.Errorf("%w: a source of format %s does not tell what it holds", ErrMirror, source.Info().Format)
	}
	if o.Step = o.Step / clusterSize * clusterSize; o.Step <= 0 {
		o.Step = defaultStep
	}
	f := &Filter{Node: source, target: target, o: o}
	f.held = make([]atomic.Uint64, (source.Size()/clusterSize+64)/64)
	return f, nil
}

// Figures are those up to now.
func (f *Filter) Figures() Figures {
	return Figures{Copied: f.copied.Load(), Mirrored: f.mirrored.Load(), Diverted: f.diverted.Load()}
}

// Source is the node whose place the filter takes.
func (f *Filter) Source() block.Node { return f.Node }

// Err is why the target does not hold what the source does; nil: no reason.
func (f *Filter) Err() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.err
}

// fail ends the moving. The source goes on: with Options.Depth it lacks what was
// diverted, and reads it from the target as before.
func (f *Filter) fail(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.err == nil {
		f.err = fmt.Errorf("%w: %w", ErrMirror, err)
	}
	f.bad.Store(true)
}

// span is the locks of n bytes: those from first to last, or, where first lies
// behind last, those up to last and those from first on.
func span(off, n int64) (first, last int64) {
	a, b := off/clusterSize, (off+max(n, 1)-1)/clusterSize
	if b-a+1 >= stripes {
		return 0, stripes - 1
	}
	return a % stripes, b % stripes
}

// lock keeps n bytes from off on from being written or copied by others. Locks
// are taken by their order, so nobody waits in a circle.
func (f *Filter) lock(off, n int64) {
	first, last := span(off, n)
	if first > last {
		for i := range last + 1 {
			f.locks[i].Lock()
		}
		last = stripes - 1
	}
	for i := first; i <= last; i++ {
		f.locks[i].Lock()
	}
}

func (f *Filter) unlock(off, n int64) {
	first, last := span(off, n)
	if first > last {
		for i := range last + 1 {
			f.locks[i].Unlock()
		}
		last = stripes - 1
	}
	for i := first; i <= last; i++ {
		f.locks[i].Unlock()
	}
}

// changeRecorder is a source with bitmaps of its own, which tell of what is written
// to the target alone too.
type changeRecorder interface {
	RecordChange(off, n int64) error
}

// way is where a write goes.
type way int

const (
	toSource way = iota
	toBoth
	toTarget
)

// way of a write to one cluster, whose lock is held. What the source does not hold
// it need not come to hold: it reads it from the target.
func (f *Filter) way(cluster int64) way {
	passed := cluster*clusterSize < f.cursor.Load()
	switch {
	case f.bad.Load():
		return toSource
	case f.o.Depth > 0 && !f.holds(cluster, passed):
		return toTarget
	case !passed:
		return toSource
	}
	return toBoth
}

// holds tells whether the source holds a part of a cluster.
func (f *Filter) holds(cluster int64, passed bool) bool {
	if passed {
		return f.held[cluster/64].Load()&(1<<(cluster%64)) != 0
	}
	off := cluster * clusterSize
	for end := min(off+clusterSize, f.Size()); off < end; {
		e, err := f.extent(off, end-off)
		if err != nil || e.take {
			return true // if it cannot be told, a write will
		}
		off += e.length
	}
	return false
}

// each carries out a request of n bytes from off on, in parts that go the same way.
func (f *Filter) each(off, n int64, do func(to block.Node, off, n int64) error) error {
	if off < 0 || n <= 0 || off > f.Size() || n > f.Size()-off {
		return do(f.Node, off, n) // which refuses it, or has nothing to do
	}
	f.requests.Add(1)
	f.lock(off, n)
	defer f.unlock(off, n)
	for end := off + n; off < end; {
		how := f.way(off / clusterSize)
		next := (off/clusterSize + 1) * clusterSize
		for next < end && f.way(next/clusterSize) == how {
			next += clusterSize
		}
		part := min(next, end) - off
		if err := f.send(how, off, part, do); err != nil {
			return err
		}
		off += part
	}
	return nil
}

func (f *Filter) send(how way, off, n int64, do func(to block.Node, off, n int64) error) error {
	if how == toTarget {
		if r, ok := f.Node.(changeRecorder); ok {
			if err := r.RecordChange(off, n); err != nil {
				return err
			}
		}
		f.diverted.Add(n)
		return do(f.target, off, n)
	}
	if err := do(f.Node, off, n); err != nil || how == toSource {
		return err
	}
	f.mirrored.Add(n)
	if err := do(f.target, off, n); err != nil {
		f.fail(err)
	}
	return nil
}

// Readv implements block.Node.
func (f *Filter) Readv(bufs [][]byte, off int64) error {
	f.requests.Add(1)
	return f.withTurn(func() error { return f.Node.Readv(bufs, off) })
}

// Writev implements block.Node.
func (f *Filter) Writev(bufs [][]byte, off int64) error {
	return f.withTurn(func() error { return f.writev(bufs, off) })
}

func (f *Filter) writev(bufs [][]byte, off int64) error {
	start := off
	var n int64
	for _, b := range bufs {
		n += int64(len(b))
	}
	return f.each(off, n, func(to block.Node, off, part int64) error {
		if part == n {
			return to.Writev(bufs, off)
		}
		return to.Writev(cut(bufs, off-start, part), off)
	})
}

// cut is n bytes of bufs from off on.
func cut(bufs [][]byte, off, n int64) [][]byte {
	var part [][]byte
	for _, b := range bufs {
		if off >= int64(len(b)) {
			off -= int64(len(b))
			continue
		}
		b = b[off:]
		off = 0
		if int64(len(b)) >= n {
			return append(part, b[:n])
		}
		part = append(part, b)
		n -= int64(len(b))
	}
	return part
}

// Discard implements block.Node. Behind the pass both read as zero then: what each
// of them would make of it, the other might not.
func (f *Filter) Discard(off, n int64) error {
	return f.each(off, n, func(to block.Node, off, n int64) error {
		if off < f.cursor.Load() {
			return to.WriteZeroes(off, n, true)
		}
		return to.Discard(off, n)
	})
}

// WriteZeroes implements block.Node.
func (f *Filter) WriteZeroes(off, n int64, unmap bool) error {
	return f.each(off, n, func(to block.Node, off, n int64) error { return to.WriteZeroes(off, n, unmap) })
}

// Flush implements block.Node. What was diverted is in the target alone, and what
// went to both may be handed over before the target has it durably.
func (f *Filter) Flush() error {
	if f.handsOver.Load() || f.o.Depth > 0 && f.diverted.Load() > 0 {
		if err := f.target.Flush(); err != nil {
			return err
		}
	}
	return f.Node.Flush()
}

// Map implements block.Mapper.
func (f *Filter) Map(off, n int64) (block.Extent, error) {
	if m, ok := f.Node.(block.Mapper); ok {
		return m.Map(off, n)
	}
	return block.Extent{Start: off, Length: n, Present: true, Data: true, Offset: -1}, nil
}
