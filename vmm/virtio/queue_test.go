package virtio

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/gnomon-vmm/gnomon/mm/guestmem"
)

// ringModel runs a driver and a Queue against each other and checks what
// passes between them.
type ringModel struct {
	t        *testing.T
	rng      *rand.Rand
	mem      *guestmem.Memory
	features uint64
	drv      *driver
	q        *Queue

	bufs     uint64 // GPA of the buffers: one page for each tag
	nextTag  int
	requests map[int]*modelRequest // made available, not yet seen used
	order    []int                 // made available, not yet popped
	popped   []Chain               // by the device, not yet pushed
	tags     []int                 // of popped
	returned []int                 // pushed, not yet seen by the driver

	asleep     bool // the device waits for a kick
	waiting    bool // the driver waits for an interrupt
	interrupts int
}

type modelRequest struct {
	segs    []segment
	written uint32
}

const modelSlots = 256 // buffers pages in use at most

func newRingModel(t *testing.T, seed uint64, size uint16, features uint64) *ringModel {
	m := &ringModel{
		t: t, rng: rand.New(rand.NewPCG(seed, 1)), mem: testMemory(t),
		features: features, requests: map[int]*modelRequest{},
	}
	m.drv, m.bufs = newDriver(m.mem, 0x4000, size, features)
	m.open(m.drv.state)
	return m
}

func (m *ringModel) open(s QueueState) {
	q, err := newQueue(m.mem, 0, m.features, &s)
	if err != nil {
		m.t.Fatal(err)
	}
	q.intr = func() { m.interrupts++; m.waiting = false }
	m.q = q
}

func (m *ringModel) add() {
	n := 1 + m.rng.IntN(6)
	indirect := m.features&FeatureIndirectDesc != 0 && m.rng.IntN(2) == 0
	if indirect {
		n += m.rng.IntN(testTableLen - 6)
	}
	if len(m.requests) >= modelSlots {
		return
	}
	tag := m.nextTag
	page := m.bufs + uint64(tag%modelSlots)*4096
	r := &modelRequest{}
	firstWrite := m.rng.IntN(n + 1)
	for i := range n {
		s := segment{page + uint64(i*64), uint32(1 + m.rng.IntN(64)), i >= firstWrite}
		r.segs = append(r.segs, s)
	}
	if !m.drv.add(r.segs, indirect, tag) {
		return
	}
	m.nextTag++
	m.requests[tag] = r
	m.order = append(m.order, tag)
	if m.drv.wantsKick() {
		m.asleep = false
	}
}

func (m *ringModel) pop() {
	if m.asleep {
		return
	}
	var c Chain
	ok, err := m.q.Pop(&c)
	if err != nil {
		m.t.Fatal(err)
	}
	if !ok {
		if len(m.order) > 0 {
			m.t.Fatalf("nothing popped, %d available", len(m.order))
		}
		if m.rng.IntN(2) == 0 {
			m.asleep = !m.q.wantKicks()
			if !m.asleep {
				m.t.Fatal("a chain appeared from nowhere")
			}
		}
		return
	}
	if len(m.order) == 0 {
		m.t.Fatal("popped a chain that nobody made")
	}
	tag := m.order[0]
	var got []segment
	for _, b := range c.Read {
		got = append(got, segment{b.GPA, uint32(len(b.Data)), false})
	}
	for _, b := range c.Write {
		got = append(got, segment{b.GPA, uint32(len(b.Data)), true})
	}
	if want := m.requests[tag].segs; !slices.Equal(got, want) {
		m.t.Fatalf("chain %d: %v, want %v", tag, got, want)
	}
	if m.rng.IntN(8) == 0 {
		m.q.Undo(&c)
		return
	}
	m.q.suppressKicks()
	m.order = m.order[1:]
	m.popped = append(m.popped, c)
	m.tags = append(m.tags, tag)
}

func (m *ringModel) push() {
	if len(m.popped) == 0 {
		return
	}
	i := m.rng.IntN(len(m.popped))
	c, tag := m.popped[i], m.tags[i]
	m.popped = slices.Delete(m.popped, i, i+1)
	m.tags = slices.Delete(m.tags, i, i+1)
	m.requests[tag].written = m.rng.Uint32N(5000)
	if err := m.q.Push(&c, m.requests[tag].written); err != nil {
		m.t.Fatal(err)
	}
	m.returned = append(m.returned, tag)
	if m.rng.IntN(3) == 0 {
		m.flush()
	}
}

