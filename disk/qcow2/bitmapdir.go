package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"

	"github.com/gnomon-vmm/gnomon/disk/bitmap"
)

// Persistent dirty bitmaps (specification, "Bitmaps"): the header extension points
// to a directory, each of whose entries to a table of clusters of bits.

// ErrBitmap is a persistent bitmap that is not there, cannot be used, or cannot be
// made.
var ErrBitmap = errors.New("bitmap")

const (
	bitmapsExtBytes    = 24
	bitmapEntryBytes   = 24 // of a directory entry, without its name
	maxBitmaps         = 65535
	maxBitmapName      = 1023
	maxBitmapDirectory = 64 << 20

	bitmapInUse = 1 << 0 // not stored since the disk was written
	bitmapAuto  = 1 << 1 // enabled

	bitmapAllOnes = 1 // entry of a bitmap's table without a cluster: all bits are set
)

// bitmapsExt is the header extension.
type bitmapsExt struct {
	at        int64 // of its body, in the file
	count     uint32
	dirSize   int64
	dirOffset int64
}

func parseBitmapsExt(body []byte, at int64) *bitmapsExt {
	be := binary.BigEndian
	return &bitmapsExt{at: at, count: be.Uint32(body), dirSize: int64(be.Uint64(body[8:])), dirOffset: int64(be.Uint64(body[16:]))}
}

func (e *bitmapsExt) encode() []byte {
	be := binary.BigEndian
	b := be.AppendUint32(nil, e.count)
	b = be.AppendUint32(b, 0)
	b = be.AppendUint64(b, uint64(e.dirSize))
	return be.AppendUint64(b, uint64(e.dirOffset))
}

// bitmapEntry is an entry of the directory.
type bitmapEntry struct {
	name        string
	flags       uint32
	granularity int64
	tableAt     int64
	tableSize   int64 // entries
	flagsAt     int64 // where in the file flags is
}

func (e *bitmapEntry) append(b []byte) []byte {
	be := binary.BigEndian
	b = be.AppendUint64(b, uint64(e.tableAt))
	b = be.AppendUint32(b, uint32(e.tableSize))
	b = be.AppendUint32(b, e.flags)
	bits := byte(0)
	for 1<<bits < e.granularity {
		bits++
	}
	b = append(b, 1, bits) // a dirty tracking bitmap
	b = be.AppendUint16(b, uint16(len(e.name)))
	b = be.AppendUint32(b, 0)
	b = append(b, e.name...)
	return append(b, make([]byte, -len(b)&7)...)
}

// consistentBitmaps tells that the image has bitmaps which whoever wrote it knew of.
func (h *Header) consistentBitmaps() bool {
	return h.Bitmaps != nil && h.Autoclear&AutoclearBitmaps != 0
}

// bitmapDirectory reads the directory.
func (n *Node) bitmapDirectory() ([]bitmapEntry, error) {
	if !n.header.consistentBitmaps() {
		return nil, nil
	}
	x := n.header.Bitmaps
	switch {
	case x.count == 0 || x.count > maxBitmaps:
		return nil, fmt.Errorf("%w: %d bitmaps", ErrCorrupt, x.count)
	case x.dirSize < bitmapEntryBytes || x.dirSize > maxBitmapDirectory || !n.within(x.dirOffset, x.dirSize):
		return nil, fmt.Errorf("%w: directory of bitmaps of %d bytes at %#x", ErrCorrupt, x.dirSize, x.dirOffset)
	}
	b := make([]byte, x.dirSize)
	if err := n.file.Readv([][]byte{b}, x.dirOffset); err != nil {
		return nil, fmt.Errorf("read directory of bitmaps: %w", err)
	}
	var all []bitmapEntry
	for at := int64(0); at < x.dirSize; {
		e, length, err := n.bitmapEntry(b[at:])
		if err != nil {
			return nil, fmt.Errorf("bitmap %d at %#x: %w", len(all), x.dirOffset+at, err)
		}
		e.flagsAt = x.dirOffset + at + 12
		all = append(all, e)
		at += length
	}
	if len(all) != int(x.count) {
		return nil, fmt.Errorf("%w: directory of %d bitmaps, the header says %d", ErrCorrupt, len(all), x.count)
	}
	return all, nil
}

// within tells that length bytes at a place that begins a cluster are in the file.
func (n *Node) within(at, length int64) bool {
	return at > 0 && at%n.header.ClusterSize() == 0 && length >= 0 && at <= n.file.Size() && length <= n.file.Size()-at
}

