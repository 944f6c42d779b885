// Package guestmem holds guest RAM: memfd-backed regions at guest-physical
// addresses (GPAs), and bounds-checked access to them for devices and loaders.
package guestmem

import (
	"errors"
	"fmt"
	"io"
	"math/bits"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// PageSize is the granule of dirty marks and of everything else in mm.
const PageSize = 4096

// Errors, wrapped with the address or size they concern.
var (
	ErrOutOfBounds = errors.New("guest-physical address outside RAM")
	ErrSize        = errors.New("bad memory size")
)

// Range is where a stretch of RAM shall lie.
type Range struct {
	GPA  uint64 // first guest-physical address, page aligned
	Size uint64 // bytes, a multiple of PageSize
}

// Region is one contiguous stretch of RAM.
type Region struct {
	Range
	Offset uint64 // of its first byte in the memfd
	bytes  []byte // the host's mapping
	guest  []byte // the guest's mapping
	// dirty has a bit for each page a device wrote; nil while not tracking.
	dirty atomic.Pointer[[]atomic.Uint64]
	// gathered has for each huge page how often Gather has tried to make it one.
	gathered []atomic.Uint32
}

// Bytes is the whole region in the host's mapping. Whoever goes past Slice and
// the like to use it calls Memory.Touch before and MarkDirty after.
func (r *Region) Bytes() []byte { return r.bytes }

// GuestBytes is the same memory in the mapping that KVM's memslots point at and
// that userfaultfd may watch. Go code must not read or write it (see Pager).
func (r *Region) GuestBytes() []byte { return r.guest }

// End is the first GPA behind the region.
func (r *Region) End() uint64 { return r.GPA + r.Size }

// Memory is a machine's RAM. Its methods may be called from any goroutine; the
// bytes themselves are shared with the guest, which may change them at any time.
type Memory struct {
	fd      int
	regions []*Region // ascending GPA
	size    uint64
	pagers  pagers
	pins    pins

	gathering gathering
}

// New maps memory of the given ranges, ascending and disjoint, on one sealed
// memfd. Nothing is allocated until it is touched.
func New(ranges []Range) (*Memory, error) {
	m := &Memory{fd: -1}
	var end uint64
	for _, r := range ranges {
		if r.Size == 0 || r.Size%PageSize != 0 || r.GPA%PageSize != 0 || r.GPA < end || r.GPA+r.Size < r.GPA {
			return nil, fmt.Errorf("%w: %d bytes at GPA %#x: ranges must be whole pages, ascending and disjoint", ErrSize, r.Size, r.GPA)
		}
		end = r.GPA + r.Size
		m.size += r.Size
	}
	if m.size == 0 || m.size > 1<<46 {
		return nil, fmt.Errorf("%w: %d bytes", ErrSize, m.size)
	}

	fd, err := unix.MemfdCreate("gnomon-ram", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("create memfd for guest memory: %w", err)
	}
	m.fd = fd
	if err := unix.Ftruncate(fd, int64(m.size)); err != nil {
		m.Close()
		return nil, fmt.Errorf("size guest memory to %d bytes: %w", m.size, err)
	}
	// Nobody who gets the descriptor can take pages from under our mapping.
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL); err != nil {
		m.Close()
		return nil, fmt.Errorf("seal guest memory: %w", err)
	}
	var offset uint64
	for _, r := range ranges {
		region := &Region{Range: r, Offset: offset}
		m.regions = append(m.regions, region)
		for _, mapping := range []*[]byte{&region.bytes, &region.guest} {
			b, err := mapShared(fd, int64(offset), r.Size)
			if err != nil {
				m.Close()
				return nil, fmt.Errorf("map %d bytes of guest memory: %w", r.Size, err)
			}
			*mapping = b
		}
		if offset%HugePage == 0 {
			region.gathered = make([]atomic.Uint32, r.Size/HugePage)
		}
		offset += r.Size
	}
	return m, nil
}

// Close unmaps the memory. No slice of it may be used after. A pager that is still
// asked, and can be closed, is closed first: it must not meet what is mapped there
// later.
func (m *Memory) Close() error {
	var errs []error
	if l := m.pagers.list.Load(); l != nil {
		for _, p := range *l {
			if c, ok := p.(io.Closer); ok {
				errs = append(errs, c.Close())
			}
		}
	}
	for _, r := range m.regions {
		for _, mapping := range []*[]byte{&r.bytes, &r.guest} {
			if *mapping != nil {
				errs = append(errs, unmap(*mapping))
				*mapping = nil
			}
		}
	}
	m.regions = nil
	if m.fd >= 0 {
		errs = append(errs, unix.Close(m.fd))
		m.fd = -1
	}
	return errors.Join(errs...)
}

// FD is the memfd that holds all regions, each at its Offset.
func (m *Memory) FD() int { return m.fd }

// Size is the RAM in bytes.
func (m *Memory) Size() uint64 { return m.size }

// Regions are the machine's RAM regions by ascending GPA.
func (m *Memory) Regions() []*Region { return m.regions }

// find returns the region that holds gpa, or nil.
func (m *Memory) find(gpa uint64) *Region {
	for _, r := range m.regions {
		if gpa-r.GPA < r.Size {
			return r
		}
	}
	return nil
}

