package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/gnomon-vmm/gnomon/disk/block"
)

// Writing is safe against power loss at any point, whatever order the file's
// writes since its last flush become durable in:
//
//   - Clusters are written and counted before a table points to them, L2 tables
//     before L1 entries do: see Flush.
//   - What a cluster is replaced by, or discarded for, is durable before its count
//     is lowered and it is used again: see freed.
//
// So the file never refers to a cluster that is not counted. What a guest flushed
// is there; of the rest each cluster is as it was before or as it was written. What
// is lost are clusters that were counted and not referred to yet: leaks.

// Bounds of what a writer holds in memory.
const (
	l2CacheBytes    = 8 << 20 // the L2 tables of 64 GiB at 64 KiB a cluster
	countCacheBytes = 1 << 20
	maxFreed        = 4096     // runs of clusters that wait for a flush
	maxRun          = 2 << 20  // bytes that are allocated at once
	roomStep        = 64       // clusters by which the file becomes longer before they are written
	directRoom      = 64 << 20 // bytes by which it does, past the page cache
)

// writer is what an image that can be written has beside.
type writer struct {
	file store

	mu     sync.Mutex
	change sync.Cond      // on mu: busy, loading, or active while quiesce waits
	end    int64          // of the file, in whole clusters; guarded by mu
	room   int64          // the file is at least so long, with zeroes behind end; guarded by mu
	counts refcounts      // guarded by mu
	l2     sliceCache     // guarded by mu
	l1     map[int64]bool // entries of the L1 table that the file has not; guarded by mu
	freed  []run          // clusters that the file still refers to; guarded by mu
	// uncovered are clusters of Uncover; guarded by mu.
	uncovered []run
	// ordered tells that an L2 entry that the file has not points to what must be durable
	// before the file has it; guarded by mu.
	ordered bool
	busy    map[int64]bool // clusters that are being given a place; guarded by mu
	loading map[int64]bool // slices of L2 tables that are being read; guarded by mu
	missing int64          // the slice that errMissing is about; guarded by mu
	pack    int64          // where in the file the next compressed cluster can go, or 0; guarded by mu
	floor   int64          // clusters below are not known to be free, whatever is counted; guarded by mu
	broken  error          // the image is marked as corrupt; guarded by mu
	closed  bool

	// Requests that use places of clusters are counted by the epoch in which they
	// looked them up, so that clusters are not used for something else meanwhile.
	epoch    int // guarded by mu
	active   [2]atomic.Int64
	quiesces atomic.Bool

	flushing sync.Mutex // held while tables are written
	zeroes   []byte     // never written: a cluster, or 64 KiB of a larger one
}

// run is some clusters of the file that lie side by side.
type run struct{ first, count int64 }

// errMissing: a slice of an L2 table, writer.missing, must be read first.
var errMissing = errors.New("table not in memory")

// makeWritable refuses what cannot be written and repairs what was not closed.
func (n *Node) makeWritable(file store) error {
	h := n.header
	const otherwise = "open it with readonly=on, or copy it with qemu-img convert -O qcow2"
	switch {
	case h.Corrupt():
		return fmt.Errorf("%w: it is marked as damaged: check and repair it first", ErrCorrupt)
	case h.Snapshots != 0:
		return fmt.Errorf("%w: internal snapshots: %s", ErrUnsupported, otherwise)
	case h.Incompatible&(FeatureExtendedL2|FeatureDataFile) != 0:
		return fmt.Errorf("%w: writing to an image with subclusters or an external data file: %s", ErrUnsupported, otherwise)
	}
	if err := n.startWriter(file); err != nil {
		return err
	}
	if h.Dirty() {
		if err := n.recount(); err != nil {
			return err
		}
	}
	return n.openBitmaps()
}

// startWriter reads what a writer needs.
func (n *Node) startWriter(file store) error {
	var err error
	if n.l1, err = readL1(n.file, n.header, int64(n.header.L1Entries)); err != nil {
		return err
	}
	table, err := n.readRefcountTable()
	if err != nil {
		return err
	}
	n.newWriter(file)
	n.w.counts.table = table
	return nil
}

// newWriter makes a writer that does not know the table of reference counts.
func (n *Node) newWriter(file store) {
	h, size := n.header, n.header.ClusterSize()
	n.w = &writer{
		file: file, end: (file.Size() + size - 1) / size * size,
		counts: refcounts{slices: newSliceCache(countCacheBytes, size), order: h.RefcountOrder, tableAt: h.RefcountOffset, linked: map[int64]bool{}},
		l2:     newSliceCache(l2CacheBytes, size),
		l1:     map[int64]bool{}, busy: map[int64]bool{}, loading: map[int64]bool{},
		zeroes: make([]byte, min(size, 64<<10)),
	}
	n.w.change.L = &n.w.mu
	n.w.floor = n.w.end / size
	file.Grow(n.w.end)
}

