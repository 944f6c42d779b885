package partition

import (
	"encoding/binary"
	"fmt"
)

const (
	mbrTable     = 446 // where in the sector the four entries are
	mbrEntry     = 16
	mbrSignature = 510
	mbrID        = 440

	typeProtective = 0xee

	// maxLogical bounds a chain of logical partitions.
	maxLogical = 256
)

// entry is one of an MBR, in sectors.
type entry struct {
	status       byte
	kind         byte
	first, count int64
}

func (e entry) isExtended() bool { return e.kind == 0x05 || e.kind == 0x0f || e.kind == 0x85 }

func entries(sector *[mbrSector]byte) (all [4]entry) {
	for i := range all {
		p := sector[mbrTable+i*mbrEntry:][:mbrEntry]
		all[i] = entry{status: p[0], kind: p[4], first: le32(p[8:]), count: le32(p[12:])}
	}
	return all
}

func signed(sector *[mbrSector]byte) bool {
	return binary.LittleEndian.Uint16(sector[mbrSignature:]) == 0xaa55
}

// protective tells that an MBR only keeps those who do not know GPT away.
func protective(sector *[mbrSector]byte) bool {
	if !signed(sector) {
		return false
	}
	for _, e := range entries(sector) {
		if e.kind == typeProtective {
			return true
		}
	}
	return false
}

// mbr reads the table whose first sector is given.
func (d *disk) mbr(sector *[mbrSector]byte) (*Table, error) {
	if !signed(sector) {
		return nil, fmt.Errorf("%w: no signature at %d", ErrNone, mbrSignature)
	}
	t := &Table{Kind: MBR, ID: fmt.Sprintf("%08x", le32(sector[mbrID:])), SectorSize: mbrSector}
	var extended *entry
	for i, e := range entries(sector) {
		if e.status&0x7f != 0 {
			// Boot code, or the boot sector of a file system, not a table.
			return nil, fmt.Errorf("%w: status %#x at %d", ErrNone, e.status, mbrTable+i*mbrEntry)
		}
		switch {
		case e.kind == 0 || e.count == 0:
		case e.isExtended():
			if extended != nil {
				return nil, fmt.Errorf("%w: a second extended partition at %d", ErrCorrupt, mbrTable+i*mbrEntry)
			}
			extended = &e
		default:
			t.add(i+1, e, 0)
		}
	}
	if extended != nil {
		// The primary ones must not be within it; it is added to be checked only.
		bounds := Partition{Number: 0, Offset: extended.first * mbrSector, Size: extended.count * mbrSector}
		primary := Table{Partitions: append([]Partition{bounds}, t.Partitions...)}
		if err := primary.check(d.size); err != nil {
			return nil, err
		}
		if err := d.logical(t, *extended); err != nil {
			return nil, err
		}
	}
	if len(t.Partitions) == 0 && extended == nil {
		return nil, fmt.Errorf("%w: the table at %d is empty", ErrNone, mbrTable)
	}
	return t, nil
}

// add takes over an entry that counts from sector base on.
func (t *Table) add(number int, e entry, base int64) {
	t.Partitions = append(t.Partitions, Partition{
		Number: number,
		Offset: (base + e.first) * mbrSector, Size: e.count * mbrSector,
		Type: fmt.Sprintf("%02x", e.kind),
	})
}

// logical follows the chain of tables in an extended partition. Each has the
// partition that follows it, counted from itself, and the next table, counted
// from the first.
func (d *disk) logical(t *Table, extended entry) error {
	end := extended.first + extended.count
	number := 5
	for at, previous := extended.first, int64(0); ; {
		off := at * mbrSector
		var sector [mbrSector]byte
		if err := d.read(sector[:], off); err != nil {
			return err
		}
		if !signed(&sector) {
			if previous == 0 {
				return nil // an extended partition in which nothing was made yet
			}
			return fmt.Errorf("%w: no signature at %d", ErrCorrupt, off+mbrSignature)
		}
		var next *entry
		for i, e := range entries(&sector) {
			switch {
			case e.kind == 0 || e.count == 0:
			case e.isExtended():
				if next == nil {
					next = &e
				}
			case at+e.first <= at || e.count > end-at-e.first:
				return fmt.Errorf("%w: the partition at %d passes the extended one: %d sectors at %d", ErrCorrupt, off+mbrTable+int64(i)*mbrEntry, e.count, at+e.first)
			default:
				if number-5 >= maxLogical {
					return fmt.Errorf("%w: more than %d logical partitions at %d", ErrCorrupt, maxLogical, off)
				}
				t.add(number, e, at)
				number++
			}
		}
		if next == nil {
			return nil
		}
		previous, at = at, extended.first+next.first
		// Linux allows going back; no tool makes it, and it would allow loops.
		if at <= previous || at >= end {
			return fmt.Errorf("%w: the table at %d names a next one at %d, which is not behind it in the extended partition", ErrCorrupt, off, at*mbrSector)
		}
	}
}
