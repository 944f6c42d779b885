package qcow2

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
)

// Repair is what Check does about what it finds.
type Repair uint8

// Kinds of repairs.
const (
	RepairNone  Repair = iota
	RepairLeaks        // gives leaked clusters back
	RepairAll          // and makes counts and tables right; entries that lead nowhere read as zero then
)

// CheckOptions say how to check.
type CheckOptions struct {
	Repair Repair
	// Progress, where not nil, is told how many of the image's tables are done.
	Progress func(done, total int64)
}

// Report is what Check found, with the fields of qemu-img check --output=json.
type Report struct {
	Filename           string `json:"filename"`
	Format             string `json:"format"`
	CheckErrors        int64  `json:"check-errors"`
	ImageEndOffset     int64  `json:"image-end-offset,omitempty"`
	Corruptions        int64  `json:"corruptions,omitempty"`
	Leaks              int64  `json:"leaks,omitempty"`
	CorruptionsFixed   int64  `json:"corruptions-fixed,omitempty"`
	LeaksFixed         int64  `json:"leaks-fixed,omitempty"`
	TotalClusters      int64  `json:"total-clusters,omitempty"`
	AllocatedClusters  int64  `json:"allocated-clusters,omitempty"`
	FragmentedClusters int64  `json:"fragmented-clusters,omitempty"`
	CompressedClusters int64  `json:"compressed-clusters,omitempty"`

	// Problems are the first of what is wrong, at most maxProblems.
	Problems []Problem `json:"-"`
}

// maxProblems is how many problems a report names.
const maxProblems = 1000

// Problem is something that is wrong with an image.
type Problem struct {
	Offset int64 // in the file
	Leak   bool  // space is lost, and no more
	Fixed  bool
	Text   string
}

// Clean tells that nothing is wrong, or not any more.
func (r *Report) Clean() bool { return r.Corruptions == 0 && r.Leaks == 0 && r.CheckErrors == 0 }

func (r *Report) add(fixed, leak bool, at int64, format string, args ...any) {
	switch {
	case leak && fixed:
		r.LeaksFixed++
	case leak:
		r.Leaks++
	case fixed:
		r.CorruptionsFixed++
	default:
		r.Corruptions++
	}
	if len(r.Problems) < maxProblems {
		r.Problems = append(r.Problems, Problem{at, leak, fixed, fmt.Sprintf(format, args...)})
	}
}

// Check finds out whether the image at path is whole: whether its clusters are
// counted as often as they are referred to, and its tables lead to places that
// exist. Its backing files are not opened. An error is about what keeps the image
// from being checked at all.
func Check(ctx context.Context, path string, o CheckOptions) (*Report, error) {
	c := newChain()
	file, err := c.open(path, o.Repair == RepairNone)
	if err != nil {
		return nil, err
	}
	n := c.node(file, path)
	r, err := n.check(ctx, o)
	if closed := file.Close(); err == nil {
		err = closed
	}
	if err != nil {
		return nil, fmt.Errorf("disk %s: check: %w", path, err)
	}
	return r, nil
}

// check checks an image that only its file is open of.
func (n *Node) check(ctx context.Context, o CheckOptions) (*Report, error) {
	if err := n.init(); err != nil {
		return nil, err
	}
	if o.Repair != RepairNone {
		n.newWriter(n.file.(store))
	}
	c := &checker{ctx: ctx, n: n, o: o, report: &Report{Filename: n.path, Format: "qcow2"}}
	if err := c.run(); err != nil {
		return nil, err
	}
	if c.report.CorruptionsFixed == 0 {
		return c.report, nil
	}
	// Where tables lie in each other's places one may be broken by what mended another.
	again, err := newChain().node(n.file, n.path).check(ctx, CheckOptions{})
	if err != nil {
		return nil, fmt.Errorf("after the repair: %w", err)
	}
	again.CorruptionsFixed, again.LeaksFixed = c.report.CorruptionsFixed, c.report.LeaksFixed
	again.Problems = append(c.report.Problems, again.Problems...)
	return again, nil
}

