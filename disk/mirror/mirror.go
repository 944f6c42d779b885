// Package mirror moves a disk that is in use to another place: into the parent
// of its overlay (Consolidate), or to a copy. One ascending pass copies
// what is there; meanwhile each write behind the pass goes to both, so that
// nothing is copied twice and the pass ends. Then the disk's user is switched
// over, between two requests.
package mirror

import (
	"context"
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
	batchBytes  = 256 << 10 // what the pass copies at once
	stripes     = 4096      // locks, each for every 4096th cluster

	// What the pass rests at most between two batches while the disk is in use.
	maxRest = 5 * time.Millisecond
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
	// Progress, where not nil, is told how far the pass is, in bytes of the disk.
	Progress func(done, total int64)
	// Pause, where not nil, is called between two batches; it may wait, and end
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
	requests                   atomic.Int64 // of the disk's user

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

// Run makes the pass. When it returns without an error the target holds all that
// the disk reads as, and every later write goes to it too, until Err is not nil.
func (f *Filter) Run(ctx context.Context) error {
	buf := make([]byte, min(batchBytes, f.Size()))
	for at := int64(0); at < f.Size(); {
		if f.o.Pause != nil {
			if err := f.o.Pause(); err != nil {
				return err
			}
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := f.Err(); err != nil {
			return err
		}
		begin, requests := time.Now(), f.requests.Load()
		end, err := f.step(at, buf)
		if err != nil {
			f.fail(err)
			return f.Err()
		}
		at = end
		if f.requests.Load() != requests {
			// Half of the time is the user's.
			time.Sleep(min(time.Since(begin), maxRest))
		}
		if f.o.Progress != nil {
			f.o.Progress(at, f.Size())
		}
	}
	return f.Err()
}

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

// step copies from at on, and returns how far it came: what nothing is held of is
// passed over at once.
func (f *Filter) step(at int64, buf []byte) (int64, error) {
	end := min(at+batchBytes, f.Size())
	f.lock(at, end-at)
	defer f.unlock(at, end-at)
	for pos := at; pos < end; {
		e, err := f.extent(pos, end-pos)
		if err != nil {
			return 0, err
		}
		if e.take {
			if err := f.copy(e, buf); err != nil {
				return 0, err
			}
			for c := pos / clusterSize; c <= (pos+e.length-1)/clusterSize; c++ {
				f.held[c/64].Or(1 << (c % 64))
			}
		}
		pos += e.length
	}
	f.cursor.Store(end)
	return end, nil
}

// extent is what the pass does about length bytes.
type extent struct {
	start, length int64
	take, zero    bool
}

func (f *Filter) extent(off, n int64) (extent, error) {
	m, ok := f.Node.(block.Mapper)
	if !ok {
		return extent{start: off, length: n, take: true}, nil
	}
	e, err := m.Map(off, n)
	if err != nil {
		return extent{}, err
	}
	if e.Length <= 0 || e.Length > n {
		return extent{}, fmt.Errorf("the source names an extent of %d bytes at %d", e.Length, off)
	}
	// What lies behind the end of an image before the target is not the target's: it
	// reads as zero.
	take := f.o.Depth == 0 || e.Depth < f.o.Depth
	return extent{start: off, length: e.Length, take: take, zero: e.Zero}, nil
}

func (f *Filter) copy(e extent, buf []byte) error {
	if e.zero {
		if f.o.TargetIsZero {
			return nil
		}
		f.copied.Add(e.length)
		return f.target.WriteZeroes(e.start, e.length, true)
	}
	data := buf[:e.length]
	if err := f.Node.Readv([][]byte{data}, e.start); err != nil {
		return err
	}
	if f.o.TargetIsZero && block.IsZero(data) {
		return nil
	}
	f.copied.Add(e.length)
	return f.target.Writev([][]byte{data}, e.start)
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
	return f.Node.Readv(bufs, off)
}

// Writev implements block.Node.
func (f *Filter) Writev(bufs [][]byte, off int64) error {
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

// Flush implements block.Node. What was diverted is in the target alone.
func (f *Filter) Flush() error {
	if f.o.Depth > 0 && f.diverted.Load() > 0 {
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
