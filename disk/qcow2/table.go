package qcow2

import (
	"encoding/binary"
	"fmt"

	"github.com/gnomon-vmm/gnomon/disk/block"
)

// Entries of L1 and L2 tables (specification, "Cluster mapping").
const (
	entrySize       = 8
	offsetMask      = 0x00ff_ffff_ffff_fe00
	entryZero       = 1 << 0 // L2: reads as zero, whatever its offset says
	entryCompressed = 1 << 62
	entryOwn        = 1 << 63 // the reference count of what it points to is exactly 1
)

// sliceBytes is how much of an L2 table is read and kept at a time; tables of
// smaller clusters are kept whole.
const sliceBytes = 4096

// readL1 reads the given number of entries of the active L1 table.
func readL1(file block.Node, h *Header, entries int64) ([]uint64, error) {
	n := entries * entrySize
	if h.L1Offset > file.Size() || n > file.Size()-h.L1Offset {
		return nil, fmt.Errorf("%w: L1 table of %d bytes at %#x ends behind the file's %d bytes; is the file cut off?", ErrCorrupt, n, h.L1Offset, file.Size())
	}
	raw := make([]byte, n)
	if err := file.Readv([][]byte{raw}, h.L1Offset); err != nil {
		return nil, fmt.Errorf("read L1 table at %#x: %w", h.L1Offset, err)
	}
	l1 := make([]uint64, entries)
	for i := range l1 {
		l1[i] = binary.BigEndian.Uint64(raw[i*entrySize:])
	}
	return l1, nil
}

// l2Slice returns the L2 entries from that of the given cluster to the end of
// the slice it lies in, or nil where no L2 table is allocated; then count is
// the number of clusters for which that holds, as it is the number of entries
// otherwise.
func (im *image) l2Slice(cluster int64) (entries []byte, count int64, err error) {
	perTable := im.header.l2Entries()
	index := cluster % perTable
	l1Index := cluster / perTable
	table := int64(im.l1[l1Index] & offsetMask)
	if table == 0 {
		return nil, perTable - index, nil
	}
	if table%im.header.ClusterSize() != 0 {
		return nil, 0, fmt.Errorf("%w: L2 table at %#x (L1 entry %d) does not start at a cluster", ErrCorrupt, table, l1Index)
	}
	size := min(im.header.ClusterSize(), sliceBytes)
	inTable := index * im.header.l2EntrySize()
	at := table + inTable/size*size
	var slice []byte
	if im.w != nil {
		s := im.w.l2.get(at)
		if s == nil {
			im.w.missing = at
			return nil, 0, errMissing
		}
		slice = s.data
	} else if slice, err = im.readSlice(at); err != nil {
		return nil, 0, fmt.Errorf("L1 entry %d: %w", l1Index, err)
	}
	entries = slice[inTable%size:]
	return entries, int64(len(entries)) / im.header.l2EntrySize(), nil
}

// readSlice returns a slice of an L2 table of an image that is only read.
func (im *image) readSlice(at int64) ([]byte, error) {
	if slice := im.tables.get(key{im.id, at}); slice != nil {
		return slice, nil
	}
	size := min(im.header.ClusterSize(), sliceBytes)
	if at > im.file.Size()-size {
		return nil, fmt.Errorf("%w: L2 table at %#x ends behind the file's %d bytes; is the file cut off?", ErrCorrupt, at, im.file.Size())
	}
	slice := make([]byte, size)
	if err := im.file.Readv([][]byte{slice}, at); err != nil {
		return nil, fmt.Errorf("read L2 table at %#x: %w", at, err)
	}
	im.tables.put(key{im.id, at}, slice)
	return slice, nil
}
