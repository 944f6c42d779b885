package checkpoint

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"sync"
	"sync/atomic"

	"github.com/klauspost/compress/s2"

	"github.com/gnomon-vmm/gnomon/mm/guestmem"
)

// BlockID names a storage block of a chain. The newest file's blocks come
// first, each file's in the order in which they were written.
type BlockID uint32

// Kind says where a page's bytes are.
type Kind uint8

// The kinds of Location.
const (
	Zero Kind = iota // nowhere: the page is zero
	Data             // in a slot of a block
)

// Location is where a page is.
type Location struct {
	Kind  Kind
	Block BlockID
	Slot  int
}

// Reader reads a checkpoint together with its parents. Its methods may be
// called from several goroutines.
type Reader struct {
	layout *layout
	files  []*file // the newest first
	blocks int
	stored sync.Pool // of *[]byte: a block as it is in the file
}

// file is one member of a chain.
type file struct {
	path string
	f    *os.File
	size uint64
	head *header
	dir  *directory
	base BlockID // of its first block
	end  uint64  // where its directory begins

	pages  [][]uint32 // the page index by chunks, nil where all is inherited
	blocks []atomic.Pointer[[]blockEntry]
}

// Open opens a checkpoint and the chain of its parents.
func Open(path string) (*Reader, error) {
	r := &Reader{}
	r.stored.New = func() any { b := make([]byte, s2.MaxEncodedLen(blockBytes)); return &b }
	if err := r.open(path); err != nil {
		r.Close()
		return nil, err
	}
	return r, nil
}

func (r *Reader) open(path string) error {
	var child *file
	for {
		f, err := openFile(path)
		if err != nil {
			if child != nil && errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("%w: %s needs %s, which is missing: %w", ErrParent, child.path, path, fs.ErrNotExist)
			}
			return err
		}
		f.base = BlockID(r.blocks)
		r.files = append(r.files, f)
		r.blocks += int(f.dir.blocks)
		if child != nil {
			if f.head.id != child.head.parentID {
				return fmt.Errorf("%w: %s needs the checkpoint %s, and %s is %s: it was replaced", ErrParent, child.path, child.head.parentID, path, f.head.id)
			}
			if err := sameMemory(f.head.ranges, child.head.ranges); err != nil {
				return fmt.Errorf("%w: %s: %w", ErrParent, path, err)
			}
		}
		if f.head.parent == "" {
			break
		}
		if len(r.files) >= maxChain {
			return fmt.Errorf("%w: %s: more than %d files in a chain, or a loop", ErrParent, path, maxChain)
		}
		child, path = f, filepath.Join(filepath.Dir(f.path), f.head.parent)
	}
	r.layout, _ = newLayout(r.files[0].head.ranges) // decodeHeader checked them
	if r.blocks > maxBlocks {
		return fmt.Errorf("%w: %s: %d blocks in its chain", ErrDamaged, r.files[0].path, r.blocks)
	}
	return nil
}

// wrap names the file in an error.
func (f *file) wrap(err error) error { return fmt.Errorf("%s: %w", f.path, err) }

