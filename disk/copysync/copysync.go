// Package copysync brings a copy of a disk up to date: it copies what changed
// since the copy was made and is used by the disk's file systems, and nothing
// else.
package copysync

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"math/bits"
	"runtime"
	"sync"

	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/extfs"
)

// ErrSync is the stage of bringing a copy up to date.
var ErrSync = errors.New("sync disk")

// ErrChanges is a set of changes that is not ascending, or not within the disk.
var ErrChanges = errors.New("changes out of order")

const (
	// chunk is the most that is read or written at once.
	chunk = 1 << 20
	// bridge is the most that is read for nothing to make one read of two.
	bridge = 16 << 10
	// maxParts bounds what is written separately of one read.
	maxParts = 64
)

// Range is a run of bytes of a disk, from Start to before End.
type Range struct{ Start, End int64 }

// Options say how to sync.
type Options struct {
	// Used is what the source's file systems use, for example as the guest's agent
	// told. Nil: Sync reads it from the source, by extfs.Disk.
	Used *extfs.Map
	// Discard has the target discard what changed but is not used.
	Discard bool
	// Skipped, where not nil, is told of each range that changed but was not
	// copied, ascending, before anything is copied. Who adds them to the changes of
	// the next sync keeps the copy right even where a file system begins to use,
	// without writing to them, blocks that it did not use before: when its damage
	// is repaired, or its partition given to something else.
	Skipped func(Range)
	// Workers copy side by side; 4 if 0, or the processors if they are fewer.
	Workers int
	// Progress, where not nil, is told how many bytes of those to be copied are.
	Progress func(done, total int64)
}

// Figures are bytes of the disk.
type Figures struct {
	Changed int64 `json:"changed"` // as the caller said
	Used    int64 `json:"used"`    // by file systems, or not known to be free
	// Copied were changed and used, and are written to the target. All of them
	// are, unless Sync failed.
	Copied int64 `json:"copied"`
	// Zero are those of Copied that were written as zeroes.
	Zero int64 `json:"zero"`
	// Skipped changed and are not used.
	Skipped int64 `json:"skipped"`
}

// Sync has dst, which was equal to src before the changes, hold all that src's
// file systems use. src must not change meanwhile: it is frozen, a snapshot, or
// not in use. The ranges of changed ascend and do not overlap; they are asked
// for twice. dst is flushed. What was copied when Sync fails is in the figures;
// it can be called again with the same changes.
func Sync(ctx context.Context, dst, src block.Node, changed iter.Seq[Range], o Options) (Figures, error) {
	s := &syncer{dst: dst, src: src, o: o}
	if dst.Size() < src.Size() {
		return s.figures, fmt.Errorf("%w: the target has %d bytes, the source %d", ErrSync, dst.Size(), src.Size())
	}
	if dst.ReadOnly() {
		return s.figures, fmt.Errorf("%w: target: %w", ErrSync, block.ErrReadOnly)
	}
	if s.o.Used == nil {
		m, err := extfs.Disk(ctx, src)
		if err != nil {
			return s.figures, fmt.Errorf("%w: %w", ErrSync, err)
		}
		s.o.Used = m
	}
	if err := s.plan(changed); err != nil {
		return s.figures, fmt.Errorf("%w: %w", ErrSync, err)
	}
	if err := s.copy(ctx, changed); err != nil {
		return s.figures, fmt.Errorf("%w: %w", ErrSync, err)
	}
	if err := dst.Flush(); err != nil {
		return s.figures, fmt.Errorf("%w: flush the target: %w", ErrSync, err)
	}
	return s.figures, nil
}

// Bitmap yields the ranges of a bitmap whose bits are for granule bytes each, the
// first bit for the disk's first: bit n is bit n%64 of word n/64. The last is cut
// at size.
func Bitmap(words []uint64, granule, size int64) iter.Seq[Range] {
	return func(yield func(Range) bool) {
		// Runs are joined across words.
		run := Range{Start: -1}
		for i, word := range words {
			for bit := int64(0); bit < 64; {
				at := (int64(i)*64 + bit) * granule
				if at >= size {
					break
				}
				rest := word >> bit
				if run.Start < 0 {
					skip := int64(bits.TrailingZeros64(rest))
					if bit += skip; bit >= 64 {
						break
					}
					run.Start = at + skip*granule
					continue
				}
				n := int64(bits.TrailingZeros64(^rest))
				if bit += n; bit >= 64 {
					break
				}
				if run.End = min(size, at+n*granule); !yield(run) {
					return
				}
				run.Start = -1
			}
		}
		if run.Start >= 0 && run.Start < size {
			run.End = min(size, int64(len(words))*64*granule)
			yield(run)
		}
	}
}

type syncer struct {
	dst, src block.Node
	o        Options
	total    int64 // to be copied

	mu      sync.Mutex
	figures Figures // its Copied and Zero guarded by mu while workers run
}

