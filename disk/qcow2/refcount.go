package qcow2

import (
	"encoding/binary"
	"fmt"
	"maps"
	"slices"
)

// maxRefcountTable is QEMU's limit of the reference count table, in bytes.
const maxRefcountTable = 8 << 20

// refcounts are the reference counts of an image that is written (specification,
// "Host cluster management"). A count is raised before the file may refer to the
// cluster and lowered when it does not any more, so counts may be written at any
// time: interrupted, they are too large at most. All is guarded by writer.mu.
type refcounts struct {
	slices  sliceCache
	order   uint32   // counts have 2^order bits
	table   []uint64 // places of blocks
	tableAt int64
	linked  map[int64]bool // entries of table that the file has not
	moved   bool           // the header has another tableAt
	hint    int64          // the clusters below are not free
}

// perBlock is how many counts a block has, perSlice how many a slice.
func (r *refcounts) perBlock(clusterSize int64) int64 { return clusterSize * 8 >> r.order }
func (r *refcounts) perSlice() int64                  { return r.slices.size * 8 >> r.order }

func (r *refcounts) max() uint64 { return 1<<(1<<r.order) - 1 }

// count is the i-th count of a block or slice.
func count(b []byte, order uint32, i int64) uint64 {
	switch order {
	case 3:
		return uint64(b[i])
	case 4:
		return uint64(binary.BigEndian.Uint16(b[i*2:]))
	case 5:
		return uint64(binary.BigEndian.Uint32(b[i*4:]))
	case 6:
		return binary.BigEndian.Uint64(b[i*8:])
	}
	bit := i << order
	return uint64(b[bit/8]>>(bit%8)) & (1<<(1<<order) - 1)
}

func setCount(b []byte, order uint32, i int64, v uint64) {
	switch order {
	case 3:
		b[i] = byte(v)
	case 4:
		binary.BigEndian.PutUint16(b[i*2:], uint16(v))
	case 5:
		binary.BigEndian.PutUint32(b[i*4:], uint32(v))
	case 6:
		binary.BigEndian.PutUint64(b[i*8:], v)
	default:
		bit := i << order
		mask := byte(1<<(1<<order)-1) << (bit % 8)
		b[bit/8] = b[bit/8]&^mask | byte(v)<<(bit%8)&mask
	}
}

// readRefcountTable reads the places of the blocks of counts.
func (n *Node) readRefcountTable() ([]uint64, error) {
	h := n.header
	length := int64(h.RefcountTables) * h.ClusterSize()
	switch {
	case length == 0 || length > maxRefcountTable:
		return nil, fmt.Errorf("%w: reference count table of %d bytes", ErrCorrupt, length)
	case h.RefcountOffset <= 0 || h.RefcountOffset%h.ClusterSize() != 0 || h.RefcountOffset > n.file.Size() || length > n.file.Size()-h.RefcountOffset:
		return nil, fmt.Errorf("%w: reference count table of %d bytes at %#x, in a file of %d bytes", ErrCorrupt, length, h.RefcountOffset, n.file.Size())
	}
	raw := make([]byte, length)
	if err := n.file.Readv([][]byte{raw}, h.RefcountOffset); err != nil {
		return nil, fmt.Errorf("read reference count table: %w", err)
	}
	table := make([]uint64, length/entrySize)
	for i := range table {
		table[i] = binary.BigEndian.Uint64(raw[i*entrySize:])
	}
	return table, nil
}

