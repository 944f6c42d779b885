package guestmem

import (
	"slices"
	"sync"
	"sync/atomic"
)

// Pager makes pages ready before the host reads or writes them.
//
// The guest's accesses to its memory fault, and userfaultfd tells of it. The
// host's own cannot: a goroutine asleep in a page fault cannot be preempted,
// and Go's garbage collector would wait for it. So the host asks first.
type Pager interface {
	// Touch returns when the n bytes from gpa on, which lie in one region, may
	// be read and written through the host's mapping. It may be called from any
	// goroutine and may block.
	Touch(gpa, n uint64) error
}

// pagers is what Touch asks, in order.
type pagers struct {
	mu   sync.Mutex
	list atomic.Pointer[[]Pager] // replaced under mu
}

func (p *pagers) change(f func([]Pager) []Pager) {
	p.mu.Lock()
	defer p.mu.Unlock()
	var list []Pager
	if l := p.list.Load(); l != nil {
		list = slices.Clone(*l)
	}
	if list = f(list); len(list) == 0 {
		p.list.Store(nil)
		return
	}
	p.list.Store(&list)
}

// AddPager has every later access through Slice, Pin, Read, Write and Discard
// ask p, after those added before it.
func (m *Memory) AddPager(p Pager) {
	m.pagers.change(func(l []Pager) []Pager { return append(l, p) })
}

// RemovePager ends what AddPager began. Calls to p.Touch may still be under way.
func (m *Memory) RemovePager(p Pager) {
	m.pagers.change(func(l []Pager) []Pager {
		return slices.DeleteFunc(l, func(q Pager) bool { return q == p })
	})
}

// Touch makes n bytes from gpa on, in one region, ready for Region.Bytes.
func (m *Memory) Touch(gpa, n uint64) error {
	l := m.pagers.list.Load()
	if l == nil || n == 0 {
		return nil
	}
	for _, p := range *l {
		if err := p.Touch(gpa, n); err != nil {
			return err
		}
	}
	return nil
}

// pins counts, by page, the slices that are kept.
type pins struct {
	mu    sync.Mutex
	pages map[uint64]int // guarded by mu: by page number
}

func (p *pins) add(gpa, n uint64, count int) {
	if n == 0 {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.pages == nil {
		p.pages = map[uint64]int{}
	}
	for pfn := gpa / PageSize; pfn <= (gpa+n-1)/PageSize; pfn++ {
		if p.pages[pfn] += count; p.pages[pfn] <= 0 {
			delete(p.pages, pfn)
		}
	}
}

// Pin is Slice for bytes that are kept and written at any time, as a virtqueue's
// rings are, without Slice being called again. Unpin ends it.
func (m *Memory) Pin(gpa, n uint64) ([]byte, error) {
	b, err := m.Slice(gpa, n)
	if err == nil {
		m.pins.add(gpa, n, 1)
	}
	return b, err
}

// Unpin takes back one Pin of the same bytes.
func (m *Memory) Unpin(gpa, n uint64) { m.pins.add(gpa, n, -1) }

// Pinned returns the GPAs of the pinned pages, ascending.
func (m *Memory) Pinned() []uint64 {
	m.pins.mu.Lock()
	defer m.pins.mu.Unlock()
	gpas := make([]uint64, 0, len(m.pins.pages))
	for pfn := range m.pins.pages {
		gpas = append(gpas, pfn*PageSize)
	}
	slices.Sort(gpas)
	return gpas
}
