package extfs

import (
	"fmt"
	"iter"
	"math/bits"
	"slices"
	"sort"
)

// Map tells of each byte of a part of a disk whether it is used. It does not
// change, and may be asked concurrently.
type Map struct {
	start, end int64
	regions    []*region // ascending; what is in none of them is used
	unknown    []Unknown
}

// Unknown is a part of a disk that counts as used because there is nothing in it
// that this package can map.
type Unknown struct {
	Offset, Size int64 // bytes
	// Reason is ErrNone, or why the file system, or partition table, that is there
	// cannot be trusted.
	Reason error
}

// Everything is the map of a disk of which nothing is known: all of size bytes
// are used.
func Everything(size int64) *Map { return &Map{end: size} }

// FileSystems describes those that the map knows, ascending.
func (m *Map) FileSystems() []FileSystem {
	all := make([]FileSystem, len(m.regions))
	for i, r := range m.regions {
		all[i] = r.FileSystem
		all[i].FreeBytes = r.freeBytes()
	}
	return all
}

// Unknown tells of partitions without a file system that the map knows.
func (m *Map) Unknown() []Unknown { return slices.Clone(m.unknown) }

// Start and End are the part of the disk that the map is about, in bytes.
func (m *Map) Start() int64 { return m.start }

// End is behind the last byte of the map.
func (m *Map) End() int64 { return m.end }

// Run tells whether byte off of the disk is used, and where the run of bytes that
// are so too ends, at limit at the latest. What is outside the map is used.
func (m *Map) Run(off, limit int64) (used bool, end int64) {
	i := sort.Search(len(m.regions), func(i int) bool { return m.regions[i].end > off })
	used, end = m.piece(i, off, limit)
	for end < limit {
		if i < len(m.regions) && end >= m.regions[i].end {
			i++
		}
		same, next := m.piece(i, end, limit)
		if same != used {
			break
		}
		end = next
	}
	return used, end
}

// piece is Run within region i, or before it.
func (m *Map) piece(i int, off, limit int64) (used bool, end int64) {
	switch {
	case i == len(m.regions):
		return true, limit
	case off < m.regions[i].start:
		return true, min(limit, m.regions[i].start)
	}
	return m.regions[i].run(off, limit)
}

// Used yields the used runs of the map, each from its first byte to behind its
// last, ascending.
func (m *Map) Used() iter.Seq2[int64, int64] { return m.runs(true) }

// Free yields the free runs, as Used does.
func (m *Map) Free() iter.Seq2[int64, int64] { return m.runs(false) }

func (m *Map) runs(wanted bool) iter.Seq2[int64, int64] {
	return func(yield func(int64, int64) bool) {
		for off := m.start; off < m.end; {
			used, end := m.Run(off, m.end)
			if used == wanted && !yield(off, end) {
				return
			}
			off = end
		}
	}
}

// UsedBytes counts the bytes of the map that are used.
func (m *Map) UsedBytes() int64 {
	n := m.end - m.start
	for _, r := range m.regions {
		n -= r.freeBytes()
	}
	return n
}

// region is the map of one file system.
type region struct {
	FileSystem
	start, end int64 // bytes of the disk that the groups are on
	groupSize  int64 // bytes
	perGroup   int64 // clusters
	groups     []groupMap
	kept       int64 // bytes of groups
}

func newRegion(f *fileSystem) *region {
	return &region{
		FileSystem: f.describe(),
		start:      f.byteOf(f.firstBlock), end: f.byteOf(f.blocks),
		groupSize: f.blocksPerGroup * f.blockSize,
		perGroup:  f.clustersPerGroup,
		groups:    make([]groupMap, f.groups),
	}
}

// clusters is how many a group has; the last of the last may be cut short.
func (r *region) clusters(g int64) int64 {
	bytes := min(r.groupSize, r.end-r.start-g*r.groupSize)
	return (bytes + r.ClusterSize - 1) / r.ClusterSize
}