// countSlice returns the slice that has the count of a cluster, and its index in
// it; nil where there is no block of counts. Preconditions: mu is held.
func (n *Node) countSlice(cluster int64) (*slice, int64, error) {
	r, size := &n.w.counts, n.header.ClusterSize()
	perBlock := r.perBlock(size)
	block := cluster / perBlock
	if block >= int64(len(r.table)) || r.table[block]&offsetMask == 0 {
		return nil, 0, nil
	}
	at := int64(r.table[block] & offsetMask)
	if at%size != 0 || at > n.w.end-size {
		return nil, 0, fmt.Errorf("%w: block of reference counts at %#x (entry %d)", ErrCorrupt, at, block)
	}
	i := cluster % perBlock
	at += i / r.perSlice() * r.slices.size
	i %= r.perSlice()
	if s := r.slices.get(at); s != nil {
		return s, i, nil
	}
	if r.slices.dirty > r.slices.limit/2 {
		// Counts may be written whenever that is wanted.
		all := r.slices.take()
		err := n.writeSlices(all)
		r.slices.done(all, err != nil)
		if err != nil {
			return nil, 0, err
		}
	}
	s := r.slices.put(at)
	if err := n.file.Readv([][]byte{s.data}, at); err != nil {
		r.slices.drop(at, 1)
		return nil, 0, fmt.Errorf("read reference counts at %#x: %w", at, err)
	}
	return s, i, nil
}

// refcount is the count of a cluster. Preconditions: mu is held.
func (n *Node) refcount(cluster int64) (uint64, error) {
	s, i, err := n.countSlice(cluster)
	if s == nil || err != nil {
		return 0, err
	}
	return count(s.data, n.w.counts.order, i), nil
}

// setRefcount makes the count of a cluster v. Preconditions: mu is held.
func (n *Node) setRefcount(cluster int64, v uint64) error {
	r := &n.w.counts
	if v > r.max() {
		return fmt.Errorf("%w: cluster %d has %d references, and counts have %d bits", ErrCorrupt, cluster, v, 1<<r.order)
	}
	s, i, err := n.countSlice(cluster)
	if err == nil && s == nil {
		if err := n.addCountBlock(cluster / r.perBlock(n.header.ClusterSize())); err != nil {
			return err
		}
		s, i, err = n.countSlice(cluster)
	}
	if err != nil {
		return err
	}
	setCount(s.data, r.order, i, v)
	r.slices.touch(s)
	return nil
}

// addCountBlock puts a block of counts at the file's end. Preconditions: mu is held.
func (n *Node) addCountBlock(index int64) error {
	r, size := &n.w.counts, n.header.ClusterSize()
	if index >= int64(len(r.table)) {
		if err := n.growRefcountTable(index + 1); err != nil {
			return err
		}
		if r.table[index]&offsetMask != 0 {
			return nil // it was needed to count the table
		}
	}
	at := n.w.extend(size)
	if err := n.writeZero(at, size); err != nil {
		return err
	}
	r.table[index] = uint64(at)
	r.linked[index] = true
	return n.setRefcount(at/size, 1) // by this block, or by one more
}

// growRefcountTable puts a larger table at the file's end. Preconditions: mu is held.
func (n *Node) growRefcountTable(entries int64) error {
	r, size := &n.w.counts, n.header.ClusterSize()
	length := (max(entries, int64(len(r.table))*3/2)*entrySize + size - 1) / size * size
	if length > maxRefcountTable {
		return fmt.Errorf("%w: the image needs a reference count table of %d bytes", ErrUnsupported, length)
	}
	old, oldLength := r.tableAt, int64(len(r.table))*entrySize
	r.table = append(r.table, make([]uint64, length/entrySize-int64(len(r.table)))...)
	r.tableAt, r.moved = n.w.extend(length), true
	for i := range length / size {
		if err := n.setRefcount(r.tableAt/size+i, 1); err != nil {
			return err
		}
	}
	if oldLength > 0 {
		n.w.free(old/size, oldLength/size)
	}
	return nil
}

// lower takes one reference to a cluster away. Preconditions: mu is held, and the
// file does not refer to it.
func (n *Node) lower(cluster int64) error {
	v, err := n.refcount(cluster)
	if err != nil || v == 0 {
		return err // 0: the count was wrong before, which is for Check to tell
	}
	if v == 1 {
		n.w.counts.hint = min(n.w.counts.hint, cluster)
		n.w.floor = min(n.w.floor, cluster)
	}
	return n.setRefcount(cluster, v-1)
}

