package extfs

import (
	"bytes"
	"encoding/binary"
	"fmt"
)

// Where the superblock is, and its magic number.
const (
	superOffset = 1024
	superSize   = 1024
	superMagic  = 0xef53
)

// Features, by the field that they are bits of.
const (
	compatHasJournal   = 0x4
	compatSparseSuper2 = 0x200

	incompatFileType   = 0x2
	incompatRecover    = 0x4
	incompatMetaBG     = 0x10
	incompatExtents    = 0x40
	incompat64bit      = 0x80
	incompatMMP        = 0x100
	incompatFlexBG     = 0x200
	incompatEAInode    = 0x400
	incompatDirData    = 0x1000
	incompatCsumSeed   = 0x2000
	incompatLargeDir   = 0x4000
	incompatInlineData = 0x8000
	incompatEncrypt    = 0x10000
	incompatCaseFold   = 0x20000

	roSparseSuper   = 0x1
	roLargeFile     = 0x2
	roBtreeDir      = 0x4
	roHugeFile      = 0x8
	roGDTCsum       = 0x10
	roDirNlink      = 0x20
	roExtraIsize    = 0x40
	roQuota         = 0x100
	roBigalloc      = 0x200
	roMetadataCsum  = 0x400
	roReadonly      = 0x1000
	roProject       = 0x2000
	roSharedBlocks  = 0x4000
	roVerity        = 0x8000
	roOrphanPresent = 0x10000

	knownIncompat = incompatFileType | incompatRecover | incompatMetaBG | incompatExtents | incompat64bit | incompatMMP |
		incompatFlexBG | incompatEAInode | incompatDirData | incompatCsumSeed | incompatLargeDir | incompatInlineData |
		incompatEncrypt | incompatCaseFold
	knownRO = roSparseSuper | roLargeFile | roBtreeDir | roHugeFile | roGDTCsum | roDirNlink | roExtraIsize | roQuota |
		roBigalloc | roMetadataCsum | roReadonly | roProject | roSharedBlocks | roVerity | roOrphanPresent

	// Those of ext2 and ext3; with any other it is an ext4.
	ext3Incompat = incompatFileType | incompatRecover | incompatMetaBG
	ext3RO       = roSparseSuper | roLargeFile | roBtreeDir
)

// Bits of s_state.
const (
	stateValid  = 0x1
	stateErrors = 0x2
)

// maxGroups bounds the memory for descriptors: 128 TiB with blocks of 4 KiB.
const maxGroups = 1 << 20

// fileSystem is what the superblock tells of one.
type fileSystem struct {
	area                     *area
	journal                  overlay // what replaying the journal changes
	compat, incompat, ro     uint32
	rev                      uint32
	state                    uint16
	uuid                     [16]byte
	label                    string
	blockSize                int64
	ratio                    int64 // blocks of a cluster
	blocks                   int64
	firstBlock               int64 // of group 0
	blocksPerGroup           int64
	clustersPerGroup         int64
	inodesPerGroup           int64
	inodeSize                int64
	journalInode             uint32
	groups                   int64
	descSize                 int64
	descBlocks               int64
	reservedGDT, firstMetaBG int64
	backups                  [2]int64
	seed                     uint32 // of metadata_csum
}

// open reads and checks the superblock (struct ext4_super_block), and the
// journal if it needs recovery.
func open(a *area) (*fileSystem, error) {
	if a.size < superOffset+superSize {
		return nil, fmt.Errorf("%w: %d bytes at %d are too few for one", ErrNone, a.size, a.base)
	}
	var sb [superSize]byte
	if err := a.read(sb[:], superOffset); err != nil {
		return nil, err
	}
	f, err := parseSuper(a, &sb)
	if err != nil {
		return nil, fmt.Errorf("%w (superblock at %d)", err, a.base+superOffset)
	}
	if f.incompat&incompatRecover != 0 {
		if err := f.readJournal(); err != nil {
			return nil, err
		}
		// The journal holds the superblock itself too.
		if err := f.read(sb[:], superOffset); err != nil {
			return nil, err
		}
		replayed, err := parseSuper(a, &sb)
		if err != nil {
			return nil, fmt.Errorf("%w (superblock in the journal at %d)", err, a.base+superOffset)
		}
		if replayed.blockSize != f.blockSize {
			return nil, fmt.Errorf("%w: its journal changes the block size from %d to %d (superblock at %d)", ErrCorrupt, f.blockSize, replayed.blockSize, a.base+superOffset)
		}
		replayed.journal = f.journal
		replayed.incompat |= incompatRecover
		f = replayed
	}
	return f, nil
}

