package checkpoint

import (
	"bytes"
	"hash/maphash"

	"github.com/klauspost/compress/s2"
)

// duplicates finds pages that are in the file already. A hash with a seed of
// its own names a candidate, and only equal bytes make a duplicate: what a guest
// puts in its memory cannot make one page pass for another. Its memory is
// bounded: what falls out of it is written again.
type duplicates struct {
	seed maphash.Seed
	// By the low bits of the hash: the whole hash, and the slot. Guarded by the
	// Writer's mu.
	hashes [duplicateSlots]uint64
	slots  [duplicateSlots]uint32
	// Pages that had duplicates, by the same bits: they are likely to have more.
	recent map[uint32][]byte
}

const (
	duplicateSlots  = 1 << 17
	duplicateRecent = 64
)

func newDuplicates() *duplicates {
	return &duplicates{seed: maphash.MakeSeed(), recent: map[uint32][]byte{}}
}

func (d *duplicates) hash(page []byte) uint64 { return maphash.Bytes(d.seed, page) }

// find returns the slot that may hold a page of that hash, or 0.
func (d *duplicates) find(hash uint64) uint32 {
	if i := hash % duplicateSlots; d.hashes[i] == hash {
		return d.slots[i]
	}
	return 0
}

func (d *duplicates) add(hash uint64, slot uint32) {
	i := hash % duplicateSlots
	d.hashes[i], d.slots[i] = hash, slot
}

// remember keeps a page that had a duplicate.
func (d *duplicates) remember(slot uint32, page []byte) {
	if len(d.recent) >= duplicateRecent {
		for old := range d.recent { // any
			delete(d.recent, old)
			break
		}
	}
	d.recent[slot] = bytes.Clone(page)
}

// duplicateOf returns the slot of a page of the file with the same bytes, or 0.
func (w *Writer) duplicateOf(page []byte, hash uint64) uint32 {
	w.mu.Lock()
	defer w.mu.Unlock()
	slot := w.dup.find(hash)
	if slot == 0 {
		return 0
	}
	if same, ok := w.dup.recent[slot]; ok {
		if bytes.Equal(same, page) {
			return slot
		}
		return 0
	}
	if w.holds(slot, page) {
		w.dup.remember(slot, page)
		return slot
	}
	return 0
}

// holds reads a slot back and compares it; mu is held. What cannot be read is
// no duplicate.
func (w *Writer) holds(slot uint32, page []byte) bool {
	b := &w.blocks[slot/BlockPages-1]
	if b.length == 0 {
		return false
	}
	stored := make([]byte, b.length)
	n := 0
	if b.offset < w.offset {
		n = int(min(uint64(b.length), w.offset-b.offset))
		if w.err != nil {
			return false
		}
		if _, err := w.file.ReadAt(stored[:n], int64(b.offset)); err != nil {
			return false
		}
	}
	if n < len(stored) {
		copy(stored[n:], w.buf[b.offset+uint64(n)-w.offset:])
	}
	if b.codec == codecS2 {
		raw, err := s2.Decode(nil, stored)
		if err != nil {
			return false
		}
		stored = raw
	}
	return bytes.Equal(stored[int(slot%BlockPages)*PageSize:][:PageSize], page)
}
