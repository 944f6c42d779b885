// Package backup copies a disk as it was at one instant while it goes on being
// written: what a write is about to change is copied first.
package backup

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/gnomon-vmm/gnomon/disk/bitmap"
	"github.com/gnomon-vmm/gnomon/disk/block"
)

// ErrCopy is what becomes of a copy that cannot be completed. The disk goes on.
var ErrCopy = errors.New("copy disk")

const (
	clusterSize = 64 << 10 // what a write has copied first
	stripes     = 64       // locks, each for every 64th cluster
	batch       = 16       // clusters that Copy reads at once
)

// Options say what is copied.
type Options struct {
	// Top: only what the disk's own image holds. The target reads the rest from the
	// same backing file. The disk must be a block.Mapper.
	Top bool
	// Overwrite: the target does not read as zero, so that zeroes are copied too.
	Overwrite bool
	// Only, where not nil, is what is copied at most: what changed since an earlier
	// copy, which the target holds.
	Only *bitmap.Bitmap
	// Pause, where not nil, is called between two steps of Copy; it may wait, and end
	// the copy with an error.
	Pause func() error
}

// Filter is a node in the place of the disk's own. It passes everything on, and
// sees to it that the target gets what the disk held when the filter was made.
type Filter struct {
	block.Node
	target block.Node
	o      Options

	copied []atomic.Uint64     // a bit for each cluster that needs no copying any more
	locks  [stripes]sync.Mutex // held while a cluster of theirs is copied
	pool   sync.Pool           // of *[batch * clusterSize]byte
	bytes  atomic.Int64        // written to the target
	broken atomic.Bool         // nothing is copied any more, because of err
	failed chan struct{}       // closed when broken is set
	mu     sync.Mutex
	err    error // the first that copying met; guarded by mu
}

// New makes a filter for a disk on which there are no requests until the filter
// is in its place. target is as large, and reads as zero, or with Options.Top as
// the disk's backing file.
func New(disk, target block.Node, o Options) (*Filter, error) {
	if _, ok := disk.(block.Mapper); o.Top && !ok {
		return nil, fmt.Errorf("%w: a disk of format %s does not tell what it holds itself", ErrCopy, disk.Info().Format)
	}
	if disk.Size() != target.Size() {
		return nil, fmt.Errorf("%w: the disk has %d bytes, the target %d", ErrCopy, disk.Size(), target.Size())
	}
	clusters := (disk.Size() + clusterSize - 1) / clusterSize
	f := &Filter{Node: disk, target: target, o: o, copied: make([]atomic.Uint64, (clusters+63)/64), failed: make(chan struct{})}
	f.pool.New = func() any { return new([batch * clusterSize]byte) }
	return f, nil
}

// Copied is how many bytes were written to the target.
func (f *Filter) Copied() int64 { return f.bytes.Load() }

