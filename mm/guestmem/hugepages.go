package guestmem

import (
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// HugePage is how many bytes a huge page of the host has.
const HugePage = 2 << 20

const (
	// gatherTries is how often it is tried to have memory lie in one huge page.
	gatherTries = 8
	// gatherShare is the part of the time that gathering may take, and gatherBurst how
	// much it may take at once.
	gatherShare = 50
	gatherBurst = 200 * time.Millisecond
)

// gathering is how long a memory may still be gathered.
type gathering struct {
	mu     sync.Mutex
	last   time.Time     // when budget was right; guarded by mu
	budget time.Duration // guarded by mu
}

// Gather has the n bytes from gpa on, which lie in one region, lie in huge pages from now
// on, where the host has at least half of their pages anyway. It is for what a disk reads
// and writes directly: the kernel gives it each small page by itself. Where it is not
// possible nothing happens. It returns false if it may be when no disk uses the memory.
func (m *Memory) Gather(gpa, n uint64) bool {
	r := m.find(gpa)
	if r == nil || r.gathered == nil || n == 0 {
		return true
	}
	done := true
	first := (gpa - r.GPA) / HugePage
	last := (gpa - r.GPA + min(n, r.End()-gpa) - 1) / HugePage
	for i := first; i <= last && i < uint64(len(r.gathered)); i++ {
		if tries := &r.gathered[i]; tries.Load() < gatherTries {
			done = m.gather(tries, r.bytes[i*HugePage:][:HugePage]) && done
		}
	}
	return done
}

// gather is Gather of one huge page.
func (m *Memory) gather(tries *atomic.Uint32, b []byte) bool {
	g := &m.gathering
	if m.pagers.list.Load() != nil || !g.mu.TryLock() { // a page that is not there may not be a hole
		return true
	}
	defer g.mu.Unlock()
	begin := time.Now()
	g.budget = min(gatherBurst, g.budget+begin.Sub(g.last)/gatherShare)
	g.last = begin
	if g.budget <= 0 || resident(b) < HugePage/PageSize/2 {
		return true
	}
	defer func() { g.budget -= time.Since(begin) }()
	// The kernel copies the pages while nobody can use them. It cannot while a disk
	// does: EAGAIN.
	switch err := unix.Madvise(b, unix.MADV_COLLAPSE); err {
	case unix.EAGAIN, unix.EBUSY, unix.ENOMEM:
		return tries.Add(1) == gatherTries || err == unix.ENOMEM
	default: // also EINVAL: it cannot
		tries.Store(gatherTries)
		return true
	}
}
