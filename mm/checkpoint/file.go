package checkpoint

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sort"
	"sync/atomic"

	"github.com/klauspost/compress/s2"
	"golang.org/x/sys/unix"
)

// file is one member of a chain. Of its indices, which are as large as memory
// is, a chunk is read when something of it is wanted first.
type file struct {
	path   string
	f      *os.File
	size   uint64
	head   *header
	layout *layout
	dir    *directory
	base   BlockID // of its first block
	end    uint64  // where its directory begins

	pages  []atomic.Pointer[pageChunk]
	blocks []atomic.Pointer[blockChunk]
}

type (
	pageChunk  [chunkPages]uint32
	blockChunk []blockEntry
)

// wrap names the file in an error.
func (f *file) wrap(err error) error { return fmt.Errorf("%s: %w", f.path, err) }

// part names a part of a file: "block " 3. It is written out for errors only.
type part struct {
	kind string
	n    int // alone: there is one
}

const alone = -1

func (p part) String() string {
	if p.n == alone {
		return p.kind
	}
	return fmt.Sprintf("%s%d", p.kind, p.n)
}

// damaged is an error about a part of the file.
func (f *file) damaged(what part, offset uint64, err error) error {
	return fmt.Errorf("%s: %w: %s at offset %d: %w", f.path, ErrDamaged, what, offset, err)
}

// openFile opens a file and reads what says where everything is.
func openFile(path string) (_ *file, err error) {
	f := &file{path: path}
	// A path may come from a file, and to open a FIFO there must not take for ever.
	if f.f, err = os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			f.f.Close()
		}
	}()
	info, err := f.f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, f.wrap(fmt.Errorf("%w: not a regular file", ErrFormat))
	}
	f.size = uint64(info.Size())
	b := make([]byte, headerSize)
	if _, err := io.ReadFull(f.f, b); err != nil {
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return nil, f.wrap(ErrFormat)
		}
		return nil, f.wrap(err)
	}
	if f.head, err = decodeHeader(b); err != nil {
		return nil, f.wrap(err)
	}
	if f.size < headerSize+footerSize {
		return nil, f.wrap(fmt.Errorf("%w: the file is cut off at offset %d", ErrDamaged, f.size))
	}
	if _, err := f.f.ReadAt(b[:footerSize], int64(f.size-footerSize)); err != nil {
		return nil, f.wrap(err)
	}
	foot, err := decodeFooter(b[:footerSize], f.size)
	if err != nil {
		return nil, f.wrap(err)
	}
	if foot.id != f.head.id {
		return nil, f.wrap(fmt.Errorf("%w: footer at offset %d: it is another checkpoint's", ErrDamaged, f.size-footerSize))
	}
	f.end = foot.directory.offset
	raw, err := f.read(part{"directory", alone}, foot.directory, nil)
	if err != nil {
		return nil, err
	}
	if f.layout, err = newLayout(f.head.ranges); err != nil {
		return nil, f.wrap(err)
	}
	if f.dir, err = decodeDirectory(raw, f.layout, f.end); err != nil {
		return nil, f.wrap(err)
	}
	f.pages = make([]atomic.Pointer[pageChunk], len(f.dir.pageChunks))
	f.blocks = make([]atomic.Pointer[blockChunk], len(f.dir.blockChunks))
	return f, nil
}

// read reads an extent, into room where that has the capacity, and checks it.
func (f *file) read(what part, e extent, room []byte) ([]byte, error) {
	if cap(room) < int(e.length) {
		room = make([]byte, e.length)
	}
	b := room[:e.length]
	if _, err := f.f.ReadAt(b, int64(e.offset)); err != nil {
		if errors.Is(err, io.EOF) {
			return nil, f.damaged(what, e.offset, errors.New("the file was cut off since it was opened"))
		}
		return nil, f.wrap(fmt.Errorf("%s at offset %d: %w", what, e.offset, err))
	}
	if checksum(b) != e.sum {
		return nil, f.damaged(what, e.offset, errors.New("wrong checksum"))
	}
	return b, nil
}

// decompress decompresses into room, which has the size that comes out.
func decompress(room, stored []byte) error {
	n, err := s2.DecodedLen(stored)
	if err != nil {
		return err
	}
	if n != len(room) {
		return fmt.Errorf("it holds %d bytes and not %d", n, len(room))
	}
	_, err = s2.Decode(room, stored)
	return err
}

func (f *file) section(s *section) ([]byte, error) {
	what := part{fmt.Sprintf("section %q", s.name), alone}
	stored, err := f.read(what, s.extent, nil)
	if err != nil || s.codec == codecRaw {
		return stored, err
	}
	if n, err := s2.DecodedLen(stored); err != nil || n != int(s.size) {
		return nil, f.damaged(what, s.offset, fmt.Errorf("it holds %d bytes and not %d: %w", n, s.size, err))
	}
	data := make([]byte, s.size)
	if err := decompress(data, stored); err != nil {
		return nil, f.damaged(what, s.offset, err)
	}
	return data, nil
}

