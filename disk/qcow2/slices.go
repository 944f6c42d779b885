package qcow2

import (
	"cmp"
	"slices"
)

// slice is a piece of a table: of an L2 table, or of a block of reference counts.
type slice struct {
	at       int64 // in the file
	data     []byte
	dirty    bool // the file does not have it as it is
	flushing bool // a flush is writing a copy of it
	used     bool // since the clock's hand passed by
}

// sliceCache keeps slices of an image that is written. Slices that the file has
// not go on being kept when there are too many; who makes them sees to it that
// they are written. All is guarded by writer.mu.
type sliceCache struct {
	size  int64 // bytes of a slice
	limit int   // slices
	at    map[int64]*slice
	ring  []*slice
	hand  int
	dirty int // slices
}

func newSliceCache(bytes, clusterSize int64) sliceCache {
	size := min(clusterSize, sliceBytes)
	return sliceCache{size: size, limit: int(bytes / size), at: map[int64]*slice{}}
}

// get returns the slice at a place, or nil.
func (c *sliceCache) get(at int64) *slice {
	s := c.at[at]
	if s != nil {
		s.used = true
	}
	return s
}

// put makes a slice for a place, in place of one that was not used for long. Its
// data is not cleared. Preconditions: the cache has none for that place.
func (c *sliceCache) put(at int64) *slice {
	s := c.victim()
	if s == nil {
		s = &slice{data: make([]byte, c.size)}
		c.ring = append(c.ring, s)
	} else {
		delete(c.at, s.at)
	}
	s.at, s.used = at, true
	c.at[at] = s
	return s
}

// victim is a slice to be replaced, or nil while there is room, or none is clean.
func (c *sliceCache) victim() *slice {
	if len(c.ring) < c.limit {
		return nil
	}
	for range 2 * len(c.ring) {
		c.hand = (c.hand + 1) % len(c.ring)
		s := c.ring[c.hand]
		if s.dirty || s.flushing {
			continue
		}
		if !s.used {
			return s
		}
		s.used = false
	}
	return nil
}

func (c *sliceCache) touch(s *slice) {
	if !s.dirty {
		s.dirty = true
		c.dirty++
	}
}

func (c *sliceCache) clean(s *slice) {
	if s.dirty {
		s.dirty = false
		c.dirty--
	}
}

// drop forgets the slices of a table that is no more. No flush is under way.
func (c *sliceCache) drop(at, length int64) {
	c.ring = slices.DeleteFunc(c.ring, func(s *slice) bool {
		if s.at < at || s.at >= at+length {
			return false
		}
		c.clean(s)
		delete(c.at, s.at)
		return true
	})
	c.hand = 0
}

// copied is a slice as it was when a flush began.
type copied struct {
	from *slice
	data []byte
}

// take returns copies of the dirty slices by their place, but for those a flush
// is writing. The slices count as clean then, and stay until done is called.
func (c *sliceCache) take() []copied {
	if c.dirty == 0 {
		return nil
	}
	out := make([]copied, 0, c.dirty)
	for _, s := range c.ring {
		if s.dirty && !s.flushing {
			c.clean(s)
			s.flushing = true
			out = append(out, copied{s, slices.Clone(s.data)})
		}
	}
	slices.SortFunc(out, func(a, b copied) int { return cmp.Compare(a.from.at, b.from.at) })
	return out
}

// done ends what take began; not all copies were written if failed.
func (c *sliceCache) done(all []copied, failed bool) {
	for _, one := range all {
		one.from.flushing = false
		if failed {
			c.touch(one.from)
		}
	}
}
