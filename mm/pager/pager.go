// Package pager runs a machine whose memory is still in a checkpoint. The
// guest's first access to a page faults; userfaultfd tells the pager, which
// brings the page, and with it those that the guest is likely to want next.
// Devices, which use the host's mapping, ask by Touch. When nothing is missing
// the pager lets go and is never heard of again.
//
// A guest never runs on wrong bytes: a page that cannot be had is not answered
// for, and a pager that is closed before it is complete takes the guest's access
// to its memory away (KVM_RUN then fails with EFAULT).
package pager

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/mm/guestmem"
	"github.com/gnomon-vmm/gnomon/mm/locality"
	"github.com/gnomon-vmm/gnomon/mm/uffd"
)

// Errors, each wrapped with what it concerns.
var (
	ErrStart  = errors.New("guest memory cannot be paged in")
	ErrLoad   = errors.New("guest memory cannot be loaded")
	ErrClosed = errors.New("the pager is closed and not all memory was loaded")
)

// Options say how to load.
type Options struct {
	Policy Policy
	// Pages is how many pages, aligned, Physical brings at once; 64 if 0.
	Pages int
	// Window is how many blocks Locality asks for ahead of a walk at most; 32 (8
	// MiB) if 0.
	Window int
	// Workers load what is not demanded; 2 if 0.
	Workers int
	// Background has the workers load everything, while no demand waits.
	Background bool
	// Recorded are the blocks that the policy Recorded begins with.
	Recorded []Block
	// CacheBlocks is how many decompressed blocks are kept, when not all pages of
	// a block are installed at once; 64 (16 MiB) if 0.
	CacheBlocks int
	// OnError is called, on a goroutine of its own, when a block cannot be loaded,
	// once for each. The machine must stop: what it wants from there it never gets.
	OnError func(error)
}

const (
	maxWindow       = 64
	maxPhysical     = 512
	defaultWindow   = 32
	defaultWorkers  = 2
	defaultCache    = 64
	defaultPhysical = 64
)

func (o *Options) setDefaults() {
	def := func(v *int, def, limit int) {
		if *v <= 0 {
			*v = def
		}
		*v = min(*v, limit)
	}
	def(&o.Pages, defaultPhysical, maxPhysical)
	def(&o.Window, defaultWindow, maxWindow)
	def(&o.Workers, defaultWorkers, 64)
	def(&o.CacheBlocks, defaultCache, 1<<16)
}

// Pager loads one machine's memory. Its methods may be called from any goroutine.
type Pager struct {
	mem     *guestmem.Memory
	src     Source
	o       Options
	u       *uffd.FD
	regions []*region
	cache   *cache
	shared  shared
	loaders sync.Pool // of *loader, for Touch
	counts  counters

	finished atomic.Bool // nothing is missing
	done     chan struct{}
	tasks    sync.WaitGroup

	// mu guards what follows. It is never held while a block is read or a page
	// installed.
	mu sync.Mutex
	queue
	closed  bool
	started bool
	gone    bool // the pager has let go
}

var _ guestmem.Pager = (*Pager)(nil)

// New takes over memory that has not been touched: from now on its pages are
// the source's. Start has the guest's faults answered; Touch works at once.
func New(mem *guestmem.Memory, src Source, o Options) (*Pager, error) {
	if err := sameLayout(mem, src.Memory()); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrStart, err)
	}
	o.setDefaults()
	u, err := uffd.Open(uffd.FeatureMissingShmem)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrStart, err)
	}
	p := &Pager{mem: mem, src: src, o: o, u: u, done: make(chan struct{}), cache: newCache(o.CacheBlocks)}
	p.loaders.New = func() any { return new(loader) }
	for _, r := range mem.Regions() {
		region := newRegion(r)
		if err := u.Register(region.addr, uintptr(len(region.guest)), uffd.Missing); err != nil {
			u.Close()
			return nil, fmt.Errorf("%w: RAM at GPA %#x: %w", ErrStart, r.GPA, err)
		}
		p.regions = append(p.regions, region)
	}
	p.queue.init(src.Blocks(), o)
	p.wanted.L, p.arrivals.L = &p.mu, &p.mu
	p.shared.pages = map[slotID][]byte{}
	mem.AddPager(p)
	return p, nil
}

