package pager

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/mm/checkpoint"
	"github.com/gnomon-vmm/gnomon/mm/guestmem"
	"github.com/gnomon-vmm/gnomon/mm/uffd"
)

// fake is a checkpoint in memory. Page pfn holds its own number and a pattern,
// or what the page that it equals holds, or zeros.
type fake struct {
	ranges []guestmem.Range
	blocks [][]uint64
	at     map[uint64]Location // what is not there is zeros
	fail   map[Block]error
	index  map[Block]error   // of Pages
	short  map[Block]bool    // give fewer pages than promised
	quiet  bool              // do not count reads
	bytes  map[uint64][]byte // of pages that hold something else than fill's pattern

	mu    sync.Mutex
	gate  func(Block)   // called before a block is read
	reads map[Block]int // guarded by mu
	total atomic.Int64
}

func (f *fake) Memory() []guestmem.Range        { return f.ranges }
func (f *fake) Blocks() int                     { return len(f.blocks) }
func (f *fake) Pages(b Block) ([]uint64, error) { return f.blocks[b], f.index[b] }

func (f *fake) Shared(b Block) (uint64, error) {
	var slots uint64
	for pfn, loc := range f.at {
		if loc.Block == b && loc.Kind == checkpoint.Data && (loc.Slot >= len(f.blocks[b]) || f.blocks[b][loc.Slot] != pfn) {
			slots |= 1 << loc.Slot
		}
	}
	return slots, f.index[b]
}

func (f *fake) Find(pfn uint64) Location {
	if loc, ok := f.at[pfn]; ok {
		return loc
	}
	return Location{}
}

func (f *fake) ReadBlock(b Block, buf []byte) ([]byte, int, error) {
	f.total.Add(1)
	if !f.quiet {
		f.mu.Lock()
		f.reads[b]++
		gate := f.gate
		f.mu.Unlock()
		if gate != nil {
			gate(b)
		}
	}
	if err := f.fail[b]; err != nil {
		return nil, 0, err
	}
	n := len(f.blocks[b])
	if f.short[b] {
		n--
	}
	for i, pfn := range f.blocks[b][:n] {
		f.fill(buf[i*pageSize:(i+1)*pageSize], pfn)
	}
	return buf[:n*pageSize], n * 100, nil
}

// fill writes what page pfn of a source holds: numbers among zeros, in places
// that are the same in all pages, so that what a buffer held before is gone.
func fill(p []byte, pfn uint64) {
	for i := 0; i < len(p); i += 1016 {
		binary.LittleEndian.PutUint64(p[i:], pfn*0x9e3779b97f4a7c15+uint64(i)+1)
	}
}

func (f *fake) fill(p []byte, pfn uint64) {
	if f.bytes != nil {
		clear(p)
	}
	if b, ok := f.bytes[pfn]; ok {
		copy(p, b)
		return
	}
	fill(p, pfn)
}

// readOnce wants no block to have been read twice.
func (f *fake) readOnce(t *testing.T) {
	t.Helper()
	for b, n := range f.reads {
		if n > 1 {
			t.Errorf("block %d was read %d times", b, n)
		}
	}
}

// want is what a page of RAM must hold.
func (f *fake) want(pfn uint64) []byte {
	p := make([]byte, pageSize)
	if loc := f.Find(pfn); !isZero(loc) {
		f.fill(p, f.blocks[loc.Block][loc.Slot])
	}
	return p
}

func newFake(ranges ...guestmem.Range) *fake {
	return &fake{ranges: ranges, at: map[uint64]Location{}, reads: map[Block]int{}, fail: map[Block]error{}, short: map[Block]bool{}}
}

// add lays pages into blocks of at most size, in their order.
func (f *fake) add(pfns []uint64, size int) {
	for len(pfns) > 0 {
		n := min(size, len(pfns))
		for slot, pfn := range pfns[:n] {
			f.at[pfn] = Location{Kind: checkpoint.Data, Block: Block(len(f.blocks)), Slot: slot}
		}
		f.blocks = append(f.blocks, pfns[:n:n])
		pfns = pfns[n:]
	}
}

