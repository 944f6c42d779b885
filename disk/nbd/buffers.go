package nbd

import (
	"math/bits"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Buffers come in powers of two from 1<<minClass to maxPayload bytes. Those of more than
// 1<<maxPooled are not the garbage collector's, which would keep them for minutes: they
// are mapped, and those that are not used are unmapped soon.
const (
	minClass  = 12
	maxPooled = 16
	maxClass  = 25

	// maxSpare is how many bytes of mapped buffers are kept for the next request, and
	// spareTime how long about.
	maxSpare  = 64 << 20
	spareTime = time.Second
)

type buffer struct{ bytes []byte }

var (
	pools [maxPooled - minClass + 1]sync.Pool // of *buffer
	large spares
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
		return large.get(class)
	}
	if b, ok := pools[class].Get().(*buffer); ok {
		return b
	}
	return &buffer{make([]byte, 1<<(class+minClass))}
}

// putBuffer takes a buffer back, of which nothing is used any more.
func putBuffer(b *buffer) {
	class := bufferClass(len(b.bytes))
	if class >= len(pools) {
		large.put(class, b)
		return
	}
	pools[class].Put(b)
}

// spares are mapped buffers that are not used.
type spares struct {
	mu      sync.Mutex
	all     [maxClass - minClass + 1][]*buffer // guarded by mu
	least   [maxClass - minClass + 1]int       // how many there were of each lately, at least; guarded by mu
	bytes   int64                              // guarded by mu
	ticking bool                               // trim will be called; guarded by mu
}

func (s *spares) get(class int) *buffer {
	s.mu.Lock()
	if last := len(s.all[class]) - 1; last >= 0 {
		b := s.all[class][last]
		s.all[class][last] = nil
		s.all[class] = s.all[class][:last]
		s.least[class] = min(s.least[class], last)
		s.bytes -= int64(len(b.bytes))
		s.mu.Unlock()
		return b
	}
	s.mu.Unlock()
	size := 1 << (class + minClass)
	bytes, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		bytes = make([]byte, size) // too many mappings; unmapping it fails, and it is collected
	}
	return &buffer{bytes}
}

func (s *spares) put(class int, b *buffer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.bytes+int64(len(b.bytes)) > maxSpare {
		_ = unix.Munmap(b.bytes)
		return
	}
	s.all[class] = append(s.all[class], b)
	s.bytes += int64(len(b.bytes))
	if !s.ticking {
		s.ticking = true
		time.AfterFunc(spareTime, s.trim)
	}
}

// trim unmaps those that were not used since the last time.
func (s *spares) trim() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for class := range s.all {
		unused := s.all[class][:s.least[class]]
		for i, b := range unused {
			s.bytes -= int64(len(b.bytes))
			_ = unix.Munmap(b.bytes)
			unused[i] = nil
		}
		s.all[class] = append(s.all[class][:0], s.all[class][len(unused):]...)
		s.least[class] = len(s.all[class])
	}
	if s.ticking = s.bytes > 0; s.ticking {
		time.AfterFunc(spareTime, s.trim)
	}
}
