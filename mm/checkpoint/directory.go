package checkpoint

import (
	"errors"
	"fmt"

	"github.com/klauspost/compress/s2"
)

// directory says where everything is. Its encoding: the counts of sections,
// page chunks, block chunks and blocks (4 bytes each), those of data, zero and
// duplicate pages and of the bytes of blocks (8 bytes each); for each section the length of its name (1
// byte), the name, version (4), codec (1), size (4) and extent; then the extents
// of the page chunks and of the block chunks. An extent is 8 bytes of offset, 4
// of length and 4 of CRC32C.
type directory struct {
	sections    []section
	pageChunks  []extent // length 0: every entry is entryInherit
	blockChunks []extent
	blocks      uint32

	dataPages      uint64 // slots of blocks
	zeroPages      uint64
	duplicatePages uint64 // that are in another page's slot
	blockBytes     uint64 // as blocks are in the file
}

// section is a named blob, such as the state of a device.
type section struct {
	name    string
	version uint32
	codec   byte
	size    uint32 // of the data
	extent
}

const extentSize = 16

func appendExtent(b []byte, e extent) []byte {
	return le.AppendUint32(le.AppendUint32(le.AppendUint64(b, e.offset), e.length), e.sum)
}

func (d *directory) encode() []byte {
	var b []byte
	for _, n := range []uint32{uint32(len(d.sections)), uint32(len(d.pageChunks)), uint32(len(d.blockChunks)), d.blocks} {
		b = le.AppendUint32(b, n)
	}
	for _, n := range []uint64{d.dataPages, d.zeroPages, d.duplicatePages, d.blockBytes} {
		b = le.AppendUint64(b, n)
	}
	for _, s := range d.sections {
		b = append(append(b, byte(len(s.name))), s.name...)
		b = append(le.AppendUint32(b, s.version), s.codec)
		b = appendExtent(le.AppendUint32(b, s.size), s.extent)
	}
	for _, list := range [][]extent{d.pageChunks, d.blockChunks} {
		for _, e := range list {
			b = appendExtent(b, e)
		}
	}
	return b
}

// cursor reads fields off the front of bytes that may be cut short.
type cursor struct {
	b     []byte
	short bool
}

func (c *cursor) take(n int) []byte {
	if len(c.b) < n {
		c.b, c.short = nil, true
		return make([]byte, n)
	}
	taken := c.b[:n]
	c.b = c.b[n:]
	return taken
}

func (c *cursor) u8() byte    { return c.take(1)[0] }
func (c *cursor) u32() uint32 { return le.Uint32(c.take(4)) }
func (c *cursor) u64() uint64 { return le.Uint64(c.take(8)) }

func (c *cursor) extent() extent {
	return extent{offset: c.u64(), length: c.u32(), sum: c.u32()}
}

// decodeDirectory reads a directory of a file whose directory begins at end, and
// checks that whatever it names lies in the file in front of it.
func decodeDirectory(b []byte, l *layout, end uint64) (*directory, error) {
	bad := func(what string) error {
		return fmt.Errorf("%w: directory at offset %d: %s", ErrDamaged, end, what)
	}
	c := &cursor{b: b}
	d := &directory{}
	sections, pageChunks, blockChunks := c.u32(), c.u32(), c.u32()
	d.blocks = c.u32()
	d.dataPages, d.zeroPages, d.duplicatePages, d.blockBytes = c.u64(), c.u64(), c.u64(), c.u64()
	if sections > maxCount || uint64(pageChunks) != l.chunks() || uint64(d.blocks) > min(maxBlocks, l.pages) ||
		blockChunks != (d.blocks+chunkBlocks-1)/chunkBlocks || (uint64(pageChunks)+uint64(blockChunks))*extentSize > uint64(len(b)) {
		return nil, bad("bad counts")
	}
	inFile := func(e extent) bool { return e.offset >= headerSize && e.offset <= end && e.end() <= end }
	seen := map[string]bool{}
	for range sections {
		var s section
		s.name = string(c.take(int(c.u8())))
		s.version, s.codec, s.size = c.u32(), c.u8(), c.u32()
		s.extent = c.extent()
		switch {
		case c.short:
			return nil, bad("it is cut off")
		case seen[s.name] || s.name == "":
			return nil, bad(fmt.Sprintf("section %q is there twice, or has no name", s.name))
		case s.codec > codecS2 || s.size > maxSection || !inFile(s.extent) || s.codec == codecRaw && s.size != s.length:
			return nil, bad(fmt.Sprintf("section %q has bad sizes", s.name))
		}
		seen[s.name] = true
		d.sections = append(d.sections, s)
	}
	for _, list := range []struct {
		count  uint32
		into   *[]extent
		most   int
		absent bool // an extent may be missing
	}{
		{pageChunks, &d.pageChunks, chunkPages * 4, true},
		{blockChunks, &d.blockChunks, chunkBlocks * blockEntryMost, false},
	} {
		for range list.count {
			e := c.extent()
			if e == (extent{}) && list.absent {
				*list.into = append(*list.into, e)
				continue
			}
			if e.length == 0 || int(e.length) > s2.MaxEncodedLen(list.most) || !inFile(e) {
				return nil, bad("a chunk of an index has bad sizes")
			}
			*list.into = append(*list.into, e)
		}
	}
	if c.short || len(c.b) != 0 {
		return nil, bad("it has another length than what it holds")
	}
	return d, nil
}

// blockEntry is a storage block in the block index: an extent, 8 bytes with a bit
// for each slot that more pages than one share, 1 byte of codec, 1 of page count,
// and 4 for each page's number.
type blockEntry struct {
	extent
	shared uint64
	codec  byte
	pfns   []uint64
}

const blockEntryMost = extentSize + 8 + 2 + 4*BlockPages

// append encodes a block's entry.
func (e *writtenBlock) append(b []byte) []byte {
	b = append(le.AppendUint64(appendExtent(b, e.extent), e.shared), e.codec, byte(len(e.pfns)))
	for _, pfn := range e.pfns {
		b = le.AppendUint32(b, pfn)
	}
	return b
}

// decodeBlocks reads a chunk of the block index with count blocks in it, of a
// file whose directory begins at end.
func decodeBlocks(b []byte, count int, l *layout, end uint64) ([]blockEntry, error) {
	c := &cursor{b: b}
	entries := make([]blockEntry, count)
	for i := range entries {
		e := &entries[i]
		e.extent, e.shared = c.extent(), c.u64()
		var pages byte
		e.codec, pages = c.u8(), c.u8()
		numbers := &cursor{b: c.take(4 * int(pages))}
		if c.short || pages == 0 || pages > BlockPages || e.codec > codecS2 || e.offset < headerSize || e.offset > end || e.end() > end ||
			e.shared>>(pages-1)>>1 != 0 || e.codec == codecRaw && e.length != uint32(pages)*PageSize || e.length == 0 || int(e.length) > s2.MaxEncodedLen(int(pages)*PageSize) {
			return nil, fmt.Errorf("entry %d has bad sizes", i)
		}
		e.pfns = make([]uint64, pages)
		for j := range e.pfns {
			e.pfns[j] = uint64(numbers.u32())
			if _, ok := l.index(e.pfns[j]); !ok {
				return nil, fmt.Errorf("entry %d names page %#x, which is not RAM", i, e.pfns[j])
			}
		}
	}
	if len(c.b) != 0 {
		return nil, errors.New("something follows its last entry")
	}
	return entries, nil
}
