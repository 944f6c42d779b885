package paging

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/mm/guestmem"
)

// Bounds on what FindRoots takes from memory that may hold anything.
const (
	// MaxRoots is how many address spaces are returned at most.
	MaxRoots = 1 << 15
	// maxPatterns is how many different upper halves are looked for; the kernels
	// of all vCPUs of a well-behaved guest share one (two, where user programs
	// run on tables that hide the kernel).
	maxPatterns = 8
)

// pattern is the upper half of a known root, by which others are recognised.
type pattern struct {
	root    Root
	half    [kernelHalf]entry // as compared
	count   int               // of entries that are present
	witness int               // of half: the entry to look at first
}

// compared is what two roots' entries for the same table agree in: the processor
// sets accessed bits, kernels use the ignored ones.
const compared = present | addressMask

// FindRoots returns the given roots (those of the vCPUs) without repetition, and
// after them further address spaces, by ascending GPA: pages in the given ranges
// that look like a top-level table whose upper half, where kernels map
// themselves, shares most entries with that of one of the given roots. A guest
// whose roots map nothing there has no others that could be recognised.
//
// It looks at every page in ranges once: leave out what was never written (see
// Populated). Of roots that other processors are just changing it may miss some.
func FindRoots(mem Memory, ranges []guestmem.Range, cpus ...Root) ([]Root, error) {
	r, err := newRAM(ranges)
	if err != nil {
		return nil, err
	}
	var roots []Root
	for _, root := range cpus {
		if len(roots) < MaxRoots && !slices.Contains(roots, root) {
			roots = append(roots, root)
		}
	}
	f := finder{mem: mem, ram: r}
	for _, root := range roots {
		if err := f.learn(root); err != nil {
			return nil, err
		}
	}
	known := make(map[uint64]struct{}, len(roots))
	for _, root := range roots {
		known[root.GPA] = struct{}{}
	}
	for _, p := range r.parts {
		for pfn := p.first; pfn < p.end && len(f.patterns) > 0 && len(roots) < MaxRoots; pfn++ {
			root, ok, err := f.match(pfn * pageSize)
			if err != nil {
				return nil, err
			}
			if _, given := known[root.GPA]; ok && !given {
				roots = append(roots, root)
			}
		}
	}
	return roots, nil
}

type finder struct {
	mem      Memory
	ram      *ram
	patterns []pattern
	buf      table
	word     [entrySize]byte
}

func (f *finder) read(gpa uint64, p []byte) error {
	if err := f.mem.Read(gpa, p); err != nil {
		return fmt.Errorf("%w: look for roots at GPA %#x: %w", ErrTable, gpa, err)
	}
	return nil
}

// learn makes a pattern of a root, unless it is like one that is known.
func (f *finder) learn(root Root) error {
	if _, ok := f.ram.bit(root.GPA >> pageShift); !ok || len(f.patterns) == maxPatterns {
		return nil
	}
	if err := f.read(root.GPA, f.buf[:]); err != nil {
		return err
	}
	p := pattern{root: root, witness: -1}
	for i := range p.half {
		e := f.buf.entry(kernelHalf+i) & compared
		if e&present == 0 {
			continue
		}
		p.half[i] = e
		p.count++
		if e.address() != root.GPA { // a root that contains itself: each has another entry there
			p.witness = i
		}
	}
	if p.witness < 0 {
		return nil
	}
	for i := range f.patterns {
		if f.patterns[i].root.FiveLevel == root.FiveLevel && f.patterns[i].like(&f.buf) {
			return nil
		}
	}
	f.patterns = append(f.patterns, p)
	return nil
}

// match tells whether the page at gpa is a root.
func (f *finder) match(gpa uint64) (Root, bool, error) {
	for i := range f.patterns {
		p := &f.patterns[i]
		// Of nearly all pages this one word is all that is read.
		if err := f.read(gpa+uint64(kernelHalf+p.witness)*entrySize, f.word[:]); err != nil {
			return Root{}, false, err
		}
		if entry(binary.LittleEndian.Uint64(f.word[:]))&compared != p.half[p.witness] {
			continue
		}
		if err := f.read(gpa, f.buf[:]); err != nil {
			return Root{}, false, err
		}
		if p.like(&f.buf) && f.plausible(&f.buf) {
			return Root{GPA: gpa, FiveLevel: p.root.FiveLevel}, true, nil
		}
	}
	return Root{}, false, nil
}

// like tells whether t's upper half has three quarters of the pattern's entries
// and not as many others.
func (p *pattern) like(t *table) bool {
	shared, others := 0, 0
	for i, want := range &p.half {
		switch e := t.entry(kernelHalf+i) & compared; {
		case e&present == 0:
		case e == want:
			shared++
		default:
			others++
		}
	}
	return shared*4 >= p.count*3 && others < shared
}

// plausible tells whether t can be a root that is in use: all its entries point
// to tables in memory, and some user address is mapped. (Kernels leave their half
// in the tables of processes that have ended.)
func (f *finder) plausible(t *table) bool {
	if len(f.ram.parts) == 0 {
		return false
	}
	top := f.ram.parts[len(f.ram.parts)-1].end * pageSize
	used := false
	for i := range entriesPerTable {
		e := t.entry(i)
		if e&present == 0 {
			continue
		}
		if e&large != 0 || e.address() >= top {
			return false
		}
		used = used || i < kernelHalf
	}
	return used
}

// Populated returns the stretches of RAM that hold anything, as the memfd behind
// it tells. Reading the others would make the host allocate them; page tables
// are never there.
func Populated(m *guestmem.Memory) ([]guestmem.Range, error) {
	var ranges []guestmem.Range
	for _, r := range m.Regions() {
		from, end := int64(r.Offset), int64(r.Offset+r.Size)
		for from < end {
			data, err := unix.Seek(m.FD(), from, unix.SEEK_DATA)
			if errors.Is(err, unix.ENXIO) || err == nil && data >= end {
				break
			}
			var hole int64
			if err == nil {
				hole, err = unix.Seek(m.FD(), data, unix.SEEK_HOLE)
			}
			if err != nil {
				return nil, fmt.Errorf("find what RAM at GPA %#x holds: %w", r.GPA+uint64(from)-r.Offset, err)
			}
			from = min(hole, end)
			ranges = append(ranges, guestmem.Range{GPA: r.GPA + uint64(data) - r.Offset, Size: uint64(from - data)})
		}
	}
	return ranges, nil
}