// flush is the device's look at whether to interrupt: a driver that waits and
// has something to see must get one.
func (m *ringModel) flush() {
	m.q.Flush()
	if m.waiting && len(m.returned) > 0 {
		m.t.Fatalf("driver waits for an interrupt while %d requests are done", len(m.returned))
	}
}

func (m *ringModel) reap() {
	tag, written, ok := m.drv.used()
	if ok != (len(m.returned) > 0) {
		m.t.Fatalf("driver sees a used request: %v, returned %v", ok, m.returned)
	}
	if !ok {
		if m.rng.IntN(2) == 0 && !m.waiting {
			m.waiting = !m.drv.wantInterrupts()
		} else if !m.waiting {
			m.drv.refuseInterrupts()
		}
		return
	}
	if tag != m.returned[0] || written != m.requests[tag].written {
		m.t.Fatalf("driver got %d with %d bytes, want %d with %d", tag, written, m.returned[0], m.requests[tag].written)
	}
	m.returned = m.returned[1:]
	delete(m.requests, tag)
}

// checkpoint replaces the queue by one restored from its state, chains that
// the device holds being pushed first.
func (m *ringModel) checkpoint() {
	for len(m.popped) > 0 {
		m.push()
	}
	m.flush()
	s := m.drv.state
	m.q.progress(&s)
	m.open(s)
	m.asleep = false // workers begin with a look at the ring
}

func TestQueueAgainstDriverModel(t *testing.T) {
	for name, features := range ringKinds {
		for _, size := range []uint16{1, 2, 8, 7, 64, 256} {
			if features&FeatureRingPacked == 0 && size == 7 {
				continue
			}
			t.Run(fmt.Sprintf("%s/%d", name, size), func(t *testing.T) {
				m := newRingModel(t, uint64(size), size, features)
				steps := []func(){m.add, m.add, m.pop, m.pop, m.push, m.push, m.reap, m.reap, m.flush}
				for i := range 40_000 {
					steps[m.rng.IntN(len(steps))]()
					if i%1000 == 999 {
						m.checkpoint()
					}
				}
				if m.nextTag < 500 {
					t.Errorf("only %d requests were made", m.nextTag)
				}
				// The flow ends with every request served.
				for i := 0; len(m.requests) > 0; i++ {
					if i > 10_000 {
						t.Fatalf("%d requests are never served", len(m.requests))
					}
					m.asleep = m.asleep && len(m.order) == 0
					m.pop()
					m.push()
					m.reap()
				}
			})
		}
	}
}

// TestQueueSuppression shows that the model's kicks and interrupts are not
// merely all there: a busy ring gets few.
func TestQueueSuppression(t *testing.T) {
	for name, features := range ringKinds {
		t.Run(name, func(t *testing.T) {
			mem := testMemory(t)
			d, heap := newDriver(mem, 0x4000, 64, features)
			q := must(newQueue(mem, 0, features, &d.state))
			kicks, interrupts := 0, 0
			q.intr = func() { interrupts++ }
			d.refuseInterrupts()
			q.suppressKicks()
			var c Chain
			for i := range 10 * 64 {
				if !d.add([]segment{{heap, 8, true}}, false, i) {
					t.Fatal("ring is full")
				}
				if d.wantsKick() {
					kicks++
				}
				if ok, err := q.Pop(&c); !ok || err != nil {
					t.Fatal(ok, err)
				}
				if err := q.Push(&c, 8); err != nil {
					t.Fatal(err)
				}
				q.Flush()
				if _, _, ok := d.used(); !ok {
					t.Fatal("nothing used")
				}
				if i%64 == 0 {
					d.refuseInterrupts()
				}
			}
			// A split ring with event indices begins with the index at 0.
			if kicks > 1 || interrupts > 0 {
				t.Errorf("%d kicks, %d interrupts", kicks, interrupts)
			}
			q.emptied = false
			if q.wantKicks() {
				t.Fatal("ring is not empty")
			}
			d.wantInterrupts()
			d.add([]segment{{heap, 8, true}}, false, 0)
			if !d.wantsKick() {
				t.Error("no kick although the device wants one")
			}
			_, _ = q.Pop(&c)
			_ = q.Push(&c, 8)
			if q.Flush(); interrupts != 1 {
				t.Errorf("%d interrupts although the driver wants one", interrupts)
			}
		})
	}
}

