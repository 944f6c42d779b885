package paging

import (
	"encoding/binary"
	"fmt"
)

// Translation is where a GVA lies, and what the guest may do there.
type Translation struct {
	GPA  uint64 // of the very byte; not necessarily RAM
	Size uint64 // of the page that maps it: 4 KiB, 2 MiB or 1 GiB

	Writable  bool // by every level
	User      bool // by every level
	NoExecute bool // by any level; it counts when EFER.NXE is set
	Accessed  bool // the entry that maps the page says so
	Dirty     bool // the entry that maps the page says so
}

// Walker translates GVAs. It is not for use by several goroutines at once.
type Walker struct {
	mem Memory
	buf [entrySize]byte
}

// NewWalker returns a Walker over tables in mem.
func NewWalker(mem Memory) *Walker { return &Walker{mem: mem} }

// Walk translates a GVA as a processor would, without setting accessed or dirty
// bits. It fails with ErrNotCanonical, ErrNotPresent, ErrReserved or ErrTable.
func (w *Walker) Walk(root Root, gva uint64) (Translation, error) {
	if !root.canonical(gva) {
		return Translation{}, fmt.Errorf("%w: %#x", ErrNotCanonical, gva)
	}
	at := root.GPA
	all, some := writable|user, entry(0)
	for level := root.levels(); ; level-- {
		index := gva >> shift(level) % entriesPerTable
		if err := w.mem.Read(at+index*entrySize, w.buf[:]); err != nil {
			return Translation{}, fmt.Errorf("%w: level %d at GPA %#x for GVA %#x: %w", ErrTable, level, at, gva, err)
		}
		e := entry(binary.LittleEndian.Uint64(w.buf[:]))
		all, some = all&e, some|e
		switch e.kind(level) {
		case absent:
			return Translation{}, fmt.Errorf("%w: %#x, at level %d", ErrNotPresent, gva, level)
		case reserved:
			return Translation{}, fmt.Errorf("%w: %#x at level %d for GVA %#x", ErrReserved, uint64(e), level, gva)
		case subtable:
			at = e.address()
		case leaf:
			size := uint64(1) << shift(level)
			return Translation{
				GPA:       e.page(level) | gva&(size-1),
				Size:      size,
				Writable:  all&writable != 0,
				User:      all&user != 0,
				NoExecute: some&noExecute != 0,
				Accessed:  e&accessed != 0,
				Dirty:     e&dirty != 0,
			}, nil
		}
	}
}
