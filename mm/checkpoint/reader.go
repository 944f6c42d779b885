package checkpoint

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
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
//
// Open reads little of a file, however large it is. So damage may be met by any
// method, and each then returns an error, but Find: see there.
type Reader struct {
	layout *layout
	files  []*file   // the newest first
	blocks int       // of all files
	stored sync.Pool // of *[]byte: a block as it is in the file
	cache  blockCache
	fault  atomic.Pointer[error] // the first damage of an index that Find met
}

// Open opens a checkpoint and the chain of its parents.
func Open(path string) (*Reader, error) {
	r := &Reader{}
	r.stored.New = func() any { b := make([]byte, s2.MaxEncodedLen(blockBytes)); return &b }
	r.cache.init(r, readCache)
	if err := r.open(path); err != nil {
		r.Close()
		return nil, err
	}
	return r, nil
}

func (r *Reader) open(path string) error {
	var child *file
	seen := map[ID]string{}
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
		if r.blocks += int(f.dir.blocks); r.blocks > maxBlocks {
			return fmt.Errorf("%w: %s: %d blocks in the chain up to it", ErrParent, path, r.blocks)
		}
		if child != nil {
			if f.head.id != child.head.parentID {
				return fmt.Errorf("%w: %s needs the checkpoint %s, and %s is %s: it was replaced", ErrParent, child.path, child.head.parentID, path, f.head.id)
			}
			if err := sameMemory(f.head.ranges, child.head.ranges); err != nil {
				return fmt.Errorf("%w: %s: %w", ErrParent, path, err)
			}
		}
		if other, ok := seen[f.head.id]; ok {
			return fmt.Errorf("%w: %s and %s are the same checkpoint, which so is its own parent", ErrParent, other, path)
		}
		seen[f.head.id] = path
		if f.head.parent == "" {
			break
		}
		if len(r.files) >= maxChain {
			return fmt.Errorf("%w: %s: more than %d files in a chain", ErrParent, path, maxChain)
		}
		// Its parent is beside the file, and not beside a link to it.
		dir := filepath.Dir(path)
		if real, err := filepath.EvalSymlinks(path); err == nil && filepath.Dir(real) != dir {
			dir = filepath.Dir(real)
		}
		child, path = f, filepath.Join(dir, f.head.parent)
	}
	r.layout = r.files[0].layout
	return nil
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

// Parents are the paths of the files that the checkpoint needs beside its own,
// the nearest first.
func (r *Reader) Parents() []string {
	var paths []string
	for _, f := range r.files[1:] {
		paths = append(paths, f.path)
	}
	return paths
}

// Section returns a named blob of the checkpoint, not of its parents.
func (r *Reader) Section(name string) (version uint32, data []byte, err error) {
	f := r.files[0]
	for i := range f.dir.sections {
		if s := &f.dir.sections[i]; s.name == name {
			data, err = f.section(s)
			return s.version, data, err
		}
	}
	return 0, nil, f.wrap(fmt.Errorf("%w: %q", ErrMissing, name))
}

// SectionInfo describes a section.
type SectionInfo struct {
	Name    string `json:"name"`
	Version uint32 `json:"version"`
	Size    int64  `json:"size"` // bytes of its data
}

// Sections lists the checkpoint's sections in the order in which they were written.
func (r *Reader) Sections() []SectionInfo { return r.files[0].sectionInfos() }

func (f *file) sectionInfos() []SectionInfo {
	all := []SectionInfo{}
	for _, s := range f.dir.sections {
		all = append(all, SectionInfo{s.name, s.version, int64(s.size)})
	}
	return all
}

// Find tells where a page of Memory is, by its number; what is not RAM is zero.
// Of a page of which it cannot be known, since the index is damaged there, it
// says that it is in the block that stands for the index (see Blocks).
func (r *Reader) Find(pfn uint64) Location {
	i, ok := r.layout.index(pfn)
	if !ok {
		return Location{}
	}
	for _, f := range r.files {
		entry, err := f.page(i)
		switch {
		case err != nil:
			return r.unknown(err)
		case entry == entryInherit:
		case entry == entryZero:
			return Location{}
		default:
			return Location{Kind: Data, Block: f.base + BlockID(entry/BlockPages-1), Slot: int(entry % BlockPages)}
		}
	}
	return Location{}
}

