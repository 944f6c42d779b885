// Package stream has the newest image of a disk in use come to hold what the images
// behind it hold, so that these are not needed any more. One ascending pass copies;
// what the disk's user writes meanwhile stays as written.
package stream

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync"

	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/qcow2"
)

// ErrStream is the stage of streaming. The disk goes on as it was.
var ErrStream = errors.New("stream disk")

// ErrSkip has a step that failed be left out: see Options.OnError.
var ErrSkip = errors.New("leave it out")

const (
	clusterSize = 64 << 10
	batchBytes  = 1 << 20 // what the pass copies at once
	stripes     = 64      // locks, each for every 64th cluster
)

// Options say how to stream.
type Options struct {
	// Depth is the image that stays behind the newest, 2 being the backing file's
	// backing file; 0: none stays.
	Depth int
	// BackingFile is how the newest image shall name that image; "": by its
	// absolute path.
	BackingFile string
	// Progress, where not nil, is told how far the pass is, in bytes of the disk.
	Progress func(done, total int64)
	// Pause, where not nil, is called between two steps; it may wait, and end the
	// pass with an error.
	Pause func() error
	// OnError, where not nil, is told of an error of a step, and whether it came of
	// reading. A step is made again if it returns nil, and left out with ErrSkip.
	OnError func(err error, reading bool) error
}

// Filter is a node in the place of the newest image while the pass runs.
type Filter struct {
	*qcow2.Node
	o     Options
	above *qcow2.Node           // the last image that goes, or the newest where none does
	base  block.Node            // that stays, or nil
	locks [stripes]sync.RWMutex // held to be written while clusters are copied
}

// New makes a filter for an image on which there are no requests until the filter
// is in its place.
func New(top *qcow2.Node, o Options) (*Filter, error) {
	f := &Filter{Node: top, o: o, above: top}
	switch {
	case top.ReadOnly():
		return nil, fmt.Errorf("%w: %w", ErrStream, block.ErrReadOnly)
	case top.Backing() == nil:
		return nil, fmt.Errorf("%w: %s has no backing file", ErrStream, top.Info().Filename)
	case o.Depth == 1:
		return nil, fmt.Errorf("%w: nothing lies between %s and the base", ErrStream, top.Info().Filename)
	}
	shortest := top.Size()
	for depth := 1; o.Depth == 0 || depth < o.Depth; depth++ {
		next, ok := f.above.Backing().(*qcow2.Node)
		if !ok {
			if o.Depth == 0 {
				return f, nil
			}
			return nil, fmt.Errorf("%w: %s lies on fewer than %d images", ErrStream, top.Info().Filename, o.Depth)
		}
		f.above, shortest = next, min(shortest, next.Size())
	}
	if f.base = f.above.Backing(); f.base == nil {
		return nil, fmt.Errorf("%w: %s lies on fewer than %d images", ErrStream, top.Info().Filename, o.Depth)
	}
	if top.Header().Version < 3 && shortest < f.base.Size() {
		return nil, fmt.Errorf("%w: %s, of version 2, cannot hold zeroes behind the end of what it lies on", ErrStream, top.Info().Filename)
	}
	return f, nil
}

