// Package dirty tells which pages of guest memory were written: by vCPUs, which
// KVM's dirty log or dirty rings show, and by devices, which guestmem's marks
// show.
package dirty

import (
	"errors"
	"fmt"
	"sync"

	"github.com/gnomon-vmm/gnomon/kvm"
	"github.com/gnomon-vmm/gnomon/mm/guestmem"
)

// Errors, each of which wraps its cause.
var (
	ErrSetup   = errors.New("dirty tracking cannot be set up")
	ErrStart   = errors.New("dirty tracking cannot be switched")
	ErrCollect = errors.New("dirty pages cannot be collected")
)

// VM is what a Tracker uses of a *kvm.VM.
type VM interface {
	Check(kvm.Cap) int
	EnableCap(c kvm.Cap, args ...uint64) error
	SetMemory(slot, flags uint32, gpa uint64, mem []byte) error
	DirtyLog(slot uint32, bitmap []uint64) error
	ClearDirtyLog(slot uint32, firstPage uint64, numPages uint32, bitmap []uint64) error
	ResetDirtyRings() (int, error)
}

// VCPU is what a Tracker uses of a *kvm.VCPU.
type VCPU interface {
	MapDirtyRing(entries int) error
	HarvestDirty(page func(slot uint32, offset uint64)) int
}

// Options say how KVM is to track.
type Options struct {
	// RingEntries, if not 0, is the size of each vCPU's dirty ring: a power of
	// two from MinRingEntries on. 0 chooses the dirty log.
	RingEntries int
}

// MinRingEntries is the smallest ring that KVM makes: a page of entries.
const MinRingEntries = guestmem.PageSize / kvm.DirtyRingEntrySize

// Stats count since New.
type Stats struct {
	Collected uint64 // pages handed out by Collect and CollectInto
	Harvests  uint64 // ring harvests, those for full rings included
	RingFull  uint64 // of these, for rings that were full
}

// Tracker knows which pages were written since it was last asked. Its methods
// may be called from any goroutine.
//
// What is written while pages are collected is in that collection or the next.
// So who copies the pages of one collection after it has ended, and goes on
// with the next, misses nothing. With the ring, a processor may keep the
// latest writes to itself until its vCPU leaves KVM_RUN: the last collection
// is made while the vCPUs stand.
//
// A page that the guest only read may be told too: KVM maps a page for writing
// when it can, and counts it as written when it does.
type Tracker struct {
	vm          VM
	mem         *guestmem.Memory
	ringEntries int  // 0 with the log
	manual      bool // reading the log does not clear it, ClearDirtyLog does

	mu      sync.Mutex
	vcpus   []VCPU     // guarded by mu: those with rings
	on      bool       // guarded by mu
	seen    *Bitmap    // guarded by mu: written, and not handed out yet
	logs    [][]uint64 // guarded by mu: what DirtyLog reads, by slot
	stats   Stats      // guarded by mu
	fromCPU func(slot uint32, offset uint64)
	fromDev func(gpa uint64)
}

// New prepares tracking for a machine whose memory slot i is region i of mem
// in its guest mapping, writable, with no flags. It must be called before the
// VM's first vCPU is made.
func New(vm VM, mem *guestmem.Memory, o Options) (*Tracker, error) {
	t := &Tracker{vm: vm, mem: mem, ringEntries: o.RingEntries, seen: NewBitmapOf(mem)}
	// Made once, so that collecting does not allocate.
	t.fromCPU = t.noteSlotPage
	t.fromDev = func(gpa uint64) { t.seen.Set(gpa / guestmem.PageSize) }

	if o.RingEntries != 0 {
		size := vm.Check(kvm.CapDirtyLogRingAcqRel)
		if o.RingEntries < MinRingEntries || o.RingEntries&(o.RingEntries-1) != 0 || o.RingEntries*kvm.DirtyRingEntrySize > size {
			return nil, fmt.Errorf("%w: a dirty ring of %d entries: this host takes powers of two from %d to %d",
				ErrSetup, o.RingEntries, MinRingEntries, size/kvm.DirtyRingEntrySize)
		}
		if err := vm.EnableCap(kvm.CapDirtyLogRingAcqRel, uint64(o.RingEntries)*kvm.DirtyRingEntrySize); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrSetup, err)
		}
		return t, nil
	}
	for _, s := range t.seen.stretches {
		t.logs = append(t.logs, make([]uint64, len(s.words)))
	}
	// Clearing apart from reading holds KVM's lock for the written pages only.
	if vm.Check(kvm.CapManualDirtyLogProtect2) != 0 {
		if err := vm.EnableCap(kvm.CapManualDirtyLogProtect2, 1); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrSetup, err)
		}
		t.manual = true
	}
	return t, nil
}

