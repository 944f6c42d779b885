package pager

import (
	"fmt"
	"sync"
)

// cache keeps the blocks that were read last, for when their pages are wanted
// one by one.
type cache struct {
	mu      sync.Mutex
	max     int
	entries []cached      // guarded by mu
	index   map[Block]int // guarded by mu: where a block is in entries
	clock   uint64        // guarded by mu
}

type cached struct {
	block Block
	buf   []byte // BlockPages long
	pages []byte // of the block, in buf; nil if the entry is free
	used  uint64 // the clock when it was last used
}

func newCache(max int) *cache { return &cache{max: max, index: map[Block]int{}} }

// page copies one page of a block to dst.
func (c *cache) page(p *Pager, b Block, slot int, dst []byte) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	i, ok := c.index[b]
	if !ok {
		i = c.evict()
		e := &c.entries[i]
		pages, err := p.read(b, e.buf)
		if err != nil {
			return err
		}
		e.block, e.pages = b, pages
		c.index[b] = i
	}
	e := &c.entries[i]
	c.clock++
	e.used = c.clock
	if (slot+1)*pageSize > len(e.pages) {
		return fmt.Errorf("%w: block %d has no slot %d", ErrLoad, b, slot)
	}
	copy(dst[:pageSize], e.pages[slot*pageSize:])
	return nil
}

// evict returns an entry that is free now. mu is held.
func (c *cache) evict() int {
	if len(c.entries) < c.max {
		c.entries = append(c.entries, cached{buf: make([]byte, BlockPages*pageSize)})
		return len(c.entries) - 1
	}
	oldest := 0
	for i := range c.entries {
		if c.entries[i].used < c.entries[oldest].used {
			oldest = i
		}
	}
	if e := &c.entries[oldest]; e.pages != nil {
		delete(c.index, e.block)
		e.pages = nil
	}
	return oldest
}

// block returns all of a block, in buf, without keeping it.
func (c *cache) block(p *Pager, b Block, buf []byte) ([]byte, error) {
	c.mu.Lock()
	if i, ok := c.index[b]; ok {
		n := copy(buf, c.entries[i].pages)
		c.mu.Unlock()
		return buf[:n], nil
	}
	c.mu.Unlock()
	return p.read(b, buf)
}
