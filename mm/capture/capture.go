// Package capture saves the memory of a machine as it is at one instant, while
// the machine goes on.
//
// All pages are write-protected, by userfaultfd on the guest's mapping. From
// the instant on, a page that the guest writes, or that a device is about to
// access, is copied first; a sweeper copies the others in an order of the
// caller's choice. Protecting takes time that grows with the memory, so it is
// done ahead: only the pages written meanwhile are protected again during the
// pause.
package capture

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/mm/dirty"
	"github.com/gnomon-vmm/gnomon/mm/guestmem"
	"github.com/gnomon-vmm/gnomon/mm/uffd"
)

const pageSize = guestmem.PageSize

// Errors, each of which wraps its cause.
var (
	ErrSetup  = errors.New("memory cannot be captured")
	ErrArm    = errors.New("memory cannot be write-protected")
	ErrFreeze = errors.New("memory cannot be frozen")
	ErrSave   = errors.New("captured memory cannot be saved")
	ErrClosed = errors.New("the capture is over")
)

// Options bound what a capture takes.
type Options struct {
	// Side is where pages are kept that were written before their turn came; when
	// there is no more room, the guest's writes to further ones wait for the sweeper,
	// which takes those next. nil: as NewSide makes by default.
	Side *Side
	// Workers is how many goroutines copy pages and hand them to the Writer. 0
	// means one for each processor, but at most 4.
	Workers int
	// Protect has pages protected however few they are: see Arm.
	Protect bool
	// Still says that from Freeze until Save has returned the machine stands still: its
	// vCPUs write nothing. Nothing is protected then, and pages are saved from where they
	// are. Whatever else writes to the memory calls Touch, as always, and may wait.
	Still bool
}

// phase is how far a capture has come.
type phase int

const (
	idle   phase = iota
	armed        // pages are protected; writes are noted
	frozen       // the instant was; pages are kept before they are written
	over         // protection is being lifted
)

// Capture is one capture of a machine's memory: New, Arm, Rearm if need be,
// Freeze, Save, one after the other, and Close at any time. It is the guestmem.Pager of its memory from Freeze on.
type Capture struct {
	mem     *guestmem.Memory
	regions []region
	fd      *uffd.FD
	workers int
	// protectAll is Options.Protect, still Options.Still.
	protectAll, still bool

	// life ends with Close.
	life context.Context
	end  context.CancelFunc

	// mu makes the handling of a fault and the change of phase exclude each other.
	mu      sync.Mutex
	phase   phase         // guarded by mu
	written *dirty.Bitmap // guarded by mu: pages written since they were protected
	spare   *dirty.Bitmap // belongs to Arm and Rearm, of which one runs at a time
	partial bool          // guarded by mu: only some pages are to be saved
	early   bool          // guarded by mu: those are copied before they are saved, not protected
	failed  error         // guarded by mu: why faults cannot be answered
	// registered is how many regions userfaultfd watches. Guarded by mu.
	registered int

	pages  pages
	isOver atomic.Bool // phase == over
	// touching is how many calls of Touch may be copying pages.
	touching atomic.Int64

	// waiting are calls of Touch that wait for the sweeper.
	waiting struct {
		sync.Mutex
		sync.Cond
	}
	// urgent has pages that someone waits for. When it is full, the page's turn
	// comes when the sweeper gets there.
	urgent chan uint32

	reader   sync.WaitGroup
	saving   sync.Mutex // held by Save
	saved    bool       // guarded by saving: nothing is left to save
	released bool       // guarded by saving: the side is not ours any more
	closing  sync.Once
	closed   error // what Close returns; after closing guarded by saving

	count counters
}

// region is where a stretch of RAM lies. A page's index is its number in the memfd.
type region struct {
	firstPFN, firstIndex, pages uint64
	host                        []byte
	guest                       uintptr
}

// New prepares a capture of mem. It needs a kernel with userfaultfd write
// protection for shared memory.
func New(mem *guestmem.Memory, o Options) (*Capture, error) {
	if o.Workers <= 0 {
		o.Workers = min(4, runtime.GOMAXPROCS(0))
	}
	total := mem.Size() / pageSize
	if total >= 1<<32-1 {
		return nil, fmt.Errorf("%w: %d pages are too many", ErrSetup, total)
	}
	side, err := o.Side, error(nil)
	if side == nil {
		if side, err = NewSide(0); err != nil {
			return nil, err
		}
	}
	fd, err := uffd.Open(uffd.FeatureWP | uffd.FeatureWPShmem)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrSetup, err)
	}
	c := &Capture{
		mem: mem, fd: fd, workers: o.Workers, protectAll: o.Protect, still: o.Still,
		written: dirty.NewBitmapOf(mem), spare: dirty.NewBitmapOf(mem),
		urgent: make(chan uint32, 256),
	}
	c.life, c.end = context.WithCancel(context.Background())
	c.waiting.L = &c.waiting.Mutex
	for _, r := range mem.Regions() {
		c.regions = append(c.regions, region{
			firstPFN: r.GPA / pageSize, firstIndex: r.Offset / pageSize, pages: r.Size / pageSize,
			host: r.Bytes(), guest: uffd.Address(r.GuestBytes()),
		})
	}
	states, err := side.take(total)
	if err != nil {
		fd.Close()
		return nil, fmt.Errorf("%w: %w", ErrSetup, err)
	}
	c.pages.init(states, side)
	return c, nil
}

