package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"
)

// batch is what a flush writes.
type batch struct {
	counts  []copied
	linked  map[int64]uint64 // entries of the table of reference counts
	table   []byte           // all of it, if it is at a new place
	tableAt int64
	l2      []copied
	l1      map[int64]uint64
	freed   []run
}

// Flush implements block.Node. It takes one flush of the file where clusters were
// only overwritten, two where some were allocated, three where L2 tables were.
func (n *Node) Flush() error {
	if n.w == nil {
		return n.file.Flush() // which knows whether it was written
	}
	n.w.flushing.Lock()
	defer n.w.flushing.Unlock()
	if err := n.flush(); err != nil {
		return fmt.Errorf("disk %s: flush: %w", n.path, err)
	}
	return nil
}

// IgnoreFlushes has flushes write tables, but wait for nothing: the image is right
// once it is closed, and may be damaged if the host ends before its cache is
// written.
func (n *Node) IgnoreFlushes() {
	if n.w != nil {
		n.w.file.IgnoreFlushes()
	}
}

// flush is Flush with flushing held.
func (n *Node) flush() error {
	w := n.w
	w.mu.Lock()
	b := n.takeBatch()
	w.mu.Unlock()
	err := n.writeBatch(b)
	w.mu.Lock()
	w.counts.slices.done(b.counts, err != nil)
	w.l2.done(b.l2, err != nil)
	if err != nil {
		for i := range b.linked {
			w.counts.linked[i] = true
		}
		w.counts.moved = w.counts.moved || b.table != nil
		for i := range b.l1 {
			w.l1[i] = true
		}
		w.freed = append(b.freed, w.freed...)
		w.ordered = true // as far as can be told
	} else if b.table != nil {
		n.header.RefcountOffset = b.tableAt
		n.header.RefcountTables = uint32(int64(len(b.table)) / n.header.ClusterSize())
	}
	w.mu.Unlock()
	if err != nil || len(b.freed) == 0 {
		return err
	}
	w.quiesce()
	return n.giveBack(b.freed)
}

// takeBatch collects what the file has not. Preconditions: mu is held.
func (n *Node) takeBatch() *batch {
	w := n.w
	b := &batch{counts: w.counts.slices.take(), l2: w.l2.take(), freed: w.freed, tableAt: w.counts.tableAt}
	w.freed, w.ordered = nil, false
	if len(w.counts.linked) > 0 {
		b.linked = map[int64]uint64{}
		for i := range w.counts.linked {
			b.linked[i] = w.counts.table[i]
		}
		clear(w.counts.linked)
	}
	if w.counts.moved {
		b.table = encodeTable(w.counts.table)
		w.counts.moved = false
	}
	if len(w.l1) > 0 {
		b.l1 = map[int64]uint64{}
		for i := range w.l1 {
			b.l1[i] = n.l1[i]
		}
		clear(w.l1)
	}
	return b
}

func encodeTable(table []uint64) []byte {
	b := make([]byte, 0, len(table)*entrySize)
	for _, v := range table {
		b = binary.BigEndian.AppendUint64(b, v)
	}
	return b
}

// writeBatch writes counts beside the data, then the tables that point to it,
// then what points to those: each is durable before the next begins.
func (n *Node) writeBatch(b *batch) error {
	if err := n.writeCounts(b); err != nil {
		return err
	}
	if err := n.file.Flush(); err != nil {
		return err
	}
	if len(b.l2) > 0 {
		if err := n.writeSlices(b.l2); err != nil {
			return err
		}
		if err := n.file.Flush(); err != nil {
			return err
		}
	}
	if len(b.l1) == 0 {
		return nil
	}
	for _, i := range slices.Sorted(maps.Keys(b.l1)) {
		entry := binary.BigEndian.AppendUint64(nil, b.l1[i])
		if err := n.file.Writev([][]byte{entry}, n.header.L1Offset+i*entrySize); err != nil {
			return fmt.Errorf("L1 entry %d: %w", i, err)
		}
	}
	return n.file.Flush()
}

// giveBack lowers the counts of clusters that nothing refers to any more, and
// gives their space to the host.
func (n *Node) giveBack(freed []run) error {
	size := n.header.ClusterSize()
	var errs []error
	for _, r := range freed {
		if err := n.giveBackRun(r); err != nil {
			errs = append(errs, fmt.Errorf("free clusters at %#x: %w", r.first*size, err))
		}
	}
	return errors.Join(errs...)
}

func (n *Node) giveBackRun(r run) error {
	size, w := n.header.ClusterSize(), n.w
	w.mu.Lock()
	defer w.mu.Unlock()
	r.count = min(r.count, w.end/size-r.first) // an entry may have pointed outside
	for r.count > 0 {
		// Those that nobody else refers to, side by side: they are not used meanwhile.
		alone := int64(0)
		for ; alone < r.count; alone++ {
			if w.pack != 0 && w.pack/size == r.first+alone {
				w.pack = 0
			}
			if v, err := n.refcount(r.first + alone); err != nil {
				return err
			} else if v != 1 || n.overlaps((r.first+alone)*size, size) != nil {
				break
			}
		}
		done := max(1, alone)
		if alone > 0 {
			w.mu.Unlock()
			err := n.file.Discard(r.first*size, alone*size)
			w.mu.Lock()
			if err != nil {
				return err
			}
		}
		for i := range done {
			if err := n.lower(r.first + i); err != nil {
				return err
			}
		}
		r.first, r.count = r.first+done, r.count-done
	}
	return nil
}

// finish makes the image whole, before it is closed: nothing is leaked, and the
// file ends where its last cluster does.
func (n *Node) finish() error {
	if n.w == nil || n.w.closed {
		return nil
	}
	n.w.closed = true
	if err := errors.Join(n.storeBitmaps(), n.Flush()); err != nil {
		return err
	}
	n.w.flushing.Lock()
	defer n.w.flushing.Unlock()
	if err := n.trim(); err != nil {
		return fmt.Errorf("disk %s: %w", n.path, err)
	}
	return nil
}

// trim writes the counts that the last flush lowered, and cuts off free clusters
// at the file's end. Preconditions: flushing is held.
func (n *Node) trim() error {
	w, size := n.w, n.header.ClusterSize()
	w.mu.Lock()
	defer w.mu.Unlock()
	counts := w.counts.slices.take()
	err := n.writeSlices(counts)
	w.counts.slices.done(counts, err != nil)
	if err == nil {
		err = n.file.Flush()
	}
	if err != nil {
		return err
	}
	was := w.end
	for w.end > w.floor*size {
		v, err := n.refcount(w.end/size - 1)
		if err != nil {
			return err
		}
		if v != 0 {
			break
		}
		w.end -= size
	}
	if w.end < max(was, w.room) {
		w.room = 0
		return w.file.Resize(w.end)
	}
	return nil
}

// Freeze implements block.Freezer.
func (n *Node) Freeze() error {
	if n.w == nil {
		return nil
	}
	if err := n.finish(); err != nil {
		return err
	}
	file := n.w.file
	// What was read into memory stays right; the caches begin anew.
	n.w, n.tables = nil, newCache(tableCacheBytes)
	return file.Freeze()
}
