package qcow2

import (
	"encoding/binary"
	"fmt"
)

// Uncover has the image's whole clusters among length bytes from off on read what the
// backing file holds: the same, and durable. Others may read them meanwhile, nobody
// writes to them. The file is told by StoreTables, at the latest by Flush; the clusters'
// old places are given back by Reclaim.
func (n *Node) Uncover(off, length int64) error {
	if err := n.checkWrite(off, length); err != nil {
		return err
	}
	if n.backing == nil {
		return fmt.Errorf("disk %s: it has no backing file to read from", n.path)
	}
	size, w := n.header.ClusterSize(), n.w
	first, end := (off+size-1)/size, (off+length)/size
	if off+length == n.Size() {
		end = (off + length + size - 1) / size // the last may be cut short
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for first < end {
		e, err := n.find(first*size, (end-first)*size)
		switch {
		case err != nil:
		case e.kind == unallocated:
			first += (e.length + size - 1) / size
			continue
		default:
			err = n.uncover(first)
		}
		if err != nil {
			return fmt.Errorf("disk %s: cluster %d: %w", n.path, first, err)
		}
		first++
	}
	return nil
}

// uncover is Uncover of one cluster. Preconditions: mu is held; it is let go of
// meanwhile.
func (n *Node) uncover(cluster int64) error {
	s, at, err := n.l2ForWrite(cluster)
	if err != nil {
		return err
	}
	entry := s.data[at*entrySize:]
	old := binary.BigEndian.Uint64(entry)
	binary.BigEndian.PutUint64(entry, 0)
	n.w.l2.touch(s)
	switch {
	case old&entryCompressed != 0:
		n.replaced(old, 0)
	case old&offsetMask != 0:
		n.w.uncovered = addRun(n.w.uncovered, run{int64(old&offsetMask) / n.header.ClusterSize(), 1})
	}
	return nil
}

// StoreTables has the file know of what was uncovered. It does not wait for the disk,
// as what was uncovered may be read from either place, unless something else is to be
// made durable first.
func (n *Node) StoreTables() error {
	w := n.w
	if w == nil {
		return nil
	}
	w.flushing.Lock()
	defer w.flushing.Unlock()
	w.mu.Lock()
	many := len(w.uncovered) > maxFreed
	if many {
		w.reclaim()
	}
	if many || w.ordered {
		w.mu.Unlock()
		if err := n.flush(); err != nil {
			return fmt.Errorf("disk %s: flush: %w", n.path, err)
		}
		return nil
	}
	tables := w.l2.take()
	w.mu.Unlock()
	err := n.writeSlices(tables)
	w.mu.Lock()
	w.l2.done(tables, err != nil)
	w.mu.Unlock()
	if err != nil {
		return fmt.Errorf("disk %s: %w", n.path, err)
	}
	return nil
}

// Reclaim has the next flush give back the places of what was uncovered. An image that
// is about to be deleted does not need it.
func (n *Node) Reclaim() {
	if n.w != nil {
		n.w.mu.Lock()
		defer n.w.mu.Unlock()
		n.w.reclaim()
	}
}

// reclaim is Reclaim with mu held.
func (w *writer) reclaim() {
	w.freed = append(w.freed, w.uncovered...)
	w.uncovered = nil
}
