package qcow2

import "sync"

// cursor walks through the buffers of a request, which it leaves as they are.
type cursor struct {
	bufs [][]byte
	skip int // bytes of bufs[0] that are done
}

// vector is a list of buffers that is used again and again.
type vector struct{ bufs [][]byte }

var vectors = sync.Pool{New: func() any { return new(vector) }}

func (v *vector) release() {
	clear(v.bufs) // keeps no guest memory alive
	vectors.Put(v)
}

// next returns the next stretch of at most n bytes, n > 0, that lies in one buffer.
func (c *cursor) next(n int64) []byte {
	for len(c.bufs[0]) == c.skip {
		c.bufs, c.skip = c.bufs[1:], 0
	}
	b := c.bufs[0][c.skip:]
	b = b[:min(int64(len(b)), n)]
	c.skip += len(b)
	return b
}

// take returns the next n bytes as a vector, to be released.
func (c *cursor) take(n int64) *vector {
	v := vectors.Get().(*vector)
	v.bufs = v.bufs[:0]
	for n > 0 {
		b := c.next(n)
		v.bufs = append(v.bufs, b)
		n -= int64(len(b))
	}
	return v
}

// zero clears the next n bytes.
func (c *cursor) zero(n int64) {
	for n > 0 {
		b := c.next(n)
		clear(b)
		n -= int64(len(b))
	}
}

// copy fills the next len(from) bytes.
func (c *cursor) copy(from []byte) {
	for len(from) > 0 {
		from = from[copy(c.next(int64(len(from))), from):]
	}
}

func total(bufs [][]byte) int64 {
	var t int64
	for _, b := range bufs {
		t += int64(len(b))
	}
	return t
}
