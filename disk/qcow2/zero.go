package qcow2

import "fmt"

// Discard implements block.Node: whole clusters read as zero afterwards and give
// their space back. As with QEMU, clusters of an image of version 2 stay as they
// are where the backing file would show.
func (n *Node) Discard(off, length int64) error {
	if err := n.checkWrite(off, length); err != nil {
		return err
	}
	size := n.header.ClusterSize()
	first, end := (off+size-1)/size, (off+length)/size
	if off+length == n.Size() {
		end = (off + length + size - 1) / size // the last may be cut short
	}
	if first >= end || n.rules.KeepDiscarded {
		return nil
	}
	if err := n.record(first*size, min(end*size, n.Size())-first*size); err != nil {
		return err
	}
	for first < end {
		done, _, err := n.zeroClusters(first, end-first, true)
		if err == nil {
			err = n.bound()
		}
		if err != nil {
			return fmt.Errorf("disk %s: discard: %w", n.path, err)
		}
		first += done
	}
	return nil
}

// WriteZeroes implements block.Node.
func (n *Node) WriteZeroes(off, length int64, unmap bool) error {
	if err := n.checkWrite(off, length); err != nil {
		return err
	}
	if err := n.record(off, length); err != nil {
		return err
	}
	for length > 0 {
		done, err := n.zeroSome(off, length, n.rules.Unmaps(unmap))
		if err == nil {
			err = n.bound()
		}
		if err != nil {
			return fmt.Errorf("disk %s: write zeroes at %d: %w", n.path, off, err)
		}
		off, length = off+done, length-done
	}
	return nil
}

// zeroSome has the beginning of a range read as zero, and tells how much.
func (n *Node) zeroSome(off, length int64, unmap bool) (int64, error) {
	size := n.header.ClusterSize()
	if off%size == 0 && (length >= size || off+length == n.Size()) {
		done, written, err := n.zeroClusters(off/size, max(1, length/size), unmap)
		if err != nil || done == 0 || written {
			return min(done*size, length), err
		}
		return n.writeZeroData(off, min(length, done*size))
	}
	// A part of a cluster: nothing is to be done where that is zero already.
	part := min(length, size-off%size)
	e, epoch, err := n.lookup(off, part)
	if err != nil {
		return 0, err
	}
	n.leave(epoch)
	if e.kind == zero || e.kind == unallocated && !n.backed(off) {
		return e.length, nil
	}
	return n.writeZeroData(off, part)
}

// backed tells that a backing file shows through at off.
func (n *Node) backed(off int64) bool { return n.backing != nil && off < n.backing.Size() }

// writeZeroData writes zeroes as data, at most a MiB.
func (n *Node) writeZeroData(off, length int64) (int64, error) {
	length = min(length, 1<<20)
	zeroes := [][]byte{make([]byte, length)}
	c := cursor{bufs: zeroes}
	for done := int64(0); done < length; {
		step, err := n.writeSome(&c, off+done, length-done)
		if err != nil {
			return 0, err
		}
		done += step
	}
	return length, nil
}

// zeroClusters makes the first of count clusters, or more, read as zero, and
// tells how many it looked at. Of an image of version 2 it may leave those as they
// are that are data, or that a backing file shows through: then done is false.
func (n *Node) zeroClusters(first, count int64, unmap bool) (looked int64, done bool, err error) {
	size, w := n.header.ClusterSize(), n.w
	w.mu.Lock()
	defer w.mu.Unlock()
	e, err := n.find(first*size, count*size)
	if err != nil {
		return 0, false, err
	}
	run := max(1, e.length/size)
	for i := range run {
		if w.busy[first+i] {
			run = max(1, i)
			break
		}
	}
	backed := n.backed(first * size)
	switch {
	case e.kind == unallocated && !backed, e.kind == zero && (!unmap || e.host == 0):
		return run, true, nil
	case n.header.Version < 3 && (backed || !unmap):
		return run, false, nil
	}
	// To the end of the slice, which is in memory: mu is held all the time, so that
	// nobody begins to use what is freed.
	perSlice := w.l2.size / entrySize
	run = min(run, perSlice-first%perSlice)
	run, err = n.set(first, run, func(_ int64, old uint64) uint64 {
		switch {
		case n.header.Version < 3:
			return 0
		case unmap || old&entryCompressed != 0:
			return entryZero
		}
		return old | entryZero
	})
	return run, true, err
}
