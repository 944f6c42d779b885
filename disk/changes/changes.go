package changes

import (
	"crypto/rand"
	"errors"
	"fmt"
	"math"
	"math/bits"
	"slices"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"github.com/gnomon-vmm/gnomon/disk/block"
)

// Errors of recorders.
var (
	// ErrApplication is an application that has no name that is possible, is
	// unknown, or one too many.
	ErrApplication = errors.New("backup application")
	// ErrStale is a set of changes from before the recording began anew.
	ErrStale = errors.New("changes are recorded anew since")
	// ErrClosed is a recorder that has been closed.
	ErrClosed = errors.New("changes are not recorded any more")
)

// Path is where the sidecar of the disk at path is kept.
func Path(path string) string { return path + ".changes" }

// Application is one of those that ask what changed since their own last backup.
type Application struct {
	Name  string
	Epoch uint32    // the last that its backup has all changes of; 0: it has no backup that counts
	Time  time.Time // when that backup was
}

// Options say how a recorder works.
type Options struct {
	// BlockSize is what a new sidecar has a counter for, a power of two from 4 KiB; 0:
	// 64 KiB. Where a disk would have more than 16777216 blocks they are larger.
	BlockSize int64
	// Report, where not nil, is told once why changes cannot be recorded any more. The
	// next backup then is of all of the disk.
	Report func(error)

	store    store
	identify func(block.Node) diskIdentity
	now      func() time.Time
	still    bool // ticks come from the test
}

// Open opens the sidecar at path of a disk, or makes it. From now on nothing may be
// written to the disk that is not recorded before. Errors wrap block.ErrInUse where
// another process has the sidecar, and ErrNewer where it needs a newer program.
func Open(path string, disk block.Node, o Options) (_ *Recorder, err error) {
	if o.BlockSize == 0 {
		o.BlockSize = defaultBlockSize
	}
	if !goodBlockSize(o.BlockSize, 0) {
		return nil, fmt.Errorf("%w: blocks of %d bytes: powers of two from %d are possible", ErrSidecar, o.BlockSize, minBlockSize)
	}
	r := &Recorder{store: o.store, identify: o.identify, now: o.now, report: o.Report, node: disk, patience: minPatience, stop: make(chan struct{})}
	if r.store == nil {
		if r.store, err = openStore(path); err != nil {
			return nil, fmt.Errorf("changes of a disk: %w", err)
		}
	}
	if r.identify == nil {
		r.identify = identify
	}
	if r.now == nil {
		r.now = time.Now
	}
	if err := r.load(disk, o.BlockSize); err != nil {
		r.store.Close()
		return nil, fmt.Errorf("changes of a disk: %s: %w", path, err)
	}
	if !o.still {
		r.stopped.Go(r.run)
	}
	return r, nil
}

// load reads the sidecar, or begins a new one.
func (r *Recorder) load(disk block.Node, blockSize int64) error {
	slots := make([]byte, marksAt)
	n, err := readAll(r.store, slots, 0)
	if err != nil {
		return err
	}
	is := r.identify(disk)
	if n == 0 {
		r.head = &header{blockSize: blockSize}
		return r.begin(disk, is, "the recording of changes began")
	}
	h, err := chooseHeader(slots[:n])
	if errors.Is(err, ErrNewer) {
		return err
	}
	if err != nil {
		r.head = &header{blockSize: blockSize}
		return r.begin(disk, is, fmt.Sprintf("the changes file was damaged: %v", err))
	}
	r.head = h
	if reason := r.foreign(disk.Size(), is); reason != "" {
		return r.begin(disk, is, reason)
	}
	r.allocate()
	table := make([]byte, (len(r.state)+perMark-1)/perMark*markSize)
	if _, err := readAll(r.store, table, marksAt); err != nil {
		return err
	}
	for s := 0; s*perMark < len(r.state); s++ {
		decodeMarks(table[s*markSize:][:markSize], h.id, s, r.state)
	}
	for i, s := range r.state {
		switch s {
		case regionRecorded:
			r.regions[i].Store(recorded)
		case regionMarked:
			r.regions[i].Store(marked)
			r.setAll(i)
		}
	}
	r.identity = is.identity
	return nil
}

// foreign tells why a sidecar does not tell of all changes of the disk; "": it does.
func (r *Recorder) foreign(size int64, is diskIdentity) string {
	h := r.head
	switch {
	case h.diskSize != size:
		return fmt.Sprintf("the disk had %d bytes when its changes were recorded last, and has %d now", h.diskSize, size)
	case is.identity == [32]byte{} || is.stamp == [32]byte{}:
		return "the disk is not in regular files, and does not tell whether it was written while its changes were not recorded"
	case h.identity != is.identity:
		return "the disk is another one than that whose changes were recorded"
	case h.state == stateClosed && h.stamp != is.stamp, h.state == stateOpen && is.changed.UnixNano()-h.alive > int64(aliveFor):
		return "the disk was written while its changes were not recorded"
	}
	return ""
}

// setAll sets all bits of a region.
func (r *Recorder) setAll(region int) {
	blocks := blocksOf(r.size, 1<<r.shift)
	for b := int64(region) * regionBlocks; b < min(blocks, int64(region+1)*regionBlocks); b += 64 {
		mask := ^uint64(0)
		if left := blocks - b; left < 64 {
			mask = 1<<left - 1
		}
		r.words[b/64].Or(mask)
	}
}

func regionsOf(h *header) int64 {
	return (blocksOf(h.diskSize, h.blockSize) + regionBlocks - 1) / regionBlocks
}

