package backup

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/gnomon-vmm/gnomon/disk/block"
)

// ErrNoInstant is a read of an Instant that is not one, yet or any more.
var ErrNoInstant = errors.New("there is no copy of the instant")

// Instant reads as a disk in use was at an instant, while the disk goes on: what is
// about to change is kept in a scratch image, the rest is read from the disk. It is
// one from Begin to End.
type Instant struct {
	scratch block.Node
	of      *block.Root

	mu     sync.RWMutex // held to be read while a read is under way
	filter *Filter      // guarded by mu
}

// NewInstant makes an instant of a disk. scratch is as large and reads as zero; it is
// closed with the instant.
func NewInstant(of *block.Root, scratch block.Node) *Instant {
	return &Instant{scratch: scratch, of: of}
}

// Of is the disk.
func (i *Instant) Of() *block.Root { return i.of }

// Begin makes the filter that has to come into the place of the disk's node, on which
// there are no requests until it is there. The instant is now.
func (i *Instant) Begin(current block.Node, o Options) (*Filter, error) {
	f, err := New(current, i.scratch, o)
	if err != nil {
		return nil, err
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.filter != nil {
		return nil, fmt.Errorf("%w: the scratch image holds another instant", ErrCopy)
	}
	i.filter = f
	return f, nil
}

// End ends the instant for good: the scratch image does not read as zero any more.
func (i *Instant) End() {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.filter != nil {
		i.filter.fail(ErrNoInstant)
	}
}

// Readv implements block.Node.
func (i *Instant) Readv(bufs [][]byte, off int64) error {
	i.mu.RLock()
	defer i.mu.RUnlock()
	if i.filter == nil {
		return ErrNoInstant
	}
	for _, b := range bufs {
		if err := i.filter.readInstant(b, off); err != nil {
			return err
		}
		off += int64(len(b))
	}
	return nil
}

// readInstant reads what the disk held when the filter was made.
func (f *Filter) readInstant(data []byte, off int64) error {
	for len(data) > 0 {
		c := off / clusterSize
		part := data[:min(int64(len(data)), (c+1)*clusterSize-off)]
		if err := f.readCluster(c, part, off); err != nil {
			return err
		}
		data, off = data[len(part):], off+int64(len(part))
	}
	return nil
}

func (f *Filter) readCluster(c int64, data []byte, off int64) error {
	// Nobody can write to the cluster meanwhile that is not copied yet.
	lock := &f.locks[c%stripes]
	lock.Lock()
	defer lock.Unlock()
	if f.broken.Load() {
		f.mu.Lock()
		defer f.mu.Unlock()
		return fmt.Errorf("%w: %w", ErrCopy, f.err)
	}
	if off >= 0 && off < f.Size() && f.isCopied(c) {
		return f.target.Readv([][]byte{data}, off)
	}
	return f.Node.Readv([][]byte{data}, off)
}

// Wait returns when ctx ends, or when something could not be kept.
func (f *Filter) Wait(ctx context.Context) error {
	select {
	case <-ctx.Done():
		f.fail(ctx.Err())
	case <-f.failed:
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return fmt.Errorf("%w: %w", ErrCopy, f.err)
}

// Size implements block.Node.
func (i *Instant) Size() int64 { return i.scratch.Size() }

// ReadOnly implements block.Node: an instant cannot be changed.
func (i *Instant) ReadOnly() bool { return true }

// Writev implements block.Node.
func (i *Instant) Writev([][]byte, int64) error { return block.ErrReadOnly }

// Discard implements block.Node.
func (i *Instant) Discard(int64, int64) error { return block.ErrReadOnly }

// WriteZeroes implements block.Node.
func (i *Instant) WriteZeroes(int64, int64, bool) error { return block.ErrReadOnly }

// Flush implements block.Node.
func (i *Instant) Flush() error { return nil }

// Info implements block.Node. It lies on the disk.
func (i *Instant) Info() block.Info {
	info, on := i.scratch.Info(), i.of.Info()
	info.Backing = &on
	return info
}

// Close implements block.Node.
func (i *Instant) Close() error {
	i.End()
	return i.scratch.Close()
}
