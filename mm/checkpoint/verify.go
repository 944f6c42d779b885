package checkpoint

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sort"
)

// Info describes one file of a chain.
type Info struct {
	File     string `json:"file"`
	ID       string `json:"id"`
	ParentID string `json:"parent-id,omitempty"`
	Parent   string `json:"parent,omitempty"` // path, as the file has it

	FileBytes      int64         `json:"file-bytes"`
	MemoryBytes    int64         `json:"memory-bytes"`
	Blocks         int64         `json:"blocks"`
	BlockBytes     int64         `json:"block-bytes"` // compressed
	DataPages      int64         `json:"data-pages"`
	ZeroPages      int64         `json:"zero-pages"`
	DuplicatePages int64         `json:"duplicate-pages"`
	Sections       []SectionInfo `json:"sections"`
}

// Info describes the chain's files, the newest first.
func (r *Reader) Info() ([]Info, error) {
	var all []Info
	for _, f := range r.files {
		i := Info{
			File: f.path, ID: f.head.id.String(), Parent: f.head.parent, FileBytes: int64(f.size), MemoryBytes: int64(r.layout.pages * PageSize),
			Blocks: int64(f.dir.blocks), DataPages: int64(f.dir.dataPages), ZeroPages: int64(f.dir.zeroPages), DuplicatePages: int64(f.dir.duplicatePages),
			Sections: []SectionInfo{},
		}
		if f.head.parent != "" {
			i.ParentID = f.head.parentID.String()
		}
		for _, s := range f.dir.sections {
			i.Sections = append(i.Sections, SectionInfo{s.name, s.version, int64(s.size)})
		}
		for n := range int(f.dir.blocks) {
			e, err := f.block(n, r.layout)
			if err != nil {
				return nil, err
			}
			i.BlockBytes += int64(e.length)
		}
		all = append(all, i)
	}
	return all, nil
}

// Verify reads every byte of the chain and checks it: checksums, that each page
// has its slot, and that nothing in a file belongs to nobody. The error names
// the first fault. progress, where not nil, is told how many bytes are done.
func (r *Reader) Verify(ctx context.Context, progress func(done, total int64)) error {
	var done, total int64
	for _, f := range r.files {
		total += int64(f.size)
	}
	buf := make([]byte, blockBytes)
	for _, f := range r.files {
		used := []extent{{0, headerSize, 0}, {f.end, uint32(f.size - f.end), 0}}
		for _, s := range f.dir.sections {
			if _, err := f.section(s); err != nil {
				return err
			}
			used = append(used, s.extent)
		}
		for _, list := range [][]extent{f.dir.pageChunks, f.dir.blockChunks} {
			used = append(used, list...)
		}
		for n := range int(f.dir.blocks) {
			if err := ctx.Err(); err != nil {
				return err
			}
			if _, _, err := r.ReadBlock(f.base+BlockID(n), buf); err != nil {
				return err
			}
			e, err := f.block(n, r.layout)
			if err != nil {
				return err
			}
			used = append(used, e.extent)
			if progress != nil {
				progress(done+int64(e.end()), total)
			}
		}
		if err := f.checkSlots(r.layout); err != nil {
			return f.wrap(err)
		}
		if err := f.checkUse(used); err != nil {
			return f.wrap(err)
		}
		done += int64(f.size)
	}
	if progress != nil {
		progress(total, total)
	}
	return nil
}

// checkSlots checks that each page's slot is there.
func (f *file) checkSlots(l *layout) error {
	for i, chunk := range f.pages {
		for j, entry := range chunk {
			if entry < firstSlot {
				continue
			}
			b, err := f.block(int(entry/BlockPages-1), l)
			if err != nil {
				return err
			}
			if slot := int(entry % BlockPages); slot >= len(b.pfns) {
				return fmt.Errorf("%w: page index, chunk %d at offset %d: entry %d names slot %d of a block of %d", ErrDamaged, i, f.dir.pageChunks[i].offset, j, slot, len(b.pfns))
			}
		}
	}
	return nil
}

// checkUse checks that each byte of the file has one use.
func (f *file) checkUse(used []extent) error {
	sort.Slice(used, func(i, j int) bool { return used[i].offset < used[j].offset })
	at := uint64(0)
	for _, e := range used {
		if e.length == 0 {
			continue
		}
		if e.offset != at {
			return fmt.Errorf("%w: what is at offset %d has no use, or two", ErrDamaged, min(at, e.offset))
		}
		at = e.end()
	}
	return nil
}

