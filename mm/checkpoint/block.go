package checkpoint

import (
	"bytes"
	"fmt"
	"sync"

	"github.com/klauspost/compress/s2"
)

// staging is what one goroutine needs to make a block.
type staging struct {
	entries  [BlockPages]uint32    // of the page index: zero, or a slot of an earlier block; else 0
	slots    [BlockPages]int       // in this block, where entries has 0
	prints   [BlockPages]pagePrint // where the page is not zero
	sums     [BlockPages]pageSum   // where summed has a bit
	summed   uint64
	like     [BlockPages]likeness // where looked has a bit
	looked   uint64
	hopeless bool     // it is not to be compressed
	kept     []int    // which pages get a slot
	pages    [][]byte // their bytes
	raw      []byte   // these, one behind the other
	stored   []byte   // these, compressed
	single   [1][]byte
}

// stagings serve one checkpoint after the other.
var stagings = sync.Pool{New: newStaging}

func newStaging() any {
	return &staging{kept: make([]int, 0, BlockPages), pages: make([][]byte, 0, BlockPages), raw: make([]byte, 0, blockBytes), stored: make([]byte, s2.MaxEncodedLen(blockBytes))}
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
	var room [BlockPages][]byte
	if len(pfns) > BlockPages || len(data) != len(pfns)*PageSize {
		return w.fail(fmt.Errorf("block of %d pages with %d bytes", len(pfns), len(data)))
	}
	pages := room[:len(pfns)]
	for i := range pages {
		pages[i] = data[i*PageSize:][:PageSize]
	}
	return w.BlockAt(w.calls.Add(1), pfns, pages)
}

// BlockAt does what Block does, for pages wherever they are, and for a block whose place
// among the others is not that of the call: a Reader counts blocks by ascending order.
func (w *Writer) BlockAt(order uint64, pfns []uint64, pages [][]byte) error {
	if len(pfns) == 0 || len(pfns) > BlockPages || len(pages) != len(pfns) {
		return w.fail(fmt.Errorf("block of %d pages, numbered by %d", len(pages), len(pfns)))
	}
	for _, page := range pages {
		if len(page) != PageSize {
			return w.fail(fmt.Errorf("page of %d bytes", len(page)))
		}
	}
	for _, pfn := range pfns {
		if _, ok := w.layout.index(pfn); !ok {
			return w.fail(fmt.Errorf("page %#x is not RAM", pfn))
		}
	}
	s := stagings.Get().(*staging)
	defer func() {
		clear(s.pages)
		stagings.Put(s)
	}()

	w.findEqual(s, pages)
	s.gather(pages)
	block := writtenBlock{order: order, pfns: make([]uint32, len(s.kept))}
	for slot, i := range s.kept {
		block.pfns[slot] = uint32(pfns[i])
	}
	var stored [][]byte
	var sum uint32
	if len(s.kept) > 0 {
		stored, block.codec = s.compress()
		sum = checksum(stored...)
	}

	number, err := w.place(&block, stored, sum)
	if err != nil {
		return err
	}
	return w.index(s, number, pfns)
}

// place puts a block, unless it is empty, into the file, and returns its number.
func (w *Writer) place(block *writtenBlock, stored [][]byte, sum uint32) (uint32, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.failed(); err != nil || len(stored) == 0 {
		return 0, err
	}
	behind := false
	if block.codec == codecRaw {
		block.extent, behind = w.out.addBehind(sum, stored)
	}
	if !behind {
		block.extent = w.out.add(sum, stored...)
	}
	number := uint32(len(w.blocks))
	if number >= maxBlocks {
		return 0, w.failLocked(fmt.Errorf("it has %d blocks already", number))
	}
	w.blocks = append(w.blocks, *block)
	w.dir.blockBytes += uint64(block.length)
	if behind {
		w.out.write(stored...)
	} else {
		w.out.writeFull()
	}
	return number, w.failed()
}

// findEqual finds the pages that are zero or in the file already. The pages of a block that
// is not going to be compressed are known by their prints, until others turn out to have the
// same: to compute sums of them all would take as long as everything else.
func (w *Writer) findEqual(s *staging, pages [][]byte) {
	s.hopeless = hopeless(pages)
	s.looked, s.summed = 0, 0
	for i, page := range pages {
		if s.entries[i] = 0; isZero(page) {
			s.entries[i] = entryZero
			continue
		}
		s.prints[i] = w.dup.print(page)
		if !s.hopeless {
			w.sum(s, i, page)
		}
	}
	w.findLike(s, pages)
	for i, page := range pages {
		if s.looked&(1<<i) != 0 {
			w.compare(s, i, page)
		}
	}
}

// sum computes the sum of a page of a block.
func (w *Writer) sum(s *staging, i int, page []byte) {
	w.dup.sum(&s.sums[i], page)
	s.summed |= 1 << i
}

