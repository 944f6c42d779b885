package checkpoint

import (
	"fmt"
	"sync"
)

// readCache is how many blocks a Reader keeps for Read: 4 MiB.
const readCache = 16

// blockCache keeps the blocks that were wanted last.
type blockCache struct {
	r   *Reader
	max int

	mu      sync.Mutex
	entries []cachedBlock // guarded by mu
	clock   uint64        // guarded by mu
}

type cachedBlock struct {
	block BlockID
	pages []byte // nil: nothing is there
	buf   []byte
	used  uint64 // the clock then
}

func (c *blockCache) init(r *Reader, max int) { c.r, c.max = r, max }

// copy copies from offset off of the page at a location.
func (c *blockCache) copy(into []byte, at Location, off int) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	e, err := c.get(at.Block)
	if err != nil {
		return err
	}
	if (at.Slot+1)*PageSize > len(e.pages) {
		return fmt.Errorf("%w: it is in slot %d of block %d, which has %d", ErrDamaged, at.Slot, at.Block, len(e.pages)/PageSize)
	}
	copy(into, e.pages[at.Slot*PageSize+off:])
	return nil
}

// get returns a block; mu is held.
func (c *blockCache) get(b BlockID) (*cachedBlock, error) {
	c.clock++
	oldest := 0
	for i := range c.entries {
		e := &c.entries[i]
		if e.block == b && e.pages != nil {
			e.used = c.clock
			return e, nil
		}
		if e.used < c.entries[oldest].used {
			oldest = i
		}
	}
	if len(c.entries) < c.max {
		oldest = len(c.entries)
		c.entries = append(c.entries, cachedBlock{buf: make([]byte, blockBytes)})
	}
	e := &c.entries[oldest]
	e.block, e.used, e.pages = b, c.clock, nil
	pages, _, err := c.r.ReadBlock(b, e.buf)
	if err != nil {
		return nil, err
	}
	e.pages = pages
	return e, nil
}