// firstFree is the first cluster before end that is free, from from on, or end.
// Preconditions: mu is held.
func (n *Node) firstFree(from, end int64) (int64, error) {
	r := &n.w.counts
	for from < end {
		s, i, err := n.countSlice(from)
		if s == nil || err != nil {
			return from, err
		}
		for perSlice := r.perSlice(); i < perSlice && from < end; i++ {
			if count(s.data, r.order, i) == 0 {
				return from, nil
			}
			from++
		}
	}
	return from, nil
}

// alloc takes up to want free clusters that lie side by side. Preconditions: mu is held.
func (n *Node) alloc(want int64) (at, got int64, err error) {
	r, size := &n.w.counts, n.header.ClusterSize()
	end := n.w.end / size
	first, err := n.firstFree(r.hint, end)
	if err != nil {
		return 0, 0, err
	}
	r.hint = first
	if first == end {
		return n.allocEnd(want)
	}
	for got = 1; got < want && first+got < end; got++ {
		if v, err := n.refcount(first + got); err != nil {
			return 0, 0, err
		} else if v != 0 {
			break
		}
	}
	if err := n.overlaps(first*size, got*size); err != nil {
		return 0, 0, n.damaged(err)
	}
	for i := range got {
		if err := n.setRefcount(first+i, 1); err != nil {
			return 0, 0, err
		}
	}
	r.hint = first + got
	return first * size, got, nil
}

// allocEnd takes clusters at the file's end. Preconditions: mu is held.
func (n *Node) allocEnd(want int64) (at, got int64, err error) {
	size := n.header.ClusterSize()
	for { // a count may be there of what was cut off
		v, err := n.refcount(n.w.end / size)
		if err != nil {
			return 0, 0, err
		}
		if v == 0 {
			break
		}
		n.w.extend(size)
	}
	at = n.w.extend(want * size)
	for i := range want {
		if err := n.setRefcount(at/size+i, 1); err != nil {
			return 0, 0, err
		}
	}
	return at, want, nil
}

// writeCounts writes what there is of all counts before anything may refer to the
// clusters; what writes the file's data durably comes after it.
func (n *Node) writeCounts(b *batch) error {
	if err := n.writeSlices(b.counts); err != nil {
		return err
	}
	if len(b.linked) == 0 && b.table == nil {
		return nil
	}
	// Blocks are there before the table points to them, the table before the header does.
	if b.table != nil {
		if err := n.file.Writev([][]byte{b.table}, b.tableAt); err != nil {
			return fmt.Errorf("reference count table at %#x: %w", b.tableAt, err)
		}
	}
	if err := n.file.Flush(); err != nil {
		return err
	}
	if b.table != nil {
		clusters := uint32(int64(len(b.table)) / n.header.ClusterSize())
		where := binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint64(nil, uint64(b.tableAt)), clusters)
		if err := n.file.Writev([][]byte{where}, 48); err != nil {
			return fmt.Errorf("header: %w", err)
		}
		return nil
	}
	for _, i := range slices.Sorted(maps.Keys(b.linked)) {
		entry := binary.BigEndian.AppendUint64(nil, b.linked[i])
		if err := n.file.Writev([][]byte{entry}, b.tableAt+i*entrySize); err != nil {
			return fmt.Errorf("reference count table entry %d: %w", i, err)
		}
	}
	return nil
}

func (n *Node) writeSlices(all []copied) error {
	for len(all) > 0 {
		// Neighbours are written at once.
		run := 1
		for run < len(all) && run < 64 && all[run].from.at == all[run-1].from.at+int64(len(all[run-1].data)) {
			run++
		}
		bufs := make([][]byte, run)
		for i := range run {
			bufs[i] = all[i].data
		}
		if err := n.file.Writev(bufs, all[0].from.at); err != nil {
			return fmt.Errorf("table at %#x: %w", all[0].from.at, err)
		}
		all = all[run:]
	}
	return nil
}