// findLike looks pages up by what they are known by. Those that have the print of one
// that is in the file are noted in s.looked.
func (w *Writer) findLike(s *staging, pages [][]byte) {
	for i := range pages {
		if s.entries[i] != 0 {
			continue
		}
		if s.summed&(1<<i) != 0 {
			if s.entries[i] = w.dup.find(&s.sums[i]); s.entries[i] != 0 {
				continue
			}
		}
		slot, alone := w.dup.findPrint(s.prints[i])
		if slot == 0 || !alone && s.summed&(1<<i) != 0 {
			continue
		}
		s.looked |= 1 << i
		s.like[i] = likeness{slot: slot}
		if alone { // its block is not compressed: see index
			w.mu.Lock()
			s.like[i].at = w.blocks[slot/BlockPages-1].offset + uint64(slot%BlockPages)*PageSize
			w.mu.Unlock()
		}
	}
}

// likeness is a page of the file that one of a block has the print of.
type likeness struct {
	slot uint32
	at   uint64 // where in the file it is, if it has no sum; or else 0
}

// compare finds out whether a page is the one whose print it has, or another that has a sum.
// From now on it is known by its sum.
func (w *Writer) compare(s *staging, i int, page []byte) {
	if like := s.like[i]; like.at != 0 && w.holds(like.at, page) {
		s.entries[i] = like.slot
		return
	}
	if s.summed&(1<<i) == 0 {
		w.sum(s, i, page)
		s.entries[i] = w.dup.find(&s.sums[i])
	}
}

// holds tells whether a page is in the file at that place. What cannot be read is not.
func (w *Writer) holds(at uint64, page []byte) bool {
	w.mu.Lock()
	if b := w.out.unwritten(at); b != nil {
		defer w.mu.Unlock()
		return bytes.Equal(b[:PageSize], page)
	}
	file := w.out.file
	w.mu.Unlock()
	if file == nil {
		return false
	}
	room := pageRoom.Get().(*[PageSize]byte)
	defer pageRoom.Put(room)
	_, err := file.ReadAt(room[:], int64(at))
	return err == nil && bytes.Equal(room[:], page)
}

var pageRoom = sync.Pool{New: func() any { return new([PageSize]byte) }}

// sumOf is the sum of a page of the block, or nil.
func (s *staging) sumOf(i int) *pageSum {
	if s.summed&(1<<i) == 0 {
		return nil
	}
	return &s.sums[i]
}

// gather finds the pages that get a slot: those that equal one before them in
// the block share its.
func (s *staging) gather(pages [][]byte) {
	s.kept, s.pages = s.kept[:0], s.pages[:0]
	for i, page := range pages {
		if s.entries[i] != 0 {
			continue
		}
		slot := 0
		for slot < len(s.kept) && (s.prints[s.kept[slot]] != s.prints[i] || !bytes.Equal(s.pages[slot], page)) {
			slot++
		}
		if s.slots[i] = slot; slot == len(s.kept) {
			s.kept, s.pages = append(s.kept, i), append(s.pages, page)
		}
	}
}

// index makes the entries of a block's pages in the page index. If some have a slot, it is
// in the block of that number.
func (w *Writer) index(s *staging, number uint32, pfns []uint64) error {
	var zero, duplicate uint64
	kept := 0
	for i, pfn := range pfns {
		entry := s.entries[i]
		switch {
		case entry == entryZero:
			zero++
		case entry == 0:
			entry = slotEntry(number, s.slots[i])
			if kept < len(s.kept) && s.kept[kept] == i {
				kept++
				w.dup.add(s.sumOf(i), s.prints[i], entry)
				break
			}
			fallthrough
		default:
			duplicate++
			w.share(entry)
		}
		if err := w.set(pfn, entry); err != nil {
			return err
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.dir.zeroPages += zero
	w.dir.duplicatePages += duplicate
	w.dir.dataPages += uint64(kept)
	return nil
}

// share notes that more pages than one are in a slot.
func (w *Writer) share(entry uint32) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.blocks[entry/BlockPages-1].shared |= 1 << (entry % BlockPages)
}

// compress returns the bytes of the pages that get a slot, compressed, or as they are if
// that does not pay.
func (s *staging) compress() (stored [][]byte, codec byte) {
	if s.hopeless {
		return s.pages, codecRaw
	}
	s.raw = s.raw[:0]
	for _, page := range s.pages {
		s.raw = append(s.raw, page...)
	}
	b := s2.Encode(s.stored, s.raw)
	if len(b) > len(s.raw)/8*7 { // not worth the time that reading it back would take
		return s.pages, codecRaw
	}
	s.single[0] = b
	return s.single[:], codecS2
}

// sampleStride: one page of so many tells whether to compress the others.
const sampleStride = 16

// hopeless tells whether nothing would come of compressing a block, by samples: to go
// through all of it would be to copy it.
func hopeless(pages [][]byte) bool {
	if len(pages) < 2*sampleStride {
		return false
	}
	for i := sampleStride / 2; i < len(pages); i += sampleStride {
		if s2.EstimateBlockSize(pages[i]) >= 0 {
			return false
		}
	}
	return true
}

var zeroPage [PageSize]byte

func isZero(page []byte) bool { return page[0] == 0 && bytes.Equal(page, zeroPage[:]) }
