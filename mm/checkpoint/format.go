// Package checkpoint is the file that holds a machine's memory and state; its
// format is described in docs/checkpoint-format.md.
//
// A Writer fills storage blocks of up to 64 pages in the order in which it is
// given them, which should be that in which the guest sees its memory, so that
// a block is a neighbourhood. A Reader finds any page of a chain of checkpoints
// and reads blocks. Whatever a file holds, a Reader refuses it or reads what
// was written.
package checkpoint

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"strings"

	"github.com/gnomon-vmm/gnomon/mm/guestmem"
)

// PageSize is the unit of memory in a checkpoint.
const PageSize = guestmem.PageSize

// BlockPages is the most pages that a storage block holds.
const BlockPages = 64

// Errors, wrapped with the file, the part of it and the offset they concern.
var (
	ErrFormat  = errors.New("not a checkpoint file")
	ErrDamaged = errors.New("checkpoint file is damaged")
	ErrVersion = errors.New("checkpoint file of a newer Gnomon")
	ErrParent  = errors.New("parent checkpoint does not fit")
	ErrMemory  = errors.New("bad memory layout")
	ErrMissing = errors.New("checkpoint has no such section")
	ErrExists  = errors.New("file exists")
	ErrNeeded  = errors.New("checkpoint is needed by another")
)

// ID tells checkpoints apart.
type ID [16]byte

func newID() (id ID) {
	rand.Read(id[:]) // never fails
	return id
}

func (id ID) String() string { return hex.EncodeToString(id[:]) }

// Sizes and limits of the format.
const (
	magic       = "GNOMONCK"
	footerMagic = "GNOMONCE"
	version     = 1

	headerSize = 4096
	footerSize = 64

	maxRanges   = 64
	maxMemory   = 1 << 41 // bytes: where RAM must end
	maxPath     = 2048
	maxFeatures = 16 // that have a name in the header
	maxChain    = 64
	maxName     = 255
	maxSection  = 64 << 20
	maxCount    = 1 << 16 // of sections

	// A chunk of the page index is for this many pages, one of the block index
	// for this many blocks. A chunk is read when something of it is wanted first:
	// larger ones make that take longer, smaller ones make more reads.
	chunkPages  = 8192
	chunkBlocks = 64

	blockBytes = BlockPages * PageSize
)

// Feature bits, as in qcow2: a reader refuses a file with an incompatible one
// that it does not know, and ignores a compatible one. Who changes a file clears
// the autoclear ones that it does not know; nothing changes files today. None is
// defined yet.
const knownIncompatible = 0

// Kinds of feature bits, in the table of their names.
const (
	featureIncompatible = iota
	featureCompatible
	featureAutoclear
)

// How bytes are stored.
const (
	codecRaw = 0
	codecS2  = 1
)

// Values of an entry of the page index; from firstSlot on it is the page's
// block and slot.
const (
	entryInherit = 0 // as in the parent; zero where there is none
	entryZero    = 1
	firstSlot    = 64
)

// slotEntry names a slot of one of the file's own blocks. Blocks count from 1
// here, so that no slot is below firstSlot.
func slotEntry(block uint32, slot int) uint32 { return (block+1)*BlockPages + uint32(slot) }

// maxBlocks keeps slotEntry within 32 bits.
const maxBlocks = 1<<26 - 2

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func checksum(parts ...[]byte) (sum uint32) {
	for _, b := range parts {
		sum = crc32.Update(sum, castagnoli, b)
	}
	return sum
}

var le = binary.LittleEndian

// header is the first page of the file. Offsets: 0 magic, 8 version, 12 size of
// the header, 16/24/32 incompatible, compatible and autoclear features, 40 id,
// 56 parent's id, 72 page size, 76 pages a block, 80 number of ranges, 84 length
// of the parent's path, 88 number of features' names, 92 zero, 96 the ranges
// (GPA, size), then the names of features (1 byte kind, 1 byte bit, 46 bytes name
// that zeros fill up), then the path; zeros; the last 4 bytes are the CRC32C of
// what is before them.
type header struct {
	incompatible, compatible, autoclear uint64
	id, parentID                        ID
	ranges                              []guestmem.Range
	features                            []feature
	parent                              string // path relative to the file's directory; "": none
}

