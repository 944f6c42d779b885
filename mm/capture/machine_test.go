package capture

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/kvm"
	"github.com/gnomon-vmm/gnomon/mm/dirty"
	"github.com/gnomon-vmm/gnomon/mm/guestmem"
	"github.com/gnomon-vmm/gnomon/mm/internal/memguest"
	"github.com/gnomon-vmm/gnomon/mm/uffd"
)

// machine is a guest, its memory, and what tests do with them.
type machine struct {
	t       testing.TB
	mem     *guestmem.Memory
	guest   *memguest.Guest
	tracker *dirty.Tracker
}

func newMachine(t testing.TB, ranges []guestmem.Range) *machine {
	t.Helper()
	m := &machine{t: t}
	var err error
	if m.mem, err = guestmem.New(ranges); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.mem.Close() })
	m.guest, err = memguest.New(m.mem, memguest.Options{Prepare: func(vm *kvm.VM) (err error) {
		m.tracker, err = dirty.New(vm, m.mem, dirty.Options{})
		return err
	}})
	if errors.Is(err, memguest.ErrNoKVM) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.guest.Close(); err != nil {
			t.Error(err)
		}
	})
	return m
}

func newSide(t testing.TB, copies int) *Side {
	t.Helper()
	s, err := NewSide(copies)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// freeze has c save all of the memory as it is now.
func freeze(t testing.TB, c *Capture) {
	t.Helper()
	if err := errors.Join(c.Arm(nil), c.Freeze(nil)); err != nil {
		t.Fatal(err)
	}
}

// newCapture makes a capture that ends with the test. A host without
// userfaultfd, or that does not let us have it, skips the test.
func newCapture(t testing.TB, mem *guestmem.Memory, o Options) *Capture {
	t.Helper()
	c, err := New(mem, o)
	if errors.Is(err, uffd.ErrOpen) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		// What the next capture finds.
		states := c.pages.room.states
		if (states != nil) != c.saved {
			t.Errorf("saved: %v; %d states are kept", c.saved, len(states))
		}
		for i := range states {
			if s := states[i].Load(); s != free {
				t.Fatalf("page %d is left in state %#x", i, s)
			}
		}
	})
	return c
}

func (m *machine) store(pfn, n, value uint64) {
	m.t.Helper()
	if err := m.guest.Store(pfn*pageSize+value%(pageSize/8)*8, n, pageSize, value); err != nil {
		m.t.Fatal(err)
	}
}

// content is all of the memory by page number, read without touching it.
func (m *machine) content() map[uint64][]byte {
	m.t.Helper()
	pages := map[uint64][]byte{}
	for _, r := range m.mem.Regions() {
		b := make([]byte, r.Size)
		if n, err := unix.Pread(m.mem.FD(), b, int64(r.Offset)); err != nil || n != len(b) {
			m.t.Fatal(n, err)
		}
		for at := uint64(0); at < r.Size; at += pageSize {
			pages[(r.GPA+at)/pageSize] = b[at : at+pageSize]
		}
	}
	return pages
}

// allocated is how many pages the memfd has.
func (m *machine) allocated() int64 {
	m.t.Helper()
	var st unix.Stat_t
	if err := unix.Fstat(m.mem.FD(), &st); err != nil {
		m.t.Fatal(err)
	}
	return st.Blocks * 512 / pageSize
}

// memWriter is a Writer that keeps everything.
type memWriter struct {
	mu     sync.Mutex
	pages  map[uint64][]byte // guarded by mu
	order  []uint64          // guarded by mu: pages in the order of their blocks
	errs   []error           // guarded by mu
	before func() error      // called at the beginning of each Block
}

func newWriter() *memWriter { return &memWriter{pages: map[uint64][]byte{}} }

func (w *memWriter) BlockAt(_ uint64, pfns []uint64, pages [][]byte) error {
	if w.before != nil {
		if err := w.before(); err != nil {
			return err
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(pfns) == 0 || len(pfns) > BlockPages || len(pages) != len(pfns) {
		w.errs = append(w.errs, fmt.Errorf("%d pages, numbered by %d", len(pages), len(pfns)))
		return nil
	}
	for i, pfn := range pfns {
		w.add(pfn, bytes.Clone(pages[i]))
	}
	w.order = append(w.order, pfns...)
	return nil
}

func (w *memWriter) Zero(pfns ...uint64) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, pfn := range pfns {
		w.add(pfn, zeroPage[:])
	}
	return nil
}

func (w *memWriter) add(pfn uint64, page []byte) {
	if w.pages[pfn] != nil {
		w.errs = append(w.errs, fmt.Errorf("page %#x came twice", pfn))
	}
	w.pages[pfn] = page
}

// compare wants exactly the pages of want for which is is nil or says yes.
func (w *memWriter) compare(t testing.TB, want map[uint64][]byte, is func(pfn uint64) bool) {
	t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, err := range w.errs {
		t.Error(err)
	}
	wrong, missing, extra := 0, 0, 0
	for pfn, page := range want {
		got := w.pages[pfn]
		switch wanted := is == nil || is(pfn); {
		case wanted && got == nil:
			missing++
		case !wanted && got != nil:
			extra++
		case wanted && !bytes.Equal(got, page):
			if wrong++; wrong == 1 {
				at := 0
				for got[at] == page[at] {
					at++
				}
				t.Errorf("page %#x byte %#x: % x, want % x", pfn, at, got[at:min(at+16, pageSize)], page[at:min(at+16, pageSize)])
			}
		}
	}
	if wrong+missing+extra > 0 || is == nil && len(w.pages) != len(want) {
		t.Errorf("%d pages are wrong, %d missing, %d too many; %d in all, want %d", wrong, missing, extra, len(w.pages), len(want))
	}
}

// allPages are the numbers of all pages from memguest.Free on.
func allPages(ranges []guestmem.Range) (pfns []uint64) {
	for _, r := range ranges {
		for at := r.GPA; at < r.GPA+r.Size; at += pageSize {
			if at >= memguest.Free {
				pfns = append(pfns, at/pageSize)
			}
		}
	}
	return pfns
}

// randomFile is a descriptor of four random pages.
func randomFile(t *testing.T, rng *rand.Rand) int {
	t.Helper()
	fd, err := unix.MemfdCreate("random", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	var data []byte
	for range 4 * pageSize / 8 {
		data = binary.LittleEndian.AppendUint64(data, rng.Uint64())
	}
	if _, err := unix.Pwrite(fd, data, 0); err != nil {
		t.Fatal(err)
	}
	return fd
}

// pagesBehind is how many pages of RAM there are from a page on, in one region.
func pagesBehind(pfn uint64) uint64 {
	for _, r := range layout {
		if pfn-r.GPA/pageSize < r.Size/pageSize {
			return (r.GPA+r.Size)/pageSize - pfn
		}
	}
	return 0
}