// extend makes the file n bytes longer and returns where it ended. Preconditions:
// mu is held.
func (w *writer) extend(n int64) int64 {
	at := w.end
	w.end += n
	w.file.Grow(w.end)
	return at
}

// makeRoom has the file reach to its end before its last clusters are written, or a part
// of them alone, and tells whether that could be done. When it has to become longer it
// becomes so by step bytes more. Preconditions: mu is held.
func (w *writer) makeRoom(step int64) bool {
	if w.room >= w.end {
		return true
	}
	// Nothing is written behind end: this never makes the file shorter.
	if w.file.Resize(w.end+step) != nil {
		return false
	}
	w.room = w.end + step
	return true
}

// free has clusters be given back after the next flush. Preconditions: mu is held.
func (w *writer) free(first, count int64) {
	w.freed = addRun(w.freed, run{first, count})
}

// addRun adds a run to some, the last of which it may prolong.
func addRun(all []run, r run) []run {
	if k := len(all) - 1; k >= 0 && all[k].first+all[k].count == r.first {
		all[k].count += r.count
		return all
	}
	return append(all, r)
}

// writeZero writes zeroes to the file.
func (n *Node) writeZero(at, length int64) error {
	for length > 0 {
		part := n.w.zeroes[:min(length, int64(len(n.w.zeroes)))]
		if err := n.file.Writev([][]byte{part}, at); err != nil {
			return err
		}
		at, length = at+int64(len(part)), length-int64(len(part))
	}
	return nil
}

// enter tells that a place that was looked up is going to be used, until leave.
// Preconditions: mu is held.
func (w *writer) enter() (epoch int) {
	w.active[w.epoch].Add(1)
	return w.epoch
}

func (w *writer) leave(epoch int) {
	if w.active[epoch].Add(-1) == 0 && w.quiesces.Load() {
		w.mu.Lock()
		w.change.Broadcast()
		w.mu.Unlock()
	}
}

// quiesce waits until the places that were looked up before are not used any
// more. Preconditions: flushing is held.
func (w *writer) quiesce() {
	w.mu.Lock()
	defer w.mu.Unlock()
	old := w.epoch
	w.epoch ^= 1
	w.quiesces.Store(true)
	for w.active[old].Load() != 0 {
		w.change.Wait()
	}
	w.quiesces.Store(false)
}

// overlaps refuses clusters that hold the image's own tables, whatever is
// referred to or counted. Preconditions: mu is held.
func (n *Node) overlaps(at, length int64) error {
	r, h := &n.w.counts, n.header
	for _, t := range [...]struct {
		name       string
		at, length int64
	}{
		{"header", 0, h.ClusterSize()},
		{"L1 table", h.L1Offset, int64(h.L1Entries) * entrySize},
		{"reference count table", r.tableAt, int64(len(r.table)) * entrySize},
	} {
		if at < t.at+t.length && t.at < at+length {
			return fmt.Errorf("%w: the image's %s at %#x would be overwritten, by clusters at %#x", ErrCorrupt, t.name, t.at, at)
		}
	}
	return nil
}

// damaged marks the image as corrupt, for good, and returns err. Preconditions:
// mu is held.
func (n *Node) damaged(err error) error {
	if n.w.broken == nil {
		n.w.broken = err
		if n.header.Version >= 3 {
			err = errors.Join(err, n.writeIncompatible(n.header.Incompatible|FeatureCorrupt))
		}
	}
	return err
}

