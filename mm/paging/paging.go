// Package paging reads x86-64 guest page tables (Intel SDM volume 3, 4.5 "4-level
// paging and 5-level paging"), both ways: Walker tells where a guest-virtual
// address (GVA) lies, Map tells for all of RAM where the guest sees it and in
// which order it thinks of it.
//
// The tables belong to the guest, which may change them while they are read and
// may fill them with anything. Whatever it does, the work is bounded: see
// MaxRoots, PagesPerTable and LinearRun.
package paging

import (
	"encoding/binary"
	"errors"

	"github.com/gnomon-vmm/gnomon/mm/guestmem"
)

// Memory is what holds the tables: a machine's RAM, or a checkpoint of it.
type Memory interface {
	// Read fills p from gpa on, or fails when not all of it is RAM.
	Read(gpa uint64, p []byte) error
}

// Errors, wrapped with the address and the level of table they concern.
var (
	ErrNotCanonical = errors.New("guest-virtual address is not canonical")
	ErrNotPresent   = errors.New("guest-virtual address is not mapped")
	ErrReserved     = errors.New("page-table entry has reserved bits set")
	ErrTable        = errors.New("page table cannot be read")
	ErrRAM          = errors.New("bad layout of RAM")
)

// Root is an address space: the page that holds its top-level table.
type Root struct {
	GPA       uint64 // page aligned
	FiveLevel bool   // the table is a PML5 (CR4.LA57), not a PML4
}

// RootOf is the address space that a CR3 value selects; la57 is CR4.LA57. The
// PCID and the flags in CR3 are left out.
func RootOf(cr3 uint64, la57 bool) Root {
	return Root{GPA: cr3 & addressMask, FiveLevel: la57}
}

// Bits of control registers (Intel SDM volume 3, 2.5 and 2.2.1).
const (
	cr0PG   = 1 << 31
	cr4LA57 = 1 << 12
	eferLMA = 1 << 10
)

// RootOfCPU is RootOf by a vCPU's control registers. It reports false while the
// vCPU does not use 4- or 5-level paging: then it has no GVAs that this package
// could read.
func RootOfCPU(cr0, cr3, cr4, efer uint64) (Root, bool) {
	if cr0&cr0PG == 0 || efer&eferLMA == 0 {
		return Root{}, false
	}
	return RootOf(cr3, cr4&cr4LA57 != 0), true
}

// levels is the number of tables between the root and a 4 KiB page.
func (r Root) levels() int {
	if r.FiveLevel {
		return 5
	}
	return 4
}

// canonical tells whether gva's upper bits all equal its top translated bit.
func (r Root) canonical(gva uint64) bool {
	return r.extend(gva) == gva
}

// extend copies the top translated bit into those above it.
func (r Root) extend(gva uint64) uint64 {
	unused := 64 - shift(r.levels()+1)
	return uint64(int64(gva<<unused) >> unused)
}

const (
	pageShift = 12
	pageSize  = guestmem.PageSize

	entriesPerTable = 512
	entrySize       = 8
	// kernelHalf is the first entry of a root that maps upper-half addresses.
	kernelHalf = entriesPerTable / 2
)

// shift is how far right a GVA goes to give the index into a table of the given
// level: 1 holds 4 KiB pages, 5 is a PML5.
func shift(level int) int { return pageShift + 9*(level-1) }

// table is a page table as read from memory.
type table [pageSize]byte

func (t *table) entry(i int) entry {
	return entry(binary.LittleEndian.Uint64(t[i*entrySize : i*entrySize+entrySize]))
}

// entry is a page-table entry of any level (Intel SDM volume 3, tables 4-15 to 4-20).
type entry uint64

const (
	present   entry = 1 << 0
	writable  entry = 1 << 1
	user      entry = 1 << 2
	accessed  entry = 1 << 5
	dirty     entry = 1 << 6
	large     entry = 1 << 7 // levels 2 and 3: this maps a page
	noExecute entry = 1 << 63

	addressMask = 1<<52 - pageSize
)

// address is the GPA of the table or of the 4 KiB page that e points to.
func (e entry) address() uint64 { return uint64(e) & addressMask }

// page is the GPA of the page of the given level that e maps.
func (e entry) page(level int) uint64 { return e.address() &^ (1<<shift(level) - 1) }

// kind is what an entry is for the processor.
type kind int

const (
	absent   kind = iota
	subtable      // points to a table of the next lower level
	leaf          // maps a page
	reserved      // present, but a walk that meets it faults
)

func (e entry) kind(level int) kind {
	switch {
	case e&present == 0:
		return absent
	case level == 1:
		return leaf
	case e&large == 0:
		return subtable
	case level > 3:
		return reserved
	case e.address()&(1<<shift(level)-1)&^(1<<pageShift) != 0: // bit 12 is PAT
		return reserved
	}
	return leaf
}