const (
	// protectBytes is how much is protected or let go in one system call: page
	// faults wait for it, or for a part of it.
	protectBytes = 32 << 20
	// mergeGap is the most pages between two runs that are cheaper to protect
	// once more than by another system call, which stops the vCPUs for a moment.
	mergeGap = 128
	// armPasses and armEnough bound how often, and for how many pages, what was
	// written while protecting is protected again before the pause.
	armPasses = 8
	armEnough = 32
)

// Arm write-protects the guest's memory while the machine runs: all of it, or
// the pages of only. A page that the guest writes until Freeze costs it one
// fault. Arm takes time that grows with the memory.
//
// With only, these are the pages that were written since the parent checkpoint,
// collected just before; Freeze gets those written since. If they are few, they
// are copied instead, and so are, by Freeze, those written since: a call to
// protect a page costs more than to copy twenty.
func (c *Capture) Arm(only *dirty.Bitmap) error {
	if only != nil && !only.SameMemory(c.written) {
		return fmt.Errorf("%w: %w", ErrArm, dirty.ErrRanges)
	}
	c.mu.Lock()
	if c.phase != idle {
		defer c.mu.Unlock()
		return fmt.Errorf("%w: %w", ErrArm, c.misplaced())
	}
	c.phase, c.partial = armed, only != nil
	if c.early = c.partial && !c.protectAll && only.Count() <= uint64(len(c.pages.unused)*3/4); c.early {
		defer c.mu.Unlock()
		if err := c.copyEarly(only); err != nil {
			return fmt.Errorf("%w: %w", ErrArm, err)
		}
		return nil
	}
	if c.still {
		defer c.mu.Unlock()
		if only == nil {
			only = dirty.NewBitmapOf(c.mem)
			only.SetAll()
		}
		c.expect(only)
		return nil
	}
	c.reader.Go(c.readFaults)
	for ; c.registered < len(c.regions); c.registered++ {
		r := &c.regions[c.registered]
		if err := c.fd.Register(r.guest, uintptr(r.pages*pageSize), uffd.WP); err != nil {
			c.mu.Unlock()
			return fmt.Errorf("%w: %w", ErrArm, err)
		}
	}
	c.mu.Unlock()

	if only == nil {
		only = dirty.NewBitmapOf(c.mem)
		only.SetAll()
	}
	c.expect(only)
	if err := c.protectRuns(only); err != nil {
		return fmt.Errorf("%w: %w", ErrArm, err)
	}
	// The longer this took, the more was written meanwhile: that must not be
	// left to the pause.
	return c.Rearm()
}

// copyEarly copies pages into side copies, once more if they have one.
// Preconditions: mu is held, and there are as many slots, or reserved ones.
func (c *Capture) copyEarly(b *dirty.Bitmap) error {
	var err error
	b.Runs(func(pfn, n uint64) {
		r := c.regionOf(pfn)
		first := r.firstIndex + pfn - r.firstPFN
		for end := first + n; first < end && err == nil; first += earlyPages {
			err = c.copyPages(first, min(earlyPages, end-first))
		}
	})
	return err
}

// earlyPages is how many pages are copied by one system call at most.
const earlyPages = 64

// copyPages copies up to earlyPages pages into their slots, or new ones. It asks the memfd
// for them: to look at the mapping would fault, and make pages where there are none.
func (c *Capture) copyPages(first, n uint64) error {
	var slots [earlyPages][]byte
	for k := range n {
		state := &c.pages.state[first+k]
		s := state.Add(0) // no Load: that would be a page fault more, in memory that is new
		if s&stateMask != copied {
			slot, ok := c.pages.get()
			if !ok {
				slot = c.pages.reserved()
			}
			s = slot<<stateBits | copied
			state.Store(s)
		}
		slots[k] = c.pages.slot(s >> stateBits)
	}
	got, err := unix.Preadv(c.mem.FD(), slots[:n], int64(first*pageSize))
	if err == nil && got != int(n*pageSize) {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return fmt.Errorf("read %d pages from %#x: %w", n, first, err)
	}
	return nil
}

