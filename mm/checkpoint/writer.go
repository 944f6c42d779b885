package checkpoint

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/klauspost/compress/s2"
	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/mm/guestmem"
)

// ErrWrite is the stage of writing a checkpoint.
var ErrWrite = errors.New("write checkpoint")

var errEnded = errors.New("it has ended")

// CreateOptions say what a checkpoint is of.
type CreateOptions struct {
	// Memory is the machine's RAM: ascending, disjoint, whole pages.
	Memory []guestmem.Range
	// Parent is the path of the checkpoint that this one continues; "": none.
	// The new file names it relative to its own directory.
	Parent string
	// Pages is about how many pages the file will hold, for whom they are few; 0: all.
	Pages uint64
	// NoFlush has Commit return without waiting until the file is on disk, as QEMU's
	// no-flush: after a power failure it may be damaged, which whoever opens or reads
	// it is told then. Nothing that the new file replaces may be deleted before it is.
	NoFlush bool
}

// Writer makes a checkpoint file. Its methods may be called from several
// goroutines; Commit or Abort is the last call. A page that it is never told of
// is the parent's, or zero where there is no parent; it may be told of a page
// once. After an error of any method but Section there can be no Commit.
type Writer struct {
	path   string
	header header
	layout *layout
	dup    *duplicates
	calls  atomic.Uint64
	// pages is the page index by chunks, nil where nothing was said; blocks are numbered as
	// in blocks.
	pages []atomic.Pointer[pageChunk]

	mu     sync.Mutex // guards everything below
	out    output
	err    error // why there can be no Commit
	ended  bool  // Commit or Abort was called
	blocks []writtenBlock
	dir    directory
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
	w, err := create(path, o)
	if err != nil {
		return nil, fmt.Errorf("%w %s: %w", ErrWrite, path, err)
	}
	return w, nil
}

func create(path string, o CreateOptions) (*Writer, error) {
	l, err := newLayout(slices.Clone(o.Memory))
	if err != nil {
		return nil, err
	}
	if _, err := os.Lstat(path); err == nil {
		return nil, fmt.Errorf("%w: remove it, or choose another name", ErrExists)
	}
	w := &Writer{
		path: path, layout: l,
		header: header{id: newID(), ranges: l.ranges},
		pages:  make([]atomic.Pointer[pageChunk], l.chunks()),
	}
	if o.Parent != "" {
		if err := w.setParent(o.Parent); err != nil {
			return nil, err
		}
	}
	head, err := w.header.encode()
	if err != nil {
		return nil, err
	}
	expect := l.pages
	if o.Pages > 0 {
		expect = min(expect, o.Pages)
	}
	if w.dup, err = newDuplicates(expect); err != nil {
		return nil, err
	}
	file, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*.partial")
	if err != nil {
		return nil, advise(err)
	}
	w.out.init(file, expect*PageSize, o.NoFlush, &w.mu)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.out.add(0, head)
	return w, nil
}

// advise says what to do about a file that cannot be made or written. Its name until
// it is complete tells the user nothing.
func advise(err error) error {
	var path *fs.PathError
	if errors.As(err, &path) {
		err = path.Err
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%w: make its directory first", err)
	case errors.Is(err, fs.ErrPermission), errors.Is(err, unix.EROFS):
		return fmt.Errorf("%w: choose a directory that you may write", err)
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return fmt.Errorf("%w: make room, or choose another place", err)
	}
	return err
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
	dir, err := realPath(filepath.Dir(w.path))
	if err != nil {
		return err
	}
	if parent, err = realPath(parent); err != nil {
		return err
	}
	if w.header.parent, err = filepath.Rel(dir, parent); err != nil {
		return fmt.Errorf("%w: %w", ErrParent, err)
	}
	return nil
}

// realPath is a path from the root without symbolic links, so that ".." means
// the same in it to everybody.
func realPath(path string) (string, error) {
	path, err := filepath.EvalSymlinks(path)
	if err != nil {
		return "", err
	}
	return filepath.Abs(path)
}

func sameMemory(have, want []guestmem.Range) error {
	if !slices.Equal(have, want) {
		return fmt.Errorf("%w: it is of a machine with other RAM: %#x and not %#x", ErrMemory, have, want)
	}
	return nil
}

