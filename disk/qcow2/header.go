package qcow2

import (
	"encoding/binary"
	"fmt"
	"math/bits"
	"strings"
)

// Magic is how an image starts.
const Magic = "QFI\xfb"

// Limits of what is accepted, all of them QEMU's.
const (
	minClusterBits = 9  // 512 B
	subclusters    = 32 // of a cluster
	maxClusterBits = 21 // 2 MiB
	maxL1Bytes     = 32 << 20
	maxRefcountLog = 6 // 64-bit counts
	maxBackingName = 1023

	headerLenV2 = 72
	headerLenV3 = 104
)

// Incompatible features: an image that has one can only be understood by who
// knows it (specification, "incompatible_features").
const (
	FeatureDirty       = 1 << 0 // reference counts may be wrong; data and mapping are right
	FeatureCorrupt     = 1 << 1 // damaged: to be read only, until repaired
	FeatureDataFile    = 1 << 2 // guest data lies in another file
	FeatureCompression = 1 << 3 // compressed with something else than zlib
	FeatureExtendedL2  = 1 << 4 // clusters have subclusters
)

// Autoclear features: who does not know one clears it when it writes the image
// (specification, "autoclear_features").
const (
	AutoclearBitmaps = 1 << 0 // the bitmaps tell of all writes
	AutoclearRawData = 1 << 1 // the data file is a raw image of the disk
)

// Compression is how an image's compressed clusters are compressed.
type Compression uint8

// Compression types of the specification.
const (
	Zlib Compression = 0 // a raw deflate stream
	Zstd Compression = 1
)

// Types of header extensions; others are passed over, as is intended.
const (
	extEnd           = 0
	extBackingFormat = 0xe2792aca
	extFeatureNames  = 0x6803f857
	extBitmaps       = 0x23852875
	extDataFile      = 0x44415441
	extNothing       = 0x6e6f6e65 // ours, in place of one that was taken away
)

// Header is an image's header with those of its extensions that matter to
// readers (specification, "Header" and "Header extensions"). Offsets are
// bytes in the file.
type Header struct {
	Version        uint32 // 2 or 3
	ClusterBits    uint32
	Size           int64 // virtual, bytes, as written in the header
	BackingFile    string
	BackingFormat  string // "" where the image does not say
	Encryption     uint32 // 0: none, 1: AES, 2: LUKS
	L1Entries      uint32
	L1Offset       int64
	RefcountOffset int64 // of the refcount table
	RefcountTables uint32
	RefcountOrder  uint32
	Snapshots      uint32
	SnapshotOffset int64
	Incompatible   uint64
	Compatible     uint64
	Autoclear      uint64
	Compression    Compression

	DataFile string      // name of the external data file
	Bitmaps  *bitmapsExt // the extension of persistent bitmaps, or nil

	featureNames map[uint8]string // of incompatible bits, by the image's own table
	nameOffset   int64            // of the backing file's name, or 0
	extensionEnd int64            // where the extension is that ends them, or 0
}

// ClusterSize is the size of a cluster in bytes.
func (h *Header) ClusterSize() int64 { return 1 << h.ClusterBits }

// Dirty tells that whoever wrote the image last did not close it.
func (h *Header) Dirty() bool { return h.Incompatible&FeatureDirty != 0 }

// Corrupt tells that someone found the image damaged.
func (h *Header) Corrupt() bool { return h.Incompatible&FeatureCorrupt != 0 }

// l2EntrySize is the size of an L2 entry in bytes.
func (h *Header) l2EntrySize() int64 {
	if h.Incompatible&FeatureExtendedL2 != 0 {
		return 2 * entrySize
	}
	return entrySize
}

// l2Entries is the number of clusters that one L2 table maps.
func (h *Header) l2Entries() int64 { return h.ClusterSize() / h.l2EntrySize() }

// unit is how many bytes of the disk come from one source: a cluster or a subcluster.
func (h *Header) unit() int64 {
	if h.Incompatible&FeatureExtendedL2 != 0 {
		return h.ClusterSize() / subclusters
	}
	return h.ClusterSize()
}

// l1Needed is the number of L1 entries that map the virtual size.
func (h *Header) l1Needed() int64 {
	perEntry := h.l2Entries() << h.ClusterBits
	n := h.Size / perEntry
	if h.Size%perEntry != 0 {
		n++
	}
	return n
}