// Refresh takes in pages that were written since Arm, while the machine runs, so
// that less is left to Freeze: they are copied if Arm has copied its pages, and
// otherwise are to be protected, which Rearm does. With more pages than there is
// room to copy it returns false: a capture made anew does better.
func (c *Capture) Refresh(more *dirty.Bitmap) (bool, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.phase != armed {
		return false, fmt.Errorf("%w: %w", ErrArm, c.misplaced())
	}
	err := error(nil)
	switch {
	case !c.partial: // all pages are to be saved, and writes to them noted
	case !c.early:
		err = c.include(more)
	case more.Count() > uint64(c.pages.left()):
		return false, nil
	default:
		err = c.copyEarly(more)
	}
	if err != nil {
		return false, fmt.Errorf("%w: %w", ErrArm, err)
	}
	return true, nil
}

// include adds pages to those that are to be saved and, since they are not
// protected, to those that were written. Preconditions: mu is held, and phase is armed.
func (c *Capture) include(more *dirty.Bitmap) error {
	if err := c.written.Merge(more); err != nil {
		return err
	}
	c.expect(more)
	return nil
}

// expect has pages saved.
func (c *Capture) expect(b *dirty.Bitmap) {
	b.Runs(func(pfn, n uint64) {
		r := c.regionOf(pfn)
		first := r.firstIndex + pfn - r.firstPFN
		for i := first; i < first+n; i++ {
			c.pages.state[i].Store(pending)
		}
	})
}

// Rearm protects again what was written since it was protected, while the
// machine runs, until not much is left for Freeze to do. Who lets time pass
// after Arm calls it right before the pause.
func (c *Capture) Rearm() error {
	for range armPasses {
		if more, err := c.protectWritten(); err != nil {
			return fmt.Errorf("%w: %w", ErrArm, err)
		} else if !more {
			break
		}
	}
	return nil
}

// protectWritten protects again what was written, unless that is not much.
func (c *Capture) protectWritten() (bool, error) {
	c.mu.Lock()
	if c.phase != armed {
		defer c.mu.Unlock()
		return false, c.misplaced()
	}
	if c.still || c.written.Count() <= armEnough {
		c.mu.Unlock()
		return false, nil
	}
	c.written, c.spare = c.spare, c.written
	c.mu.Unlock()
	err := c.protectRuns(c.spare)
	c.spare.Reset()
	return true, err
}

// misplaced says why something cannot be done now. Preconditions: mu is held.
func (c *Capture) misplaced() error {
	switch c.phase {
	case over:
		return errors.Join(ErrClosed, c.failed)
	case idle:
		return errors.New("nothing is protected yet")
	case armed:
		return errors.New("the memory is protected already, and not frozen")
	}
	return errors.New("the memory is frozen already")
}

// protectRuns write-protects all pages in b, and perhaps some between them.
func (c *Capture) protectRuns(b *dirty.Bitmap) error {
	var err error
	var in *region
	var from, end uint64 // of the run that grows
	flush := func() {
		if in != nil && err == nil {
			err = c.protect(in, from, end-from)
		}
	}
	b.Runs(func(pfn, n uint64) {
		r := c.regionOf(pfn)
		if in == r && pfn-end <= mergeGap {
			end = pfn + n
			return
		}
		flush()
		in, from, end = r, pfn, pfn+n
	})
	flush()
	return err
}

// protect write-protects n pages of a region.
func (c *Capture) protect(r *region, pfn, n uint64) error {
	addr, left := r.guest+uintptr((pfn-r.firstPFN)*pageSize), uintptr(n*pageSize)
	for left > 0 {
		step := min(left, protectBytes)
		if err := retry(func() error { return c.fd.WriteProtect(addr, step, true, false) }); err != nil {
			return fmt.Errorf("%d bytes at page %#x: %w", n*pageSize, pfn, err)
		}
		c.count.protectCalls.Add(1)
		addr, left = addr+step, left-step
	}
	return nil
}