// Run makes the pass. When it returns nil the newest image holds all that it shall.
func (f *Filter) Run(ctx context.Context) error {
	buf := make([]byte, batchBytes)
	for off := int64(0); off < f.Size(); {
		if f.o.Pause != nil {
			if err := f.o.Pause(); err != nil {
				return err
			}
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		n := min(batchBytes-off%batchBytes, f.Size()-off)
		reading, err := f.step(off, n, buf)
		if err != nil {
			if f.o.OnError != nil {
				err = f.o.OnError(err, reading)
			}
			switch {
			case err == nil:
				continue
			case err != ErrSkip:
				return fmt.Errorf("%w: at %d: %w", ErrStream, off, err)
			}
		}
		off += n
		if f.o.Progress != nil {
			f.o.Progress(off, f.Size())
		}
	}
	return nil
}

// step copies what images that go hold of n bytes from off on.
func (f *Filter) step(off, n int64, buf []byte) (reading bool, err error) {
	unlock := f.lock(off, n, (*sync.RWMutex).Lock, (*sync.RWMutex).Unlock)
	defer unlock()
	for end := off + n; off < end; {
		e, err := f.Node.Map(off, end-off)
		if err != nil {
			return true, err
		}
		if e.Length <= 0 || e.Length > end-off {
			return true, fmt.Errorf("the image names an extent of %d bytes", e.Length)
		}
		if reading, err := f.copy(e, buf); err != nil {
			return reading, err
		}
		off += e.Length
	}
	return false, nil
}

func (f *Filter) copy(e block.Extent, buf []byte) (reading bool, err error) {
	// What lies behind the end of an image that goes reads as zero, whatever the base
	// holds there.
	zero := e.Zero || !e.Present
	switch {
	case e.Present && e.Depth == 0 || f.base != nil && e.Depth >= f.o.Depth:
		return false, nil
	case zero && f.base == nil: // as it reads without any
		return false, nil
	case zero && e.Depth == 0:
		// The image holds nothing for what it lies on does not reach: zeroes must be
		// data for once to become zeroes of its own.
		clear(buf[:e.Length])
		if err := f.Node.Writev([][]byte{buf[:e.Length]}, e.Start); err != nil {
			return false, err
		}
		fallthrough
	case zero:
		return false, f.Node.WriteZeroes(e.Start, e.Length, true)
	}
	p := buf[:e.Length]
	if err := f.Node.Readv([][]byte{p}, e.Start); err != nil {
		return true, err
	}
	if f.base == nil && block.IsZero(p) {
		return false, nil
	}
	return false, f.Node.Writev([][]byte{p}, e.Start)
}

// Finish has the newest image lie on the base, or on none, by its header too. There
// are no requests meanwhile. It returns the image in whose place the base comes,
// which lies on those that go and is the caller's, or an error, with which all
// is as it was.
func (f *Filter) Finish() (gone block.Node, err error) {
	// What was copied is durable before the header does without the old images.
	if err := f.Node.Flush(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrStream, err)
	}
	name, format := "", ""
	if f.base != nil {
		info := f.base.Info()
		if name, err = filepath.Abs(info.Filename); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrStream, err)
		}
		if f.o.BackingFile != "" {
			name = f.o.BackingFile
		}
		format = info.Format
	}
	if err := f.Node.RenameBacking(name, format); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrStream, err)
	}
	if f.base != nil {
		f.above.SetBacking(nil)
	}
	return f.Node.SetBacking(f.base), nil
}

// lock takes the locks of n bytes from off on, in the order in which they are.
func (f *Filter) lock(off, n int64, lock, unlock func(*sync.RWMutex)) func() {
	first, last := off/clusterSize, (off+max(n, 1)-1)/clusterSize
	var held [stripes]bool
	if off < 0 || n > clusterSize*stripes {
		first, last = 0, stripes-1
	}
	for c := first; c <= last; c++ {
		held[c%stripes] = true
	}
	for i := range held {
		if held[i] {
			lock(&f.locks[i])
		}
	}
	return func() {
		for i := range held {
			if held[i] {
				unlock(&f.locks[i])
			}
		}
	}
}

// writing keeps the pass from n bytes from off on.
func (f *Filter) writing(off, n int64) (done func()) {
	return f.lock(off, n, (*sync.RWMutex).RLock, (*sync.RWMutex).RUnlock)
}

// Writev implements block.Node.
func (f *Filter) Writev(bufs [][]byte, off int64) error {
	var n int64
	for _, b := range bufs {
		n += int64(len(b))
	}
	defer f.writing(off, n)()
	return f.Node.Writev(bufs, off)
}

// Discard implements block.Node.
func (f *Filter) Discard(off, n int64) error {
	defer f.writing(off, n)()
	return f.Node.Discard(off, n)
}

// WriteZeroes implements block.Node.
func (f *Filter) WriteZeroes(off, n int64, unmap bool) error {
	defer f.writing(off, n)()
	return f.Node.WriteZeroes(off, n, unmap)
}