func TestQueueDoesNotAllocate(t *testing.T) {
	for name, features := range ringKinds {
		t.Run(name, func(t *testing.T) {
			mem := testMemory(t)
			d, heap := newDriver(mem, 0x4000, 64, features)
			q := must(newQueue(mem, 0, features, &d.state))
			mem.TrackDirty(true)
			segs := []segment{{heap, 16, false}, {heap + 4096, 4096, true}, {heap + 16, 1, true}}
			var c Chain
			for i := range 2000 { // let the driver's own maps grow
				d.add(segs, false, i)
				_, _ = q.Pop(&c)
				_ = q.Push(&c, 1)
				d.used()
			}
			n := testing.AllocsPerRun(500, func() {
				q.suppressKicks()
				if ok, err := q.Pop(&c); ok || err != nil {
					t.Fatal(ok, err)
				}
				q.wantKicks()
			})
			if n != 0 {
				t.Errorf("looking at an empty ring: %v allocations", n)
			}
			for i := range 16 {
				d.add(segs, false, i)
			}
			n = testing.AllocsPerRun(15, func() {
				if ok, err := q.Pop(&c); !ok || err != nil {
					t.Fatal(ok, err)
				}
				_ = q.Push(&c, 4097)
				q.Flush()
			})
			if n != 0 {
				t.Errorf("%v allocations a request", n)
			}
		})
	}
}

func TestQueueMarksWhatItWroteDirty(t *testing.T) {
	for name, features := range ringKinds {
		t.Run(name, func(t *testing.T) {
			mem := testMemory(t)
			d, heap := newDriver(mem, 0x4000, 64, features)
			q := must(newQueue(mem, 0, features, &d.state))
			d.add([]segment{{heap, 16, false}, {heap + 0x2000, 4096, true}, {heap + 0x4000, 4096, true}, {heap + 0x6000, 1, true}}, false, 0)
			mem.TrackDirty(true)
			var c Chain
			_, _ = q.Pop(&c)
			_ = q.Push(&c, 4097)
			q.wantKicks()
			dirty := map[uint64]bool{}
			mem.TakeDirty(func(gpa uint64) { dirty[gpa] = true })
			want := map[uint64]bool{heap + 0x2000: true, heap + 0x4000: true}
			if d.packed {
				want[d.state.Desc&^4095] = true
			}
			want[d.state.Device&^4095] = true
			if fmt.Sprint(dirty) != fmt.Sprint(want) {
				t.Errorf("dirty %v, want %v", dirty, want)
			}
		})
	}
}

func TestQueueSetupIsChecked(t *testing.T) {
	mem := testMemory(t, guestmem.Range{GPA: 0, Size: 0x100000}, guestmem.Range{GPA: 0x1_0000_0000, Size: 0x100000})
	good := QueueState{Size: 16, Desc: 0x1000, Driver: 0x2000, Device: 0x3000, AvailWrap: true, UsedWrap: true}
	for _, packed := range []uint64{0, FeatureRingPacked} {
		if _, err := newQueue(mem, 0, packed, &good); err != nil {
			t.Fatal(err)
		}
		for name, change := range map[string]func(s *QueueState){
			"size 0":                func(s *QueueState) { s.Size = 0 },
			"size too large":        func(s *QueueState) { s.Size = 2048 },
			"table in MMIO":         func(s *QueueState) { s.Desc = 0xC000_0000 },
			"driver area in ECAM":   func(s *QueueState) { s.Driver = 0xE000_0000 },
			"device area in LAPIC":  func(s *QueueState) { s.Device = 0xFEE0_0000 },
			"table past RAM":        func(s *QueueState) { s.Desc = 0x100000 - 0x80 },
			"device area past RAM":  func(s *QueueState) { s.Device = 0x100000 },
			"table at the very end": func(s *QueueState) { s.Desc = ^uint64(15) },
			"table unaligned":       func(s *QueueState) { s.Desc++ },
			"driver area unaligned": func(s *QueueState) { s.Driver++ },
			"device area unaligned": func(s *QueueState) { s.Device += 2 },
		} {
			s := good
			change(&s)
			if _, err := newQueue(mem, 0, packed, &s); !errors.Is(err, ErrQueue) {
				t.Errorf("%s (packed: %v): error %v", name, packed != 0, err)
			}
		}
	}
	s := good
	s.Size = 12
	if _, err := newQueue(mem, 0, 0, &s); !errors.Is(err, ErrQueue) {
		t.Errorf("split ring of 12: %v", err)
	}
	s.Avail = 12
	if _, err := newQueue(mem, 0, FeatureRingPacked, &s); !errors.Is(err, ErrQueue) {
		t.Errorf("packed ring at a position outside it: %v", err)
	}
}

