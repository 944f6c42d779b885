package checkpoint

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"github.com/klauspost/compress/s2"
	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/mm/guestmem"
)

// writeSize is how much the file grows by with one system call.
const writeSize = 1 << 20

// ErrWrite is the stage of writing a checkpoint.
var ErrWrite = errors.New("write checkpoint")

// CreateOptions say what a checkpoint is of.
type CreateOptions struct {
	// Memory is the machine's RAM: ascending, disjoint, whole pages.
	Memory []guestmem.Range
	// Parent is the path of the checkpoint that this one continues; "": none.
	// It must lie in a place that the new file's directory leads to.
	Parent string
}

// Writer makes a checkpoint file. Its methods may be called from several
// goroutines; Commit or Abort is the last call.
type Writer struct {
	path   string
	file   *os.File
	header header
	layout *layout

	mu      sync.Mutex
	err     error      // guarded by mu: the first of a write; nothing is written after it
	buf     []byte     // guarded by mu: the file's end that is not written yet
	offset  uint64     // guarded by mu: of buf in the file
	pages   [][]uint32 // guarded by mu: the page index by chunks, nil where nothing was said
	blocks  []blockEntry
	dir     directory // guarded by mu: sections and counts
	dup     *duplicates
	stats   WriteStats // guarded by mu
	encoded sync.Pool  // of *[]byte, room for a block
}

// WriteStats tell what a Writer has done.
type WriteStats struct {
	Pages          int64 // zero and duplicate pages included
	ZeroPages      int64
	DuplicatePages int64 // kept in the index only, since their like is in the file
	Blocks         int64
	Writes         int64 // system calls
	Bytes          int64 // of the file
}

// Create begins a checkpoint at path, which must not exist. Nothing is there
// until Commit; meanwhile the file is .NAME.*.partial in the same directory,
// which a process that was killed leaves behind and anybody may remove.
func Create(path string, o CreateOptions) (*Writer, error) {
	fail := func(err error) (*Writer, error) {
		return nil, fmt.Errorf("%w %s: %w", ErrWrite, path, err)
	}
	l, err := newLayout(o.Memory)
	if err != nil {
		return fail(err)
	}
	if _, err := os.Lstat(path); err == nil {
		return fail(fmt.Errorf("%w: remove it, or choose another name", ErrExists))
	}
	w := &Writer{
		path: path, layout: l,
		header: header{id: newID(), ranges: append([]guestmem.Range(nil), o.Memory...)},
		pages:  make([][]uint32, l.chunks()),
		dup:    newDuplicates(),
		buf:    make([]byte, 0, writeSize+blockBytes),
	}
	w.encoded.New = func() any { b := make([]byte, s2.MaxEncodedLen(blockBytes)); return &b }
	if o.Parent != "" {
		if err := w.setParent(o.Parent); err != nil {
			return fail(err)
		}
	}
	head, err := w.header.encode()
	if err != nil {
		return fail(err)
	}
	dir, name := filepath.Split(path)
	if dir == "" {
		dir = "."
	}
	if w.file, err = os.CreateTemp(dir, "."+name+".*.partial"); err != nil {
		return fail(err)
	}
	w.buf = append(w.buf, head...)
	return w, nil
}

func (w *Writer) setParent(parent string) error {
	r, err := Open(parent)
	if err != nil {
		return err
	}
	defer r.Close()
	if len(r.files) >= maxChain {
		return fmt.Errorf("%w: the chain already has %d files: flatten it", ErrParent, len(r.files))
	}
	if err := sameMemory(r.Memory(), w.header.ranges); err != nil {
		return fmt.Errorf("%w: %s: %w", ErrParent, parent, err)
	}
	w.header.parentID = r.ID()
	dir, err := filepath.Abs(filepath.Dir(w.path))
	if err != nil {
		return err
	}
	if parent, err = filepath.Abs(parent); err != nil {
		return err
	}
	if w.header.parent, err = filepath.Rel(dir, parent); err != nil {
		return fmt.Errorf("%w: %w", ErrParent, err)
	}
	return nil
}

func sameMemory(a, b []guestmem.Range) error {
	if len(a) == len(b) {
		same := true
		for i := range a {
			same = same && a[i] == b[i]
		}
		if same {
			return nil
		}
	}
	return fmt.Errorf("%w: it is of a machine with other RAM: %x and not %x", ErrMemory, a, b)
}

// ID is the new checkpoint's.
func (w *Writer) ID() ID { return w.header.id }

// Stats tells what was done so far.
func (w *Writer) Stats() WriteStats {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.stats
}