// Copy copies what no write has had copied yet, and returns when the target is
// complete; it is not flushed. The filter then only passes on.
func (f *Filter) Copy(ctx context.Context, progress func(done, total int64)) error {
	clusters := int64(len(f.copied)) * 64
	for c := int64(0); c < clusters && c*clusterSize < f.Size(); {
		err := ctx.Err()
		if err == nil && f.o.Pause != nil {
			err = f.o.Pause()
		}
		if err != nil {
			f.fail(err)
			break
		}
		n, err := f.sweep(c)
		if err != nil {
			f.fail(err)
		}
		if f.broken.Load() {
			break
		}
		c += n
		if progress != nil {
			progress(min(c*clusterSize, f.Size()), f.Size())
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.err != nil {
		return fmt.Errorf("%w: %w", ErrCopy, f.err)
	}
	return nil
}

// fail ends the copying, not the disk.
func (f *Filter) fail(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.err == nil {
		f.err = err
		close(f.failed)
	}
	f.broken.Store(true)
}

// sweep copies clusters from first on, and returns how many it has seen to.
func (f *Filter) sweep(first int64) (int64, error) {
	n := min(batch, (f.Size()+clusterSize-1)/clusterSize-first)
	// Writers hold one of these locks at a time.
	for c := first; c < first+n; c++ {
		f.locks[c%stripes].Lock()
		defer f.locks[c%stripes].Unlock()
	}
	if f.needless(first*clusterSize, min((first+n)*clusterSize, f.Size())) {
		for c := first; c < first+n; c++ {
			f.mark(c)
		}
		return n, nil
	}
	for c := first; c < first+n; {
		run := c
		for run < first+n && !f.isCopied(run) {
			run++
		}
		if err := f.copyNeeded(c, run); err != nil {
			return 0, err
		}
		for c = run; c < first+n && f.isCopied(c); c++ {
		}
	}
	return n, nil
}

// copyNeeded copies the clusters from first to end, whose locks are held: where not
// all may be needed, those that are.
func (f *Filter) copyNeeded(first, end int64) error {
	if f.o.Only == nil && !f.o.Top {
		if first == end {
			return nil
		}
		return f.copyRun(first, end-first)
	}
	for c := first; c < end; c++ {
		if err := f.copyOne(c); err != nil {
			return err
		}
	}
	return nil
}

// needless tells that nothing need be copied from off to end: the disk knows that
// it reads as the target does without.
func (f *Filter) needless(off, end int64) bool {
	if f.o.Only != nil {
		start, n := f.o.Only.Next(off)
		return n == 0 || start >= end
	}
	m, ok := f.Node.(block.Mapper)
	for ok && off < end {
		e, err := m.Map(off, end-off)
		if err != nil || e.Length <= 0 {
			return false
		}
		if f.o.Top && e.Present && e.Depth == 0 || !f.o.Top && (!e.Zero || f.o.Overwrite) {
			return false
		}
		off += e.Length
	}
	return ok
}

// copyRun copies n clusters, whose locks are held.
func (f *Filter) copyRun(first, n int64) error {
	buf := f.pool.Get().(*[batch * clusterSize]byte)
	defer f.pool.Put(buf)
	off := first * clusterSize
	data := buf[:min(n*clusterSize, f.Size()-off)]
	if err := f.Node.Readv([][]byte{data}, off); err != nil {
		return err
	}
	zero := block.IsZero(data)
	var err error
	switch {
	case f.o.Overwrite && zero:
		err = f.target.WriteZeroes(off, int64(len(data)), true)
	case f.o.Top || f.o.Only != nil || !zero:
		if err = f.target.Writev([][]byte{data}, off); err == nil {
			f.bytes.Add(int64(len(data)))
		}
	}
	if err != nil {
		return err
	}
	for c := first; c < first+n; c++ {
		f.mark(c)
	}
	return nil
}

// copyOne copies a cluster, whose lock is held, if that is needed.
func (f *Filter) copyOne(c int64) error {
	if (f.o.Top || f.o.Only != nil) && f.needless(c*clusterSize, min((c+1)*clusterSize, f.Size())) {
		f.mark(c)
		return nil
	}
	return f.copyRun(c, 1)
}

func (f *Filter) isCopied(c int64) bool { return f.copied[c/64].Load()&(1<<(c%64)) != 0 }
func (f *Filter) mark(c int64)          { f.copied[c/64].Or(1 << (c % 64)) }

// before copies what n bytes from off on are about to change.
func (f *Filter) before(off, n int64) {
	if off < 0 || n <= 0 || off >= f.Size() {
		return // the disk refuses it, or does nothing
	}
	last := off + min(n, f.Size()-off) - 1
	for c := off / clusterSize; c <= last/clusterSize && !f.broken.Load(); c++ {
		if f.isCopied(c) {
			continue
		}
		lock := &f.locks[c%stripes]
		lock.Lock()
		if !f.isCopied(c) {
			if err := f.copyOne(c); err != nil {
				f.fail(err)
			}
		}
		lock.Unlock()
	}
}

// Writev implements block.Node.
func (f *Filter) Writev(bufs [][]byte, off int64) error {
	var n int64
	for _, b := range bufs {
		n += int64(len(b))
	}
	f.before(off, n)
	return f.Node.Writev(bufs, off)
}

// Discard implements block.Node.
func (f *Filter) Discard(off, n int64) error {
	f.before(off, n)
	return f.Node.Discard(off, n)
}

// WriteZeroes implements block.Node.
func (f *Filter) WriteZeroes(off, n int64, unmap bool) error {
	f.before(off, n)
	return f.Node.WriteZeroes(off, n, unmap)
}