// keep makes a bitmap for a group.
func (r *region) keep() (groupMap, error) {
	words := (r.perGroup + 63) / 64
	if r.kept += words * 8; r.kept > maxBitmaps {
		return nil, fmt.Errorf("%w: the bitmaps of the file system at %d take more than %d bytes", ErrUnsupported, r.Offset, maxBitmaps)
	}
	return make(groupMap, words), nil
}

// set takes over a group's bitmap as the disk has it.
func (r *region) set(g int64, bitmap []byte) error {
	n := r.clusters(g)
	switch countUsed(bitmap, n) {
	case 0:
		r.groups[g] = allFree
		return nil
	case n:
		r.groups[g] = nil
		return nil
	}
	m, err := r.keep()
	if err != nil {
		return err
	}
	m.load(bitmap)
	r.groups[g] = m
	return nil
}

// mark has the clusters [from, to) of a group be used.
func (r *region) mark(g, from, to int64) error {
	m := r.groups[g]
	if m == nil {
		return nil
	}
	if m.isFree() {
		var err error
		if m, err = r.keep(); err != nil {
			return err
		}
		r.groups[g] = m
	}
	m.mark(from, to)
	return nil
}

// freeBytes counts them; the last cluster may pass the region's end.
func (r *region) freeBytes() (n int64) {
	for g := range r.groups {
		n += r.groups[g].free(r.clusters(int64(g))) * r.ClusterSize
	}
	last := int64(len(r.groups) - 1)
	if c := r.clusters(last); !r.groups[last].used(c - 1) {
		n -= r.start + last*r.groupSize + c*r.ClusterSize - r.end
	}
	return n
}

// run is Map.Run within the region.
func (r *region) run(off, limit int64) (used bool, end int64) {
	limit = min(limit, r.end)
	g := (off - r.start) / r.groupSize
	c := (off - r.start) % r.groupSize / r.ClusterSize
	used = r.groups[g].used(c)
	for {
		n := r.clusters(g)
		c = r.groups[g].next(c, n, !used)
		end = r.start + g*r.groupSize + c*r.ClusterSize
		if c < n {
			break
		}
		g, c = g+1, 0
		if end >= limit || r.groups[g].used(0) != used {
			break
		}
	}
	return used, min(end, limit)
}

// groupMap has a bit for each cluster of a group that is used. A nil one is used
// as a whole, allFree is free as a whole.
type groupMap []uint64

var allFree = groupMap{}

func (m groupMap) isFree() bool { return m != nil && len(m) == 0 }

func (m groupMap) load(bitmap []byte) {
	for i, b := range bitmap {
		m[i/8] |= uint64(b) << (i % 8 * 8)
	}
}

func (m groupMap) mark(from, to int64) {
	for c := from; c < to; {
		n := min(64-c%64, to-c)
		m[c/64] |= ^uint64(0) >> (64 - n) << (c % 64)
		c += n
	}
}

func (m groupMap) used(c int64) bool {
	return m == nil || !m.isFree() && m[c/64]>>(c%64)&1 != 0
}

// next is the first cluster from c on, of n, that is used or is not; n if none.
func (m groupMap) next(c, n int64, used bool) int64 {
	if m == nil || m.isFree() {
		if m.used(c) == used {
			return c
		}
		return n
	}
	for c < n {
		word := m[c/64]
		if !used {
			word = ^word
		}
		if word >>= c % 64; word != 0 {
			return min(n, c+int64(bits.TrailingZeros64(word)))
		}
		c += 64 - c%64
	}
	return n
}

// free counts those that are not used among the first n.
func (m groupMap) free(n int64) (free int64) {
	switch {
	case m == nil:
		return 0
	case m.isFree():
		return n
	}
	for c := int64(0); c < n; c += 64 {
		word := ^m[c/64]
		if n-c < 64 {
			word &= 1<<(n-c) - 1
		}
		free += int64(bits.OnesCount64(word))
	}
	return free
}

// countUsed counts the bits set among the first n.
func countUsed(bitmap []byte, n int64) (used int64) {
	for _, b := range bitmap[:n/8] {
		used += int64(bits.OnesCount8(b))
	}
	if rest := n % 8; rest != 0 {
		used += int64(bits.OnesCount8(bitmap[n/8] & (1<<rest - 1)))
	}
	return used
}
