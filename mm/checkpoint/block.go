package checkpoint

import (
	"bytes"
	"fmt"

	"github.com/klauspost/compress/s2"
)

// staging is what one goroutine needs to make a block.
type staging struct {
	entries [BlockPages]uint32  // of the page index: zero, or a slot of an earlier block; else 0
	slots   [BlockPages]int     // in this block, where entries has 0
	sums    [BlockPages]pageSum // where the page is not zero
	kept    []int               // which pages get a slot
	raw     []byte              // their bytes
	stored  []byte              // these, compressed
}

func newStaging() any {
	return &staging{kept: make([]int, 0, BlockPages), raw: make([]byte, blockBytes), stored: make([]byte, s2.MaxEncodedLen(blockBytes))}
}

// writtenBlock is a block that is in the file.
type writtenBlock struct {
	extent
	order  uint64
	shared uint64 // a bit for each slot that more pages than one share
	codec  byte
	pfns   []uint32
}

// Block adds 1 to 64 pages, which are numbered pfns and follow each other in
// data, as one storage block. Blocks are in the order of the calls. It returns
// when data may be used for something else.
func (w *Writer) Block(pfns []uint64, data []byte) error {
	return w.BlockAt(w.calls.Add(1), pfns, data)
}

// BlockAt does what Block does, for a block whose place among the others is not
// that of the call: a Reader counts blocks by ascending order.
func (w *Writer) BlockAt(order uint64, pfns []uint64, data []byte) error {
	if len(pfns) == 0 || len(pfns) > BlockPages || len(data) != len(pfns)*PageSize {
		return w.fail(fmt.Errorf("block of %d pages with %d bytes", len(pfns), len(data)))
	}
	for _, pfn := range pfns {
		if _, ok := w.layout.index(pfn); !ok {
			return w.fail(fmt.Errorf("page %#x is not RAM", pfn))
		}
	}
	s := w.staging.Get().(*staging)
	defer w.staging.Put(s)

	w.findEqual(s, pfns, data)
	s.gather(len(pfns))
	block := writtenBlock{order: order, pfns: make([]uint32, len(s.kept))}
	for slot, i := range s.kept {
		block.pfns[slot] = uint32(pfns[i])
	}
	var stored []byte
	var sum uint32
	if len(s.kept) > 0 {
		raw := data
		if len(s.kept) < len(pfns) {
			raw = s.raw[:0]
			for _, i := range s.kept {
				raw = append(raw, data[i*PageSize:][:PageSize]...)
			}
		}
		stored, block.codec = compress(s.stored, raw)
		sum = checksum(stored)
	}

	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.failed(); err != nil {
		return err
	}
	if len(w.blocks) >= maxBlocks {
		return w.failLocked(fmt.Errorf("it has %d blocks already", len(w.blocks)))
	}
	if len(s.kept) > 0 {
		block.extent = w.out.add(stored, sum)
		w.blocks = append(w.blocks, block)
		w.dir.blockBytes += uint64(block.length)
	}
	if err := w.index(s, pfns); err != nil {
		return err
	}
	w.out.writeFull()
	return w.failed()
}

// findEqual finds the pages that are zero or in the file already.
func (w *Writer) findEqual(s *staging, pfns []uint64, data []byte) {
	for i := range pfns {
		page := data[i*PageSize:][:PageSize]
		if s.entries[i] = 0; isZero(page) {
			s.entries[i] = entryZero
		} else {
			w.dup.sum(&s.sums[i], page)
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for i := range pfns {
		if s.entries[i] == 0 {
			s.entries[i] = w.dup.find(&s.sums[i])
		}
	}
}

// gather finds the pages that get a slot: those that equal one before them in
// the block share its.
func (s *staging) gather(pages int) {
	s.kept = s.kept[:0]
	for i := range pages {
		if s.entries[i] != 0 {
			continue
		}
		slot := 0
		for slot < len(s.kept) && s.sums[s.kept[slot]] != s.sums[i] {
			slot++
		}
		if s.slots[i] = slot; slot == len(s.kept) {
			s.kept = append(s.kept, i)
		}
	}
}

// index makes the entries of a block's pages in the page index; mu is held. If
// some have a slot, the block is the last one.
func (w *Writer) index(s *staging, pfns []uint64) error {
	block := uint32(len(w.blocks) - 1)
	var zero, duplicate uint64
	kept := 0
	for i, pfn := range pfns {
		entry := s.entries[i]
		switch {
		case entry == entryZero:
			zero++
		case entry == 0:
			entry = slotEntry(block, s.slots[i])
			if kept < len(s.kept) && s.kept[kept] == i {
				kept++
				w.dup.add(&s.sums[i], entry)
				break
			}
			fallthrough
		default:
			duplicate++
			w.blocks[entry/BlockPages-1].shared |= 1 << (entry % BlockPages)
		}
		if err := w.set(pfn, entry); err != nil {
			return err
		}
	}
	w.dir.zeroPages += zero
	w.dir.duplicatePages += duplicate
	w.dir.dataPages += uint64(kept)
	return nil
}

// compress returns the bytes, in room, or as they are if that does not pay.
func compress(room, raw []byte) (stored []byte, codec byte) {
	stored = s2.Encode(room, raw)
	if len(stored) > len(raw)/8*7 { // not worth the time that reading it back would take
		return raw, codecRaw
	}
	return stored, codecS2
}

var zeroPage [PageSize]byte

func isZero(page []byte) bool { return page[0] == 0 && bytes.Equal(page, zeroPage[:]) }