// plan checks the changes and counts.
func (s *syncer) plan(changed iter.Seq[Range]) error {
	var err error
	end := int64(0)
	checked := func(yield func(Range) bool) {
		for r := range changed {
			if r.Start < end || r.End < r.Start || r.End > s.src.Size() {
				err = fmt.Errorf("%w: bytes %d to %d of %d, after those up to %d", ErrChanges, r.Start, r.End, s.src.Size(), end)
				return
			}
			end = r.End
			s.figures.Changed += r.End - r.Start
			if !yield(r) {
				return
			}
		}
	}
	for r, used := range s.split(checked) {
		if used {
			s.total += r.End - r.Start
			continue
		}
		s.figures.Skipped += r.End - r.Start
		if s.o.Skipped != nil {
			s.o.Skipped(r)
		}
	}
	m := s.o.Used
	// What is outside of the map is used.
	s.figures.Used = s.src.Size() - (m.End() - m.Start() - m.UsedBytes())
	return err
}

// split divides ranges by whether they are used.
func (s *syncer) split(ranges iter.Seq[Range]) iter.Seq2[Range, bool] {
	return func(yield func(Range, bool) bool) {
		for r := range ranges {
			for r.Start < r.End {
				used, end := s.o.Used.Run(r.Start, r.End)
				if !yield(Range{r.Start, end}, used) {
					return
				}
				r.Start = end
			}
		}
	}
}

// task is one read and the writes of it, or one range to be discarded.
type task struct {
	parts   []Range // within chunk bytes
	discard bool
}

// tasks joins what is to be copied into reads, in the disk's order. A task is
// valid until the next.
func (s *syncer) tasks(changed iter.Seq[Range]) iter.Seq[task] {
	return func(yield func(task) bool) {
		parts := make([]Range, 0, maxParts)
		flush := func() bool {
			if len(parts) == 0 {
				return true
			}
			ok := yield(task{parts: parts})
			parts = parts[:0]
			return ok
		}
		for r, used := range s.split(changed) {
			if !used {
				if s.o.Discard && !yield(task{parts: []Range{r}, discard: true}) {
					return
				}
				continue
			}
			for r.Start < r.End {
				if n := len(parts); n > 0 {
					if n == maxParts || r.Start-parts[n-1].End > bridge || r.Start-parts[0].Start >= chunk {
						if !flush() {
							return
						}
					}
				}
				room := Range{r.Start, min(r.End, r.Start+chunk)}
				if len(parts) > 0 {
					room.End = min(room.End, parts[0].Start+chunk)
				}
				parts = append(parts, room)
				r.Start = room.End
			}
		}
		flush()
	}
}

// copy has workers do all tasks, each reading while others write.
func (s *syncer) copy(ctx context.Context, changed iter.Seq[Range]) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	next, stop := iter.Pull(s.tasks(changed))
	defer stop()
	var taking sync.Mutex // guards next
	take := func(parts []Range) (task, bool) {
		taking.Lock()
		defer taking.Unlock()
		t, ok := next()
		t.parts = append(parts[:0], t.parts...)
		return t, ok
	}
	n := s.o.Workers
	if n <= 0 {
		n = min(4, runtime.NumCPU())
	}
	if s.o.Progress != nil {
		s.o.Progress(0, s.total)
	}
	var workers sync.WaitGroup
	for range n {
		workers.Go(func() {
			buf := make([]byte, chunk)
			vector := make([][]byte, 1)
			parts := make([]Range, 0, maxParts)
			for ctx.Err() == nil {
				t, ok := take(parts)
				if !ok {
					return
				}
				if err := s.do(t, buf, vector); err != nil {
					cancel(err)
				}
			}
		})
	}
	workers.Wait()
	return context.Cause(ctx)
}

// do does a task with a worker's buffer and vector, which are used again.
func (s *syncer) do(t task, buf []byte, vector [][]byte) error {
	first, last := t.parts[0], t.parts[len(t.parts)-1]
	if t.discard {
		if err := s.dst.Discard(first.Start, first.End-first.Start); err != nil {
			return fmt.Errorf("discard %d bytes at %d: %w", first.End-first.Start, first.Start, err)
		}
		return nil
	}
	buf = buf[:last.End-first.Start]
	vector[0] = buf
	if err := s.src.Readv(vector, first.Start); err != nil {
		return fmt.Errorf("read %d bytes at %d: %w", len(buf), first.Start, err)
	}
	for _, p := range t.parts {
		data := buf[p.Start-first.Start : p.End-first.Start]
		zero := block.IsZero(data)
		var err error
		if zero {
			err = s.dst.WriteZeroes(p.Start, int64(len(data)), true)
		} else {
			vector[0] = data
			err = s.dst.Writev(vector, p.Start)
		}
		if err != nil {
			return fmt.Errorf("write %d bytes at %d: %w", len(data), p.Start, err)
		}
		s.done(int64(len(data)), zero)
	}
	return nil
}

func (s *syncer) done(n int64, zero bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.figures.Copied += n
	if zero {
		s.figures.Zero += n
	}
	if s.o.Progress != nil {
		s.o.Progress(s.figures.Copied, s.total)
	}
}