// Section adds a named blob, of at most 64 MiB. Names are unique.
func (w *Writer) Section(name string, version uint32, data []byte) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if name == "" || len(name) > maxName || len(data) > maxSection || len(w.dir.sections) >= maxCount {
		return fmt.Errorf("%w %s: section %q of %d bytes: names have 1 to %d bytes, sections at most %d", ErrWrite, w.path, name, len(data), maxName, maxSection)
	}
	for _, s := range w.dir.sections {
		if s.name == name {
			return fmt.Errorf("%w %s: section %q is there already", ErrWrite, w.path, name)
		}
	}
	s := section{name: name, version: version, size: uint32(len(data))}
	stored := s2.EncodeBetter(nil, data)
	s.codec = codecS2
	if len(stored) >= len(data) {
		s.codec, stored = codecRaw, data
	}
	s.extent = w.append(stored)
	w.dir.sections = append(w.dir.sections, s)
	return w.err
}

// Zero says that pages, by their numbers, are zero.
func (w *Writer) Zero(pfns ...uint64) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, pfn := range pfns {
		if err := w.set(pfn, entryZero); err != nil {
			return err
		}
		w.stats.ZeroPages++
		w.stats.Pages++
	}
	return w.err
}

// set makes the index entry of a page; mu is held.
func (w *Writer) set(pfn uint64, entry uint32) error {
	i, ok := w.layout.index(pfn)
	if !ok {
		return fmt.Errorf("%w %s: page %#x is not RAM", ErrWrite, w.path, pfn)
	}
	chunk := &w.pages[i/chunkPages]
	if *chunk == nil {
		*chunk = make([]uint32, chunkPages)
	}
	(*chunk)[i%chunkPages] = entry
	return nil
}

// Block adds 1 to 64 pages, which are numbered pfns and follow each other in
// data, as one storage block. Blocks are in the order of the calls. It returns
// when data may be used for something else.
func (w *Writer) Block(pfns []uint64, data []byte) error {
	if len(pfns) == 0 || len(pfns) > BlockPages || len(data) != len(pfns)*PageSize {
		return fmt.Errorf("%w %s: block of %d pages with %d bytes", ErrWrite, w.path, len(pfns), len(data))
	}
	var kinds [BlockPages]uint32 // what set gets: entryZero, a duplicate's slot, or 0 for a page of this block
	var hashes [BlockPages]uint64
	kept := make([]uint64, 0, BlockPages)
	zero, duplicate := 0, 0
	for i := range pfns {
		page := data[i*PageSize:][:PageSize]
		switch {
		case isZero(page):
			kinds[i] = entryZero
			zero++
			continue
		default:
			hashes[i] = w.dup.hash(page)
		}
		if slot := w.duplicateOf(page, hashes[i]); slot != 0 {
			kinds[i] = slot
			duplicate++
			continue
		}
		// The pages that stay move together, in a copy where some go.
		kept = append(kept, pfns[i])
	}
	if len(kept) == 0 {
		return w.finish(pfns, kinds[:len(pfns)], hashes[:], 0, zero, duplicate)
	}
	block, err := w.reserve(kept)
	if err != nil {
		return err
	}
	raw := data
	if len(kept) < len(pfns) {
		scratch := w.encoded.Get().(*[]byte)
		defer w.encoded.Put(scratch)
		n := 0
		for i := range pfns {
			if kinds[i] == 0 {
				n += copy((*scratch)[n:], data[i*PageSize:][:PageSize])
			}
		}
		raw = (*scratch)[:n]
	}
	room := w.encoded.Get().(*[]byte)
	defer w.encoded.Put(room)
	stored, codec := s2.Encode(*room, raw), byte(codecS2)
	if len(stored) > len(raw)/8*7 { // not worth the time that reading it back would take
		stored, codec = raw, codecRaw
	}

	w.mu.Lock()
	w.blocks[block].extent = w.append(stored)
	w.blocks[block].codec = codec
	w.mu.Unlock()
	return w.finish(pfns, kinds[:len(pfns)], hashes[:], block, zero, duplicate)
}

// reserve gives the next block its number.
func (w *Writer) reserve(pfns []uint64) (uint32, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.blocks) >= maxBlocks {
		return 0, fmt.Errorf("%w %s: it has %d blocks already", ErrWrite, w.path, len(w.blocks))
	}
	w.blocks = append(w.blocks, blockEntry{pfns: pfns})
	w.stats.Blocks++
	return uint32(len(w.blocks) - 1), w.err
}

