package checkpoint

import (
	"context"
	"errors"
	"fmt"
)

// Info describes one file of a chain.
type Info struct {
	File     string `json:"file"`
	ID       string `json:"id"`
	Parent   string `json:"parent,omitempty"` // path, as the file has it
	ParentID string `json:"parent-id,omitempty"`

	FileBytes      int64         `json:"file-bytes"`
	MemoryBytes    int64         `json:"memory-bytes"`
	Blocks         int64         `json:"blocks"`
	BlockBytes     int64         `json:"block-bytes"` // compressed
	DataPages      int64         `json:"data-pages"`
	ZeroPages      int64         `json:"zero-pages"` // those that the file tells of
	DuplicatePages int64         `json:"duplicate-pages"`
	Sections       []SectionInfo `json:"sections"`
}

// Info describes the chain's files, the newest first.
func (r *Reader) Info() []Info {
	var all []Info
	for _, f := range r.files {
		i := Info{
			File: f.path, ID: f.head.id.String(), Parent: f.head.parent,
			FileBytes: int64(f.size), MemoryBytes: int64(r.layout.pages * PageSize),
			Blocks: int64(f.dir.blocks), BlockBytes: int64(f.dir.blockBytes),
			DataPages: int64(f.dir.dataPages), ZeroPages: int64(f.dir.zeroPages), DuplicatePages: int64(f.dir.duplicatePages),
			Sections: f.sectionInfos(),
		}
		if f.head.parent != "" {
			i.ParentID = f.head.parentID.String()
		}
		all = append(all, i)
	}
	return all
}

// Verify reads every byte of the chain and checks it: checksums, that each page
// has its slot and each slot its page, and that nothing in a file belongs to
// nobody. The error names the first fault. progress, where not nil, is told how
// many bytes are done.
func (r *Reader) Verify(ctx context.Context, progress func(done, total int64)) error {
	var before, total int64
	for _, f := range r.files {
		total += int64(f.size)
	}
	for _, f := range r.files {
		if err := r.verifyFile(ctx, f, func(done uint64) {
			if progress != nil {
				progress(before+int64(done), total)
			}
		}); err != nil {
			return err
		}
		before += int64(f.size)
	}
	return nil
}

func (r *Reader) verifyFile(ctx context.Context, f *file, progress func(done uint64)) error {
	if err := f.readIndex(); err != nil {
		return err
	}
	places, err := f.extents()
	if err != nil {
		return err
	}
	if err := f.checkSlots(); err != nil {
		return err
	}
	buf := make([]byte, blockBytes)
	for _, p := range places {
		if err := ctx.Err(); err != nil {
			return err
		}
		switch p.kind {
		case aSection:
			_, err = f.section(&f.dir.sections[p.i])
		case aBlock:
			_, _, err = r.ReadBlock(f.base+BlockID(p.i), buf)
		default: // readIndex has read them
		}
		if err != nil {
			return err
		}
		progress(p.end())
	}
	progress(f.size)
	return nil
}

// checkSlots checks that the page index and the block index say the same.
func (f *file) checkSlots() error {
	var slots, zeros, others, bytes uint64
	for n := range int(f.dir.blocks) {
		b, err := f.block(n)
		if err != nil {
			return err
		}
		bytes += uint64(b.length)
		slots += uint64(len(b.pfns))
		for slot, pfn := range b.pfns {
			i, _ := f.layout.index(pfn) // decodeBlocks checked that it is RAM
			entry, err := f.page(i)
			if err != nil {
				return err
			}
			if entry != slotEntry(uint32(n), slot) {
				return f.damaged(part{"block index, chunk ", n / chunkBlocks}, f.dir.blockChunks[n/chunkBlocks].offset,
					fmt.Errorf("slot %d of block %d is page %#x's, which is elsewhere", slot, n, pfn))
			}
		}
	}
	for at := range f.pages {
		chunk := f.pages[at].Load()
		if chunk == nil {
			continue
		}
		for j, entry := range chunk {
			switch {
			case entry == entryZero:
				zeros++
			case entry >= firstSlot:
				others++
				b, err := f.block(int(entry/BlockPages - 1))
				if err != nil {
					return err
				}
				slot := int(entry % BlockPages)
				if slot >= len(b.pfns) {
					return f.damaged(part{"page index, chunk ", at}, f.dir.pageChunks[at].offset,
						fmt.Errorf("entry %d names slot %d of a block of %d", j, slot, len(b.pfns)))
				}
				if own, _ := f.layout.index(b.pfns[slot]); own != uint64(at*chunkPages+j) && b.shared&(1<<slot) == 0 {
					return f.damaged(part{"page index, chunk ", at}, f.dir.pageChunks[at].offset,
						fmt.Errorf("entry %d names slot %d of a block, which is not shared", j, slot))
				}
			}
		}
	}
	if d := f.dir; slots != d.dataPages || zeros != d.zeroPages || others-slots != d.duplicatePages || bytes != d.blockBytes {
		return f.damaged(part{"directory", alone}, f.end, errors.New("wrong counts"))
	}
	return nil
}
