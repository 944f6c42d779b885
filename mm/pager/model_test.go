package pager

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/mm/checkpoint"
	"github.com/gnomon-vmm/gnomon/mm/guestmem"
)

var everyPolicy = []Policy{0, Physical, Locality, Recorded, Locality | Recorded, Physical | Recorded, Physical | Locality}

// mixed is a source with everything that one can have: regions with a hole
// between, short and full blocks, stretches of zeros, pages that equal others,
// and blocks in which slots are no longer anybody's, as a chain of checkpoints has.
func mixed(seed uint64) *fake {
	const low, high = 700, 900
	f := newFake(guestmem.Range{GPA: 0, Size: 300 * pageSize}, guestmem.Range{GPA: 300 * pageSize, Size: (low - 300) * pageSize},
		guestmem.Range{GPA: 1 << 32, Size: high * pageSize})
	rng := rand.New(rand.NewPCG(seed, 5))
	var pages, equal, stale []uint64
	for i := range low + high {
		pfn := uint64(i)
		if i >= low {
			pfn = 1<<32/pageSize + uint64(i-low)
		}
		switch {
		case i/100%4 == 1 && rng.IntN(10) > 0: // zeros
		case rng.IntN(12) == 0:
			equal = append(equal, pfn)
		default:
			if rng.IntN(8) == 0 {
				stale = append(stale, pfn)
			}
			pages = append(pages, pfn)
		}
	}
	// A parent's blocks, most of which the child's override.
	f.add(stale, 50)
	// Half of it in stretches, as a kernel allocates, half anywhere.
	half := pages[len(pages)/2:]
	rng.Shuffle(len(half), func(i, j int) { half[i], half[j] = half[j], half[i] })
	f.add(pages[:len(pages)/3], 64)
	f.add(pages[len(pages)/3:], 1+rng.IntN(64))
	for i, pfn := range equal {
		f.at[pfn] = f.at[pages[rng.IntN(len(pages))]]
		switch {
		case i%7 == 0: // one may outlive the page that it equalled
			f.at[pfn] = Location{Kind: checkpoint.Data, Block: 0, Slot: rng.IntN(len(f.blocks[0]))}
		case i%3 > 0: // and equal pages often lie together
			f.at[pfn] = f.at[equal[i-1]]
		}
	}
	return f
}

func (f *fake) pfns() []uint64 {
	var all []uint64
	for _, r := range f.ranges {
		for gpa := r.GPA; gpa < r.GPA+r.Size; gpa += pageSize {
			all = append(all, gpa/pageSize)
		}
	}
	return all
}

// TestModel has guests and devices use memory in any order, while it is loaded
// or not, and compares each page each time with what it must hold.
func TestModel(t *testing.T) {
	for _, policy := range everyPolicy {
		for _, background := range []bool{false, true} {
			t.Run(fmt.Sprintf("%v,background=%v", policy, background), func(t *testing.T) {
				t.Parallel()
				seed := rand.Uint64()
				t.Logf("seed %d", seed)
				f := mixed(seed)
				rng := rand.New(rand.NewPCG(seed, 6))
				o := Options{Policy: policy, Background: background, Workers: 1 + rng.IntN(3), Pages: 1 << rng.IntN(7), Window: 1 + rng.IntN(16), CacheBlocks: 1 + rng.IntN(4)}
				for range rng.IntN(len(f.blocks)) {
					o.Recorded = append(o.Recorded, Block(rng.IntN(len(f.blocks)+3)))
				}
				m := newMachine(t, f, o)
				m.p.Start()
				pfns := f.pfns()
				rng.Shuffle(len(pfns), func(i, j int) { pfns[i], pfns[j] = pfns[j], pfns[i] })
				var users sync.WaitGroup
				const count = 4
				for u := range count {
					var mine []uint64
					for i := u; i < len(pfns); i += count {
						mine = append(mine, pfns[i])
					}
					users.Go(func() { m.use(mine, rand.New(rand.NewPCG(seed, uint64(u+10))), u) })
				}
				users.Wait()
				m.p.LoadAll()
				if err := m.p.Wait(context.Background()); err != nil {
					t.Fatal(err)
				}
				<-m.p.Done()
				s := m.p.Stats()
				if !s.Complete || s.BlocksLeft != 0 {
					t.Errorf("%+v", s)
				}
				if policy&Locality != 0 && policy&Physical == 0 {
					f.readOnce(t)
				}
			})
		}
	}
}