// bitmapEntry takes the first entry of a directory apart, and returns its length.
func (n *Node) bitmapEntry(b []byte) (bitmapEntry, int64, error) {
	if len(b) < bitmapEntryBytes {
		return bitmapEntry{}, 0, fmt.Errorf("%w: the directory ends within the entry", ErrCorrupt)
	}
	be := binary.BigEndian
	e := bitmapEntry{tableAt: int64(be.Uint64(b)), tableSize: int64(be.Uint32(b[8:])), flags: be.Uint32(b[12:])}
	kind, bits, nameLen, extra := b[16], b[17], int64(be.Uint16(b[18:])), int64(be.Uint32(b[20:]))
	length := (bitmapEntryBytes + extra + nameLen + 7) &^ 7
	if length > int64(len(b)) {
		return bitmapEntry{}, 0, fmt.Errorf("%w: the directory ends within the entry", ErrCorrupt)
	}
	e.name = string(b[bitmapEntryBytes+extra:][:nameLen])
	e.granularity = 1 << min(bits, 62)
	switch {
	case nameLen == 0 || nameLen > maxBitmapName || strings.ContainsRune(e.name, 0):
		return e, 0, fmt.Errorf("%w: name %q", ErrCorrupt, e.name)
	case e.granularity < bitmap.MinGranularity || e.granularity > bitmap.MaxGranularity:
		return e, 0, fmt.Errorf("%w: granularity 2^%d", ErrCorrupt, bits)
	case kind != 1 || extra != 0 || e.flags&^(bitmapInUse|bitmapAuto) != 0:
		return e, 0, fmt.Errorf("%w: bitmap %s of type %d with flags %#x and %d bytes of extra data", ErrUnsupported, e.name, kind, e.flags, extra)
	case e.flags&bitmapInUse == 0 && e.tableSize != n.bitmapClusters(e.granularity):
		return e, 0, fmt.Errorf("%w: bitmap %s has a table of %d entries, and needs %d", ErrCorrupt, e.name, e.tableSize, n.bitmapClusters(e.granularity))
	case !n.within(e.tableAt, e.tableSize*entrySize):
		return e, 0, fmt.Errorf("%w: bitmap %s has its table at %#x", ErrCorrupt, e.name, e.tableAt)
	}
	return e, length, nil
}

// bitmapClusters is how many clusters a bitmap of the disk has.
func (n *Node) bitmapClusters(granularity int64) int64 {
	bits := (n.Size() + granularity - 1) / granularity
	perCluster := n.header.ClusterSize() * 8
	return (bits + perCluster - 1) / perCluster
}

// bitmapTable reads where a bitmap's clusters are.
func (n *Node) bitmapTable(e bitmapEntry) ([]uint64, error) {
	raw := make([]byte, e.tableSize*entrySize)
	if err := n.file.Readv([][]byte{raw}, e.tableAt); err != nil {
		return nil, fmt.Errorf("%w %s: read table: %w", ErrBitmap, e.name, err)
	}
	table := make([]uint64, e.tableSize)
	for i := range table {
		v := binary.BigEndian.Uint64(raw[i*entrySize:])
		at := int64(v & offsetMask)
		if v&^offsetMask&^bitmapAllOnes != 0 || at != 0 && (v&bitmapAllOnes != 0 || !n.within(at, n.header.ClusterSize())) {
			return nil, fmt.Errorf("%w: bitmap %s: table entry %d is %#x", ErrCorrupt, e.name, i, v)
		}
		table[i] = v
	}
	return table, nil
}

// loadBitmap reads a bitmap.
func (n *Node) loadBitmap(e bitmapEntry) (*bitmap.Bitmap, error) {
	if e.flags&bitmapInUse != 0 {
		return nil, fmt.Errorf("%w %s: it was in use when the disk was not closed, so it does not tell of all writes: remove it", ErrBitmap, e.name)
	}
	b, err := bitmap.New(e.name, n.Size(), e.granularity)
	if err != nil {
		return nil, fmt.Errorf("%w %s: %w", ErrBitmap, e.name, err)
	}
	b.SetEnabled(e.flags&bitmapAuto != 0)
	table, err := n.bitmapTable(e)
	if err != nil {
		return nil, err
	}
	p := make([]byte, n.header.ClusterSize())
	perCluster := n.header.ClusterSize() * 8
	for i, v := range table {
		switch at := int64(v & offsetMask); {
		case at != 0:
			if err := n.file.Readv([][]byte{p}, at); err != nil {
				return nil, fmt.Errorf("%w %s: read: %w", ErrBitmap, e.name, err)
			}
			b.SetBytes(p, int64(i)*perCluster)
		case v&bitmapAllOnes != 0:
			b.Set(int64(i)*perCluster*e.granularity, perCluster*e.granularity)
		}
	}
	return b, nil
}
