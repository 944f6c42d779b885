package qcow2

import (
	"encoding/binary"
	"fmt"
	"maps"
	"slices"
	"sync"

	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/raw"
)

// Writing is kept simple and safe against being killed at any point:
//
//   - New clusters go to the end of the file, and are written before a table
//     points to them; L2 tables are written by Flush, after the data, and L1
//     entries after the tables. What a guest flushed is there; the rest is as it
//     was before, cluster by cluster.
//   - Reference counts are not kept up to date. The image is marked as dirty
//     (incompatible feature 0) from the first change until it is closed, when they
//     are counted anew, as QEMU does with lazy reference counts. An image that was
//     not closed is counted when it is opened the next time.

// Bounds of what a writer holds in memory.
const (
	maxTables      = 256 // L2 tables: 16 MiB at 64 KiB a cluster
	maxDirtyTables = 64  // of them not written yet
	maxRun         = 2 << 20
)

// writer is what an image that can be written has beside.
type writer struct {
	file *raw.Node

	mu     sync.Mutex
	change sync.Cond        // on mu: busy changed
	end    int64            // where the next new cluster goes; guarded by mu
	tables map[int64][]byte // L2 tables by their place; guarded by mu
	dirty  map[int64]bool   // tables that the file has not as they are; guarded by mu
	l1     map[int64]bool   // likewise entries of the L1 table; guarded by mu
	busy   map[int64]bool   // clusters that are being given a place; guarded by mu
	marked bool             // the file says that it is dirty; guarded by mu
	closed bool             // guarded by mu

	flushing sync.Mutex // held while tables are written
}

// openWritable opens the image at path, without its backing chain.
func (c *chain) openWritable(path string) (*Node, error) {
	open := c.openFile
	defer func() { c.openFile = open }()
	c.openFile = openFileWritable
	file, err := c.open(path)
	if err != nil {
		return nil, err
	}
	n := &Node{path: path, image: image{file: file, id: len(c.opened), tables: c.tables, clusters: c.clusters}}
	if err := n.init(); err != nil {
		file.Close()
		return nil, fmt.Errorf("disk %s: %w", path, err)
	}
	if err := n.makeWritable(file.(*raw.Node)); err != nil {
		file.Close()
		return nil, fmt.Errorf("disk %s: %w", path, err)
	}
	return n, nil
}

// makeWritable refuses what cannot be written and repairs what was not closed.
func (n *Node) makeWritable(file *raw.Node) error {
	h := n.header
	const otherwise = "open it with readonly=on, or copy it with qemu-img convert -O qcow2"
	switch {
	case h.Version < 3:
		return fmt.Errorf("%w: version 2 cannot be written: qemu-img amend -o compat=1.1 makes it version 3", ErrUnsupported)
	case h.Corrupt():
		return fmt.Errorf("%w: it is marked as damaged: qemu-img check -r all may repair it", ErrCorrupt)
	case h.Snapshots != 0:
		return fmt.Errorf("%w: internal snapshots: %s", ErrUnsupported, otherwise)
	case h.Autoclear != 0:
		return fmt.Errorf("%w: persistent bitmaps, or other autoclear features %#x: %s", ErrUnsupported, h.Autoclear, otherwise)
	case h.RefcountOrder != 4:
		return fmt.Errorf("%w: reference counts of %d bits: %s", ErrUnsupported, 1<<h.RefcountOrder, otherwise)
	}
	size := h.ClusterSize()
	n.w = &writer{
		file: file, end: (file.Size() + size - 1) / size * size,
		tables: map[int64][]byte{}, dirty: map[int64]bool{}, l1: map[int64]bool{}, busy: map[int64]bool{},
		marked: h.Dirty(),
	}
	n.w.change.L = &n.w.mu
	file.Grow(n.w.end)
	if n.w.marked {
		return n.recount()
	}
	return nil
}

// table returns an L2 table, to be read and changed with mu held. Preconditions:
// mu is held.
func (w *writer) table(im *image, at int64) ([]byte, error) {
	if t := w.tables[at]; t != nil {
		return t, nil
	}
	size := im.header.ClusterSize()
	if at > w.file.Size()-size {
		return nil, fmt.Errorf("%w: L2 table at %#x ends behind the file's %d bytes; is the file cut off?", ErrCorrupt, at, w.file.Size())
	}
	t := make([]byte, size)
	if err := w.file.Readv([][]byte{t}, at); err != nil {
		return nil, fmt.Errorf("read L2 table at %#x: %w", at, err)
	}
	if len(w.tables) >= maxTables {
		for old := range w.tables {
			if !w.dirty[old] {
				delete(w.tables, old)
				break
			}
		}
	}
	w.tables[at] = t
	return t, nil
}

// alloc takes n bytes of whole clusters at the file's end. Preconditions: mu is held.
func (w *writer) alloc(n int64) int64 {
	at := w.end
	w.end += n
	w.file.Grow(w.end)
	return at
}