// use reads, writes and discards pages that nobody else writes, as the guest
// and as a device, and checks them against a model.
func (m *machine) use(pfns []uint64, rng *rand.Rand, who int) {
	model := map[uint64][]byte{}
	c := m.vcpu()
	want := func(pfn uint64) []byte {
		if p := model[pfn]; p != nil {
			return p
		}
		return m.f.want(pfn)
	}
	for step := range 3 * len(pfns) {
		pfn := pfns[rng.IntN(len(pfns))]
		if step < len(pfns) {
			pfn = pfns[step]
		}
		switch op := rng.IntN(8); op {
		case 0, 1, 2:
			got, err := c.read(pfn, pageSize)
			if err != nil || !bytes.Equal(got, want(pfn)) {
				m.t.Errorf("user %d, step %d: the guest reads page %#x: %v, %x, want %x", who, step, pfn, err, got[:16], want(pfn)[:16])
				return
			}
		case 3:
			b := []byte{byte(step), byte(who), 3}
			model[pfn] = append(b, want(pfn)[3:]...)
			if err := c.write(pfn, b); err != nil {
				m.t.Errorf("user %d, step %d: the guest writes page %#x: %v", who, step, pfn, err)
				return
			}
		case 4, 5:
			got := make([]byte, pageSize)
			if err := m.mem.Read(pfn*pageSize, got); err != nil || !bytes.Equal(got, want(pfn)) {
				m.t.Errorf("user %d, step %d: a device reads page %#x: %v, %x, want %x", who, step, pfn, err, got[:16], want(pfn)[:16])
				return
			}
		case 6:
			b := []byte{byte(step), byte(who), 6, 6}
			model[pfn] = append(b, want(pfn)[4:]...)
			if err := m.mem.Write(pfn*pageSize, b); err != nil {
				m.t.Errorf("user %d, step %d: a device writes page %#x: %v", who, step, pfn, err)
				return
			}
		case 7:
			if rng.IntN(4) > 0 {
				continue
			}
			model[pfn] = make([]byte, pageSize)
			if err := m.mem.Discard(pfn*pageSize, pageSize); err != nil {
				m.t.Errorf("user %d, step %d: discard page %#x: %v", who, step, pfn, err)
				return
			}
		}
	}
	// In the end by both mappings.
	for _, pfn := range pfns {
		got, err := c.read(pfn, pageSize)
		if err != nil || !bytes.Equal(got, want(pfn)) {
			m.t.Errorf("user %d: the guest reads page %#x at last: %v", who, pfn, err)
		}
		if err := m.mem.Read(pfn*pageSize, c.buf[:]); err != nil || !bytes.Equal(c.buf[:], want(pfn)) {
			m.t.Errorf("user %d: a device reads page %#x at last: %v", who, pfn, err)
		}
	}
}

// TestEverythingIsLoaded: with nobody using it, memory becomes the source's,
// each block is read once, and the pager goes away.
func TestEverythingIsLoaded(t *testing.T) {
	f := mixed(3)
	m := newMachine(t, f, Options{Policy: Locality, Background: true})
	m.p.Start()
	if err := m.p.Wait(context.Background()); err != nil {
		t.Fatal(err)
	}
	<-m.p.Done()
	// Holes were not filled.
	var st unix.Stat_t
	if err := unix.Fstat(m.mem.FD(), &st); err != nil {
		t.Fatal(err)
	}
	if got := int(st.Blocks) * 512 / pageSize; got != len(f.at) {
		t.Errorf("%d pages have memory, %d are in the source", got, len(f.at))
	}
	// The host's mapping has it without anybody being asked.
	for _, r := range m.mem.Regions() {
		for i := uint64(0); i < r.Size; i += pageSize {
			if !bytes.Equal(r.Bytes()[i:i+pageSize], f.want((r.GPA+i)/pageSize)) {
				t.Fatalf("page at GPA %#x is wrong", r.GPA+i)
			}
		}
	}
	s := m.p.Stats()
	if s.GuestFaults+s.DeviceFaults+s.ZeroPages != 0 || s.Installed() != uint64(len(f.at)) || s.BackgroundPages != uint64(len(f.at)) {
		t.Errorf("%d pages: %+v", len(f.at), s)
	}
	f.readOnce(t)
	m.walk(f.pfns())
	m.p.regions[0].states[0].Store(0)
	if err := m.mem.Touch(0, 16*pageSize); err != nil || m.p.Stats().DeviceFaults != 0 {
		t.Errorf("the memory still asks its pager, %v", err)
	}
	if err := m.p.Close(); err != nil {
		t.Errorf("close after completion: %v", err)
	}
	m.walk(f.pfns())
}