// ID is the new checkpoint's.
func (w *Writer) ID() ID { return w.header.id }

// Depth is how many calls of BlockAt at a time it has use for, because they wait for the disk;
// 0: no more than there are processors.
func (w *Writer) Depth() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.out.direct == nil {
		return 0
	}
	return directDepth
}

// Stats tells what was done so far.
func (w *Writer) Stats() WriteStats {
	w.mu.Lock()
	defer w.mu.Unlock()
	return WriteStats{
		Pages:     int64(w.dir.dataPages + w.dir.zeroPages + w.dir.duplicatePages),
		ZeroPages: int64(w.dir.zeroPages), DuplicatePages: int64(w.dir.duplicatePages),
		Blocks: int64(len(w.blocks)), Writes: w.out.writes, Bytes: int64(w.out.size()),
	}
}

// fail notes why there can be no Commit, and returns it.
func (w *Writer) fail(err error) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.failLocked(err)
}

func (w *Writer) failLocked(err error) error {
	err = fmt.Errorf("%w %s: %w", ErrWrite, w.path, err)
	if w.err == nil {
		w.err = err
	}
	return err
}

// failed tells why nothing can be added any more, if so; mu is held.
func (w *Writer) failed() error {
	switch {
	case w.err != nil:
		return w.err
	case w.out.err != nil:
		return w.failLocked(advise(w.out.err))
	case w.ended:
		return w.failLocked(errEnded)
	}
	return nil
}

// Section adds a named blob, of at most 64 MiB. Names are unique.
func (w *Writer) Section(name string, version uint32, data []byte) error {
	s := section{name: name, version: version, size: uint32(len(data)), codec: codecRaw}
	if name == "" || len(name) > maxName || len(data) > maxSection {
		return fmt.Errorf("%w %s: section %q of %d bytes: names have 1 to %d bytes, sections at most %d", ErrWrite, w.path, name, len(data), maxName, maxSection)
	}
	stored := s2.EncodeBetter(nil, data)
	if len(stored) < len(data) {
		s.codec = codecS2
	} else {
		stored = data
	}
	sum := checksum(stored)

	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.failed(); err != nil {
		return err
	}
	same := func(other section) bool { return other.name == name }
	if slices.ContainsFunc(w.dir.sections, same) || len(w.dir.sections) >= maxCount {
		return fmt.Errorf("%w %s: section %q is there already, or %d others", ErrWrite, w.path, name, maxCount)
	}
	s.extent = w.out.add(sum, stored)
	w.dir.sections = append(w.dir.sections, s)
	return w.failed()
}

// Zero says that pages, by their numbers, are zero.
func (w *Writer) Zero(pfns ...uint64) error {
	w.mu.Lock()
	err := w.failed()
	w.dir.zeroPages += uint64(len(pfns))
	w.mu.Unlock()
	for i := 0; i < len(pfns) && err == nil; i++ {
		err = w.set(pfns[i], entryZero)
	}
	return err
}

// set makes the entry of a page in the page index.
func (w *Writer) set(pfn uint64, entry uint32) error {
	i, ok := w.layout.index(pfn)
	if !ok {
		return w.fail(fmt.Errorf("page %#x is not RAM", pfn))
	}
	at := &w.pages[i/chunkPages]
	chunk := at.Load()
	if chunk == nil {
		if chunk = chunks.Get().(*pageChunk); !at.CompareAndSwap(nil, chunk) {
			chunks.Put(chunk)
			chunk = at.Load()
		}
	}
	// At once: in memory that is new, to read before is a page fault more.
	if atomic.SwapUint32(&chunk[i%chunkPages], entry) != entryInherit {
		return w.fail(fmt.Errorf("page %#x was there before", pfn))
	}
	return nil
}

// Commit completes the file and gives it its name. The file and its directory
// are on disk when it returns, but for NoFlush. After an error nothing is left.
func (w *Writer) Commit() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	err := w.failed()
	w.ended = true
	if err == nil {
		if err = w.commit(); err != nil {
			err = w.failLocked(err)
		}
	}
	w.remove()
	w.recycle()
	return err
}

