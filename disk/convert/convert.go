// Package convert copies what one disk reads as into another, and compares disks.
package convert

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/gnomon-vmm/gnomon/disk/block"
)

// ErrConvert is the stage of copying a disk.
var ErrConvert = errors.New("convert disk")

const (
	// chunk is what one worker takes at a time.
	chunk = 2 << 20
	// piece is what is read and written at once, by way of the page cache: what was read
	// is still in the processor's cache when it is written.
	piece = 256 << 10
	// granule is by which zeroes are left out.
	granule = 64 << 10
	// defaultWorkers is qemu-img's figure, too: more than there are processors, since they
	// wait for the disk, or in the kernel for each other.
	defaultWorkers = 8
)

// Options say how to copy.
type Options struct {
	// TargetIsZero tells that the target reads as zero, so that zeroes need not be
	// written.
	TargetIsZero bool
	// Workers copy side by side; 8 if 0.
	Workers int
	// Direct tells that the target is written past the page cache: larger parts at
	// once then.
	Direct bool
	// Write, where not nil, takes the place of the target's Writev: of a target
	// that is to be written in another way, compressed for example. It gets whole
	// granules but for the disk's end.
	Write func(data []byte, off int64) error
	// Rate is how many bytes a second are written at most; 0: no limit.
	Rate int64
	// Progress, where not nil, is told how many bytes of the disk are done.
	Progress func(done, total int64)
}