// hostileRing is a ring of 8 descriptors in 1 MiB of RAM with the first
// request as a test wants it.
type hostileRing struct {
	desc, drv []byte
	mem       *guestmem.Memory
}

// TestQueueRefusesHostileChains has one row for each way to break a ring.
func TestQueueRefusesHostileChains(t *testing.T) {
	const size = 8
	split := func(h *hostileRing, i int, gpa uint64, n uint32, flags, next uint16) {
		putDesc(h.desc[16*i:], gpa, n, flags, next)
	}
	packed := func(h *hostileRing, i int, gpa uint64, n uint32, flags uint16) {
		putDesc(h.desc[16*i:], gpa, n, 0, flags|descAvail)
	}
	indirectAt := func(h *hostileRing, gpa uint64, i int) []byte {
		return must(h.mem.Slice(gpa+16*uint64(i), 16))
	}
	rows := []struct {
		name   string
		packed bool
		plain  bool // without the indirect feature
		set    func(h *hostileRing)
		want   string
	}{
		{"index jumps", false, false, func(h *hostileRing) { store16(h.drv, 2, size+1) }, "moved by 9"},
		{"index goes back", false, false, func(h *hostileRing) { store16(h.drv, 2, 0xFFFF) }, "moved by 65535"},
		{"head outside the table", false, false, func(h *hostileRing) { store16(h.drv, 4, size) }, "descriptor 8 in a table of 8"},
		{"next outside the table", false, false, func(h *hostileRing) { split(h, 0, 0x1000, 1, descNext, 0xFFFF) }, "descriptor 65535"},
		{"loop of one", false, false, func(h *hostileRing) { split(h, 0, 0x1000, 1, descNext, 0) }, "loop"},
		{"loop of empty buffers", false, false, func(h *hostileRing) { split(h, 0, 0x1000, 0, descNext, 0) }, "loop"},
		{"loop of two", false, false, func(h *hostileRing) {
			split(h, 0, 0x1000, 1, descNext|descWrite, 5)
			split(h, 5, 0x1000, 1, descNext|descWrite, 0)
		}, "loop"},
		{"buffer in MMIO", false, false, func(h *hostileRing) { split(h, 0, 0xFEE0_0000, 4, descWrite, 0) }, "outside RAM"},
		{"buffer past RAM", false, false, func(h *hostileRing) { split(h, 0, 0xF_FFFF, 2, 0, 0) }, "outside RAM"},
		{"buffer of 4 GiB", false, false, func(h *hostileRing) { split(h, 0, 0x1000, 0xFFFF_FFFF, 0, 0) }, "outside RAM"},
		{"buffer wraps around", false, false, func(h *hostileRing) { split(h, 0, ^uint64(0), 2, 0, 0) }, "outside RAM"},
		{"buffer from one region into the other", false, false, func(h *hostileRing) { split(h, 0, 0xF_F000, 0x2000, 0, 0) }, "outside RAM"},
		{"readable behind writable", false, false, func(h *hostileRing) {
			split(h, 0, 0x1000, 1, descNext|descWrite, 1)
			split(h, 1, 0x1000, 1, 0, 0)
		}, "readable buffer behind a writable one"},
		{"indirect without the feature", false, true, func(h *hostileRing) { split(h, 0, 0x8000, 16, descIndirect, 0) }, "without the feature"},
		{"indirect with next", false, false, func(h *hostileRing) { split(h, 0, 0x8000, 16, descIndirect|descNext, 1) }, "inside a chain"},
		{"indirect in indirect", false, false, func(h *hostileRing) {
			split(h, 0, 0x8000, 16, descIndirect, 0)
			putDesc(indirectAt(h, 0x8000, 0), 0x9000, 16, descIndirect, 0)
		}, "inside a chain"},
		{"indirect table empty", false, false, func(h *hostileRing) { split(h, 0, 0x8000, 0, descIndirect, 0) }, "table of 0 bytes"},
		{"indirect table of 17 bytes", false, false, func(h *hostileRing) { split(h, 0, 0x8000, 17, descIndirect, 0) }, "table of 17 bytes"},
		{"indirect table too long", false, false, func(h *hostileRing) { split(h, 0, 0x8000, 16*(MaxChain+1), descIndirect, 0) }, "table of 16400 bytes"},
		{"indirect table outside RAM", false, false, func(h *hostileRing) { split(h, 0, 0xFEC0_0000, 16, descIndirect, 0) }, "outside RAM"},
		{"indirect loop", false, false, func(h *hostileRing) {
			split(h, 0, 0x8000, 32, descIndirect, 0)
			putDesc(indirectAt(h, 0x8000, 0), 0x1000, 1, descNext, 1)
			putDesc(indirectAt(h, 0x8000, 1), 0x1000, 1, descNext, 0)
		}, "loop"},
		{"indirect next outside its table", false, false, func(h *hostileRing) {
			split(h, 0, 0x8000, 32, descIndirect, 0)
			putDesc(indirectAt(h, 0x8000, 0), 0x1000, 1, descNext, 2)
		}, "descriptor 2 in a table of 2"},

		{"packed: endless chain", true, false, func(h *hostileRing) {
			for i := range size {
				packed(h, i, 0x1000, 1, descNext)
			}
		}, "longer than the ring"},
		{"packed: buffer in MMIO", true, false, func(h *hostileRing) { packed(h, 0, 0xC000_0000, 1, 0) }, "outside RAM"},
		{"packed: readable behind writable", true, false, func(h *hostileRing) {
			packed(h, 0, 0x1000, 1, descNext|descWrite)
			packed(h, 1, 0x1000, 1, 0)
		}, "readable buffer behind a writable one"},
		{"packed: indirect without the feature", true, true, func(h *hostileRing) { packed(h, 0, 0x8000, 16, descIndirect) }, "without the feature"},
		{"packed: indirect second in a chain", true, false, func(h *hostileRing) {
			packed(h, 0, 0x1000, 1, descNext)
			packed(h, 1, 0x8000, 16, descIndirect)
		}, "inside a chain"},
		{"packed: indirect in indirect", true, false, func(h *hostileRing) {
			packed(h, 0, 0x8000, 16, descIndirect)
			putDesc(indirectAt(h, 0x8000, 0), 0x9000, 16, 0, descIndirect)
		}, "inside another"},
		{"packed: indirect table outside RAM", true, false, func(h *hostileRing) { packed(h, 0, 0xFFFF_F000, 16, descIndirect) }, "outside RAM"},
	}
	for _, r := range rows {
		t.Run(r.name, func(t *testing.T) {
			mem := testMemory(t, guestmem.Range{GPA: 0, Size: 0x100000}, guestmem.Range{GPA: 0x1_0000_0000, Size: 0x100000})
			s := QueueState{Size: size, Desc: 0x2000, Driver: 0x3000, Device: 0x4000, AvailWrap: true, UsedWrap: true}
			h := &hostileRing{desc: must(mem.Slice(s.Desc, 16*size)), drv: must(mem.Slice(s.Driver, 64)), mem: mem}
			if !r.packed {
				store16(h.drv, 2, 1)
			}
			features := FeatureIndirectDesc
			if r.plain {
				features = 0
			}
			if r.packed {
				features |= FeatureRingPacked
			}
			r.set(h)
			q := must(newQueue(mem, 0, features, &s))
			var c Chain
			for range 2 {
				ok, err := q.Pop(&c)
				if ok || !errors.Is(err, ErrQueue) || !strings.Contains(err.Error(), r.want) {
					t.Fatalf("popped %v, error %v, want %q", ok, err, r.want)
				}
			}
		})
	}
}