// AddVCPU makes a vCPU known, before it runs for the first time.
func (t *Tracker) AddVCPU(v VCPU) error {
	if t.ringEntries == 0 {
		return nil
	}
	if err := v.MapDirtyRing(t.ringEntries); err != nil {
		return fmt.Errorf("%w: %w", ErrSetup, err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.vcpus = append(t.vcpus, v)
	return nil
}

// Ring tells whether KVM tracks by rings; it logs otherwise.
func (t *Tracker) Ring() bool { return t.ringEntries != 0 }

// Start begins tracking: all that is written from now on is known. Its time
// grows with the memory that the guest has touched; the machine may run.
func (t *Tracker) Start() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.on {
		return nil
	}
	t.seen.Reset()
	t.mem.TrackDirty(true)
	if err := t.setFlags(kvm.MemLogDirtyPages); err != nil {
		t.mem.TrackDirty(false)
		return errors.Join(err, t.setFlags(0))
	}
	t.on = true
	return nil
}

// Stop ends tracking and forgets what was not collected.
func (t *Tracker) Stop() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.on {
		return nil
	}
	t.on = false
	t.mem.TrackDirty(false)
	if err := t.setFlags(0); err != nil {
		return err
	}
	// What is still in the rings must not come up after the next Start.
	if err := t.harvest(); err != nil {
		return fmt.Errorf("%w: %w", ErrStart, err)
	}
	t.seen.Reset()
	return nil
}

// setFlags changes the flags of all slots.
func (t *Tracker) setFlags(flags uint32) error {
	var errs []error
	for slot, r := range t.mem.Regions() {
		if err := t.vm.SetMemory(uint32(slot), flags, r.GPA, r.GuestBytes()); err != nil {
			errs = append(errs, fmt.Errorf("%w: slot %d, flags %#x: %w", ErrStart, slot, flags, err))
		}
	}
	return errors.Join(errs...)
}

// RingFull empties the rings. The vCPU's thread calls it after
// KVM_EXIT_DIRTY_RING_FULL and then runs the vCPU again.
func (t *Tracker) RingFull() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.stats.RingFull++
	return t.harvest()
}

// Harvest takes what is in the rings to where Collect finds it, so that they
// do not fill up. It does nothing with the log.
func (t *Tracker) Harvest() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.harvest()
}

// harvest is Harvest with mu held.
func (t *Tracker) harvest() error {
	if t.ringEntries == 0 {
		return nil
	}
	t.stats.Harvests++
	harvested := 0
	for _, v := range t.vcpus {
		harvested += v.HarvestDirty(t.fromCPU)
	}
	if harvested == 0 {
		return nil
	}
	if _, err := t.vm.ResetDirtyRings(); err != nil {
		return fmt.Errorf("%w: %w", ErrCollect, err)
	}
	return nil
}

// noteSlotPage takes a ring's entry. The ring lies in memory that the guest
// cannot reach, but a slot that is not ours must do no harm. Preconditions: mu
// is held.
func (t *Tracker) noteSlotPage(slot uint32, offset uint64) {
	// The upper half of slot is the address space, of which SMM's is the
	// second: it shows the same pages.
	if i := int(slot & 0xffff); i < len(t.seen.stretches) {
		if s := &t.seen.stretches[i]; offset < s.pages {
			s.words[offset/64] |= 1 << (offset % 64)
		}
	}
}

// Collect calls f for each run of pages written since the last collection,
// ascending. When it fails, nothing is lost to the next one. f must not use
// the tracker.
func (t *Tracker) Collect(f func(pfn, n uint64)) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if err := t.gather(); err != nil {
		return err
	}
	t.seen.Runs(f)
	t.handOut()
	return nil
}

// CollectInto adds the pages written since the last collection to b, which is
// over the same memory. When it fails, nothing is lost to the next one.
func (t *Tracker) CollectInto(b *Bitmap) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if err := t.gather(); err != nil {
		return err
	}
	if err := b.Merge(t.seen); err != nil {
		return fmt.Errorf("%w: %w", ErrCollect, err)
	}
	t.handOut()
	return nil
}

// handOut forgets the pages that the caller has now. Preconditions: mu is held.
func (t *Tracker) handOut() {
	t.stats.Collected += t.seen.Count()
	t.seen.Reset()
}

// gather brings all that was written into seen. Preconditions: mu is held.
func (t *Tracker) gather() error {
	if !t.on {
		return fmt.Errorf("%w: tracking is off", ErrCollect)
	}
	t.mem.TakeDirty(t.fromDev)
	if t.ringEntries != 0 {
		return t.harvest()
	}
	for slot := range t.logs {
		if err := t.gatherLog(slot); err != nil {
			return err
		}
	}
	return nil
}

// clearPages is how many pages at most are protected again with KVM's lock
// held; vCPUs that fault wait for that. A multiple of 64.
const clearPages = 1 << 18

// gatherLog reads and clears the log of one slot. Preconditions: mu is held.
func (t *Tracker) gatherLog(slot int) error {
	log, seen := t.logs[slot], &t.seen.stretches[slot]
	if err := t.vm.DirtyLog(uint32(slot), log); err != nil {
		return fmt.Errorf("%w: %w", ErrCollect, err)
	}
	for at := 0; at < len(log); at += clearPages / 64 {
		part := log[at:min(at+clearPages/64, len(log))]
		first, end := -1, 0 // the words with written pages
		for i, w := range part {
			if w != 0 {
				if first < 0 {
					first = i
				}
				end = i + 1
				seen.words[at+i] |= w
			}
		}
		if first < 0 || !t.manual {
			continue
		}
		page := uint64(at+first) * 64
		pages := min(uint64(end-first)*64, seen.pages-page)
		if err := t.vm.ClearDirtyLog(uint32(slot), page, uint32(pages), part[first:end]); err != nil {
			return fmt.Errorf("%w: %w", ErrCollect, err)
		}
	}
	return nil
}

// Stats returns the counts so far.
func (t *Tracker) Stats() Stats {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.stats
}