// Freeze makes the memory as it is now what Save saves. The machine stands and
// its devices are drained; when Freeze has returned it may go on. more, if not
// nil, are further pages to save besides those given to Arm. The time it takes
// grows with the pages written since Arm, not with the memory. Save must
// follow soon: when there is no more room for side copies, writers wait for it.
func (c *Capture) Freeze(more *dirty.Bitmap) error {
	began := time.Now()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.phase != armed {
		return fmt.Errorf("%w: %w", ErrFreeze, c.misplaced())
	}
	if c.early {
		if err := c.freezeEarly(more); err != nil {
			return fmt.Errorf("%w: %w", ErrFreeze, err)
		}
		c.count.frozenFor.Store(int64(time.Since(began)))
		return nil
	}
	if more != nil && c.partial {
		if err := c.include(more); err != nil {
			return fmt.Errorf("%w: %w", ErrFreeze, err)
		}
	}
	before := c.count.protectCalls.Load()
	c.count.rewritten.Store(c.written.Count())
	if !c.still {
		if err := c.protectRuns(c.written); err != nil {
			return fmt.Errorf("%w: %w", ErrFreeze, err)
		}
	}
	c.count.freezeCalls.Store(c.count.protectCalls.Load() - before)
	c.keepPinned()
	c.phase = frozen
	c.mem.AddPager(c)
	c.count.frozenFor.Store(int64(time.Since(began)))
	return nil
}

// freezeEarly copies what was written since it was copied. Then all is copied:
// nobody has to wait for anything. mu is held.
func (c *Capture) freezeEarly(more *dirty.Bitmap) error {
	pinned := c.mem.Pinned()
	most := len(pinned)
	if more != nil {
		most += int(more.Count())
	}
	c.pages.reserve(most)
	if more != nil {
		if err := c.copyEarly(more); err != nil {
			return err
		}
	}
	for _, gpa := range pinned {
		if i, ok := c.indexOf(gpa / pageSize); ok && c.pages.keepReserved(i, c.hostPage(i)) {
			c.count.pinned.Add(1)
		}
	}
	c.phase = frozen
	return nil
}

// keepPinned copies the pages that devices write without asking.
func (c *Capture) keepPinned() {
	pinned := c.mem.Pinned()
	c.pages.reserve(len(pinned))
	for _, gpa := range pinned {
		if i, ok := c.indexOf(gpa / pageSize); ok && c.pages.keepReserved(i, c.hostPage(i)) {
			c.count.pinned.Add(1)
		}
	}
}

// Close lifts the protection, wakes whoever waits for a page, and ends a Save
// that is under way. A second Close returns what the first did.
func (c *Capture) Close() error {
	c.end()
	c.letGo()
	c.saving.Lock() // Save has ended
	defer c.saving.Unlock()
	if !c.released {
		c.released = true
		for c.touching.Load() > 0 { // for as long as it takes to copy a page
			runtime.Gosched()
		}
		states := c.pages.state
		if !c.saved {
			states = nil
		}
		c.closed = errors.Join(c.closed, c.pages.room.release(states))
	}
	return c.closed
}

// letGo ends the capture: no page is kept any more.
func (c *Capture) letGo() {
	c.closing.Do(func() {
		c.mu.Lock()
		registered := c.regions[:c.registered]
		c.phase = over
		c.isOver.Store(true)
		c.mu.Unlock()
		c.mem.RemovePager(c)
		c.wakeTouching()

		var errs []error
		// Piece by piece: the kernel holds all page faults off while it lets
		// go of one.
		for _, r := range registered {
			for at := uintptr(0); at < uintptr(r.pages*pageSize); at += protectBytes {
				step := min(uintptr(r.pages*pageSize)-at, protectBytes)
				if err := c.fd.Unregister(r.guest+at, step); err != nil {
					errs = append(errs, err)
				}
			}
		}
		errs = append(errs, c.fd.Close()) // wakes the rest
		c.reader.Wait()
		c.closed = errors.Join(errs...)
	})
}

// regionOf returns the region of a page that is RAM.
func (c *Capture) regionOf(pfn uint64) *region {
	for i := range c.regions {
		if r := &c.regions[i]; pfn-r.firstPFN < r.pages {
			return r
		}
	}
	return nil
}

// indexOf returns the index of a page by its number.
func (c *Capture) indexOf(pfn uint64) (uint32, bool) {
	r := c.regionOf(pfn)
	if r == nil {
		return 0, false
	}
	return uint32(r.firstIndex + pfn - r.firstPFN), true
}

// regionAt returns the region of a page by its index.
func (c *Capture) regionAt(i uint32) *region {
	for j := range c.regions {
		if r := &c.regions[j]; uint64(i)-r.firstIndex < r.pages {
			return r
		}
	}
	return nil
}

// hostPage is a page's bytes in the host's mapping.
func (c *Capture) hostPage(i uint32) []byte {
	r := c.regionAt(i)
	at := (uint64(i) - r.firstIndex) * pageSize
	return r.host[at : at+pageSize : at+pageSize]
}

// retry repeats a call that the kernel could not do at the moment.
func retry(call func() error) error {
	for {
		err := call()
		if !temporary(err) {
			return err
		}
		runtime.Gosched()
	}
}