// page returns the page index's entry of a page by its index in the layout.
func (f *file) page(i uint64) (uint32, error) {
	at := i / chunkPages
	if f.dir.pageChunks[at].length == 0 {
		return entryInherit, nil
	}
	chunk := f.pages[at].Load()
	if chunk == nil {
		var err error
		if chunk, err = f.readPageChunk(at); err != nil {
			return 0, err
		}
	}
	return chunk[i%chunkPages], nil
}

func (f *file) readPageChunk(at uint64) (*pageChunk, error) {
	e := f.dir.pageChunks[at]
	what := part{"page index, chunk ", int(at)}
	stored, err := f.read(what, e, nil)
	if err != nil {
		return nil, err
	}
	raw := make([]byte, chunkPages*4)
	if err := decompress(raw, stored); err != nil {
		return nil, f.damaged(what, e.offset, err)
	}
	chunk := new(pageChunk)
	for j := range chunk {
		v := le.Uint32(raw[4*j:])
		if v > entryZero && (v < firstSlot || v/BlockPages-1 >= f.dir.blocks) || v != entryInherit && at*chunkPages+uint64(j) >= f.layout.pages {
			return nil, f.damaged(what, e.offset, fmt.Errorf("entry %d is %#x", j, v))
		}
		chunk[j] = v
	}
	f.pages[at].Store(chunk)
	return chunk, nil
}

// block returns the block index's entry of one of the file's blocks.
func (f *file) block(n int) (*blockEntry, error) {
	chunk := f.blocks[n/chunkBlocks].Load()
	if chunk == nil {
		var err error
		if chunk, err = f.readBlockChunk(n / chunkBlocks); err != nil {
			return nil, err
		}
	}
	return &(*chunk)[n%chunkBlocks], nil
}

func (f *file) readBlockChunk(at int) (*blockChunk, error) {
	e := f.dir.blockChunks[at]
	what := part{"block index, chunk ", at}
	stored, err := f.read(what, e, nil)
	if err != nil {
		return nil, err
	}
	size, err := s2.DecodedLen(stored)
	if err != nil || size > chunkBlocks*blockEntryMost {
		return nil, f.damaged(what, e.offset, fmt.Errorf("it holds %d bytes: %w", size, err))
	}
	raw := make([]byte, size)
	if err := decompress(raw, stored); err != nil {
		return nil, f.damaged(what, e.offset, err)
	}
	entries, err := decodeBlocks(raw, min(chunkBlocks, int(f.dir.blocks)-at*chunkBlocks), f.layout, f.end)
	if err != nil {
		return nil, f.damaged(what, e.offset, err)
	}
	chunk := blockChunk(entries)
	f.blocks[at].Store(&chunk)
	return &chunk, nil
}

// readIndex reads all of the indices that has not been read.
func (f *file) readIndex() error {
	for at := range f.pages {
		if f.dir.pageChunks[at].length > 0 && f.pages[at].Load() == nil {
			if _, err := f.readPageChunk(uint64(at)); err != nil {
				return err
			}
		}
	}
	for at := range f.blocks {
		if f.blocks[at].Load() == nil {
			if _, err := f.readBlockChunk(at); err != nil {
				return err
			}
		}
	}
	return nil
}

// extents are what the file has behind its header and before its directory, in
// the order in which it lies there. There is an error if something of that has
// no use, or two: so all of it can be read in no more time than its size takes.
func (f *file) extents() ([]place, error) {
	var all []place
	for i, s := range f.dir.sections {
		all = append(all, place{s.extent, aSection, i})
	}
	for i, e := range f.dir.pageChunks {
		if e.length > 0 {
			all = append(all, place{e, aPageChunk, i})
		}
	}
	for i, e := range f.dir.blockChunks {
		all = append(all, place{e, aBlockChunk, i})
	}
	for n := range int(f.dir.blocks) {
		e, err := f.block(n)
		if err != nil {
			return nil, err
		}
		all = append(all, place{e.extent, aBlock, n})
	}
	sort.Slice(all, func(i, j int) bool { return all[i].offset < all[j].offset })
	at := uint64(headerSize)
	for _, e := range all {
		if e.length == 0 {
			continue
		}
		if err := f.padding(at, e.offset); err != nil {
			return nil, err
		}
		at = e.end()
	}
	return all, f.padding(at, f.end)
}

// padding checks that what lies between two extents is zeros that fill up a page, if it is
// anything.
func (f *file) padding(from, to uint64) error {
	if to == from {
		return nil
	}
	if to < from || to%PageSize != 0 || to-from >= PageSize {
		return f.wrap(fmt.Errorf("%w: what is at offset %d has no use, or two", ErrDamaged, min(from, to)))
	}
	b := make([]byte, to-from)
	if _, err := f.f.ReadAt(b, int64(from)); err != nil {
		return f.wrap(err)
	}
	for i, c := range b {
		if c != 0 {
			return f.wrap(fmt.Errorf("%w: what is at offset %d has no use", ErrDamaged, from+uint64(i)))
		}
	}
	return nil
}

// place is an extent and what is there: the i-th of its kind.
type place struct {
	extent
	kind placeKind
	i    int
}

type placeKind int

const (
	aSection placeKind = iota
	aPageChunk
	aBlockChunk
	aBlock
)
