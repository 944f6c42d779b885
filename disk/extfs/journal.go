package extfs

import (
	"encoding/binary"
	"fmt"
	"sort"
)

const (
	flagExtents  = 0x80000 // of i_flags
	extentMagic  = 0xf30a
	extentLevels = 5

	// maxJournal bounds the blocks of a journal: 4 GiB with blocks of 4 KiB.
	maxJournal = 1 << 20
)

// mapping is where the blocks of the journal are: n from logical on, at physical.
type mapping struct{ logical, physical, n int64 }

// journalFile is the file that holds the journal.
type journalFile struct {
	f      *fileSystem
	blocks int64 // as its size says
	runs   []mapping
}

// openJournalFile finds the blocks of the journal's inode. The file system is
// read as it is, as the kernel does: the journal itself is not journalled.
func (f *fileSystem) openJournalFile() (*journalFile, error) {
	if f.compat&compatHasJournal == 0 || f.journalInode == 0 {
		return nil, fmt.Errorf("%w: the journal is on another disk (superblock at %d)", ErrUnsupported, f.area.base+superOffset)
	}
	n := int64(f.journalInode) - 1
	g := n / f.inodesPerGroup
	if g >= f.groups {
		return nil, fmt.Errorf("%w: the journal is inode %d (superblock at %d)", ErrCorrupt, f.journalInode, f.area.base+superOffset)
	}
	raw := make([]byte, f.descSize)
	at := f.descBlock(g/f.descsPerBlock())*f.blockSize + g%f.descsPerBlock()*f.descSize
	if err := f.area.read(raw, at); err != nil {
		return nil, err
	}
	// Its checksum may be old where the journal has the descriptor as well.
	d, err := f.parseFields(raw)
	if err != nil {
		return nil, fmt.Errorf("%w: group %d: descriptor at %d: %w", ErrCorrupt, g, f.area.base+at, err)
	}
	inode := make([]byte, 128)
	at = d.inodeTable*f.blockSize + n%f.inodesPerGroup*f.inodeSize
	if err := f.area.read(inode, at); err != nil {
		return nil, err
	}
	size := uint64(binary.LittleEndian.Uint32(inode[0x4:])) | uint64(binary.LittleEndian.Uint32(inode[0x6c:]))<<32
	j := &journalFile{f: f}
	if size > maxJournal*uint64(f.blockSize) {
		return nil, fmt.Errorf("%w: a journal of %d bytes (inode at %d)", ErrUnsupported, size, f.area.base+at)
	}
	j.blocks = int64(size) / f.blockSize
	root := inode[0x28 : 0x28+60]
	if binary.LittleEndian.Uint32(inode[0x20:])&flagExtents != 0 {
		err = j.addExtents(root, f.area.base+at+0x28, extentLevels)
	} else {
		err = j.addIndirect(root)
	}
	if err != nil {
		return nil, err
	}
	if end := j.end(); end < j.blocks {
		return nil, fmt.Errorf("%w: the journal has %d blocks of %d (inode at %d)", ErrCorrupt, end, j.blocks, f.area.base+at)
	}
	return j, nil
}

// end is how many blocks are known.
func (j *journalFile) end() int64 {
	if len(j.runs) == 0 {
		return 0
	}
	last := j.runs[len(j.runs)-1]
	return last.logical + last.n
}

// add takes over the next blocks of the journal, as what is at byte where says.
func (j *journalFile) add(physical, n, where int64) error {
	if physical <= 0 || n <= 0 || physical > j.f.blocks || n > j.f.blocks-physical {
		return fmt.Errorf("%w: the journal has %d blocks from %d on, of %d (at %d)", ErrCorrupt, n, physical, j.f.blocks, where)
	}
	end := j.end()
	if n > maxJournal-end {
		return fmt.Errorf("%w: the journal has more than %d blocks (at %d)", ErrUnsupported, maxJournal, where)
	}
	if last := len(j.runs) - 1; last >= 0 && j.runs[last].physical+j.runs[last].n == physical {
		j.runs[last].n += n
		return nil
	}
	j.runs = append(j.runs, mapping{end, physical, n})
	return nil
}

