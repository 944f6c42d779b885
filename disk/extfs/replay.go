package extfs

import (
	"encoding/binary"
	"fmt"
)

// The journal is jbd2's, described in the kernel's
// Documentation/filesystems/ext4/journal.rst. Its numbers are big endian.
const (
	journalMagic = 0xc03b3998

	blockDescriptor = 1
	blockCommit     = 2
	blockSuperV2    = 4
	blockRevoke     = 5

	journalRevoke = 0x1
	journal64bit  = 0x2
	journalAsync  = 0x4
	journalCsumV2 = 0x8
	journalCsumV3 = 0x10

	tagEscaped  = 0x1
	tagSameUUID = 0x2
	tagLast     = 0x8
)

// log reads the transactions of a journal.
type log struct {
	file        *journalFile
	incompat    uint32
	first, last int64 // the ring of blocks, last not being in it
	seed        uint32
	buf         []byte // a block
	data        []byte // another

	revoked map[int64]uint32 // the last transaction that revokes a block
	written overlay
	order   map[int64]uint32 // the transaction that wrote a block, until revocations are known
}

func (l *log) has(feature uint32) bool { return l.incompat&feature != 0 }
func (l *log) checksums() bool         { return l.has(journalCsumV2 | journalCsumV3) }

// where is the byte of the disk at which a block of the journal is.
func (l *log) where(n int64) int64 { return l.file.f.byteOf(l.file.block(n)) }

func (l *log) read(p []byte, n int64) error {
	f := l.file.f
	return f.area.read(p, l.file.block(n)*f.blockSize)
}

func (l *log) corrupt(n int64, format string, args ...any) error {
	return fmt.Errorf("%w: journal: block %d at %d: %w", ErrCorrupt, n, l.where(n), fmt.Errorf(format, args...))
}

// readJournal finds what replaying the journal would change.
func (f *fileSystem) readJournal() error {
	file, err := f.openJournalFile()
	if err != nil {
		return err
	}
	if file.blocks == 0 {
		return fmt.Errorf("%w: the journal, inode %d, is empty (superblock at %d)", ErrCorrupt, f.journalInode, f.area.base+superOffset)
	}
	l := &log{
		file: file, buf: make([]byte, f.blockSize), data: make([]byte, f.blockSize),
		revoked: map[int64]uint32{}, written: overlay{}, order: map[int64]uint32{},
	}
	start, sequence, err := l.readSuper()
	if err != nil {
		return err
	}
	if start != 0 {
		if err := l.scan(start, sequence); err != nil {
			return err
		}
	}
	f.journal = l.written
	return nil
}

// readSuper reads the journal's superblock: where the log begins, 0 if it is
// empty, and with which transaction.
func (l *log) readSuper() (start int64, sequence uint32, err error) {
	if err := l.read(l.buf, 0); err != nil {
		return 0, 0, err
	}
	u32 := func(at int) uint32 { return binary.BigEndian.Uint32(l.buf[at:]) }
	if u32(0) != journalMagic {
		return 0, 0, l.corrupt(0, "magic number %#x", u32(0))
	}
	if kind := u32(4); kind != blockSuperV2 {
		return 0, 0, fmt.Errorf("%w: journal superblock of type %d at %d", ErrUnsupported, kind, l.where(0))
	}
	l.incompat = u32(0x28)
	// Fast commits and the first kind of checksums tell more than blocks do.
	known := uint32(journalRevoke | journal64bit | journalAsync | journalCsumV2 | journalCsumV3)
	if unknown := l.incompat &^ known; unknown != 0 || u32(0x24) != 0 || u32(0x2c) != 0 {
		return 0, 0, fmt.Errorf("%w: journal features %#x, %#x, %#x at %d", ErrUnsupported, u32(0x24), l.incompat, u32(0x2c), l.where(0))
	}
	if l.checksums() {
		if l.buf[0x50] != 4 || l.has(journalCsumV2) && l.has(journalCsumV3) {
			return 0, 0, l.corrupt(0, "checksums of type %d", l.buf[0x50])
		}
		sum := u32(0xfc)
		binary.BigEndian.PutUint32(l.buf[0xfc:], 0)
		if got := crc32c(^uint32(0), l.buf[:1024]); got != sum {
			return 0, 0, l.corrupt(0, "checksum %#x, computed %#x", sum, got)
		}
		l.seed = crc32c(^uint32(0), l.buf[0x30:0x40])
	}
	l.first, l.last = int64(u32(0x14)), int64(u32(0x10))
	start = int64(u32(0x1c))
	switch {
	case int64(u32(0xc)) != l.file.f.blockSize:
		return 0, 0, l.corrupt(0, "blocks of %d bytes", u32(0xc))
	case l.last > l.file.blocks || l.first <= 0 || l.first >= l.last:
		return 0, 0, l.corrupt(0, "blocks %d to %d of %d", l.first, l.last, l.file.blocks)
	case start != 0 && (start < l.first || start >= l.last):
		return 0, 0, l.corrupt(0, "the log begins in block %d, of %d to %d", start, l.first, l.last)
	}
	return start, u32(0x18), nil
}

// transaction is one as it is read, up to its commit.
type transaction struct {
	writes  map[int64]replayed
	revoked []int64
	err     error // what is wrong with it if it was committed
}