// openFile reads everything of a file but its blocks and sections.
func openFile(path string) (_ *file, err error) {
	f := &file{path: path}
	if f.f, err = os.Open(path); err != nil {
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
	raw, err := f.read("directory", foot.directory, nil)
	if err != nil {
		return nil, err
	}
	l, err := newLayout(f.head.ranges)
	if err != nil {
		return nil, f.wrap(err)
	}
	if f.dir, err = decodeDirectory(raw, l, f.end); err != nil {
		return nil, f.wrap(err)
	}
	if err := f.checkTiling(); err != nil {
		return nil, f.wrap(err)
	}
	f.blocks = make([]atomic.Pointer[[]blockEntry], len(f.dir.blockChunks))
	return f, f.readPages(l)
}

// checkTiling checks that no two of the directory's extents overlap. Blocks,
// which the block index names, are not looked at.
func (f *file) checkTiling() error {
	var all []extent
	for _, s := range f.dir.sections {
		all = append(all, s.extent)
	}
	for _, list := range [][]extent{f.dir.pageChunks, f.dir.blockChunks} {
		for _, e := range list {
			if e.length > 0 {
				all = append(all, e)
			}
		}
	}
	sort.Slice(all, func(i, j int) bool { return all[i].offset < all[j].offset })
	for i := 1; i < len(all); i++ {
		if all[i].offset < all[i-1].end() {
			return fmt.Errorf("%w: directory at offset %d: what is at offset %d is named twice", ErrDamaged, f.end, all[i].offset)
		}
	}
	return nil
}

// read reads an extent, into room where that has the capacity, and checks it.
func (f *file) read(what string, e extent, room []byte) ([]byte, error) {
	if cap(room) < int(e.length) {
		room = make([]byte, e.length)
	}
	b := room[:e.length]
	if _, err := f.f.ReadAt(b, int64(e.offset)); err != nil {
		if errors.Is(err, io.EOF) {
			err = fmt.Errorf("%w: the file was cut off", ErrDamaged)
		}
		return nil, f.wrap(fmt.Errorf("%s at offset %d: %w", what, e.offset, err))
	}
	if checksum(b) != e.sum {
		return nil, f.wrap(fmt.Errorf("%w: %s at offset %d: wrong checksum", ErrDamaged, what, e.offset))
	}
	return b, nil
}

// decompress undoes a codec; the result has the given size.
func decompress(codec byte, stored, room []byte, size int) ([]byte, error) {
	if codec == codecRaw {
		if len(stored) != size {
			return nil, fmt.Errorf("%w: it has %d bytes and not %d", ErrDamaged, len(stored), size)
		}
		if cap(room) < size {
			return stored, nil
		}
		return room[:copy(room[:size], stored)], nil
	}
	n, err := s2.DecodedLen(stored)
	if err != nil || n != size {
		return nil, fmt.Errorf("%w: it holds %d bytes and not %d", ErrDamaged, n, size)
	}
	if cap(room) < size {
		room = make([]byte, size)
	}
	raw, err := s2.Decode(room[:size], stored)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return raw, nil
}

// readPages reads the page index.
func (f *file) readPages(l *layout) error {
	f.pages = make([][]uint32, len(f.dir.pageChunks))
	var stored, raw []byte
	for i, e := range f.dir.pageChunks {
		if e.length == 0 {
			continue
		}
		what := fmt.Sprintf("page index, chunk %d", i)
		var err error
		if stored, err = f.read(what, e, stored); err != nil {
			return err
		}
		if raw, err = decompress(codecS2, stored, raw, chunkPages*4); err != nil {
			return f.wrap(fmt.Errorf("%s at offset %d: %w", what, e.offset, err))
		}
		chunk := make([]uint32, chunkPages)
		for j := range chunk {
			chunk[j] = le.Uint32(raw[4*j:])
			if v := chunk[j]; v > entryZero && (v < firstSlot || v/BlockPages-1 >= f.dir.blocks) ||
				v != entryInherit && uint64(i)*chunkPages+uint64(j) >= l.pages {
				return f.wrap(fmt.Errorf("%w: %s at offset %d: entry %d is %#x", ErrDamaged, what, e.offset, j, v))
			}
		}
		f.pages[i] = chunk
	}
	return nil
}

// block returns the index entry of one of the file's blocks.
func (f *file) block(n int, l *layout) (*blockEntry, error) {
	at := n / chunkBlocks
	if entries := f.blocks[at].Load(); entries != nil {
		return &(*entries)[n%chunkBlocks], nil
	}
	e := f.dir.blockChunks[at]
	what := fmt.Sprintf("block index, chunk %d", at)
	stored, err := f.read(what, e, nil)
	if err != nil {
		return nil, err
	}
	size, err := s2.DecodedLen(stored)
	if err != nil || size > chunkBlocks*blockEntryMost {
		return nil, f.wrap(fmt.Errorf("%w: %s at offset %d: bad size", ErrDamaged, what, e.offset))
	}
	raw, err := s2.Decode(nil, stored)
	if err != nil {
		return nil, f.wrap(fmt.Errorf("%w: %s at offset %d: %w", ErrDamaged, what, e.offset, err))
	}
	entries, err := decodeBlocks(raw, min(chunkBlocks, int(f.dir.blocks)-at*chunkBlocks), l, f.end)
	if err != nil {
		return nil, f.wrap(fmt.Errorf("%s at offset %d: %w", what, e.offset, err))
	}
	f.blocks[at].Store(&entries)
	return &entries[n%chunkBlocks], nil
}

// Close closes the files.
func (r *Reader) Close() error {
	var errs []error
	for _, f := range r.files {
		errs = append(errs, f.f.Close())
	}
	return errors.Join(errs...)
}

// ID is the checkpoint's.
func (r *Reader) ID() ID { return r.files[0].head.id }

// Memory is the machine's RAM. The caller must not change it.
func (r *Reader) Memory() []guestmem.Range { return r.layout.ranges }

// Section returns a named blob of the checkpoint, not of its parents.
func (r *Reader) Section(name string) (version uint32, data []byte, err error) {
	f := r.files[0]
	for _, s := range f.dir.sections {
		if s.name == name {
			data, err = f.section(s)
			return s.version, data, err
		}
	}
	return 0, nil, f.wrap(fmt.Errorf("%w: %q", ErrMissing, name))
}

func (f *file) section(s section) ([]byte, error) {
	what := fmt.Sprintf("section %q", s.name)
	stored, err := f.read(what, s.extent, nil)
	if err != nil {
		return nil, err
	}
	data, err := decompress(s.codec, stored, nil, int(s.size))
	if err != nil {
		return nil, f.wrap(fmt.Errorf("%s at offset %d: %w", what, s.offset, err))
	}
	return data, nil
}

// SectionInfo describes a section.
type SectionInfo struct {
	Name    string
	Version uint32
	Size    int64 // bytes of its data
}

// Sections lists the checkpoint's sections in the order in which they were written.
func (r *Reader) Sections() []SectionInfo {
	var all []SectionInfo
	for _, s := range r.files[0].dir.sections {
		all = append(all, SectionInfo{s.name, s.version, int64(s.size)})
	}
	return all
}

// Find tells where a page of Memory is, by its number; what is not RAM is zero.
func (r *Reader) Find(pfn uint64) Location {
	i, ok := r.layout.index(pfn)
	if !ok {
		return Location{}
	}
	for _, f := range r.files {
		chunk := f.pages[i/chunkPages]
		if chunk == nil {
			continue
		}
		switch entry := chunk[i%chunkPages]; entry {
		case entryInherit:
		case entryZero:
			return Location{}
		default:
			return Location{Kind: Data, Block: f.base + BlockID(entry/BlockPages-1), Slot: int(entry % BlockPages)}
		}
	}
	return Location{}
}

// Blocks is how many blocks the chain has.
func (r *Reader) Blocks() int { return r.blocks }

// fileOf returns the file that holds a block, and its number there.
func (r *Reader) fileOf(b BlockID) (*file, int, error) {
	for i := len(r.files) - 1; i >= 0; i-- {
		if f := r.files[i]; b >= f.base {
			if n := b - f.base; n < BlockID(f.dir.blocks) {
				return f, int(n), nil
			}
			break
		}
	}
	return nil, 0, fmt.Errorf("%w: %s: there is no block %d of %d", ErrDamaged, r.files[0].path, b, r.blocks)
}

// Pages returns the numbers of the pages that a block's slots were made for. A
// slot holds its page still if Find says so. The caller must not change them.
func (r *Reader) Pages(b BlockID) ([]uint64, error) {
	f, n, err := r.fileOf(b)
	if err != nil {
		return nil, err
	}
	e, err := f.block(n, r.layout)
	if err != nil {
		return nil, err
	}
	return e.pfns, nil
}

// ReadBlock reads a block with one system call, checks it, and returns its
// pages, in buf if they fit, and how many bytes of the file it took.
func (r *Reader) ReadBlock(b BlockID, buf []byte) (pages []byte, stored int, err error) {
	f, n, err := r.fileOf(b)
	if err != nil {
		return nil, 0, err
	}
	e, err := f.block(n, r.layout)
	if err != nil {
		return nil, 0, err
	}
	room := r.stored.Get().(*[]byte)
	defer r.stored.Put(room)
	raw, err := f.read("block", e.extent, *room)
	if err != nil {
		return nil, 0, fmt.Errorf("block %d: %w", n, err)
	}
	if cap(buf) < len(e.pfns)*PageSize {
		buf = make([]byte, len(e.pfns)*PageSize)
	}
	pages, err = decompress(e.codec, raw, buf, len(e.pfns)*PageSize)
	if err != nil {
		return nil, 0, f.wrap(fmt.Errorf("block %d at offset %d: %w", n, e.offset, err))
	}
	return pages, int(e.length), nil
}

// Read copies guest memory from gpa on into p, all of which must be RAM.
func (r *Reader) Read(gpa uint64, p []byte) error {
	var buf []byte
	last := Location{}
	for len(p) > 0 {
		pfn, off := gpa/PageSize, int(gpa%PageSize)
		if _, ok := r.layout.index(pfn); !ok {
			return fmt.Errorf("%w: %#x", guestmem.ErrOutOfBounds, gpa)
		}
		n := min(len(p), PageSize-off)
		at := r.Find(pfn)
		if at.Kind == Zero {
			clear(p[:n])
		} else {
			if buf == nil || last.Block != at.Block {
				var err error
				if buf, _, err = r.ReadBlock(at.Block, buf); err != nil {
					return err
				}
				last = at
			}
			if (at.Slot+1)*PageSize > len(buf) {
				return fmt.Errorf("%w: %s: page %#x is in slot %d of block %d, which has %d", ErrDamaged, r.files[0].path, pfn, at.Slot, at.Block, len(buf)/PageSize)
			}
			copy(p[:n], buf[at.Slot*PageSize+off:])
		}
		gpa, p = gpa+uint64(n), p[n:]
	}
	return nil
}