// mark has the file say that its reference counts are not right. Preconditions:
// mu is held.
func (n *Node) mark() error {
	if n.w.marked {
		return nil
	}
	if err := n.writeIncompatible(n.header.Incompatible | FeatureDirty); err != nil {
		return err
	}
	n.w.marked = true
	return nil
}

func (n *Node) writeIncompatible(features uint64) error {
	b := binary.BigEndian.AppendUint64(nil, features)
	if err := n.file.Writev([][]byte{b}, 72); err != nil {
		return fmt.Errorf("write header: %w", err)
	}
	if err := n.file.Flush(); err != nil {
		return err
	}
	n.header.Incompatible = features
	return nil
}

// set makes the L2 entries of count clusters from the given one on; entry tells
// each, by its index. Preconditions: mu is held.
func (n *Node) set(cluster, count int64, entry func(i int64) uint64) error {
	perTable := n.header.l2Entries()
	for i := range count {
		index := (cluster + i) / perTable
		at := int64(n.l1[index] & offsetMask)
		if at == 0 {
			at = n.w.alloc(n.header.ClusterSize())
			n.w.tables[at] = make([]byte, n.header.ClusterSize())
			n.l1[index] = uint64(at) | entryOwn
			n.w.l1[index] = true
		}
		t, err := n.w.table(&n.image, at)
		if err != nil {
			return err
		}
		binary.BigEndian.PutUint64(t[(cluster+i)%perTable*entrySize:], entry(i))
		n.w.dirty[at] = true
	}
	return nil
}

// Writev implements block.Node.
func (n *Node) Writev(bufs [][]byte, off int64) error {
	length := total(bufs)
	if err := n.checkWrite(off, length); err != nil {
		return err
	}
	c := &cursor{bufs: bufs}
	for length > 0 {
		done, err := n.writeSome(c, off, length)
		if err != nil {
			return fmt.Errorf("disk %s: write at %d: %w", n.path, off, err)
		}
		off, length = off+done, length-done
	}
	return n.bound()
}

func (n *Node) checkWrite(off, length int64) error {
	switch {
	case n.w == nil:
		return block.ErrReadOnly
	case off < 0 || length < 0 || off > n.size || length > n.size-off:
		return fmt.Errorf("%w: %d bytes at %d of %d", block.ErrOutOfRange, length, off, n.size)
	}
	return nil
}

// bound writes tables when many have changed.
func (n *Node) bound() error {
	n.w.mu.Lock()
	many := len(n.w.dirty) >= maxDirtyTables
	n.w.mu.Unlock()
	if many {
		return n.Flush()
	}
	return nil
}

// writeSome writes the beginning of what c has, and tells how much.
func (n *Node) writeSome(c *cursor, off, length int64) (int64, error) {
	size, w := n.header.ClusterSize(), n.w
	w.mu.Lock()
	e, err := n.lookupLocked(off, length)
	if err != nil {
		w.mu.Unlock()
		return 0, err
	}
	if e.kind == data && e.own {
		w.mu.Unlock()
		v := c.take(e.length)
		defer v.release()
		return e.length, n.file.Writev(v.bufs, e.host)
	}
	first, within := off/size, off%size
	if w.busy[first] {
		w.change.Wait() // for who writes to the same cluster
		w.mu.Unlock()
		return 0, nil
	}
	// Whole clusters without a place are placed side by side; otherwise it is one.
	count, piece := int64(1), min(length, size-within)
	host := int64(0)
	switch {
	case e.kind == zero && e.own:
		host = e.host - within
	case within == 0 && e.kind != compressed && e.kind != data:
		for (count+1)*size <= min(e.length, maxRun) && !w.busy[first+count] {
			count++
		}
		if count > 1 {
			piece = count * size
		}
	}
	if err := n.mark(); err != nil {
		w.mu.Unlock()
		return 0, err
	}
	if host == 0 {
		host = w.alloc(count * size)
	}
	for i := range count {
		w.busy[first+i] = true
	}
	w.mu.Unlock()

	err = n.writeClusters(c, host, first*size, within, piece)

	w.mu.Lock()
	defer w.mu.Unlock()
	for i := range count {
		delete(w.busy, first+i)
	}
	w.change.Broadcast()
	if err == nil {
		err = n.set(first, count, func(i int64) uint64 { return uint64(host+i*size) | entryOwn })
	}
	return piece, err
}

// writeClusters fills clusters at host, which are to hold the disk from off on,
// with the next n bytes of c at within, and around these with what the disk holds.
func (n *Node) writeClusters(c *cursor, host, off, within, length int64) error {
	size := n.header.ClusterSize()
	v := c.take(length)
	defer v.release()
	if within == 0 && length%size == 0 {
		return n.file.Writev(v.bufs, host)
	}
	whole := make([]byte, size)
	// Behind the disk's end there is nothing to read.
	if err := n.Readv([][]byte{whole[:min(size, n.size-off)]}, off); err != nil {
		return err
	}
	at := within
	for _, b := range v.bufs {
		at += int64(copy(whole[at:], b))
	}
	return n.file.Writev([][]byte{whole}, host)
}

