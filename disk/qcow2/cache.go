package qcow2

import (
	"container/list"
	"sync"
)

// key names a piece of an image file: image distinguishes the images of a
// chain, which share their caches.
type key struct {
	image  int
	offset int64
}

// cache keeps the pieces that were used last, up to a number of bytes. What it
// hands out is never written to again, so readers need no lock for it.
type cache struct {
	limit int64 // bytes

	mu      sync.Mutex
	used    int64                 // guarded by mu: bytes
	entries map[key]*list.Element // guarded by mu: values are *piece
	recent  list.List             // guarded by mu: the last used in front
}

type piece struct {
	key  key
	data []byte
}

func newCache(limit int64) *cache {
	return &cache{limit: limit, entries: map[key]*list.Element{}}
}

// get returns the piece at k, or nil.
func (c *cache) get(k key) []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.entries[k]
	if e == nil {
		return nil
	}
	c.recent.MoveToFront(e)
	return e.Value.(*piece).data
}

// put keeps data, which nobody may write to from now on.
func (c *cache) put(k key, data []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.entries[k] != nil {
		return // another reader was faster
	}
	c.entries[k] = c.recent.PushFront(&piece{k, data})
	c.used += int64(len(data))
	for c.used > c.limit && c.recent.Len() > 1 {
		e := c.recent.Back()
		old := c.recent.Remove(e).(*piece)
		delete(c.entries, old.key)
		c.used -= int64(len(old.data))
	}
}

// drop forgets the piece at k.
func (c *cache) drop(k key) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e := c.entries[k]; e != nil {
		old := c.recent.Remove(e).(*piece)
		delete(c.entries, k)
		c.used -= int64(len(old.data))
	}
}