// sameLayout wants the source's pages to be those of the memory.
func sameLayout(mem *guestmem.Memory, ranges []guestmem.Range) error {
	var have []guestmem.Range
	for _, r := range mem.Regions() {
		have = append(have, r.Range)
	}
	have, want := joined(have), joined(ranges)
	if len(have) == len(want) {
		same := true
		for i := range have {
			same = same && have[i] == want[i]
		}
		if same {
			return nil
		}
	}
	return fmt.Errorf("the machine's RAM is %v, the checkpoint's %v", have, want)
}

// joined makes one range of those that touch.
func joined(ranges []guestmem.Range) []guestmem.Range {
	var out []guestmem.Range
	for _, r := range ranges {
		if n := len(out); n > 0 && out[n-1].GPA+out[n-1].Size == r.GPA {
			out[n-1].Size += r.Size
			continue
		}
		out = append(out, r)
	}
	return out
}

// Start begins to answer the guest's faults and, as the policy says, to load
// what nobody waits for yet.
func (p *Pager) Start() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed || p.started {
		return
	}
	p.started = true
	p.tasks.Go(p.serve)
	for range p.o.Workers {
		p.tasks.Go(p.work)
	}
}

// LoadInBackground is what Options.Background does, from now on.
func (p *Pager) LoadInBackground() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.background = true
	p.wanted.Broadcast()
}

// LoadAll has everything loaded, with all workers, whatever Options.Background
// says, as fast as demands allow. Wait tells when it is.
func (p *Pager) LoadAll() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.background, p.hurry = true, true
	p.wanted.Broadcast()
}

// Done is closed when nothing is missing and the pager has let go.
func (p *Pager) Done() <-chan struct{} { return p.done }

// Wait returns when the pager has let go, or with the error that makes this
// impossible.
func (p *Pager) Wait(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.arrivals.Broadcast()
	})
	defer stop()
	p.mu.Lock()
	defer p.mu.Unlock()
	for {
		switch {
		case p.gone:
			return nil
		case p.firstErr != nil:
			return p.firstErr
		case p.closed:
			return ErrClosed
		case ctx.Err() != nil:
			return ctx.Err()
		}
		p.arrivals.Wait()
	}
}

// letGo ends the pager's work when nothing is missing.
func (p *Pager) letGo() {
	p.mu.Lock()
	if p.closed || p.complete {
		p.mu.Unlock()
		return
	}
	p.complete = true
	p.mu.Unlock()
	p.finished.Store(true)
	p.mem.RemovePager(p)
	// Unregistering wakes who waits for a hole; the kernel fills it with zeros.
	var errs []error
	for _, r := range p.regions {
		errs = append(errs, p.u.Unregister(r.addr, uintptr(len(r.guest))))
	}
	errs = append(errs, p.u.Close())
	if err := errors.Join(errs...); err != nil {
		p.report(fmt.Errorf("%w: let go: %w", ErrLoad, err))
	}
	p.mu.Lock()
	p.gone = true
	p.wanted.Broadcast()
	p.arrivals.Broadcast()
	p.mu.Unlock()
	close(p.done)
}

// Close ends the pager. If pages are missing, the guest's mapping becomes
// inaccessible first, so that nobody who waits for one, or meets one later, reads
// zeros in its place; and Touch fails for missing pages from now on. The machine
// should stand still. Close does not wait for calls of Touch under way, which
// return soon.
func (p *Pager) Close() error {
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		p.tasks.Wait()
		return nil
	}
	p.closed = true
	complete := p.complete
	p.wanted.Broadcast()
	p.arrivals.Broadcast()
	p.mu.Unlock()
	var errs []error
	if !complete {
		for _, r := range p.regions {
			if err := unix.Mprotect(r.guest, unix.PROT_NONE); err != nil {
				errs = append(errs, fmt.Errorf("take away guest memory that is not loaded: %w", err))
			}
		}
		if len(errs) == 0 { // otherwise whoever waits must wait on
			errs = append(errs, p.u.Close())
		}
	}
	p.tasks.Wait()
	return errors.Join(errs...)
}

// report tells the owner of an error.
func (p *Pager) report(err error) {
	if p.o.OnError != nil {
		go p.o.OnError(err)
	}
}

// newWalks is what recognises walks, if the policy wants it.
func newWalks(blocks int, o Options) *locality.Walks {
	if o.Policy&Locality == 0 {
		return nil
	}
	return locality.NewWalks(blocks, o.Window)
}