func (n *Node) writeIncompatible(features uint64) error {
	if n.header.Incompatible == features {
		return nil
	}
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

// find is lookup for a change of the cluster at off, which nobody else is
// changing. It waits, and reads what it needs. Preconditions: mu is held; it is
// let go of meanwhile.
func (n *Node) find(off, limit int64) (extent, error) {
	for {
		if n.w.broken != nil {
			return extent{}, n.w.broken
		}
		if n.w.busy[off>>n.header.ClusterBits] {
			n.w.change.Wait()
			continue
		}
		e, err := n.lookupLocked(off, limit)
		if err != errMissing {
			return e, err
		}
		if err := n.load(n.w.missing); err != nil {
			return extent{}, err
		}
	}
}

// load reads a slice of an L2 table. Preconditions: mu is held; it is let go of
// meanwhile.
func (im *image) load(at int64) error {
	w := im.w
	for w.loading[at] {
		w.change.Wait()
	}
	if w.l2.get(at) != nil {
		return nil
	}
	if at > w.file.Size()-w.l2.size {
		return fmt.Errorf("%w: L2 table at %#x ends behind the file's %d bytes; is the file cut off?", ErrCorrupt, at, w.file.Size())
	}
	w.loading[at] = true
	w.mu.Unlock()
	b := make([]byte, w.l2.size)
	err := w.file.Readv([][]byte{b}, at)
	w.mu.Lock()
	delete(w.loading, at)
	w.change.Broadcast()
	if err != nil {
		return fmt.Errorf("read L2 table at %#x: %w", at, err)
	}
	copy(w.l2.put(at).data, b)
	return nil
}

// l2ForWrite returns the slice of an L2 table that has the entry of a cluster, and
// the entry's index in it. The table is made if there is none, and copied if the
// image does not own it. Preconditions: mu is held; it is let go of meanwhile.
func (n *Node) l2ForWrite(cluster int64) (*slice, int64, error) {
	size, w := n.header.ClusterSize(), n.w
	perTable := n.header.l2Entries()
	for {
		index := cluster / perTable
		table := int64(n.l1[index] & offsetMask)
		if table == 0 || n.l1[index]&entryOwn == 0 {
			if err := n.newL2(index, table); err != nil {
				return nil, 0, err
			}
			continue
		}
		inTable := cluster % perTable * entrySize
		at := table + inTable/w.l2.size*w.l2.size
		if s := w.l2.get(at); s != nil {
			return s, inTable % w.l2.size / entrySize, nil
		}
		if table%size != 0 {
			return nil, 0, fmt.Errorf("%w: L2 table at %#x (L1 entry %d) does not start at a cluster", ErrCorrupt, table, index)
		}
		if err := n.load(at); err != nil {
			return nil, 0, err
		}
	}
}

// newL2 gives an L1 entry an L2 table, with the content of old, or empty if that
// is 0. Preconditions: mu is held.
func (n *Node) newL2(index, old int64) error {
	size := n.header.ClusterSize()
	if old != 0 && !n.within(old, size) {
		return fmt.Errorf("%w: L2 table at %#x (L1 entry %d) does not start at a cluster of the file", ErrCorrupt, old, index)
	}
	at, _, err := n.alloc(1)
	if err != nil {
		return err
	}
	if old == 0 {
		err = n.writeZero(at, size)
	} else {
		b := make([]byte, size)
		if err = n.file.Readv([][]byte{b}, old); err == nil {
			err = n.file.Writev([][]byte{b}, at)
		}
	}
	if err != nil {
		return errors.Join(err, n.lower(at/size))
	}
	if old != 0 {
		n.w.free(old/size, 1)
	}
	n.l1[index] = uint64(at) | entryOwn
	n.w.l1[index] = true
	return nil
}

// set makes the L2 entries of count clusters from the given one on what entry
// makes of the old ones, by their index, and tells how many it did. Preconditions:
// mu is held; it is let go of meanwhile.
func (n *Node) set(cluster, count int64, entry func(i int64, old uint64) uint64) (int64, error) {
	for i := range count {
		s, at, err := n.l2ForWrite(cluster + i)
		if err != nil {
			return i, err
		}
		b := s.data[at*entrySize:]
		old := binary.BigEndian.Uint64(b)
		v := entry(i, old)
		if v == old {
			continue
		}
		binary.BigEndian.PutUint64(b, v)
		n.w.l2.touch(s)
		n.w.ordered = n.w.ordered || v != 0
		n.replaced(old, v)
	}
	return count, nil
}

// replaced frees what an L2 entry referred to and its new value does not.
// Preconditions: mu is held.
func (n *Node) replaced(old, now uint64) {
	size := n.header.ClusterSize()
	switch {
	case old&entryCompressed != 0:
		at, length := n.header.stream(old)
		if first := at / size; first > 0 {
			n.w.free(first, (at+length-1)/size-first+1)
		}
	case old&offsetMask != 0 && (now&entryCompressed != 0 || now&offsetMask != old&offsetMask):
		n.w.free(int64(old&offsetMask)/size, 1)
	}
}

// Writev implements block.Node.
func (n *Node) Writev(bufs [][]byte, off int64) error {
	length := total(bufs)
	if err := n.checkWrite(off, length); err != nil {
		return err
	}
	if n.rules.Detects(bufs) {
		return n.WriteZeroes(off, length, n.rules.Zeroes == block.ZeroesUnmap)
	}
	if err := n.record(off, length); err != nil {
		return err
	}
	c := cursor{bufs: bufs}
	for length > 0 {
		done, err := n.writeSome(&c, off, length)
		if err != nil {
			return fmt.Errorf("disk %s: write at %d: %w", n.path, off, err)
		}
		off, length = off+done, length-done
	}
	return n.bound()
}

func (n *Node) checkWrite(off, length int64) error {
	size := n.Size()
	switch {
	case n.w == nil:
		return block.ErrReadOnly
	case off < 0 || length < 0 || off > size || length > size-off:
		return fmt.Errorf("%w: %d bytes at %d of %d", block.ErrOutOfRange, length, off, size)
	}
	return nil
}

// bound flushes when much waits for it, and always if changes are to be durable at
// once.
func (n *Node) bound() error {
	if n.through {
		return n.Flush()
	}
	n.w.mu.Lock()
	much := n.w.l2.dirty > n.w.l2.limit/2 || len(n.w.freed) > maxFreed
	n.w.mu.Unlock()
	if much {
		return n.Flush()
	}
	return nil
}

// writeSome writes the beginning of what c has, and tells how much.
func (n *Node) writeSome(c *cursor, off, length int64) (int64, error) {
	size, w := n.header.ClusterSize(), n.w
	w.mu.Lock()
	e, err := n.find(off, length)
	if err != nil {
		w.mu.Unlock()
		return 0, err
	}
	first, within := off/size, off%size
	if e.kind == data && e.own {
		if err := n.overlaps(e.host, e.length); err != nil {
			err = n.damaged(err)
			w.mu.Unlock()
			return 0, err
		}
		epoch := w.enter()
		w.mu.Unlock()
		v := c.take(e.length)
		err := n.file.Writev(v.bufs, e.host)
		v.release()
		w.leave(epoch)
		return e.length, err
	}
	// Whole clusters without a place are placed side by side; otherwise it is one.
	count, host := int64(1), int64(0)
	switch {
	case e.kind == zero && e.own:
		host = e.host - within
	case within == 0 && e.kind != compressed && e.kind != data:
		for (count+1)*size <= min(e.length, maxRun) && !w.busy[first+count] {
			count++
		}
	}
	end := w.end
	if host == 0 {
		host, count, err = n.alloc(count)
	} else if err = n.overlaps(host, size); err != nil {
		err = n.damaged(err)
	}
	if err != nil {
		w.mu.Unlock()
		return 0, err
	}
	fresh := e.kind != zero || !e.own
	if host >= end && n.Waits() {
		// Past the page cache, host file systems do one write at a time that makes the
		// file longer.
		w.makeRoom(max(roomStep*size, directRoom))
	}
	piece := min(length, count*size-within)
	// Behind the file's end all is zero already, as it is to be around the piece.
	blank := host >= end && piece < count*size && (e.kind == zero || e.kind == unallocated && !n.backed(first*size)) && w.makeRoom(roomStep*size)
	for i := range count {
		w.busy[first+i] = true
	}
	w.mu.Unlock()

	if blank {
		v := c.take(piece)
		err = n.file.Writev(v.bufs, host+within)
		v.release()
	} else {
		err = n.writeClusters(c, host, first*size, within, piece)
	}

	w.mu.Lock()
	defer w.mu.Unlock()
	done := int64(0)
	if err == nil {
		done, err = n.set(first, count, func(i int64, _ uint64) uint64 { return uint64(host+i*size) | entryOwn })
	}
	for i := range count {
		delete(w.busy, first+i)
	}
	w.change.Broadcast()
	if err != nil && fresh {
		for i := done; i < count; i++ {
			err = errors.Join(err, n.lower(host/size+i))
		}
	}
	return piece, err
}

// writeClusters fills clusters at host, which are to hold the disk from off on,
// with the next length bytes of c at within, and around these with what the disk
// holds.
func (n *Node) writeClusters(c *cursor, host, off, within, length int64) error {
	size := n.header.ClusterSize()
	v := c.take(length)
	defer v.release()
	if within == 0 && length%size == 0 {
		return n.file.Writev(v.bufs, host)
	}
	whole := make([]byte, size)
	// Behind the disk's end there is nothing to read.
	there := min(size, n.Size()-off)
	if within > 0 {
		if err := n.Readv([][]byte{whole[:within]}, off); err != nil {
			return err
		}
	}
	if end := within + length; end < there {
		if err := n.Readv([][]byte{whole[end:there]}, off+end); err != nil {
			return err
		}
	}
	at := within
	for _, b := range v.bufs {
		at += int64(copy(whole[at:], b))
	}
	return n.file.Writev([][]byte{whole}, host)
}
