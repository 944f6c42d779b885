package mirror

import "sync"

// maxBacklog is how many writes may wait: some tenths of a second's.
const maxBacklog = 4096

// backlog are writes behind the pass that the source has and the target shall get.
// What they wrote is read from the source again: a later write to the same place
// makes no difference. Its zero value takes none.
type backlog struct {
	mu       sync.Mutex
	ring     []late // guarded by mu; empty: no writes are taken
	first, n int    // those in use; guarded by mu
}

// late is one that waits, in bytes of the disk.
type late struct{ off, n int64 }

// open has it take writes.
func (b *backlog) open() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.ring = make([]late, maxBacklog)
}

// close has it take no more, and returns those that wait still.
func (b *backlog) close() (rest []late) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for i := range b.n {
		rest = append(rest, b.ring[(b.first+i)%len(b.ring)])
	}
	b.ring, b.n = nil, 0
	return rest
}

// put takes a write, and tells whether there is room for it.
func (b *backlog) put(off, n int64) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.n == len(b.ring) {
		return false
	}
	b.ring[(b.first+b.n)%len(b.ring)] = late{off, n}
	b.n++
	return true
}

// take returns the oldest.
func (b *backlog) take() (w late, ok bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.n == 0 {
		return late{}, false
	}
	w = b.ring[b.first]
	b.first, b.n = (b.first+1)%len(b.ring), b.n-1
	return w, true
}

// waiting is how many there are.
func (b *backlog) waiting() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.n
}