// feature names a feature bit, for a reader that does not know it.
type feature struct {
	kind, bit byte
	name      string
}

const (
	headerFixed = 96
	featureSize = 48
)

func (h *header) encode() ([]byte, error) {
	b := make([]byte, headerSize)
	if len(h.parent) > maxPath {
		return nil, fmt.Errorf("%w: its path from here has %d bytes; at most %d are possible", ErrParent, len(h.parent), maxPath)
	}
	copy(b, magic)
	le.PutUint32(b[8:], version)
	le.PutUint32(b[12:], headerSize)
	le.PutUint64(b[16:], h.incompatible)
	le.PutUint64(b[24:], h.compatible)
	le.PutUint64(b[32:], h.autoclear)
	copy(b[40:], h.id[:])
	copy(b[56:], h.parentID[:])
	le.PutUint32(b[72:], PageSize)
	le.PutUint32(b[76:], BlockPages)
	le.PutUint32(b[80:], uint32(len(h.ranges)))
	le.PutUint32(b[84:], uint32(len(h.parent)))
	le.PutUint32(b[88:], uint32(len(h.features)))
	at := headerFixed
	for _, r := range h.ranges {
		le.PutUint64(b[at:], r.GPA)
		le.PutUint64(b[at+8:], r.Size)
		at += 16
	}
	for _, f := range h.features {
		b[at], b[at+1] = f.kind, f.bit
		copy(b[at+2:at+featureSize], f.name)
		at += featureSize
	}
	copy(b[at:], h.parent)
	le.PutUint32(b[headerSize-4:], checksum(b[:headerSize-4]))
	return b, nil
}

func decodeHeader(b []byte) (*header, error) {
	if len(b) < headerSize || string(b[:8]) != magic {
		return nil, ErrFormat
	}
	if v := le.Uint32(b[8:]); v != version {
		return nil, fmt.Errorf("%w: format version %d; this one reads %d", ErrVersion, v, version)
	}
	damaged := func(what string) error {
		return fmt.Errorf("%w: header at offset 0: %s", ErrDamaged, what)
	}
	if le.Uint32(b[headerSize-4:]) != checksum(b[:headerSize-4]) {
		return nil, damaged("wrong checksum")
	}
	h := &header{incompatible: le.Uint64(b[16:]), compatible: le.Uint64(b[24:]), autoclear: le.Uint64(b[32:])}
	copy(h.id[:], b[40:])
	copy(h.parentID[:], b[56:])
	ranges, path, features := le.Uint32(b[80:]), le.Uint32(b[84:]), le.Uint32(b[88:])
	if le.Uint32(b[12:]) != headerSize || ranges > maxRanges || path > maxPath || features > maxFeatures {
		return nil, damaged("bad sizes")
	}
	at := headerFixed
	for range ranges {
		h.ranges = append(h.ranges, guestmem.Range{GPA: le.Uint64(b[at:]), Size: le.Uint64(b[at+8:])})
		at += 16
	}
	for range features {
		name := bytes.TrimRight(b[at+2:at+featureSize], "\x00")
		h.features = append(h.features, feature{kind: b[at], bit: b[at+1], name: string(name)})
		at += featureSize
	}
	if err := h.refuseUnknown(); err != nil {
		return nil, err
	}
	h.parent = string(b[at : at+int(path)])
	if le.Uint32(b[72:]) != PageSize || le.Uint32(b[76:]) != BlockPages || le.Uint32(b[92:]) != 0 || strings.Contains(h.parent, "\x00") {
		return nil, damaged("bad sizes")
	}
	for _, c := range b[at+int(path) : headerSize-4] {
		if c != 0 {
			return nil, damaged("something follows its fields")
		}
	}
	if _, err := newLayout(h.ranges); err != nil {
		return nil, fmt.Errorf("%w: header at offset 0: %w", ErrDamaged, err)
	}
	return h, nil
}

