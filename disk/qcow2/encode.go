package qcow2

import "encoding/binary"

// bitmapsGap is left in the header of new images where there is room, so that the
// extension of bitmaps can be added.
const bitmapsGap = bitmapsExtRoom

// encode is the header of a new image, with its extensions and the backing file's
// name.
func (h *Header) encode() []byte {
	be := binary.BigEndian
	length := headerLenV2
	if h.Version >= 3 {
		length = headerLenV3
	}
	if h.Compression != Zlib {
		length += 8
	}
	b := make([]byte, length)
	copy(b, Magic)
	be.PutUint32(b[4:], h.Version)
	be.PutUint32(b[20:], h.ClusterBits)
	be.PutUint64(b[24:], uint64(h.Size))
	be.PutUint32(b[36:], h.L1Entries)
	be.PutUint64(b[40:], uint64(h.L1Offset))
	be.PutUint64(b[48:], uint64(h.RefcountOffset))
	be.PutUint32(b[56:], h.RefcountTables)
	if h.Version >= 3 {
		be.PutUint64(b[72:], h.Incompatible)
		be.PutUint64(b[80:], h.Compatible)
		be.PutUint32(b[96:], h.RefcountOrder)
		be.PutUint32(b[100:], uint32(length))
	}
	if h.Compression != Zlib {
		b[headerLenV3] = byte(h.Compression)
	}
	if h.BackingFile == "" {
		return append(b, make([]byte, 8)...) // extEnd
	}
	b = be.AppendUint32(b, extBackingFormat)
	b = be.AppendUint32(b, uint32(len(h.BackingFormat)))
	b = append(b, h.BackingFormat...)
	b = append(b, make([]byte, -len(b)&7)...)
	b = append(b, make([]byte, 8)...) // extEnd
	if int64(len(b)+bitmapsGap+len(h.BackingFile)) <= h.ClusterSize() {
		b = append(b, make([]byte, bitmapsGap)...)
	}
	be.PutUint64(b[8:], uint64(len(b)))
	be.PutUint32(b[16:], uint32(len(h.BackingFile)))
	return append(b, h.BackingFile...)
}
