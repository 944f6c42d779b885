package nbd

import (
	"math/bits"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Buffers come in powers of two from 1<<minClass to maxPayload bytes. Those of more than
// 1<<maxPooled are not the garbage collector's, which would keep them for minutes: they
// are parts of chunks.
const (
	minClass  = 12
	maxPooled = 16

	// chunkSize is what a chunk has at least: a huge page.
	chunkSize = 2 << 20
	// chunkParts is how many parts a chunk is divided into at most.
	chunkParts = chunkSize >> (maxPooled + 1)

	// maxSpare is how many bytes of unused chunks are kept for the next request, and
	// spareTime how long about.
	maxSpare  = 64 << 20
	spareTime = time.Second
)

type buffer struct {
	bytes []byte
	chunk *chunk // or nil
	parts uint16 // of the chunk, a bit for each
}

// chunk is mapped memory of which there is a buffer, or several small ones. It lies in
// huge pages where the kernel has them: what lies in few pieces takes a disk less.
type chunk struct {
	mapping []byte
	bytes   []byte // of mapping, those in use
	buffers [chunkParts]buffer
	used    uint16 // parts, a bit for each
	lately  bool   // used since the last trim
}

var (
	pools [maxPooled - minClass + 1]sync.Pool // of *buffer
	large chunks
)

func bufferClass(n int) int {
	return max(bits.Len(uint(max(n, 1)-1)), minClass) - minClass
}

// bufferSize is what a buffer of at least n bytes has.
func bufferSize(n int) int64 { return 1 << (bufferClass(n) + minClass) }

// getBuffer returns a buffer of at least n bytes, at most maxPayload; what it
// holds is old.
func getBuffer(n int) *buffer {
	class := bufferClass(n)
	if class >= len(pools) {
		return large.get(1 << (class + minClass))
	}
	if b, ok := pools[class].Get().(*buffer); ok {
		return b
	}
	return &buffer{bytes: make([]byte, 1<<(class+minClass))}
}

// putBuffer takes a buffer back, of which nothing is used any more.
func putBuffer(b *buffer) {
	if b.chunk != nil {
		large.put(b)
		return
	}
	pools[bufferClass(len(b.bytes))].Put(b)
}

// chunks are those there are.
type chunks struct {
	mu      sync.Mutex
	all     []*chunk // guarded by mu
	spare   int      // bytes of those that are not used; guarded by mu
	ticking bool     // trim will be called; guarded by mu
}

// get returns a buffer of size bytes.
func (s *chunks) get(size int) *buffer {
	s.mu.Lock()
	defer s.mu.Unlock()
	whole := max(size, chunkSize)
	for _, c := range s.all { // the first, so that others become unused
		if len(c.bytes) != whole {
			continue
		}
		wasSpare := c.used == 0
		if b := c.cut(size); b != nil {
			if wasSpare {
				s.spare -= whole
			}
			return b
		}
	}
	c := newChunk(whole)
	s.all = append(s.all, c)
	return c.cut(size)
}

// cut returns a buffer of size bytes, or nil: there is no room. Preconditions: mu is held.
func (c *chunk) cut(size int) *buffer {
	count := chunkParts * size / len(c.bytes)
	for first := 0; first < chunkParts; first += count {
		parts := uint16((1<<count - 1) << first)
		if c.used&parts != 0 {
			continue
		}
		c.used |= parts
		c.lately = true
		start := first * len(c.bytes) / chunkParts
		b := &c.buffers[first]
		*b = buffer{c.bytes[start : start+size : start+size], c, parts}
		return b
	}
	return nil
}

func (s *chunks) put(b *buffer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := b.chunk
	c.used &^= b.parts
	if c.used != 0 {
		return
	}
	if s.spare+len(c.bytes) > maxSpare {
		c.unmap()
		s.all = slices.DeleteFunc(s.all, func(other *chunk) bool { return other == c })
		return
	}
	s.spare += len(c.bytes)
	if !s.ticking {
		s.ticking = true
		time.AfterFunc(spareTime, s.trim)
	}
}

// trim unmaps those that were not used since the last time.
func (s *chunks) trim() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.all = slices.DeleteFunc(s.all, func(c *chunk) bool {
		unused := c.used == 0 && !c.lately
		c.lately = false
		if unused {
			s.spare -= len(c.bytes)
			c.unmap()
		}
		return unused
	})
	if s.ticking = s.spare > 0; s.ticking {
		time.AfterFunc(spareTime, s.trim)
	}
}

func newChunk(size int) *chunk {
	mapping, err := unix.Mmap(-1, 0, size+chunkSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return &chunk{bytes: make([]byte, size)} // too many mappings
	}
	c := &chunk{mapping: mapping, bytes: mapping[toHugePage(mapping):][:size:size]}
	_ = unix.Madvise(c.bytes, unix.MADV_HUGEPAGE) // a kernel without them maps small ones
	return c
}

func (c *chunk) unmap() {
	if c.mapping != nil {
		_ = unix.Munmap(c.mapping)
	}
}