// scan reads transactions until there is no further one that was committed.
func (l *log) scan(at int64, sequence uint32) error {
	t := transaction{writes: map[int64]replayed{}}
	// Never more blocks than there are, whatever they say.
	for left := l.last - l.first; left > 0; left-- {
		if err := l.read(l.buf, at); err != nil {
			return err
		}
		if binary.BigEndian.Uint32(l.buf) != journalMagic || binary.BigEndian.Uint32(l.buf[8:]) != sequence {
			break
		}
		this := at
		at = l.next(at)
		switch kind := binary.BigEndian.Uint32(l.buf[4:]); kind {
		case blockDescriptor:
			n, err := l.descriptor(&t, this, sequence, left-1)
			if err != nil {
				return err
			}
			for range n {
				at = l.next(at)
			}
			left -= n
		case blockRevoke:
			l.revocations(&t, this)
		case blockCommit:
			if err := l.commit(&t, this, sequence); err != nil {
				return err
			}
			sequence++
			t = transaction{writes: map[int64]replayed{}}
		default:
			return l.corrupt(this, "type %d", kind)
		}
	}
	// What a later transaction revokes must not be written by an earlier.
	for block, by := range l.revoked {
		if wrote, ok := l.order[block]; ok && int32(by-wrote) >= 0 {
			delete(l.written, block)
		}
	}
	return nil
}

func (l *log) next(at int64) int64 {
	if at++; at == l.last {
		return l.first
	}
	return at
}

// tail checks the checksum at a block's end, and returns how much of the block is
// before it.
func (l *log) tail(t *transaction, n int64) int {
	end := len(l.buf)
	if !l.checksums() {
		return end
	}
	end -= 4
	sum := binary.BigEndian.Uint32(l.buf[end:])
	clear(l.buf[end:])
	if got := crc32c(l.seed, l.buf); got != sum && t.err == nil {
		t.err = l.corrupt(n, "checksum %#x, computed %#x", sum, got)
	}
	return end
}

// tagSize is the size of a tag without the UUID that may follow it.
func (l *log) tagSize() int {
	if l.has(journalCsumV3) {
		return 16
	}
	size := 8
	if l.has(journal64bit) {
		size += 4
	}
	if l.has(journalCsumV2) {
		size += 2
	}
	return size
}

// descriptor reads the tags of block n, which name the blocks that the next ones
// of the journal are for, and returns how many those are, left at the most.
func (l *log) descriptor(t *transaction, n int64, sequence uint32, left int64) (blocks int64, err error) {
	end := l.tail(t, n)
	size := l.tagSize()
	data := n
	for at := 12; at+size <= end; {
		tag := l.buf[at : at+size]
		block := int64(binary.BigEndian.Uint32(tag))
		var flags, sum uint32
		if l.has(journalCsumV3) {
			flags, sum = binary.BigEndian.Uint32(tag[4:]), binary.BigEndian.Uint32(tag[12:])
		} else {
			sum, flags = uint32(binary.BigEndian.Uint16(tag[4:])), uint32(binary.BigEndian.Uint16(tag[6:]))
		}
		if l.has(journal64bit) {
			block |= int64(binary.BigEndian.Uint32(tag[8:])) << 32
		}
		if blocks == left {
			return blocks, nil // the log has gone round: it cannot be complete
		}
		blocks++
		data = l.next(data)
		if block < 0 || block >= l.file.f.blocks {
			if t.err == nil {
				t.err = l.corrupt(n, "tag at %d is for block %d of %d", at, block, l.file.f.blocks)
			}
		} else {
			t.writes[block] = replayed{at: l.file.block(data), escaped: flags&tagEscaped != 0}
		}
		if err := l.checkData(t, data, sequence, sum); err != nil {
			return 0, err
		}
		if flags&tagLast != 0 {
			break
		}
		at += size
		if flags&tagSameUUID == 0 {
			at += 16
		}
	}
	return blocks, nil
}

// checkData compares a block that is to be written with its tag's checksum.
func (l *log) checkData(t *transaction, n int64, sequence, sum uint32) error {
	if !l.checksums() || t.err != nil {
		return nil
	}
	if err := l.read(l.data, n); err != nil {
		return err
	}
	var number [4]byte
	binary.BigEndian.PutUint32(number[:], sequence)
	got := crc32c(crc32c(l.seed, number[:]), l.data)
	if l.has(journalCsumV2) {
		got &= 0xffff
	}
	if got != sum {
		t.err = l.corrupt(n, "checksum %#x, computed %#x", sum, got)
	}
	return nil
}

// revocations reads block n, which names blocks that must not be written any more
// by this transaction or those before it.
func (l *log) revocations(t *transaction, n int64) {
	limit := l.tail(t, n)
	end := int64(binary.BigEndian.Uint32(l.buf[12:]))
	if end > int64(limit) || end < 16 {
		if t.err == nil {
			t.err = l.corrupt(n, "%d bytes of revocations", end)
		}
		return
	}
	size := int64(4)
	if l.has(journal64bit) {
		size = 8
	}
	for at := int64(16); at+size <= end; at += size {
		block := uint64(binary.BigEndian.Uint32(l.buf[at:]))
		if size == 8 {
			block = binary.BigEndian.Uint64(l.buf[at:])
		}
		if block < uint64(l.file.f.blocks) {
			t.revoked = append(t.revoked, int64(block))
		}
	}
}

// commit has a transaction take effect.
func (l *log) commit(t *transaction, n int64, sequence uint32) error {
	if l.checksums() {
		sum := binary.BigEndian.Uint32(l.buf[0x10:])
		clear(l.buf[0x10:0x14])
		if got := crc32c(l.seed, l.buf); got != sum {
			return l.corrupt(n, "checksum %#x, computed %#x", sum, got)
		}
	}
	if t.err != nil {
		return t.err
	}
	for block, w := range t.writes {
		l.written[block], l.order[block] = w, sequence
	}
	for _, block := range t.revoked {
		l.revoked[block] = sequence
	}
	return nil
}