// allocate makes what is in memory for the header's disk.
func (r *Recorder) allocate() {
	r.size, r.shift = r.head.diskSize, uint(bits.TrailingZeros64(uint64(r.head.blockSize)))
	regions := regionsOf(r.head)
	r.words = make([]atomic.Uint64, (blocksOf(r.size, r.head.blockSize)+63)/64)
	r.regions = make([]atomic.Uint32, regions)
	r.idle = make([]uint8, regions)
	r.state = make([]byte, regions)
}

// begin begins a new sidecar, for whose applications all of the disk has changed.
// There are no writes to the disk meanwhile.
func (r *Recorder) begin(disk block.Node, is diskIdentity, reason string) error {
	r.meta.Lock()
	defer r.meta.Unlock()
	for len(reason) > reasonLimit || !utf8.ValidString(reason) {
		reason = reason[:min(len(reason), reasonLimit+1)-1]
	}
	h := &header{
		sequence: 2, identity: is.identity, diskSize: disk.Size(), blockSize: fitBlockSize(r.head.blockSize, disk.Size()),
		epoch: 1, state: stateOpen, alive: r.now().UnixNano(), reason: reason, apps: slices.Clone(r.head.apps),
	}
	for i := range h.apps {
		h.apps[i].Epoch = 0
	}
	if !goodBlockSize(h.blockSize, h.diskSize) {
		return fmt.Errorf("%w: a disk of %d bytes is too large", ErrSidecar, h.diskSize)
	}
	if _, err := rand.Read(h.id[:]); err != nil {
		return err
	}
	state := make([]byte, regionsOf(h))
	content := make([]byte, marksAt+(len(state)+perMark-1)/perMark*markSize)
	copy(content, h.encode())
	for s := 0; s*perMark < len(state); s++ {
		encodeMarks(content[marksAt+s*markSize:][:markSize], h.id, s, state)
	}
	if err := r.store.Replace(content); err != nil {
		return err
	}
	r.head, r.identity = h, is.identity
	r.allocate()
	r.marks, r.err = 0, nil
	r.awake.Store(true)
	return nil
}

// BlockSize is what changes are told in, in bytes.
func (r *Recorder) BlockSize() int64 { return 1 << r.shift }

// Err tells why changes are not recorded any more; nil: they are.
func (r *Recorder) Err() error {
	r.meta.Lock()
	defer r.meta.Unlock()
	return r.err
}

// Applications are all that are known.
func (r *Recorder) Applications() []Application {
	r.meta.Lock()
	defer r.meta.Unlock()
	return slices.Clone(r.head.apps)
}

// Forget has an application not be known any more.
func (r *Recorder) Forget(name string) error {
	r.op.Lock()
	defer r.op.Unlock()
	r.meta.Lock()
	defer r.meta.Unlock()
	if err := r.usableLocked(); err != nil {
		return err
	}
	i := slices.IndexFunc(r.head.apps, func(a Application) bool { return a.Name == name })
	if i < 0 {
		return fmt.Errorf("%w: %q is not known", ErrApplication, name)
	}
	r.head.apps = slices.Delete(slices.Clone(r.head.apps), i, i+1)
	return r.savedLocked()
}

// usableLocked tells why nothing can be done.
func (r *Recorder) usableLocked() error {
	if r.closed {
		return ErrClosed
	}
	return r.err
}

// savedLocked saves the header, and ends the recording where that fails.
func (r *Recorder) savedLocked() error {
	err := r.saveHeaderLocked()
	if err != nil {
		err = fmt.Errorf("%w: %w", ErrSidecar, err)
		r.failLocked(err)
	}
	return err
}

// Close brings all that is in memory to the sidecar. The disk is closed already:
// nobody writes to it, and what it looks like now is how it must be found when its
// changes are recorded again.
func (r *Recorder) Close() error {
	r.op.Lock()
	if r.closed {
		r.op.Unlock()
		return nil
	}
	err := r.settle()
	r.closed = true
	r.op.Unlock()
	close(r.stop)
	r.stopped.Wait()
	if closed := r.store.Close(); err == nil {
		err = closed
	}
	if err != nil {
		return fmt.Errorf("close the changes of a disk: %w", err)
	}
	return nil
}

// settle makes the sidecar one of a disk that is not in use. op is held.
func (r *Recorder) settle() error {
	r.meta.Lock()
	failed := r.err != nil
	r.meta.Unlock()
	if failed {
		return nil // it has been reported, and whoever comes next begins anew
	}
	var all []int
	for i := range r.regions {
		if r.regions[i].Load()&marked != 0 || r.state[i] == regionMarked {
			all = append(all, i)
		}
	}
	is := r.identify(r.node)
	if r.head.state == stateClosed && len(all) == 0 && is.stamp == r.head.stamp {
		return nil // it was only looked at
	}
	for batch := range slices.Chunk(all, coolBatch) {
		if err := r.cool(batch); err != nil {
			return err
		}
	}
	is.settle()
	r.meta.Lock()
	defer r.meta.Unlock()
	// Nothing of what cool wrote may come to disk after the header.
	if err := r.store.Sync(); err != nil {
		return err
	}
	r.head.sequence++
	r.head.state, r.head.stamp = stateClosed, is.stamp
	if err := r.putHeaderLocked(); err != nil {
		return err
	}
	return r.store.Sync()
}

// epochsLeft tells that the epoch can still be raised.
func (h *header) epochsLeft() bool { return h.epoch < math.MaxUint32 }

// closer closes a disk, and then its recorder.
type closer struct {
	block.Node
	recorder *Recorder
}

// CloseWith is a disk whose Close closes its recorder too.
func CloseWith(disk block.Node, r *Recorder) block.Node { return closer{disk, r} }

func (c closer) Close() error { return errors.Join(c.Node.Close(), c.recorder.Close()) }