// refuseUnknown names the incompatible features that this program does not know.
func (h *header) refuseUnknown() error {
	unknown := h.incompatible &^ knownIncompatible
	if unknown == 0 {
		return nil
	}
	var names []string
	for bit := range byte(64) {
		if unknown&(1<<bit) == 0 {
			continue
		}
		name := fmt.Sprintf("bit %d", bit)
		for _, f := range h.features {
			if f.kind == featureIncompatible && f.bit == bit {
				name = fmt.Sprintf("%q", f.name)
			}
		}
		names = append(names, name)
	}
	return fmt.Errorf("%w: it needs features that this one does not know: %s", ErrVersion, strings.Join(names, ", "))
}

// footer is the last 64 bytes: 0 magic, 8 id, 24 offset, 32 length and 36
// CRC32C of the directory, 40 size of the file, zeros, at 60 the CRC32C of what
// is before it. It is written last: a file without one was never completed.
type footer struct {
	id        ID
	directory extent
	size      uint64
}

func (f *footer) encode() []byte {
	b := make([]byte, footerSize)
	copy(b, footerMagic)
	copy(b[8:], f.id[:])
	le.PutUint64(b[24:], f.directory.offset)
	le.PutUint32(b[32:], f.directory.length)
	le.PutUint32(b[36:], f.directory.sum)
	le.PutUint64(b[40:], f.size)
	le.PutUint32(b[60:], checksum(b[:60]))
	return b
}

func decodeFooter(b []byte, size uint64) (*footer, error) {
	at := size - footerSize
	if string(b[:8]) != footerMagic {
		return nil, fmt.Errorf("%w: footer at offset %d is missing: the file is cut off, or was never completed", ErrDamaged, at)
	}
	if le.Uint32(b[60:]) != checksum(b[:60]) {
		return nil, fmt.Errorf("%w: footer at offset %d: wrong checksum", ErrDamaged, at)
	}
	f := &footer{size: le.Uint64(b[40:])}
	copy(f.id[:], b[8:])
	f.directory = extent{offset: le.Uint64(b[24:]), length: le.Uint32(b[32:]), sum: le.Uint32(b[36:])}
	if f.size != size || le.Uint64(b[48:]) != 0 || le.Uint32(b[56:]) != 0 ||
		f.directory.offset < headerSize || f.directory.offset > at || f.directory.end() != at {
		return nil, fmt.Errorf("%w: footer at offset %d: bad sizes", ErrDamaged, at)
	}
	return f, nil
}

// extent is a stretch of the file.
type extent struct {
	offset uint64
	length uint32 // bytes
	sum    uint32 // their CRC32C
}

func (e extent) end() uint64 { return e.offset + uint64(e.length) }

// layout numbers the pages of RAM without the holes between its ranges.
type layout struct {
	ranges []guestmem.Range
	first  []uint64 // index of each range's first page
	pages  uint64
}

func newLayout(ranges []guestmem.Range) (*layout, error) {
	l := &layout{ranges: ranges}
	end := uint64(0)
	if len(ranges) == 0 || len(ranges) > maxRanges {
		return nil, fmt.Errorf("%w: %d ranges; 1 to %d are possible", ErrMemory, len(ranges), maxRanges)
	}
	for _, r := range ranges {
		if r.Size == 0 || r.GPA%PageSize != 0 || r.Size%PageSize != 0 || r.GPA < end || r.GPA > maxMemory || r.Size > maxMemory-r.GPA {
			return nil, fmt.Errorf("%w: %d bytes at GPA %#x: ranges must be whole pages, ascending, disjoint and below 2 TiB", ErrMemory, r.Size, r.GPA)
		}
		end = r.GPA + r.Size
		l.first = append(l.first, l.pages)
		l.pages += r.Size / PageSize
	}
	return l, nil
}

// index returns the index of a page, by its number (GPA / PageSize).
func (l *layout) index(pfn uint64) (uint64, bool) {
	for i, r := range l.ranges {
		if start := r.GPA / PageSize; pfn >= start && pfn-start < r.Size/PageSize {
			return l.first[i] + pfn - start, true
		}
	}
	return 0, false
}

// pfn is the page number of an index below pages.
func (l *layout) pfn(index uint64) uint64 {
	for i := len(l.first) - 1; ; i-- {
		if index >= l.first[i] {
			return l.ranges[i].GPA/PageSize + index - l.first[i]
		}
	}
}

func (l *layout) chunks() uint64 { return (l.pages + chunkPages - 1) / chunkPages }