// Flatten writes the chain that r reads as one file without a parent, at out,
// in the order of its blocks. Nothing is there when it fails.
func (r *Reader) Flatten(ctx context.Context, out string, progress func(done, total int64)) (err error) {
	w, err := Create(out, CreateOptions{Memory: r.Memory()})
	if err != nil {
		return err
	}
	defer w.Abort()
	for _, s := range r.files[0].dir.sections {
		data, err := r.files[0].section(s)
		if err != nil {
			return err
		}
		if err := w.Section(s.name, s.version, data); err != nil {
			return err
		}
	}
	// Duplicates are found anew: a page may be kept in a block that has become
	// another page's, or in one that was written for a page that changed since.
	extra := map[BlockID][]uint64{}
	for i := range r.layout.pages {
		pfn := r.layout.pfn(i)
		at := r.Find(pfn)
		if at.Kind == Zero {
			continue
		}
		own, err := r.Pages(at.Block)
		if err != nil {
			return err
		}
		if at.Slot >= len(own) {
			return fmt.Errorf("%w: page %#x has slot %d of a block of %d", ErrDamaged, pfn, at.Slot, len(own))
		}
		if own[at.Slot] != pfn {
			extra[at.Block] = append(extra[at.Block], pfn)
		}
	}
	buf, data := make([]byte, blockBytes), make([]byte, 0, blockBytes)
	for b := range BlockID(r.blocks) {
		if err := ctx.Err(); err != nil {
			return err
		}
		own, err := r.Pages(b)
		if err != nil {
			return err
		}
		var pfns []uint64
		for slot, pfn := range own {
			if at := r.Find(pfn); at == (Location{Data, b, slot}) {
				pfns = append(pfns, pfn)
			}
		}
		pfns = append(pfns, extra[b]...)
		if len(pfns) == 0 {
			continue
		}
		pages, _, err := r.ReadBlock(b, buf)
		if err != nil {
			return err
		}
		for len(pfns) > 0 {
			n := min(len(pfns), BlockPages)
			data = data[:0]
			for _, pfn := range pfns[:n] {
				data = append(data, pages[r.Find(pfn).Slot*PageSize:][:PageSize]...)
			}
			if err := w.Block(pfns[:n], data); err != nil {
				return err
			}
			pfns = pfns[n:]
		}
		if progress != nil {
			progress(int64(b)+1, int64(r.blocks))
		}
	}
	return w.Commit()
}

// Parents are the paths of the files that the checkpoint needs beside its own,
// the nearest first.
func (r *Reader) Parents() []string {
	var paths []string
	for _, f := range r.files[1:] {
		paths = append(paths, f.path)
	}
	return paths
}

// Children are the checkpoints in the same directory as path that name it as
// their parent. What is not a checkpoint there is passed over.
func Children(path string) ([]string, error) {
	self, err := openFile(path)
	if err != nil {
		return nil, err
	}
	defer self.f.Close()
	dir := filepath.Dir(path)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var children []string
	for _, e := range entries {
		if !e.Type().IsRegular() {
			continue
		}
		other, err := openFile(filepath.Join(dir, e.Name()))
		if err != nil {
			continue
		}
		if other.head.parent != "" && other.head.parentID == self.head.id {
			children = append(children, other.path)
		}
		other.f.Close()
	}
	return children, nil
}

// Extract writes memory to a file as a raw image, each range at its GPA, with
// holes where pages are zero.
func (r *Reader) Extract(ctx context.Context, out *os.File, progress func(done, total int64)) error {
	last := r.layout.ranges[len(r.layout.ranges)-1]
	if err := out.Truncate(int64(last.GPA + last.Size)); err != nil {
		return err
	}
	page := make([]byte, BlockPages*PageSize)
	for i := uint64(0); i < r.layout.pages; {
		if err := ctx.Err(); err != nil {
			return err
		}
		n := 0
		first := r.layout.pfn(i)
		for i+uint64(n) < r.layout.pages && n < BlockPages && r.layout.pfn(i+uint64(n)) == first+uint64(n) && r.Find(first+uint64(n)).Kind == Data {
			n++
		}
		if n == 0 {
			i++
			continue
		}
		if err := r.Read(first*PageSize, page[:n*PageSize]); err != nil {
			return err
		}
		if _, err := out.WriteAt(page[:n*PageSize], int64(first*PageSize)); err != nil {
			return err
		}
		i += uint64(n)
		if progress != nil {
			progress(int64(i*PageSize), int64(r.layout.pages*PageSize))
		}
	}
	return nil
}
