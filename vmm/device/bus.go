package device

import (
	"errors"
	"fmt"
	"slices"
	"sort"
	"sync"
	"sync/atomic"
)

// ErrMap is the stage of putting a device on a bus.
var ErrMap = errors.New("map device")

// Bus sends guest accesses to the devices mapped on it: the machine has one
// for port I/O and one for MMIO.
//
// Read and Write take no lock and do not allocate; any number of vCPU threads
// call them while Map and Unmap change the map. An access that found its
// device before Unmap may still be inside it when Unmap returns.
type Bus struct {
	name string
	// mu serialises the writers of ranges.
	mu sync.Mutex
	// ranges is sorted by base and disjoint. It is replaced, never changed.
	ranges atomic.Pointer[[]busRange]
}

// busRange is the mapping of one handler; last is its last address, so that a
// range may end where the address space does.
type busRange struct {
	base, last uint64
	h          Handler
}

// NewBus returns an empty bus; name stands in errors.
func NewBus(name string) *Bus {
	b := &Bus{name: name}
	b.ranges.Store(&[]busRange{})
	return b
}

// Map sends accesses to the size addresses from base on to h. It fails with
// ErrMap when the range is empty, wraps around, or overlaps another.
func (b *Bus) Map(base, size uint64, h Handler) error {
	last := base + size - 1
	if size == 0 || last < base {
		return fmt.Errorf("%w: %s bus: %d addresses at %#x", ErrMap, b.name, size, base)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	old := *b.ranges.Load()
	i := sort.Search(len(old), func(i int) bool { return old[i].last >= base })
	if i < len(old) && old[i].base <= last {
		return fmt.Errorf("%w: %s bus: %#x-%#x overlaps %#x-%#x", ErrMap, b.name, base, last, old[i].base, old[i].last)
	}
	changed := slices.Insert(slices.Clone(old), i, busRange{base, last, h})
	b.ranges.Store(&changed)
	return nil
}

// Unmap takes the range that begins at base off the bus, if there is one.
func (b *Bus) Unmap(base uint64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	changed := slices.DeleteFunc(slices.Clone(*b.ranges.Load()), func(r busRange) bool { return r.base == base })
	b.ranges.Store(&changed)
}

// find returns the range that holds all n addresses from addr on, or nil.
func (b *Bus) find(addr uint64, n int) *busRange {
	ranges := *b.ranges.Load()
	lo, hi := 0, len(ranges)
	for lo < hi {
		mid := int(uint(lo+hi) / 2)
		if ranges[mid].last < addr {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	if lo == len(ranges) || n == 0 {
		return nil
	}
	r := &ranges[lo]
	if addr < r.base || uint64(n-1) > r.last-addr {
		return nil
	}
	return r
}

// Read performs a guest's read of len(p) bytes at addr. Where no device's
// range holds the whole access it fills p with 0xFF, as a bus that nobody
// drives reads, and returns false.
func (b *Bus) Read(addr uint64, p []byte) bool {
	r := b.find(addr, len(p))
	if r == nil {
		for i := range p {
			p[i] = 0xFF
		}
		return false
	}
	for off := addr - r.base; len(p) > 0; {
		n := pieceLen(len(p))
		r.h.Read(off, p[:n:n])
		off, p = off+uint64(n), p[n:]
	}
	return true
}

// Write performs a guest's write of p at addr. Where no device's range holds
// the whole access it does nothing and returns false.
func (b *Bus) Write(addr uint64, p []byte) bool {
	r := b.find(addr, len(p))
	if r == nil {
		return false
	}
	for off := addr - r.base; len(p) > 0; {
		n := pieceLen(len(p))
		r.h.Write(off, p[:n:n])
		off, p = off+uint64(n), p[n:]
	}
	return true
}

// pieceLen is how many of n bytes a Handler gets in one call. An MMIO access
// that crosses a page comes from KVM in two fragments of any length.
func pieceLen(n int) int {
	switch {
	case n >= 8:
		return 8
	case n >= 4:
		return 4
	case n >= 2:
		return 2
	}
	return 1
}

// Ignore is a Handler for ports that guests write for their side effects on
// real hardware only, such as PortBIOSDebug. It reads as zero.
type Ignore struct{}

// Read fills p with zeros.
func (Ignore) Read(_ uint64, p []byte) { clear(p) }

// Write does nothing.
func (Ignore) Write(uint64, []byte) {}