// Slice returns the n bytes from gpa on, which must lie in one region. It does
// not allocate. Whoever writes to it calls MarkDirty after, and lets go of it
// before the machine stands still; what is kept longer is pinned.
func (m *Memory) Slice(gpa, n uint64) ([]byte, error) {
	r := m.find(gpa)
	if r == nil || n > r.Size-(gpa-r.GPA) {
		return nil, outOfBounds(gpa, n)
	}
	if err := m.Touch(gpa, n); err != nil {
		return nil, err
	}
	off := gpa - r.GPA
	return r.bytes[off : off+n : off+n], nil
}

// outOfBounds keeps the formatting out of Slice's fast path.
//
//go:noinline
func outOfBounds(gpa, n uint64) error {
	return fmt.Errorf("%w: %d bytes at GPA %#x", ErrOutOfBounds, n, gpa)
}

// Read copies guest memory from gpa on into p; it may cross from one region
// into an adjacent one. Nothing is copied when part of it is not RAM.
func (m *Memory) Read(gpa uint64, p []byte) error {
	if !m.contains(gpa, uint64(len(p))) {
		return outOfBounds(gpa, uint64(len(p)))
	}
	for len(p) > 0 {
		r := m.find(gpa)
		if err := m.Touch(gpa, min(uint64(len(p)), r.End()-gpa)); err != nil {
			return err
		}
		n := copy(p, r.bytes[gpa-r.GPA:])
		p, gpa = p[n:], gpa+uint64(n)
	}
	return nil
}

// Write copies p to guest memory from gpa on and marks the pages dirty; it may
// cross from one region into an adjacent one. Nothing is copied when part of it
// is not RAM.
func (m *Memory) Write(gpa uint64, p []byte) error {
	if !m.contains(gpa, uint64(len(p))) {
		return outOfBounds(gpa, uint64(len(p)))
	}
	for len(p) > 0 {
		r := m.find(gpa)
		if err := m.Touch(gpa, min(uint64(len(p)), r.End()-gpa)); err != nil {
			return err
		}
		n := copy(r.bytes[gpa-r.GPA:], p)
		m.MarkDirty(gpa, uint64(n))
		p, gpa = p[n:], gpa+uint64(n)
	}
	return nil
}

// contains tells whether all n bytes from gpa on are RAM.
func (m *Memory) contains(gpa, n uint64) bool {
	if gpa+n < gpa {
		return false
	}
	for n > 0 {
		r := m.find(gpa)
		if r == nil {
			return false
		}
		step := min(n, r.End()-gpa)
		gpa, n = gpa+step, n-step
	}
	return true
}

// TrackDirty starts or stops keeping MarkDirty's marks. KVM sees what vCPUs
// write; these marks add what devices write.
func (m *Memory) TrackDirty(on bool) {
	for _, r := range m.regions {
		if !on {
			r.dirty.Store(nil)
			continue
		}
		marks := make([]atomic.Uint64, (r.Size/PageSize+63)/64)
		r.dirty.Store(&marks)
	}
}

// MarkDirty records that a device wrote n bytes from gpa on, which lie in one
// region; what passes its end is ignored. It does nothing while dirty pages are
// not tracked, or outside RAM.
func (m *Memory) MarkDirty(gpa, n uint64) {
	r := m.find(gpa)
	if r == nil || n == 0 {
		return
	}
	marks := r.dirty.Load()
	if marks == nil {
		return
	}
	first := (gpa - r.GPA) / PageSize
	last := (gpa - r.GPA + min(n, r.End()-gpa) - 1) / PageSize
	for p := first; p <= last; p++ {
		(*marks)[p/64].Or(1 << (p % 64))
	}
}

// TakeDirty calls f for each marked page, ascending, and clears its mark.
func (m *Memory) TakeDirty(f func(gpa uint64)) {
	for _, r := range m.regions {
		marks := r.dirty.Load()
		if marks == nil {
			continue
		}
		for i := range *marks {
			if (*marks)[i].Load() == 0 {
				continue // an exchange costs far more
			}
			word := (*marks)[i].Swap(0)
			for word != 0 {
				bit := bits.TrailingZeros64(word)
				word &= word - 1
				f(r.GPA + uint64(i*64+bit)*PageSize)
			}
		}
	}
}

// Discard gives the pages that lie wholly inside n bytes from gpa on back to
// the host; the guest reads them as zero. It is what a balloon does.
func (m *Memory) Discard(gpa, n uint64) error {
	r := m.find(gpa)
	if r == nil || n > r.Size-(gpa-r.GPA) {
		return outOfBounds(gpa, n)
	}
	first := (gpa - r.GPA + PageSize - 1) &^ (PageSize - 1)
	last := (gpa - r.GPA + n) &^ (PageSize - 1)
	if first >= last {
		return nil
	}
	if err := m.Touch(r.GPA+first, last-first); err != nil {
		return err
	}
	if err := unix.Fallocate(m.fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, int64(r.Offset+first), int64(last-first)); err != nil {
		return fmt.Errorf("give back %d bytes at GPA %#x: %w", last-first, r.GPA+first, err)
	}
	m.MarkDirty(r.GPA+first, last-first)
	return nil
}