// unknown is where a page is of which the index cannot be read.
func (r *Reader) unknown(err error) Location {
	r.fault.CompareAndSwap(nil, &err)
	return Location{Kind: Data, Block: r.indexBlock()}
}

// Blocks is how many blocks the chain has. The last one stands for the index: it
// has no pages, and reading it reads what has not been read of the index and
// tells whether it is damaged.
func (r *Reader) Blocks() int { return r.blocks + 1 }

func (r *Reader) indexBlock() BlockID { return BlockID(r.blocks) }

func (r *Reader) readIndex() error {
	if fault := r.fault.Load(); fault != nil {
		return *fault
	}
	for _, f := range r.files {
		if err := f.readIndex(); err != nil {
			return err
		}
	}
	return nil
}

// entry returns the block index's entry of a block, its file, and its number
// there.
func (r *Reader) entry(b BlockID) (*blockEntry, *file, int, error) {
	for i := len(r.files) - 1; i >= 0; i-- {
		if f := r.files[i]; b >= f.base {
			n := int(b - f.base)
			if n >= int(f.dir.blocks) {
				break
			}
			e, err := f.block(n)
			return e, f, n, err
		}
	}
	return nil, nil, 0, fmt.Errorf("%s: there is no block %d", r.files[0].path, b)
}

// Pages returns the numbers of the pages that a block's slots were made for. A
// slot holds its page still if Find says so. The caller must not change them.
func (r *Reader) Pages(b BlockID) ([]uint64, error) {
	if b == r.indexBlock() {
		return nil, nil
	}
	e, _, _, err := r.entry(b)
	if err != nil {
		return nil, err
	}
	return e.pfns, nil
}

// Shared has a bit for each slot of a block that more pages than one were equal
// to when their file was written.
func (r *Reader) Shared(b BlockID) (uint64, error) {
	if b == r.indexBlock() {
		return 0, nil
	}
	e, _, _, err := r.entry(b)
	if err != nil {
		return 0, err
	}
	return e.shared, nil
}

// ReadBlock reads a block with one system call, checks it, and returns its
// pages, in buf if they fit, and how many bytes of the file it took. A buf of
// 256 KiB fits all.
func (r *Reader) ReadBlock(b BlockID, buf []byte) (pages []byte, stored int, err error) {
	if b == r.indexBlock() {
		return buf[:0], 0, r.readIndex()
	}
	e, f, n, err := r.entry(b)
	if err != nil {
		return nil, 0, err
	}
	size := len(e.pfns) * PageSize
	if cap(buf) < size {
		buf = make([]byte, size)
	}
	pages = buf[:size]
	if e.codec == codecRaw {
		_, err = f.read(part{"block ", n}, e.extent, pages)
	} else {
		room := r.stored.Get().(*[]byte)
		defer r.stored.Put(room)
		var raw []byte
		if raw, err = f.read(part{"block ", n}, e.extent, *room); err == nil {
			if err := decompress(pages, raw); err != nil {
				return nil, 0, f.damaged(part{"block ", n}, e.offset, err)
			}
		}
	}
	if err != nil {
		return nil, 0, err
	}
	return pages, int(e.length), nil
}

// Read copies guest memory from gpa on into p, all of which must be RAM.
func (r *Reader) Read(gpa uint64, p []byte) error {
	for len(p) > 0 {
		pfn, off := gpa/PageSize, int(gpa%PageSize)
		if _, ok := r.layout.index(pfn); !ok {
			return fmt.Errorf("%w: %#x", guestmem.ErrOutOfBounds, gpa)
		}
		n := min(len(p), PageSize-off)
		if at := r.Find(pfn); at.Kind == Zero {
			clear(p[:n])
		} else if err := r.cache.copy(p[:n], at, off); err != nil {
			return fmt.Errorf("page %#x: %w", pfn, err)
		}
		gpa, p = gpa+uint64(n), p[n:]
	}
	return nil
}