// Copy has dst, which is at least as large, read as src. It is not flushed.
func Copy(ctx context.Context, dst, src block.Node, o Options) error {
	if dst.Size() < src.Size() {
		return fmt.Errorf("%w: the target has %d bytes, the source %d", ErrConvert, dst.Size(), src.Size())
	}
	if o.Write == nil {
		o.Write = func(data []byte, off int64) error { return dst.Writev([][]byte{data}, off) }
	}
	c := &copier{dst: dst, src: src, o: o, piece: chunk, pace: block.NewPace(o.Rate)}
	if cluster := dst.Info().ClusterSize; !o.Direct && cluster <= piece {
		c.piece = piece
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var workers sync.WaitGroup
	n := o.Workers
	if n <= 0 {
		n = defaultWorkers
	}
	for range n {
		workers.Go(func() {
			if err := c.work(ctx); err != nil {
				cancel(err)
			}
		})
	}
	workers.Wait()
	if err := context.Cause(ctx); err != nil {
		return fmt.Errorf("%w: %w", ErrConvert, err)
	}
	return nil
}

type copier struct {
	dst, src block.Node
	o        Options
	piece    int64 // bytes that are read and written at once
	pace     *block.Pace
	next     atomic.Int64 // where the next chunk begins
	done     atomic.Int64
	progress sync.Mutex
}

func (c *copier) work(ctx context.Context) error {
	buf := make([]byte, c.piece)
	for {
		off := c.next.Add(chunk) - chunk
		if off >= c.src.Size() {
			return nil
		}
		if ctx.Err() != nil {
			return nil // its cause is known
		}
		n := min(chunk, c.src.Size()-off)
		if err := c.chunk(ctx, buf, off, n); err != nil {
			return fmt.Errorf("at %d: %w", off, err)
		}
		if c.o.Progress != nil {
			c.progress.Lock()
			c.o.Progress(c.done.Add(n), c.src.Size())
			c.progress.Unlock()
		}
	}
}

// chunk copies length bytes from off on, by what the source knows of its zeroes.
func (c *copier) chunk(ctx context.Context, buf []byte, off, length int64) error {
	for length > 0 {
		n, zero := length, false
		if m, ok := c.src.(block.Mapper); ok {
			e, err := m.Map(off, n)
			if err != nil {
				return err
			}
			n, zero = e.Length, e.Zero
			if !zero {
				// A run of data and small holes is read at once.
				if n, err = dataRun(m, off, n, min(length, c.piece)); err != nil {
					return err
				}
			}
		}
		var err error
		if zero {
			err = c.zero(off, n)
		} else {
			n = min(n, c.piece)
			err = c.data(ctx, buf[:n], off)
		}
		if err != nil {
			return err
		}
		off, length = off+n, length-n
	}
	return nil
}

// dataRun is how many bytes from off on, of which n are data and limit the most,
// end at a hole of at least a granule.
func dataRun(m block.Mapper, off, n, limit int64) (int64, error) {
	for n < limit {
		e, err := m.Map(off+n, limit-n)
		if err != nil {
			return 0, err
		}
		if e.Zero && e.Length >= granule {
			break
		}
		n += e.Length
	}
	return n, nil
}

// data copies what fits into buf, but for what is zero in it.
func (c *copier) data(ctx context.Context, buf []byte, off int64) error {
	if err := c.src.Readv([][]byte{buf}, off); err != nil {
		return err
	}
	// Runs of granules that are zero, or not.
	for start := 0; start < len(buf); {
		isZero, end := false, start
		for end < len(buf) {
			// Granules are the disk's, so that those of the target are whole.
			next := min(len(buf), end+granule-int((off+int64(end))%granule))
			z := block.IsZero(buf[end:next])
			if end > start && z != isZero {
				break
			}
			isZero, end = z, next
		}
		var err error
		if at := off + int64(start); isZero {
			err = c.zero(at, int64(end-start))
		} else if err = c.o.Write(buf[start:end], at); err == nil && c.o.Rate > 0 {
			err = c.pace.Wait(ctx, int64(end-start))
		}
		if err != nil {
			return err
		}
		start = end
	}
	return nil
}

func (c *copier) zero(off, n int64) error {
	if c.o.TargetIsZero {
		return nil
	}
	return c.dst.WriteZeroes(off, n, true)
}

// Difference is where two disks differ first.
type Difference struct {
	Offset int64
	// Size tells that one disk is larger, and holds something behind the other's
	// end, at Offset.
	Size bool
}

// Compare finds where two disks differ first; nil: nowhere. What lies behind the
// end of one counts as zero, unless strict.
func Compare(ctx context.Context, a, b block.Node, strict bool, progress func(done, total int64)) (*Difference, error) {
	if strict && a.Size() != b.Size() {
		return &Difference{Offset: min(a.Size(), b.Size()), Size: true}, nil
	}
	if a.Size() < b.Size() {
		a, b = b, a
	}
	x, y := make([]byte, chunk), make([]byte, chunk)
	for off := int64(0); off < a.Size(); off += chunk {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		n := min(chunk, a.Size()-off)
		both := max(0, min(n, b.Size()-off))
		if !zeroes(a, off, n) || !zeroes(b, off, both) {
			if err := errors.Join(a.Readv([][]byte{x[:n]}, off), read(b, y[:both], off)); err != nil {
				return nil, fmt.Errorf("compare disks: at %d: %w", off, err)
			}
			clear(y[both:n])
			if at := differ(x[:n], y[:n]); at >= 0 {
				return &Difference{Offset: off + int64(at), Size: int64(at) >= both}, nil
			}
		}
		if progress != nil {
			progress(off+n, a.Size())
		}
	}
	return nil, nil
}

func read(n block.Node, p []byte, off int64) error {
	if len(p) == 0 {
		return nil
	}
	return n.Readv([][]byte{p}, off)
}

// zeroes tells that a disk knows that n bytes read as zero.
func zeroes(d block.Node, off, n int64) bool {
	m, ok := d.(block.Mapper)
	for n > 0 {
		if !ok {
			return false
		}
		e, err := m.Map(off, n)
		if err != nil || !e.Zero || e.Length <= 0 {
			return false
		}
		off, n = off+e.Length, n-e.Length
	}
	return true
}

// differ is the first place where a and b, of one length, differ; -1: none.
func differ(a, b []byte) int {
	for start := 0; start < len(a); start += granule {
		end := min(start+granule, len(a))
		if string(a[start:end]) == string(b[start:end]) {
			continue
		}
		for i := start; ; i++ {
			if a[i] != b[i] {
				return i
			}
		}
	}
	return -1
}