// finish makes the index entries of a block's pages.
func (w *Writer) finish(pfns []uint64, kinds []uint32, hashes []uint64, block uint32, zero, duplicate int) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	slot := 0
	for i, pfn := range pfns {
		entry := kinds[i]
		if entry == 0 {
			entry = slotEntry(block, slot)
			slot++
			w.dup.add(hashes[i], entry)
		}
		if err := w.set(pfn, entry); err != nil {
			return err
		}
	}
	w.stats.Pages += int64(len(pfns))
	w.stats.ZeroPages += int64(zero)
	w.stats.DuplicatePages += int64(duplicate)
	return w.err
}

// append adds bytes to the file and tells where they are; mu is held. An error
// of writing is kept in err.
func (w *Writer) append(b []byte) extent {
	e := extent{offset: w.offset + uint64(len(w.buf)), length: uint32(len(b)), sum: checksum(b)}
	for len(b) > 0 {
		n := min(len(b), cap(w.buf)-len(w.buf))
		w.buf = append(w.buf, b[:n]...)
		b = b[n:]
		if len(w.buf) >= writeSize {
			w.flush()
		}
	}
	return e
}

// flush writes what is buffered; mu is held.
func (w *Writer) flush() {
	if w.err == nil && len(w.buf) > 0 {
		_, err := w.file.WriteAt(w.buf, int64(w.offset))
		w.stats.Writes++
		if err != nil {
			w.err = fmt.Errorf("%w %s: at offset %d: %w", ErrWrite, w.path, w.offset, err)
		}
	}
	w.offset += uint64(len(w.buf))
	w.buf = w.buf[:0]
	w.stats.Bytes = int64(w.offset)
}

// Commit completes the file and gives it its name. The file and its directory
// are on disk when it returns. After an error nothing is left.
func (w *Writer) Commit() error {
	if err := w.commit(); err != nil {
		w.Abort()
		return err
	}
	return nil
}

func (w *Writer) commit() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.appendIndices()
	w.flush()
	if w.err != nil {
		return w.err
	}
	fail := func(err error) error { return fmt.Errorf("%w %s: %w", ErrWrite, w.path, err) }
	if err := w.file.Sync(); err != nil {
		return fail(err)
	}
	// Not over a file that came meanwhile.
	err := unix.Renameat2(unix.AT_FDCWD, w.file.Name(), unix.AT_FDCWD, w.path, unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EINVAL) { // a file system that cannot promise it
		err = os.Rename(w.file.Name(), w.path)
	}
	if err != nil {
		return fail(err)
	}
	if err := w.file.Close(); err != nil {
		return fail(err)
	}
	w.file = nil
	if err := syncDirectory(filepath.Dir(w.path)); err != nil {
		return fail(err)
	}
	return nil
}

// appendIndices writes all that follows blocks and sections; mu is held.
func (w *Writer) appendIndices() {
	d := &w.dir
	d.blocks = uint32(len(w.blocks))
	for at := 0; at < len(w.blocks); at += chunkBlocks {
		var raw []byte
		for i := range w.blocks[at:min(at+chunkBlocks, len(w.blocks))] {
			raw = w.blocks[at+i].append(raw)
		}
		d.blockChunks = append(d.blockChunks, w.append(s2.Encode(nil, raw)))
	}
	raw := make([]byte, 0, chunkPages*4)
	for _, chunk := range w.pages {
		if chunk == nil {
			d.pageChunks = append(d.pageChunks, extent{})
			continue
		}
		raw = raw[:0]
		for _, entry := range chunk {
			raw = le.AppendUint32(raw, entry)
		}
		d.pageChunks = append(d.pageChunks, w.append(s2.Encode(nil, raw)))
	}
	d.dataPages = uint64(w.stats.Pages - w.stats.ZeroPages - w.stats.DuplicatePages)
	d.zeroPages, d.duplicatePages = uint64(w.stats.ZeroPages), uint64(w.stats.DuplicatePages)
	where := w.append(d.encode())
	f := footer{id: w.header.id, directory: where, size: where.end() + footerSize}
	w.append(f.encode())
}

// Abort ends the Writer and leaves nothing behind. After Commit it does nothing.
func (w *Writer) Abort() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.file != nil {
		w.file.Close()
		os.Remove(w.file.Name())
		w.file = nil
	}
	if w.err == nil {
		w.err = fmt.Errorf("%w %s: it has ended", ErrWrite, w.path)
	}
}

func syncDirectory(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}

var zeroPage [PageSize]byte

func isZero(page []byte) bool { return page[0] == 0 && bytes.Equal(page, zeroPage[:]) }