// clusterBits finds the cluster size in the first bytes of a file, so that
// the first cluster, which is all the header, can be read.
func clusterBits(start []byte) (uint32, error) {
	if len(start) < headerLenV2 || string(start[:4]) != Magic {
		return 0, fmt.Errorf("%w: it does not start with a qcow2 header", ErrHeader)
	}
	switch version := binary.BigEndian.Uint32(start[4:]); version {
	case 2, 3:
	default:
		return 0, fmt.Errorf("%w: qcow2 version %d: 2 and 3 are known", ErrUnsupported, version)
	}
	b := binary.BigEndian.Uint32(start[20:])
	if b < minClusterBits || b > maxClusterBits {
		return 0, fmt.Errorf("%w: cluster size 2^%d: 2^%d to 2^%d bytes are possible", ErrHeader, b, minClusterBits, maxClusterBits)
	}
	return b, nil
}

// ParseHeader reads the header from first, the first cluster of an image or
// what there is of it. It checks that the header makes sense on its own, not
// that everything in it is supported.
func ParseHeader(first []byte) (*Header, error) {
	cb, err := clusterBits(first)
	if err != nil {
		return nil, err
	}
	be := binary.BigEndian
	h := &Header{
		Version:        be.Uint32(first[4:]),
		ClusterBits:    cb,
		Size:           int64(be.Uint64(first[24:])),
		Encryption:     be.Uint32(first[32:]),
		L1Entries:      be.Uint32(first[36:]),
		L1Offset:       int64(be.Uint64(first[40:])),
		RefcountOffset: int64(be.Uint64(first[48:])),
		RefcountTables: be.Uint32(first[56:]),
		RefcountOrder:  4,
		Snapshots:      be.Uint32(first[60:]),
		SnapshotOffset: int64(be.Uint64(first[64:])),
	}
	if int64(len(first)) > h.ClusterSize() {
		first = first[:h.ClusterSize()]
	}
	length := uint32(headerLenV2)
	if h.Version >= 3 {
		if len(first) < headerLenV3 {
			return nil, fmt.Errorf("%w: the file ends within the header", ErrHeader)
		}
		h.Incompatible = be.Uint64(first[72:])
		h.Compatible = be.Uint64(first[80:])
		h.Autoclear = be.Uint64(first[88:])
		h.RefcountOrder = be.Uint32(first[96:])
		length = be.Uint32(first[100:])
		if length < headerLenV3 || length%8 != 0 || int64(length) > h.ClusterSize() {
			return nil, fmt.Errorf("%w: header length %d", ErrHeader, length)
		}
		if int(length) > len(first) {
			return nil, fmt.Errorf("%w: the file ends within the header", ErrHeader)
		}
		if length > headerLenV3 {
			h.Compression = Compression(first[headerLenV3])
		}
	}
	if err := h.parseExtensions(first, length); err != nil {
		return nil, err
	}
	return h, h.validate()
}

// parseExtensions reads the header extensions from the fixed header's end on,
// and the backing file's name that follows them.
func (h *Header) parseExtensions(first []byte, at uint32) error {
	be := binary.BigEndian
	nameOffset, nameLen := be.Uint64(first[8:]), be.Uint32(first[16:])
	end := uint64(len(first))
	if nameOffset != 0 {
		if nameOffset > uint64(h.ClusterSize()) {
			return fmt.Errorf("%w: backing file name at %d, outside the first cluster", ErrHeader, nameOffset)
		}
		if nameLen > maxBackingName || nameOffset > end || uint64(nameLen) > end-nameOffset {
			return fmt.Errorf("%w: backing file name of %d bytes at %d", ErrHeader, nameLen, nameOffset)
		}
		h.BackingFile = string(first[nameOffset : nameOffset+uint64(nameLen)])
		if strings.ContainsRune(h.BackingFile, 0) {
			return fmt.Errorf("%w: backing file name %q", ErrHeader, h.BackingFile)
		}
		end = nameOffset
		h.nameOffset = int64(nameOffset)
	}
	for pos := uint64(at); pos+8 <= end; {
		kind, n := be.Uint32(first[pos:]), uint64(be.Uint32(first[pos+4:]))
		pos += 8
		if kind == extEnd {
			h.extensionEnd = int64(pos) - 8
			return nil
		}
		if n > end-pos {
			return fmt.Errorf("%w: header extension %#x of %d bytes at %d is too long", ErrHeader, kind, n, pos)
		}
		body := first[pos : pos+n]
		switch kind {
		case extBackingFormat:
			if n > 15 {
				return fmt.Errorf("%w: backing format of %d bytes", ErrHeader, n)
			}
			h.BackingFormat = string(body)
		case extFeatureNames:
			h.featureNames = featureNames(body)
		case extDataFile:
			if n > maxBackingName {
				return fmt.Errorf("%w: name of the data file of %d bytes", ErrHeader, n)
			}
			h.DataFile = string(body)
		case extBitmaps:
			if h.Bitmaps != nil || n != bitmapsExtBytes {
				return fmt.Errorf("%w: bitmaps extension of %d bytes at %d", ErrHeader, n, pos)
			}
			h.Bitmaps = parseBitmapsExt(body, int64(pos))
		}
		pos += (n + 7) &^ 7
	}
	return nil
}