// scattered is a source whose guest has laid pages virtual pages over as much
// RAM, at random, and how: the physical page of each virtual one.
func scattered(pages int, seed uint64) (*fake, []uint64) {
	f := newFake(guestmem.Range{GPA: 0, Size: uint64(pages) * pageSize})
	order := make([]uint64, pages)
	for i, pfn := range rand.New(rand.NewPCG(seed, 1)).Perm(pages) {
		order[i] = uint64(pfn)
	}
	f.add(order, BlockPages)
	return f, order
}

// machine is memory with a pager on it, and a guest that makes system calls do
// its accesses, so that no goroutine sleeps in a page fault.
type machine struct {
	t   testing.TB
	f   *fake
	mem *guestmem.Memory
	p   *Pager
}

func newMachine(t testing.TB, f *fake, o Options) *machine {
	t.Helper()
	mem, err := guestmem.New(f.ranges)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { mem.Close() })
	p, err := New(mem, f, o)
	if errors.Is(err, unix.EPERM) {
		t.Skipf("needs userfaultfd: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	return &machine{t, f, mem, p}
}

// quiesce waits until nobody loads anything, apart from the background.
func (m *machine) quiesce() {
	m.quiesceBatches()
	m.until(func() bool { return m.p.demands == 0 && len(m.p.held) == 0 })
}

// quiesceBatches waits until all that was asked for ahead has come.
func (m *machine) quiesceBatches() {
	m.until(func() bool {
		left := 0
		for i := range m.p.batches {
			left += m.p.batches[i].left
		}
		return left == 0
	})
}

// until waits for a state of the pager.
func (m *machine) until(is func() bool) {
	for {
		m.p.mu.Lock()
		ok := is()
		m.p.mu.Unlock()
		if ok {
			return
		}
		runtime.Gosched()
	}
}

// vcpu accesses the guest's mapping without allocating.
type vcpu struct {
	m      *machine
	buf    [pageSize]byte
	local  []unix.Iovec
	remote []unix.RemoteIovec
}

func (m *machine) vcpu() *vcpu {
	c := &vcpu{m: m, local: make([]unix.Iovec, 1), remote: make([]unix.RemoteIovec, 1)}
	c.local[0].Base = &c.buf[0]
	return c
}

var pid = unix.Getpid()

func (c *vcpu) point(pfn uint64, n int) bool {
	for _, r := range c.m.mem.Regions() {
		if at := pfn*pageSize - r.GPA; pfn*pageSize >= r.GPA && at < r.Size {
			c.local[0].SetLen(n)
			c.remote[0] = unix.RemoteIovec{Base: uffd.Address(r.GuestBytes()) + uintptr(at), Len: n}
			return true
		}
	}
	return false
}

// read reads the first bytes of a page as the guest.
func (c *vcpu) read(pfn uint64, n int) ([]byte, error) {
	if !c.point(pfn, n) {
		return nil, fmt.Errorf("page %#x is not RAM", pfn)
	}
	got, err := unix.ProcessVMReadv(pid, c.local, c.remote, 0)
	return c.buf[:max(got, 0)], err
}

func (c *vcpu) write(pfn uint64, b []byte) error {
	if !c.point(pfn, len(b)) {
		return fmt.Errorf("page %#x is not RAM", pfn)
	}
	copy(c.buf[:], b)
	_, err := unix.ProcessVMWritev(pid, c.local, c.remote, 0)
	return err
}

// see wants what the source has at a page.
func (c *vcpu) see(pfn uint64) error {
	got, err := c.read(pfn, pageSize)
	if err != nil {
		return fmt.Errorf("page %#x: %w", pfn, err)
	}
	if !bytes.Equal(got, c.m.f.want(pfn)) {
		return fmt.Errorf("page %#x holds %x..., want %x...", pfn, got[:min(16, len(got))], c.m.f.want(pfn)[:16])
	}
	return nil
}

func (m *machine) walk(pfns []uint64) {
	m.t.Helper()
	c := m.vcpu()
	for _, pfn := range pfns {
		if err := c.see(pfn); err != nil {
			m.t.Fatal(err)
		}
	}
}