// addExtents follows a node of an extent tree that is at byte where of the disk.
// Empty nodes, which nobody makes, are refused, so that the tree is not larger
// than the journal.
func (j *journalFile) addExtents(node []byte, where int64, levels int) error {
	u16 := func(at int) int64 { return int64(binary.LittleEndian.Uint16(node[at:])) }
	u32 := func(at int) int64 { return int64(binary.LittleEndian.Uint32(node[at:])) }
	entries, depth := u16(2), u16(6)
	if u16(0) != extentMagic || entries == 0 || 12+entries*12 > int64(len(node)) || depth > int64(levels) {
		return fmt.Errorf("%w: journal: extents at %d: magic number %#x, %d entries, depth %d", ErrCorrupt, where, u16(0), entries, depth)
	}
	for i := range int(entries) {
		at := 12 + i*12
		if u32(at) != j.end() {
			return fmt.Errorf("%w: journal: extent at %d is for block %d, not %d", ErrCorrupt, where+int64(at), u32(at), j.end())
		}
		if depth == 0 {
			// Beyond 32768 the extent is not written yet, which that of a journal never is.
			n := u16(at + 4)
			if n > 32768 {
				return fmt.Errorf("%w: journal: extent at %d is not written", ErrCorrupt, where+int64(at))
			}
			if err := j.add(u32(at+8)|u16(at+6)<<32, n, where+int64(at)); err != nil {
				return err
			}
			continue
		}
		block := u32(at+4) | u16(at+8)<<32
		child := make([]byte, j.f.blockSize)
		if err := j.f.area.read(child, block*j.f.blockSize); err != nil {
			return err
		}
		if err := j.addExtents(child, j.f.byteOf(block), int(depth)-1); err != nil {
			return err
		}
	}
	return nil
}

// addIndirect follows the block numbers of an inode of ext2 and ext3.
func (j *journalFile) addIndirect(root []byte) error {
	for i := range 15 {
		if j.end() >= j.blocks {
			return nil
		}
		block := int64(binary.LittleEndian.Uint32(root[i*4:]))
		if err := j.addTree(block, max(0, i-11)); err != nil {
			return err
		}
	}
	return nil
}

// addTree adds what is below a block of numbers of so many levels.
func (j *journalFile) addTree(block int64, levels int) error {
	if levels == 0 {
		return j.add(block, 1, j.f.byteOf(block))
	}
	if block <= 0 || block >= j.f.blocks {
		return fmt.Errorf("%w: journal: indirect block %d of %d", ErrCorrupt, block, j.f.blocks)
	}
	numbers := make([]byte, j.f.blockSize)
	if err := j.f.area.read(numbers, block*j.f.blockSize); err != nil {
		return err
	}
	for ; len(numbers) > 0 && j.end() < j.blocks; numbers = numbers[4:] {
		if err := j.addTree(int64(binary.LittleEndian.Uint32(numbers)), levels-1); err != nil {
			return err
		}
	}
	return nil
}

// block is where a block of the journal is, in blocks of the file system.
func (j *journalFile) block(n int64) int64 {
	i := sort.Search(len(j.runs), func(i int) bool { return j.runs[i].logical+j.runs[i].n > n })
	return j.runs[i].physical + n - j.runs[i].logical
}

// overlay has the blocks that replaying the journal writes.
type overlay map[int64]replayed

// replayed is where a block is in the journal, in blocks of the file system.
type replayed struct {
	at      int64
	escaped bool // it begins with the journal's own magic number, which was cleared
}

// apply puts the blocks of the overlay over p, which was read at byte off of the
// file system.
func (o overlay) apply(f *fileSystem, p []byte, off int64) error {
	if len(o) == 0 {
		return nil
	}
	for len(p) > 0 {
		block, skip := off/f.blockSize, off%f.blockSize
		n := min(int64(len(p)), f.blockSize-skip)
		if r, ok := o[block]; ok {
			if err := f.area.read(p[:n], r.at*f.blockSize+skip); err != nil {
				return err
			}
			if r.escaped && skip < 4 {
				var magic [4]byte
				binary.BigEndian.PutUint32(magic[:], journalMagic)
				copy(p[:n], magic[skip:])
			}
		}
		p, off = p[n:], off+n
	}
	return nil
}