func TestQueueChainIsBounded(t *testing.T) {
	mem := testMemory(t)
	s := QueueState{Size: MaxQueueSize, Desc: 0x10000, Driver: 0x20000, Device: 0x30000}
	desc, drv := must(mem.Slice(s.Desc, 16*MaxQueueSize)), must(mem.Slice(s.Driver, 64))
	table := must(mem.Slice(0x40000, 16*MaxChain))
	for i := range MaxChain {
		flags := uint16(descNext)
		if i == MaxChain-1 {
			flags = 0
		}
		putDesc(table[16*i:], 0x1000, 1, flags, uint16(i+1))
	}
	putDesc(desc, 0x1000, 1, descNext, 1)
	putDesc(desc[16:], 0x40000, 16*MaxChain, descIndirect, 0)
	store16(drv, 2, 1)
	q := must(newQueue(mem, 0, FeatureIndirectDesc, &s))
	var c Chain
	if ok, err := q.Pop(&c); ok || !errors.Is(err, ErrQueue) || !strings.Contains(err.Error(), "more than") {
		t.Errorf("chain of %d buffers: %v %v", MaxChain+1, ok, err)
	}
	putDesc(desc, 0x40000, 16*MaxChain, descIndirect, 0)
	if ok, err := q.Pop(&c); !ok || err != nil || len(c.Read) != MaxChain {
		t.Errorf("chain of %d buffers: %v %v, got %d", MaxChain, ok, err, len(c.Read))
	}
}