// recount makes the counts right of an image that was not closed, before it is
// written. Whatever else is wrong is not touched.
func (n *Node) recount() error {
	c := &checker{ctx: context.Background(), n: n, o: CheckOptions{Repair: RepairAll}, countsOnly: true, report: &Report{}}
	if err := c.run(); err != nil {
		return fmt.Errorf("count references: %w", err)
	}
	return nil
}

// checker is the state of a check.
type checker struct {
	ctx        context.Context
	n          *Node
	o          CheckOptions
	countsOnly bool // entries that lead nowhere are errors
	report     *Report

	clusters int64 // of the file
	refs     references
	l1       []uint64 // all of the active table
	l2       []l2Table
	rebuild  bool // the reference counts cannot be mended where they are
	end      int64
}

// l2Table is an L2 table with how many L1 entries refer to it, and which of the
// active ones, or -1.
type l2Table struct {
	at     int64
	weight uint16
	active int64
}

// fixes tells that entries are to be mended.
func (c *checker) fixes() bool { return c.o.Repair == RepairAll && !c.countsOnly }

func (c *checker) run() error {
	n, size := c.n, c.n.header.ClusterSize()
	c.clusters = (n.file.Size() + size - 1) / size
	c.refs = references{bits: n.header.ClusterBits}
	c.report.TotalClusters = (n.Size() + size - 1) / size
	for _, step := range []func() error{c.tables, c.entries, c.bitmaps, c.blocks, c.compare, c.flags, c.finish} {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

// bad is an entry at a place in the file that leads nowhere; it is made to be v if
// it is to be mended.
func (c *checker) bad(inL2 bool, at int64, v uint64, format string, args ...any) error {
	if c.countsOnly {
		return fmt.Errorf("%w: %s", ErrCorrupt, fmt.Sprintf(format, args...))
	}
	if c.fixes() {
		if err := c.patch(at, v); err != nil {
			return err
		}
		if inL2 && c.n.header.l2EntrySize() > entrySize {
			if err := c.patch(at+entrySize, 0); err != nil {
				return err
			}
		}
	}
	c.report.add(c.fixes(), false, at, format, args...)
	return nil
}

func (c *checker) patch(at int64, v uint64) error {
	return c.n.file.Writev([][]byte{binary.BigEndian.AppendUint64(nil, v)}, at)
}

// place tells that length bytes at a place begin a cluster, and are in the file.
func (c *checker) place(at, length int64) bool { return c.n.within(at, length) }

// structure tells that a cluster is of the header or of the active L1 table, which
// mending a table must not touch.
func (c *checker) structure(at int64) bool {
	h := c.n.header
	for _, t := range [...]struct{ at, length int64 }{{0, h.ClusterSize()}, {h.L1Offset, int64(h.L1Entries) * entrySize}} {
		if at < t.at+t.length && t.at < at+h.ClusterSize() {
			return true
		}
	}
	return false
}

// tables counts the header, the L1 tables and what these refer to.
func (c *checker) tables() error {
	n, size := c.n, c.n.header.ClusterSize()
	h := n.header
	if err := c.refs.add(0, size, 1); err != nil {
		return err
	}
	var err error
	if c.l1, err = readL1(n.file, h, int64(h.L1Entries)); err != nil {
		return err
	}
	index := map[int64]int{} // in c.l2
	if err := c.l1Table(h.L1Offset, c.l1, true, index); err != nil {
		return err
	}
	snapshots, length, err := n.snapshots()
	if err != nil {
		return err
	}
	if length > 0 {
		if err := c.refs.add(h.SnapshotOffset, length, 1); err != nil {
			return err
		}
	}
	for i, s := range snapshots {
		if s.l1Entries == 0 {
			continue // of a disk of no size; its place says nothing
		}
		other := *h
		other.L1Offset = s.l1At
		l1, err := readL1(n.file, &other, s.l1Entries)
		if err != nil {
			return fmt.Errorf("snapshot %d: %w", i, err)
		}
		if err := c.l1Table(s.l1At, l1, false, index); err != nil {
			return err
		}
	}
	return nil
}

// l1Table counts an L1 table, and collects the L2 tables.
func (c *checker) l1Table(at int64, l1 []uint64, active bool, index map[int64]int) error {
	size := c.n.header.ClusterSize()
	if len(l1) == 0 {
		return nil
	}
	if err := c.refs.add(at, int64(len(l1))*entrySize, 1); err != nil {
		return err
	}
	for i, entry := range l1 {
		table := int64(entry & offsetMask)
		if table == 0 {
			continue
		}
		if !c.place(table, size) || c.structure(table) {
			if err := c.bad(false, at+int64(i)*entrySize, 0, "L1 entry %d: L2 table at %#x, which is something else, or not in the file", i, table); err != nil {
				return err
			}
			if active && c.fixes() {
				l1[i] = 0
			}
			continue
		}
		if err := c.refs.add(table, size, 1); err != nil {
			return err
		}
		k, known := index[table]
		if !known {
			k = len(c.l2)
			index[table] = k
			c.l2 = append(c.l2, l2Table{at: table, active: -1})
		}
		c.l2[k].weight++
		if active && c.l2[k].active < 0 {
			c.l2[k].active = int64(i)
		}
	}
	return nil
}

// entries counts what the L2 tables refer to, each as often as it is referred to.
func (c *checker) entries() error {
	b := make([]byte, c.n.header.ClusterSize())
	for i, t := range c.l2 {
		if err := c.ctx.Err(); err != nil {
			return err
		}
		if err := c.n.file.Readv([][]byte{b}, t.at); err != nil {
			return fmt.Errorf("read L2 table at %#x: %w", t.at, err)
		}
		if err := c.l2Entries(b, t); err != nil {
			return err
		}
		if c.o.Progress != nil {
			c.o.Progress(int64(i+1), int64(2*len(c.l2)))
		}
	}
	return nil
}

func (c *checker) l2Entries(b []byte, t l2Table) error {
	h, size := c.n.header, c.n.header.ClusterSize()
	next := int64(0) // where the next cluster is expected
	step := h.l2EntrySize()
	// A cluster that leads nowhere reads as zero from then on.
	mended := uint64(0)
	if h.Version >= 3 && h.Incompatible&FeatureExtendedL2 == 0 {
		mended = entryZero
	}
	for i := int64(0); i < size/step; i++ {
		entry, at := binary.BigEndian.Uint64(b[i*step:]), t.at+i*step
		if entry&entryCompressed != 0 {
			place, length := h.stream(entry)
			if place == 0 || place+length > c.clusters*size || h.Incompatible&FeatureDataFile != 0 {
				if err := c.bad(true, at, mended, "L2 table at %#x, entry %d: compressed cluster at %#x, of %d bytes", t.at, i, place, length); err != nil {
					return err
				}
				continue
			}
			if t.active >= 0 {
				c.report.AllocatedClusters++
				c.report.CompressedClusters++
				c.report.FragmentedClusters++
			}
			if err := c.refs.add(place, length, t.weight); err != nil {
				return err
			}
			continue
		}
		host := int64(entry & offsetMask)
		if h.Version < 3 && entry&entryZero != 0 {
			if err := c.bad(true, at, 0, "L2 table at %#x, entry %d: zero cluster in version 2", t.at, i); err != nil {
				return err
			}
			continue
		}
		external := h.Incompatible&FeatureDataFile != 0
		if host == 0 && !(external && entry&entryOwn != 0) {
			continue
		}
		if host%size != 0 || !external && !c.place(host, 1) {
			if err := c.bad(true, at, mended, "L2 table at %#x, entry %d: cluster at %#x", t.at, i, host); err != nil {
				return err
			}
			continue
		}
		if t.active >= 0 {
			c.report.AllocatedClusters++
			if next != 0 && host != next {
				c.report.FragmentedClusters++
			}
			next = host + size
		}
		if external {
			continue
		}
		if err := c.refs.add(host, size, t.weight); err != nil {
			return err
		}
	}
	return nil
}

// bitmaps counts what persistent bitmaps are kept in.
func (c *checker) bitmaps() error {
	n, size := c.n, c.n.header.ClusterSize()
	dir, err := n.bitmapDirectory()
	if err != nil {
		if c.countsOnly || !errors.Is(err, ErrCorrupt) {
			return err
		}
		c.report.add(false, false, n.header.Bitmaps.dirOffset, "%v", err)
		return nil
	}
	if len(dir) == 0 {
		return nil
	}
	x := n.header.Bitmaps
	if err := c.refs.add(x.dirOffset, x.dirSize, 1); err != nil {
		return err
	}
	for _, e := range dir {
		table, err := n.bitmapTable(e)
		if err != nil {
			if c.countsOnly || !errors.Is(err, ErrCorrupt) {
				return err
			}
			c.report.add(false, false, e.tableAt, "%v", err)
			continue
		}
		if len(table) == 0 {
			continue
		}
		if err := c.refs.add(e.tableAt, e.tableSize*entrySize, 1); err != nil {
			return err
		}
		for _, v := range table {
			if at := int64(v & offsetMask); at != 0 {
				if err := c.refs.add(at, size, 1); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// blocks counts the reference counts' own clusters, unless they have to be made
// anew.
func (c *checker) blocks() error {
	n, size := c.n, c.n.header.ClusterSize()
	table, err := n.readRefcountTable()
	if err != nil {
		if !errors.Is(err, ErrCorrupt) {
			return err
		}
		c.rebuild = true
		c.report.add(c.o.Repair == RepairAll, false, n.header.RefcountOffset, "%v", err)
	}
	own := references{bits: n.header.ClusterBits}
	if len(table) > 0 {
		if err := own.add(n.header.RefcountOffset, int64(len(table))*entrySize, 1); err != nil {
			return err
		}
	}
	for i, entry := range table {
		at := int64(entry & offsetMask)
		switch {
		case at == 0:
			continue
		case !c.place(at, 1) || own.get(at/size) != 0 || c.refs.get(at/size) != 0:
			c.rebuild = true
			c.report.add(c.o.Repair == RepairAll, false, n.header.RefcountOffset+int64(i)*entrySize,
				"reference count table, entry %d: block at %#x, which is something else, or not in the file", i, at)
			continue
		}
		if err := own.add(at, size, 1); err != nil {
			return err
		}
	}
	for i := int64(0); i < int64(len(table))*entrySize; i += size {
		if c.refs.get((n.header.RefcountOffset+i)/size) != 0 && !c.rebuild {
			c.rebuild = true
			c.report.add(c.o.Repair == RepairAll, false, n.header.RefcountOffset+i, "the reference count table lies where something else does")
		}
	}
	if n.w != nil {
		n.w.counts.table = table
	}
	if c.rebuild && c.o.Repair == RepairAll {
		return nil // the old ones are given up
	}
	return c.refs.merge(&own)
}

// compare compares the counts with the references.
func (c *checker) compare() error {
	n := c.n
	if c.rebuild && c.o.Repair == RepairAll {
		return c.recreate()
	}
	r := refcounts{order: n.header.RefcountOrder}
	var err error
	table, _ := n.readRefcountTable() // what is wrong with it is known
	perBlock := r.perBlock(n.header.ClusterSize())
	b := make([]byte, n.header.ClusterSize())
	loaded := int64(-1)
	for i := range c.clusters {
		block := i / perBlock
		if block != loaded {
			if err := c.ctx.Err(); err != nil {
				return err
			}
			loaded = block
			at := int64(0)
			if block < int64(len(table)) {
				at = int64(table[block] & offsetMask)
			}
			clear(b)
			if at != 0 && c.place(at, 1) {
				if err = n.file.Readv([][]byte{b[:min(int64(len(b)), n.file.Size()-at)]}, at); err != nil {
					return fmt.Errorf("read reference counts at %#x: %w", at, err)
				}
			}
		}
		if err := c.compareOne(i, count(b, r.order, i%perBlock)); err != nil {
			return err
		}
	}
	return nil
}

func (c *checker) compareOne(cluster int64, stored uint64) error {
	want := uint64(c.refs.get(cluster))
	if stored != 0 || want != 0 {
		c.end = cluster + 1
	}
	if stored == want {
		return nil
	}
	leak := stored > want
	fix := c.o.Repair == RepairAll || c.o.Repair == RepairLeaks && leak && c.report.Corruptions == 0
	if fix {
		c.n.w.mu.Lock()
		err := c.n.setRefcount(cluster, want)
		c.n.w.mu.Unlock()
		if err != nil {
			return err
		}
	}
	c.report.add(fix, leak, cluster<<c.refs.bits, "cluster at %#x: %d references, counted as %d", cluster<<c.refs.bits, want, stored)
	return nil
}

// recreate writes all counts anew.
func (c *checker) recreate() error {
	n := c.n
	n.w.mu.Lock()
	defer n.w.mu.Unlock()
	n.w.counts.table, n.w.counts.tableAt = nil, 0
	for i := range c.clusters {
		if v := c.refs.get(i); v != 0 {
			c.end = i + 1
			if err := n.setRefcount(i, uint64(v)); err != nil {
				return err
			}
		}
	}
	return nil
}

// flags compares the entries' word that a cluster has one reference with the
// references.
func (c *checker) flags() error {
	n, size := c.n, c.n.header.ClusterSize()
	step := n.header.l2EntrySize()
	b := make([]byte, size)
	for i, t := range c.l2 {
		if c.o.Progress != nil {
			c.o.Progress(int64(len(c.l2)+i+1), int64(2*len(c.l2)))
		}
		if t.active < 0 {
			continue
		}
		if err := c.ctx.Err(); err != nil {
			return err
		}
		entry := c.l1[t.active]
		if err := c.flag(n.header.L1Offset+t.active*entrySize, entry, t.at); err != nil {
			return err
		}
		if n.header.Incompatible&FeatureDataFile != 0 {
			continue
		}
		if err := n.file.Readv([][]byte{b}, t.at); err != nil {
			return fmt.Errorf("read L2 table at %#x: %w", t.at, err)
		}
		for j := int64(0); j < size/step; j++ {
			entry := binary.BigEndian.Uint64(b[j*step:])
			host := int64(entry & offsetMask)
			if entry&entryCompressed == 0 && (host == 0 || !c.place(host, 1)) {
				continue
			}
			if err := c.flag(t.at+j*step, entry, host); err != nil {
				return err
			}
		}
	}
	return nil
}

// flag compares the flag of an entry at a place of the file, that refers to a
// cluster there. Compressed clusters do not have it.
func (c *checker) flag(at int64, entry uint64, cluster int64) error {
	alone := entry&entryCompressed == 0 && c.refs.get(cluster>>c.refs.bits) == 1
	if alone == (entry&entryOwn != 0) {
		return nil
	}
	fix := c.o.Repair == RepairAll
	if fix {
		if err := c.patch(at, entry^entryOwn); err != nil {
			return err
		}
	}
	c.report.add(fix, false, at, "entry %#x at %#x says otherwise whether its cluster has one reference", entry, at)
	return nil
}

// finish makes what was mended durable, and takes the marks away that it was not.
func (c *checker) finish() error {
	n := c.n
	c.report.ImageEndOffset = c.end << c.refs.bits
	if n.w == nil {
		return nil
	}
	if err := n.Flush(); err != nil {
		return err
	}
	if c.o.Repair == RepairAll {
		if err := n.writeIncompatible(n.header.Incompatible &^ (FeatureDirty | FeatureCorrupt)); err != nil {
			return err
		}
	}
	if c.countsOnly || !c.report.Clean() {
		return nil // what the counts say is free may not be
	}
	n.w.floor = 0
	n.w.flushing.Lock()
	defer n.w.flushing.Unlock()
	return n.trim()
}