// commit is Commit; mu is held.
func (w *Writer) commit() error {
	if err := w.out.finish(); err != nil {
		return err
	}
	w.sortBlocks()
	w.addBlockIndex()
	w.addPageIndex()
	b := w.dir.encode()
	where := w.out.add(checksum(b), b)
	f := footer{id: w.header.id, directory: where, size: where.end() + footerSize}
	w.out.add(0, f.encode())
	if err := w.out.finish(); err != nil {
		return err
	}
	file, flush := w.out.file, !w.out.noFlush
	if flush {
		if err := file.Sync(); err != nil {
			return err
		}
	}
	// Not over a file that came meanwhile.
	err := unix.Renameat2(unix.AT_FDCWD, file.Name(), unix.AT_FDCWD, w.path, unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EINVAL) { // a file system that cannot promise it
		err = os.Rename(file.Name(), w.path)
	}
	if err != nil {
		return err
	}
	w.out.file, w.out.err = nil, errEnded
	if err = file.Close(); flush {
		err = errors.Join(err, syncDirectory(filepath.Dir(w.path)))
	}
	if err != nil {
		os.Remove(w.path)
	}
	return err
}

// sortBlocks numbers the blocks in their order.
func (w *Writer) sortBlocks() {
	byOrder := make([]uint32, len(w.blocks))
	for i := range byOrder {
		byOrder[i] = uint32(i)
	}
	slices.SortStableFunc(byOrder, func(a, b uint32) int { return cmp.Compare(w.blocks[a].order, w.blocks[b].order) })
	sorted, number := make([]writtenBlock, len(w.blocks)), make([]uint32, len(w.blocks))
	for to, from := range byOrder {
		sorted[to], number[from] = w.blocks[from], uint32(to)
	}
	w.blocks = sorted
	for at := range w.pages {
		chunk := w.pages[at].Load()
		if chunk == nil {
			continue
		}
		for i, entry := range chunk {
			if entry >= firstSlot {
				chunk[i] = slotEntry(number[entry/BlockPages-1], int(entry%BlockPages))
			}
		}
	}
}

func (w *Writer) addBlockIndex() {
	w.dir.blocks = uint32(len(w.blocks))
	var raw, stored []byte
	for chunk := range slices.Chunk(w.blocks, chunkBlocks) {
		raw = raw[:0]
		for i := range chunk {
			raw = chunk[i].append(raw)
		}
		stored = s2.Encode(stored[:cap(stored)], raw)
		w.dir.blockChunks = append(w.dir.blockChunks, w.out.add(checksum(stored), stored))
	}
}

func (w *Writer) addPageIndex() {
	raw := make([]byte, 0, chunkPages*4)
	stored := make([]byte, s2.MaxEncodedLen(cap(raw)))
	for at := range w.pages {
		chunk := w.pages[at].Load()
		if chunk == nil {
			w.dir.pageChunks = append(w.dir.pageChunks, extent{})
			continue
		}
		raw = raw[:0]
		for _, entry := range chunk {
			raw = le.AppendUint32(raw, entry)
		}
		b := s2.Encode(stored, raw)
		w.dir.pageChunks = append(w.dir.pageChunks, w.out.add(checksum(b), b))
	}
}

// Abort ends the Writer and leaves nothing behind. After Commit it does nothing.
func (w *Writer) Abort() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.ended = true
	w.remove()
	w.recycle()
}

// chunks serve one checkpoint after the other. Their entries are all 0.
var chunks = sync.Pool{New: func() any { return new(pageChunk) }}

// recycle lets others use the memory, once nothing is going to be added.
func (w *Writer) recycle() {
	w.out.recycle()
	for i := range w.pages {
		if chunk := w.pages[i].Swap(nil); chunk != nil {
			clear(chunk[:])
			chunks.Put(chunk)
		}
	}
}

// remove removes the file unless it has its name; mu is held.
func (w *Writer) remove() {
	if w.out.direct != nil {
		w.out.direct.Close()
		w.out.direct = nil
	}
	if file := w.out.file; file != nil {
		w.out.file, w.out.err = nil, errEnded
		file.Close()
		os.Remove(file.Name())
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
