package nbd

import (
	"math/bits"
	"sync"
)

// Buffers come in powers of two from 1<<minClass to maxPayload bytes.
const (
	minClass = 12
	maxClass = 25
)

type buffer struct{ bytes []byte }

var pools [maxClass - minClass + 1]sync.Pool // of *buffer

func bufferClass(n int) int {
	return max(bits.Len(uint(max(n, 1)-1)), minClass) - minClass
}

// getBuffer returns a buffer of at least n bytes, at most maxPayload; what it
// holds is old.
func getBuffer(n int) *buffer {
	class := bufferClass(n)
	if b, ok := pools[class].Get().(*buffer); ok {
		return b
	}
	return &buffer{make([]byte, 1<<(class+minClass))}
}

func putBuffer(b *buffer) {
	pools[bufferClass(len(b.bytes))].Put(b)
}
