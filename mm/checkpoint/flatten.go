package checkpoint

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
)

// flattenCache is how many blocks are kept while pages are gathered: 16 MiB.
const flattenCache = 64

// Flatten writes the chain that r reads as one file without a parent, at out;
// nothing is there if it fails. Pages are in the order of the oldest file's
// blocks, then of the next one's for those that it did not have, and so on: what
// were neighbours before they changed one by one are neighbours again. progress,
// where not nil, is told how many bytes of memory are done.
func (r *Reader) Flatten(ctx context.Context, out string, progress func(done, total int64)) error {
	w, err := Create(out, CreateOptions{Memory: r.Memory()})
	if err != nil {
		return err
	}
	defer w.Abort()
	for i := range r.files[0].dir.sections {
		s := &r.files[0].dir.sections[i]
		data, err := r.files[0].section(s)
		if err != nil {
			return err
		}
		if err := w.Section(s.name, s.version, data); err != nil {
			return err
		}
	}
	f := &flattening{r: r, w: w, seen: make([]uint64, (r.layout.pages+63)/64), data: make([]byte, 0, blockBytes)}
	f.cache.init(r, flattenCache)
	for i := len(r.files) - 1; i >= 0; i-- {
		for n := range int(r.files[i].dir.blocks) {
			if err := ctx.Err(); err != nil {
				return err
			}
			b, err := r.files[i].block(n)
			if err != nil {
				return err
			}
			for _, pfn := range b.pfns {
				if err := f.add(pfn, r.Find(pfn)); err != nil {
					return err
				}
			}
			if progress != nil {
				progress(f.done*PageSize, int64(r.layout.pages*PageSize))
			}
		}
	}
	if err := r.eachLeft(ctx, f.isSeen, f.add); err != nil {
		return err
	}
	if err := f.flush(); err != nil {
		return err
	}
	return w.Commit()
}

// flattening is one Flatten.
type flattening struct {
	r     *Reader
	w     *Writer
	cache blockCache
	seen  []uint64 // a bit for each page that has been added, or is zero
	done  int64    // pages
	pfns  []uint64 // of the next block
	data  []byte   // and their bytes
}

func (f *flattening) isSeen(i uint64) bool { return f.seen[i/64]&(1<<(i%64)) != 0 }

// add adds a page, if it was not added before.
func (f *flattening) add(pfn uint64, at Location) error {
	i, ok := f.r.layout.index(pfn)
	if !ok || f.isSeen(i) {
		return nil
	}
	f.seen[i/64] |= 1 << (i % 64)
	f.done++
	if at.Kind == Zero {
		return nil
	}
	n := len(f.data)
	f.data = f.data[:n+PageSize]
	if err := f.cache.copy(f.data[n:], at, 0); err != nil {
		return fmt.Errorf("page %#x: %w", pfn, err)
	}
	if f.pfns = append(f.pfns, pfn); len(f.pfns) == BlockPages {
		return f.flush()
	}
	return nil
}

func (f *flattening) flush() error {
	if len(f.pfns) == 0 {
		return nil
	}
	err := f.w.Block(f.pfns, f.data)
	f.pfns, f.data = f.pfns[:0], f.data[:0]
	return err
}

// eachLeft calls do for the pages that are not zero and that skip, by their
// index, does not want to be left out: some thousands at a time in the order of
// where they are.
func (r *Reader) eachLeft(ctx context.Context, skip func(i uint64) bool, do func(pfn uint64, at Location) error) error {
	type left struct {
		pfn uint64
		at  Location
	}
	var some []left
	for i := uint64(0); i < r.layout.pages; {
		if err := ctx.Err(); err != nil {
			return err
		}
		some = some[:0]
		for ; i < r.layout.pages && len(some) < 1<<14; i++ {
			if skip(i) {
				continue
			}
			pfn := r.layout.pfn(i)
			if at := r.Find(pfn); at.Kind != Zero {
				some = append(some, left{pfn, at})
			}
		}
		slices.SortFunc(some, func(a, b left) int {
			return cmp.Or(cmp.Compare(a.at.Block, b.at.Block), cmp.Compare(a.at.Slot, b.at.Slot))
		})
		for _, l := range some {
			if err := do(l.pfn, l.at); err != nil {
				return err
			}
		}
	}
	return nil
}