func parseSuper(a *area, sb *[superSize]byte) (*fileSystem, error) {
	u16 := func(at int) uint16 { return binary.LittleEndian.Uint16(sb[at:]) }
	u32 := func(at int) uint32 { return binary.LittleEndian.Uint32(sb[at:]) }
	if u16(0x38) != superMagic {
		return nil, fmt.Errorf("%w: magic number %#x", ErrNone, u16(0x38))
	}
	f := &fileSystem{
		area: a, rev: u32(0x4c), state: u16(0x3a), inodeSize: 128,
		blocks: int64(u32(0x4)), firstBlock: int64(u32(0x14)),
		blocksPerGroup: int64(u32(0x20)), clustersPerGroup: int64(u32(0x24)), inodesPerGroup: int64(u32(0x28)),
		descSize: 32, ratio: 1,
	}
	copy(f.uuid[:], sb[0x68:])
	if f.rev > 1 {
		return nil, fmt.Errorf("%w: revision %d", ErrUnsupported, f.rev)
	}
	if f.rev == 1 { // else the fields below are not there
		f.compat, f.incompat, f.ro = u32(0x5c), u32(0x60), u32(0x64)
		f.inodeSize = int64(u16(0x58))
		label, _, _ := bytes.Cut(sb[0x78:0x88], []byte{0})
		f.label = string(label)
		f.reservedGDT, f.journalInode = int64(u16(0xce)), u32(0xe0)
		f.firstMetaBG = int64(u32(0x104))
		f.backups = [2]int64{int64(u32(0x24c)), int64(u32(0x250))}
	}
	if unknown := f.incompat &^ knownIncompat; unknown != 0 {
		return nil, fmt.Errorf("%w: incompatible features %#x", ErrUnsupported, unknown)
	}
	if unknown := f.ro &^ knownRO; unknown != 0 {
		return nil, fmt.Errorf("%w: read-only compatible features %#x", ErrUnsupported, unknown)
	}
	if f.hasRO(roMetadataCsum) {
		if sb[0x175] != 1 {
			return nil, fmt.Errorf("%w: checksums of type %d", ErrUnsupported, sb[0x175])
		}
		if want := crc32c(^uint32(0), sb[:0x3fc]); u32(0x3fc) != want {
			return nil, fmt.Errorf("%w: superblock checksum %#x, computed %#x", ErrCorrupt, u32(0x3fc), want)
		}
		f.seed = crc32c(^uint32(0), f.uuid[:])
		if f.incompat&incompatCsumSeed != 0 {
			f.seed = u32(0x270)
		}
	}
	if f.incompat&incompat64bit != 0 {
		f.blocks |= int64(u32(0x150)) << 32
		f.descSize = int64(u16(0xfe))
	}
	if err := f.checkGeometry(u32(0x18), u32(0x1c)); err != nil {
		return nil, err
	}
	return f, nil
}

func (f *fileSystem) hasRO(feature uint32) bool { return f.ro&feature != 0 }

// groupChecksums tells that descriptors have checksums, without which they have
// no flags either.
func (f *fileSystem) groupChecksums() bool { return f.hasRO(roGDTCsum | roMetadataCsum) }

// checkGeometry refuses what the kernel would not mount, and computes the rest.
func (f *fileSystem) checkGeometry(logBlock, logCluster uint32) error {
	corrupt := func(format string, args ...any) error {
		return fmt.Errorf("%w: %w", ErrCorrupt, fmt.Errorf(format, args...))
	}
	if logBlock > 6 {
		return corrupt("blocks of 2^%d KiB", logBlock)
	}
	f.blockSize = 1024 << logBlock
	if f.hasRO(roBigalloc) {
		if logCluster < logBlock || logCluster > 20 {
			return corrupt("clusters of 2^%d KiB", logCluster)
		}
		f.ratio = 1 << (logCluster - logBlock)
	} else {
		f.clustersPerGroup = f.blocksPerGroup
	}
	switch n := f.clustersPerGroup; {
	case n == 0 || n%8 != 0 || n > 8*f.blockSize:
		return corrupt("groups of %d clusters", n)
	case f.blocksPerGroup != n*f.ratio:
		return corrupt("groups of %d blocks and %d clusters of %d blocks", f.blocksPerGroup, n, f.ratio)
	}
	if first := f.superBlock(); f.firstBlock != first && (f.ratio == 1 || f.firstBlock != 0) {
		return corrupt("first block %d, where superblock is block %d", f.firstBlock, first)
	}
	if f.blocks <= f.firstBlock || f.blocks > f.area.size/f.blockSize {
		return corrupt("%d blocks of %d bytes on %d bytes", f.blocks, f.blockSize, f.area.size)
	}
	if f.inodesPerGroup == 0 || f.inodesPerGroup > 8*f.blockSize {
		return corrupt("groups of %d inodes", f.inodesPerGroup)
	}
	if s := f.inodeSize; s < 128 || s > f.blockSize || s&(s-1) != 0 {
		return corrupt("inodes of %d bytes", s)
	}
	if s := f.descSize; s < 32 || s > 1024 || s&(s-1) != 0 || f.incompat&incompat64bit != 0 && s < 64 {
		return corrupt("group descriptors of %d bytes", s)
	}
	f.groups = (f.blocks - f.firstBlock + f.blocksPerGroup - 1) / f.blocksPerGroup
	if f.groups > maxGroups {
		return fmt.Errorf("%w: %d groups, of at most %d", ErrUnsupported, f.groups, maxGroups)
	}
	f.descBlocks = (f.groups + f.descsPerBlock() - 1) / f.descsPerBlock()
	if f.hasMetaBG() && f.firstMetaBG > f.descBlocks {
		return corrupt("meta groups from %d on, of %d", f.firstMetaBG, f.descBlocks)
	}
	return nil
}

// describe is f for those who ask.
func (f *fileSystem) describe() FileSystem {
	d := FileSystem{
		Kind: "ext2", Label: f.label, Offset: f.area.base, Size: f.blocks * f.blockSize,
		BlockSize: f.blockSize, ClusterSize: f.blockSize * f.ratio,
		UUID: fmt.Sprintf("%x-%x-%x-%x-%x", f.uuid[:4], f.uuid[4:6], f.uuid[6:8], f.uuid[8:10], f.uuid[10:]),
	}
	switch {
	case f.incompat&^ext3Incompat != 0 || f.ro&^ext3RO != 0:
		d.Kind = "ext4"
	case f.compat&compatHasJournal != 0:
		d.Kind = "ext3"
	}
	switch {
	case f.state&stateErrors != 0:
		d.State = HasErrors
	case f.incompat&incompatRecover != 0:
		d.State = Recovered
	case f.state&stateValid == 0:
		d.State = NotUnmounted
	}
	return d
}
