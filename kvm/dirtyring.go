package kvm

import (
	"errors"
	"fmt"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// ErrDirtyRing means that a dirty ring cannot be mapped as asked.
var ErrDirtyRing = errors.New("dirty ring")

// dirtyGFN is struct kvm_dirty_gfn, one entry of a ring.
type dirtyGFN struct {
	flags  uint32 // dirtyGFN* bits; the kernel and HarvestDirty pass the entry by them
	slot   uint32
	offset uint64
}

const (
	dirtyGFNDirty = 1 << 0 // the kernel filled it in
	dirtyGFNReset = 1 << 1 // harvested

	dirtyRingPage = 64 // KVM_DIRTY_LOG_PAGE_OFFSET
)

// dirtyRing is where KVM tells the pages that a VCPU wrote.
type dirtyRing struct {
	size    uint64        // bytes, as the VM's rings were enabled
	unreset *atomic.Int64 // the VM's
	mapping []byte
	entries []dirtyGFN
	next    uint32 // the entry HarvestDirty looks at first, modulo len(entries)
}

func (r *dirtyRing) unmap() error {
	if r.mapping == nil {
		return nil
	}
	err := unix.Munmap(r.mapping)
	*r = dirtyRing{}
	return err
}

// DirtyRingEntrySize is the size in bytes of an entry of the dirty ring:
// before the first VCPU is made, VM.EnableCap(CapDirtyLogRingAcqRel,
// entries*DirtyRingEntrySize) turns rings on.
const DirtyRingEntrySize = 16

// MapDirtyRing maps the VCPU's dirty ring; entries is what the VM's rings were
// enabled with.
func (v *VCPU) MapDirtyRing(entries int) error {
	// Touching a mapping that is longer than the ring would kill the process.
	if entries <= 0 || uint64(entries)*DirtyRingEntrySize != v.ring.size {
		return fmt.Errorf("%w: vCPU %d: %d entries, but enabled with %d", ErrDirtyRing, v.ID, entries, v.ring.size/DirtyRingEntrySize)
	}
	if v.ring.mapping != nil {
		return fmt.Errorf("%w: vCPU %d: mapped already", ErrDirtyRing, v.ID)
	}
	mapping, err := unix.Mmap(v.fd, dirtyRingPage*pageSize, entries*DirtyRingEntrySize,
		unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("%w: vCPU %d: map %d entries: %w", ErrDirtyRing, v.ID, entries, err)
	}
	v.ring.mapping, v.ring.entries, v.ring.next = mapping, dirtyGFNs(mapping), 0
	return nil
}

// HarvestDirty calls page for every page that the VCPU wrote since the last
// harvest, by slot (with the address space in its upper 16 bits) and page
// offset within the slot, and returns how many those were. ResetDirtyRings
// gives their entries back to the kernel; until then the pages' further writes
// are not told. One goroutine at a time may harvest, while the VCPU runs.
func (v *VCPU) HarvestDirty(page func(slot uint32, offset uint64)) int {
	n := 0
	for ; n < len(v.ring.entries); n++ {
		entry := &v.ring.entries[v.ring.next&uint32(len(v.ring.entries)-1)]
		if atomic.LoadUint32(&entry.flags) != dirtyGFNDirty {
			break
		}
		page(entry.slot, entry.offset)
		atomic.StoreUint32(&entry.flags, dirtyGFNReset)
		v.ring.next++
	}
	if n > 0 {
		v.ring.unreset.Add(int64(n))
	}
	return n
}

// ResetDirtyRings write-protects again the pages that HarvestDirty took from
// any VCPU's ring, frees their entries, and returns how many those were.
func (vm *VM) ResetDirtyRings() (int, error) {
	// A signal cuts the kernel short, which it does not tell but by the count:
	// so go on until all that was harvested is counted.
	const patience = 1000
	for total, idle := 0, 0; ; {
		n, errno := ioctl(vm.fd, nrResetDirtyRings, 0)
		if errno != 0 && errno != unix.EINTR {
			return total, opError("KVM_RESET_DIRTY_RINGS", errno)
		}
		if n = max(n, 0); n > 0 {
			idle = 0
		}
		total += n
		if vm.unreset.Add(-int64(n)) <= 0 {
			return total, nil
		}
		if idle++; idle > patience {
			return total, fmt.Errorf("%w: KVM_RESET_DIRTY_RINGS leaves %d entries", ErrDirtyRing, vm.unreset.Load())
		}
	}
}
