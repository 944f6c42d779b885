package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/gnomon-vmm/gnomon/disk/block"
)

var _ block.Resizer = (*Node)(nil)

// Resize implements block.Resizer.
func (n *Node) Resize(size int64) error {
	return n.Extend(size, func() error { return nil })
}

// Extend is Resize to size, with the disk's new end filled by fill, if it becomes larger.
// The file has the new size when that has succeeded, and the old one, with what fill
// wrote given back, when it has not.
func (n *Node) Extend(size int64, fill func() error) error {
	var err error
	switch old := n.Size(); {
	case n.w == nil:
		return block.ErrReadOnly
	case size < 0 || size%sector != 0:
		err = fmt.Errorf("%w: virtual size %d: multiples of 512 are possible", ErrHeader, size)
	case size > old:
		err = n.grow(old, size, fill)
	case size < old:
		err = n.shrink(old, size)
	}
	if err != nil {
		return fmt.Errorf("disk %s: resize: %w", n.path, err)
	}
	return nil
}

// setSize makes the size known to everybody but the file.
func (n *Node) setSize(size int64) error {
	n.bitmaps.mu.Lock()
	defer n.bitmaps.mu.Unlock()
	for _, k := range n.bitmaps.all {
		if k.Bitmap == nil {
			continue
		}
		if err := k.Resize(size); err != nil {
			return err
		}
	}
	n.size.Store(size)
	return nil
}

// beginResize has the file say that its bitmaps are not those of the disk, whose
// size is changing.
func (n *Node) beginResize() error {
	if n.bitmaps.recording.Load() == nil {
		return nil
	}
	return n.markBitmaps()
}

// writeSize writes the size, after what it depends on.
func (n *Node) writeSize(size int64) error {
	if err := n.writeHeader(24, binary.BigEndian.AppendUint64(nil, uint64(size))); err != nil {
		return err
	}
	n.header.Size = size
	return nil
}

func (n *Node) grow(old, size int64, fill func() error) error {
	if err := n.beginResize(); err != nil {
		return err
	}
	bigger := *n.header
	bigger.Size = size
	if need := bigger.l1Needed(); need > int64(len(n.l1)) {
		if need*entrySize > maxL1Bytes {
			return fmt.Errorf("%w: virtual size %d needs larger clusters", ErrHeader, size)
		}
		if err := n.growL1(need); err != nil {
			return err
		}
	}
	// What a shrink that was killed left behind the old end is not to be seen, nor is what
	// the last cluster, or the backing file, holds there.
	cluster := n.header.ClusterSize()
	if err := n.dropAll((old+cluster-1)/cluster, (size+cluster-1)/cluster); err != nil {
		return err
	}
	if err := n.setSize(size); err != nil {
		return err
	}
	end := (old + cluster - 1) / cluster * cluster
	if n.backing != nil {
		end = max(end, n.backing.Size())
	}
	if end = min(end, size); end > old {
		if err := n.WriteZeroes(old, end-old, true); err != nil {
			return errors.Join(err, n.setSize(old))
		}
	}
	err := fill()
	if err == nil {
		err = n.Flush()
	}
	if err != nil {
		return errors.Join(err, n.takeBack(old, size))
	}
	return n.writeSize(size)
}

// takeBack ends a growth that failed. What was written behind the old end is of no use,
// and its space is given back before anything is written: there may be no other.
func (n *Node) takeBack(old, size int64) error {
	cluster := n.header.ClusterSize()
	for off := (old + cluster - 1) / cluster * cluster; off < size; {
		e, epoch, err := n.lookup(off, size-off)
		if err != nil {
			return err
		}
		if e.kind == data {
			err = n.file.Discard(e.host, e.length)
		}
		n.leave(epoch)
		if err != nil {
			return err
		}
		off += e.length
	}
	return n.shrink(size, old)
}

// growL1 puts a larger L1 table at the file's end.
func (n *Node) growL1(entries int64) error {
	size := n.header.ClusterSize()
	clusters := (entries*entrySize + size - 1) / size
	if err := n.Flush(); err != nil {
		return err // the old table is up to date then, as is the new one
	}
	l1 := make([]uint64, clusters*size/entrySize)
	copy(l1, n.l1)
	n.w.mu.Lock()
	at, _, err := n.allocEnd(clusters)
	n.w.mu.Unlock()
	if err != nil {
		return err
	}
	if err := n.file.Writev([][]byte{encodeTable(l1)}, at); err != nil {
		return err
	}
	if err := n.Flush(); err != nil {
		return err
	}
	where := binary.BigEndian.AppendUint32(nil, uint32(len(l1)))
	if err := n.writeHeader(36, binary.BigEndian.AppendUint64(where, uint64(at))); err != nil {
		return err
	}
	h := n.header
	n.w.mu.Lock()
	defer n.w.mu.Unlock()
	if h.L1Entries > 0 {
		n.w.free(h.L1Offset/size, (int64(h.L1Entries)*entrySize+size-1)/size)
	}
	n.l1, h.L1Entries, h.L1Offset = l1, uint32(len(l1)), at
	return nil
}

func (n *Node) shrink(old, size int64) error {
	if err := errors.Join(n.beginResize(), n.Flush()); err != nil {
		return err
	}
	if err := n.writeSize(size); err != nil {
		return err
	}
	cluster := n.header.ClusterSize()
	if err := n.dropAll((size+cluster-1)/cluster, (old+cluster-1)/cluster); err != nil {
		return err
	}
	if err := errors.Join(n.setSize(size), n.Flush()); err != nil {
		return err
	}
	n.w.flushing.Lock()
	defer n.w.flushing.Unlock()
	n.dropTables(n.header.l1Needed())
	if err := n.flush(); err != nil {
		return err
	}
	return n.trim()
}

// dropAll frees the clusters from first up to end, with a bounded number of tables in
// memory.
func (n *Node) dropAll(first, end int64) error {
	for first < end {
		done, err := n.dropClusters(first, end-first)
		if err == nil {
			err = n.bound()
		}
		if err != nil {
			return err
		}
		first += done
	}
	return nil
}

// dropClusters frees the first of count clusters, or more, which are not of the
// disk any more.
func (n *Node) dropClusters(first, count int64) (int64, error) {
	size, w := n.header.ClusterSize(), n.w
	w.mu.Lock()
	defer w.mu.Unlock()
	e, err := n.find(first*size, count*size)
	if err != nil {
		return 0, err
	}
	run := max(1, e.length/size)
	if e.kind == unallocated {
		return run, nil
	}
	return n.set(first, run, func(int64, uint64) uint64 { return 0 })
}

// dropTables frees the L2 tables from an index on, which are empty.
// Preconditions: flushing is held.
func (n *Node) dropTables(first int64) {
	w, size := n.w, n.header.ClusterSize()
	w.mu.Lock()
	defer w.mu.Unlock()
	for i := first; i < int64(len(n.l1)); i++ {
		if at := int64(n.l1[i] & offsetMask); at != 0 {
			w.l2.drop(at, size)
			w.free(at/size, 1)
			n.l1[i] = 0
			w.l1[i] = true
		}
	}
}