// featureNames reads the names of incompatible features from a feature name
// table: 48 bytes each, of which one is the kind, one the bit, the rest the name.
func featureNames(table []byte) map[uint8]string {
	names := map[uint8]string{}
	for ; len(table) >= 48; table = table[48:] {
		if table[0] != 0 || table[1] >= 64 {
			continue
		}
		name, _, _ := strings.Cut(string(table[2:48]), "\x00")
		names[table[1]] = name
	}
	return names
}

// validate checks the fields against each other.
func (h *Header) validate() error {
	switch {
	case h.Size < 0:
		return fmt.Errorf("%w: virtual size %d", ErrHeader, uint64(h.Size))
	case h.Incompatible&FeatureExtendedL2 != 0 && h.ClusterSize() < subclusters*sector:
		return fmt.Errorf("%w: subclusters in clusters of %d bytes", ErrHeader, h.ClusterSize())
	case h.RefcountOrder > maxRefcountLog:
		return fmt.Errorf("%w: reference counts of 2^%d bits", ErrHeader, h.RefcountOrder)
	case int64(h.L1Entries)*entrySize > maxL1Bytes:
		return fmt.Errorf("%w: L1 table of %d entries: at most %d are possible", ErrHeader, h.L1Entries, maxL1Bytes/entrySize)
	case h.l1Needed() > int64(h.L1Entries):
		return fmt.Errorf("%w: L1 table of %d entries for a disk of %d bytes, which needs %d", ErrHeader, h.L1Entries, h.Size, h.l1Needed())
	case h.L1Offset < 0 || h.L1Offset%h.ClusterSize() != 0 || h.L1Offset == 0 && h.L1Entries > 0:
		return fmt.Errorf("%w: L1 table at %#x", ErrHeader, uint64(h.L1Offset))
	case h.Incompatible&FeatureCompression == 0 && h.Compression != Zlib:
		return fmt.Errorf("%w: compression type %d without its feature bit", ErrHeader, h.Compression)
	case h.Incompatible&FeatureCompression != 0 && h.Compression == Zlib:
		return fmt.Errorf("%w: compression feature bit without a compression type", ErrHeader)
	}
	return nil
}

// supported refuses an image that needs what this package does not do, and
// says which way out there is.
func (h *Header) supported() error {
	const convert = "copy it with qemu-img convert -O qcow2 to an image without"
	known := uint64(FeatureDirty | FeatureCorrupt | FeatureDataFile | FeatureCompression | FeatureExtendedL2)
	switch unknown := h.Incompatible &^ known; {
	case unknown != 0:
		return fmt.Errorf("%w: %s", ErrUnsupported, h.describe(unknown))
	case h.Encryption == 1:
		return fmt.Errorf("%w: AES encryption: %s (qemu-img convert --image-opts, with the secret)", ErrUnsupported, convert)
	case h.Encryption == 2:
		return fmt.Errorf("%w: LUKS encryption: %s (qemu-img convert --image-opts, with the secret)", ErrUnsupported, convert)
	case h.Encryption != 0:
		return fmt.Errorf("%w: encryption method %d", ErrUnsupported, h.Encryption)
	case h.Compression > Zstd:
		return fmt.Errorf("%w: compression type %d: zlib and zstd are known", ErrUnsupported, h.Compression)
	}
	return nil
}

// describe lists features by the image's own names, or by number.
func (h *Header) describe(features uint64) string {
	var names []string
	for f := features; f != 0; f &= f - 1 {
		bit := uint8(bits.TrailingZeros64(f))
		name := fmt.Sprintf("unknown incompatible feature, bit %d", bit)
		if own := h.featureNames[bit]; own != "" {
			name += fmt.Sprintf(" (%q)", own)
		}
		names = append(names, name)
	}
	return strings.Join(names, "; ")
}