// Extract writes memory to a file as a raw image, each page at its GPA, with
// holes where pages are zero. out should be empty. progress, where not nil, is
// told how many bytes of memory are done.
func (r *Reader) Extract(ctx context.Context, out *os.File, progress func(done, total int64)) error {
	last := r.layout.ranges[len(r.layout.ranges)-1]
	if err := out.Truncate(int64(last.GPA + last.Size)); err != nil {
		return err
	}
	seen := make([]uint64, (r.layout.pages+63)/64)
	buf := make([]byte, blockBytes)
	done, total := int64(0), int64(r.layout.pages*PageSize)
	for b := range BlockID(r.blocks) {
		if err := ctx.Err(); err != nil {
			return err
		}
		pfns, err := r.Pages(b)
		if err != nil {
			return err
		}
		var pages []byte
		for slot := 0; slot < len(pfns); {
			n := 0
			for slot+n < len(pfns) && pfns[slot+n] == pfns[slot]+uint64(n) && r.Find(pfns[slot+n]) == (Location{Data, b, slot + n}) {
				i, _ := r.layout.index(pfns[slot+n])
				seen[i/64] |= 1 << (i % 64)
				n++
			}
			if n == 0 {
				slot++
				continue
			}
			if pages == nil {
				if pages, _, err = r.ReadBlock(b, buf); err != nil {
					return err
				}
			}
			if _, err := out.WriteAt(pages[slot*PageSize:(slot+n)*PageSize], int64(pfns[slot]*PageSize)); err != nil {
				return err
			}
			slot += n
			done += int64(n) * PageSize
		}
		if progress != nil {
			progress(done, total)
		}
	}
	var cache blockCache
	cache.init(r, 1)
	page := make([]byte, PageSize)
	return r.eachLeft(ctx, func(i uint64) bool { return seen[i/64]&(1<<(i%64)) != 0 }, func(pfn uint64, at Location) error {
		if err := cache.copy(page, at, 0); err != nil {
			return fmt.Errorf("page %#x: %w", pfn, err)
		}
		_, err := out.WriteAt(page, int64(pfn*PageSize))
		return err
	})
}

// Children are the checkpoints in the directory of path, and in others, that
// name it as their parent. What is not a checkpoint there is passed over.
func Children(path string, others ...string) ([]string, error) {
	self, err := openFile(path)
	if err != nil {
		return nil, err
	}
	defer self.f.Close()
	var children []string
	for _, dir := range append([]string{filepath.Dir(path)}, others...) {
		more, err := childrenIn(dir, self.head.id)
		if err != nil {
			return nil, err
		}
		for _, c := range more {
			if !slices.Contains(children, c) {
				children = append(children, c)
			}
		}
	}
	return children, nil
}

func childrenIn(dir string, parent ID) ([]string, error) {
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
		if other.head.parent != "" && other.head.parentID == parent {
			children = append(children, other.path)
		}
		other.f.Close()
	}
	return children, nil
}

// Needed refuses, with ErrNeeded, if another checkpoint in the directories of
// the chain's files needs one of them. Those elsewhere are not looked for.
// A copy of one of the files is another checkpoint, which needs its parent too.
func (r *Reader) Needed() error {
	var dirs []string
	chain := map[string]bool{}
	for _, f := range r.files {
		real, err := filepath.EvalSymlinks(f.path)
		if err != nil {
			return err
		}
		for _, path := range []string{f.path, real} {
			if dir := filepath.Dir(path); !slices.Contains(dirs, dir) {
				dirs = append(dirs, dir)
			}
			chain[path] = true
		}
	}
	for _, f := range r.files {
		for _, dir := range dirs {
			children, err := childrenIn(dir, f.head.id)
			if err != nil {
				return err
			}
			for _, path := range children {
				real, err := filepath.EvalSymlinks(path)
				if err != nil {
					return err
				}
				if !chain[real] && !chain[path] {
					return fmt.Errorf("%w: %s by %s", ErrNeeded, f.path, path)
				}
			}
		}
	}
	return nil
}

// RecordedPath is where what a run on a checkpoint wanted is kept (package pager).
func RecordedPath(checkpoint string) string { return checkpoint + ".recorded" }

// Delete deletes the chain's files and what was recorded of them, the newest first, so that those that are
// left at any time are whole, unless one of them is Needed or was replaced since
// it was opened. It returns those that it has deleted.
func (r *Reader) Delete() (deleted []string, err error) {
	if err := r.Needed(); err != nil {
		return nil, err
	}
	for _, f := range r.files {
		opened, err := f.f.Stat()
		if err != nil {
			return deleted, err
		}
		there, err := os.Stat(f.path)
		if err != nil {
			return deleted, err
		}
		if !os.SameFile(opened, there) {
			return deleted, fmt.Errorf("%w: %s was replaced meanwhile", ErrParent, f.path)
		}
		if err := os.Remove(f.path); err != nil {
			return deleted, err
		}
		if err := os.Remove(RecordedPath(f.path)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return append(deleted, f.path), err
		}
		if err := syncDirectory(filepath.Dir(f.path)); err != nil {
			return deleted, err
		}
		deleted = append(deleted, f.path)
	}
	return deleted, nil
}
