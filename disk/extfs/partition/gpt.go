package partition

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"slices"
	"unicode/utf16"
)

const (
	gptSignature  = "EFI PART"
	gptRevision   = 0x00010000
	gptHeaderSize = 92
	gptEntrySize  = 128

	// maxEntries and maxTable bound a table's memory; usual are 128 entries.
	maxEntries = 16384
	maxTable   = 4 << 20
)

// header is a GPT header, section 5.3.2; sectors where nothing else is said.
type header struct {
	self              int64
	firstUse, lastUse int64
	id                [16]byte
	table             int64
	count, size       int64 // entries, and bytes of each
	tableChecksum     uint32
}

// gpt reads the table at the disk's beginning, or that at its end if the first
// is damaged.
func (d *disk) gpt() (*Table, error) {
	// The header is in the second sector, of whatever size that is.
	var errs []error
	for _, sector := range [...]int64{512, 4096} {
		t, err := d.gptAt(sector, 1)
		if err == nil {
			return t, nil
		}
		if errors.Is(err, ErrRead) {
			return nil, err
		}
		errs = append(errs, err)
	}
	for _, sector := range [...]int64{512, 4096} {
		t, err := d.gptAt(sector, d.size/sector-1)
		if err == nil {
			t.Backup = true
			return t, nil
		}
		if errors.Is(err, ErrRead) {
			return nil, err
		}
		errs = append(errs, err)
	}
	return nil, errors.Join(errs...)
}

// gptAt reads the table whose header is in a sector.
func (d *disk) gptAt(sectorSize, at int64) (*Table, error) {
	h, err := d.gptHeader(sectorSize, at)
	if err != nil {
		return nil, err
	}
	raw := make([]byte, h.count*h.size)
	if err := d.read(raw, h.table*sectorSize); err != nil {
		return nil, err
	}
	if got := crc32.ChecksumIEEE(raw); got != h.tableChecksum {
		return nil, fmt.Errorf("%w: entries at %d have checksum %#x, the header at %d says %#x", ErrCorrupt, h.table*sectorSize, got, at*sectorSize, h.tableChecksum)
	}
	t := &Table{Kind: GPT, ID: uuid(h.id), SectorSize: sectorSize}
	for i := range h.count {
		e := raw[i*h.size:][:gptEntrySize]
		if [16]byte(e) == ([16]byte{}) {
			continue
		}
		first, last := binary.LittleEndian.Uint64(e[32:]), binary.LittleEndian.Uint64(e[40:])
		if first < uint64(h.firstUse) || last < first || last > uint64(h.lastUse) {
			return nil, fmt.Errorf("%w: entry %d at %d: sectors %d to %d, of %d to %d", ErrCorrupt, i+1, h.table*sectorSize+i*h.size, first, last, h.firstUse, h.lastUse)
		}
		t.Partitions = append(t.Partitions, Partition{
			Number: int(i) + 1,
			Offset: int64(first) * sectorSize, Size: int64(last-first+1) * sectorSize,
			Type: uuid([16]byte(e)), ID: uuid([16]byte(e[16:])), Name: name(e[56:]),
		})
	}
	return t, nil
}

func (d *disk) gptHeader(sectorSize, at int64) (*header, error) {
	off := at * sectorSize
	p := make([]byte, sectorSize)
	if err := d.read(p, off); err != nil {
		return nil, err
	}
	corrupt := func(format string, args ...any) error {
		return fmt.Errorf("%w: header at %d: %w", ErrCorrupt, off, fmt.Errorf(format, args...))
	}
	if !bytes.HasPrefix(p, []byte(gptSignature)) {
		return nil, corrupt("no signature")
	}
	if rev := le32(p[8:]); rev != gptRevision {
		return nil, corrupt("revision %#x", rev)
	}
	size := le32(p[12:])
	if size < gptHeaderSize || size > sectorSize {
		return nil, corrupt("%d bytes", size)
	}
	sum := binary.LittleEndian.Uint32(p[16:])
	clear(p[16:20])
	if got := crc32.ChecksumIEEE(p[:size]); got != sum {
		return nil, corrupt("checksum %#x, computed %#x", sum, got)
	}
	h := &header{
		id:    [16]byte(p[56:]),
		count: le32(p[80:]), size: le32(p[84:]),
		tableChecksum: binary.LittleEndian.Uint32(p[88:]),
	}
	sectors := d.size / sectorSize
	for _, field := range [...]struct {
		at   int
		to   *int64
		name string
	}{
		{24, &h.self, "its own sector"},
		{40, &h.firstUse, "first usable sector"},
		{48, &h.lastUse, "last usable sector"},
		{72, &h.table, "sector of entries"},
	} {
		v := binary.LittleEndian.Uint64(p[field.at:])
		if v >= uint64(sectors) {
			return nil, corrupt("%s %d, of %d", field.name, v, sectors)
		}
		*field.to = int64(v)
	}
	if h.self != at {
		return nil, corrupt("says that it is in sector %d", h.self)
	}
	if h.size < gptEntrySize || h.size&(h.size-1) != 0 || h.count == 0 || h.count > maxEntries || h.count*h.size > maxTable {
		return nil, corrupt("%d entries of %d bytes", h.count, h.size)
	}
	return h, nil
}

// uuid prints one whose first three parts are little endian.
func uuid(u [16]byte) string {
	return fmt.Sprintf("%08x-%04x-%04x-%x-%x", binary.LittleEndian.Uint32(u[:]), binary.LittleEndian.Uint16(u[4:]), binary.LittleEndian.Uint16(u[6:]), u[8:10], u[10:])
}

// name is a name in UTF-16, ended by a zero or by its field.
func name(p []byte) string {
	var units []uint16
	for ; len(p) >= 2; p = p[2:] {
		u := binary.LittleEndian.Uint16(p)
		if u == 0 {
			break
		}
		units = append(units, u)
	}
	return string(utf16.Decode(units))
}

// ascending are the partitions by their offset.
func (t *Table) ascending() []Partition {
	return slices.SortedFunc(slices.Values(t.Partitions), func(a, b Partition) int { return cmp.Compare(a.Offset, b.Offset) })
}