// Flush implements block.Node.
func (n *Node) Flush() error {
	if n.w == nil {
		return n.file.Flush() // which knows whether it was written
	}
	w := n.w
	w.flushing.Lock()
	defer w.flushing.Unlock()
	w.mu.Lock()
	tables := map[int64][]byte{}
	for at := range w.dirty {
		tables[at] = slices.Clone(w.tables[at])
	}
	l1 := map[int64]uint64{}
	for i := range w.l1 {
		l1[i] = n.l1[i]
	}
	clear(w.dirty)
	clear(w.l1)
	w.mu.Unlock()
	err := n.writeTables(tables, l1)
	if err != nil {
		w.mu.Lock()
		defer w.mu.Unlock()
		for at := range tables {
			if w.tables[at] == nil {
				w.tables[at] = tables[at]
			}
			w.dirty[at] = true
		}
		for i := range l1 {
			w.l1[i] = true
		}
		return fmt.Errorf("disk %s: flush: %w", n.path, err)
	}
	return nil
}

// writeTables writes data, then the tables that point to it, then what points to
// those: each is on the disk before the next begins.
func (n *Node) writeTables(tables map[int64][]byte, l1 map[int64]uint64) error {
	if err := n.file.Flush(); err != nil {
		return err
	}
	if len(tables) == 0 && len(l1) == 0 {
		return nil
	}
	for _, at := range slices.Sorted(maps.Keys(tables)) {
		if err := n.file.Writev([][]byte{tables[at]}, at); err != nil {
			return fmt.Errorf("L2 table at %#x: %w", at, err)
		}
	}
	if len(l1) > 0 {
		if err := n.file.Flush(); err != nil {
			return err
		}
		for _, i := range slices.Sorted(maps.Keys(l1)) {
			b := binary.BigEndian.AppendUint64(nil, l1[i])
			if err := n.file.Writev([][]byte{b}, n.header.L1Offset+i*entrySize); err != nil {
				return fmt.Errorf("L1 entry %d: %w", i, err)
			}
		}
	}
	return n.file.Flush()
}

// Discard implements block.Node: whole clusters read as zero afterwards and
// give their space back.
func (n *Node) Discard(off, length int64) error {
	if err := n.checkWrite(off, length); err != nil {
		return err
	}
	size := n.header.ClusterSize()
	first, end := (off+size-1)/size, (off+length)/size
	if off+length == n.size {
		end = (n.size + size - 1) / size // the last may be cut short
	}
	for first < end {
		done, err := n.zeroClusters(first, end-first, true)
		if err != nil {
			return fmt.Errorf("disk %s: discard: %w", n.path, err)
		}
		first += done
	}
	return n.bound()
}

// WriteZeroes implements block.Node.
func (n *Node) WriteZeroes(off, length int64, unmap bool) error {
	if err := n.checkWrite(off, length); err != nil {
		return err
	}
	size := n.header.ClusterSize()
	for length > 0 {
		within := off % size
		if within == 0 && (length >= size || off+length == n.size) {
			done, err := n.zeroClusters(off/size, max(1, length/size), unmap)
			if err != nil {
				return fmt.Errorf("disk %s: write zeroes: %w", n.path, err)
			}
			step := min(done*size, length)
			off, length = off+step, length-step
			continue
		}
		step := min(length, size-within)
		if err := n.Writev([][]byte{make([]byte, step)}, off); err != nil {
			return err
		}
		off, length = off+step, length-step
	}
	return n.bound()
}

// zeroClusters makes the first of count clusters, or more, read as zero, and
// tells how many.
func (n *Node) zeroClusters(first, count int64, unmap bool) (int64, error) {
	size, w := n.header.ClusterSize(), n.w
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.busy[first] {
		w.change.Wait()
		return 0, nil
	}
	e, err := n.lookupLocked(first*size, count*size)
	if err != nil {
		return 0, err
	}
	run := max(1, e.length/size)
	if e.kind == zero || e.kind == unallocated && n.backing == nil {
		return run, nil
	}
	for i := range run {
		if w.busy[first+i] {
			run = max(1, i)
			break
		}
	}
	if err := n.mark(); err != nil {
		return 0, err
	}
	keep := e.kind == data && e.own
	if err := n.set(first, run, func(i int64) uint64 {
		if keep {
			return uint64(e.host+i*size) | entryOwn | entryZero
		}
		return entryZero
	}); err != nil {
		return 0, err
	}
	if keep && unmap {
		return run, n.file.Discard(e.host, run*size)
	}
	return run, nil
}

// finish makes the image whole again, before it is closed.
func (n *Node) finish() error {
	if n.w == nil || n.w.closed {
		return nil
	}
	n.w.closed = true
	if err := n.Flush(); err != nil {
		return err
	}
	if !n.w.marked {
		return nil
	}
	if err := n.recount(); err != nil {
		return fmt.Errorf("disk %s: %w", n.path, err)
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

var _ block.Freezer = (*Node)(nil)
