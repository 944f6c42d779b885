package dirty_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/kvm"
	"github.com/gnomon-vmm/gnomon/mm/dirty"
	"github.com/gnomon-vmm/gnomon/mm/guestmem"
	"github.com/gnomon-vmm/gnomon/mm/internal/memguest"
)

const pageSize = guestmem.PageSize

var layout = []guestmem.Range{{GPA: 0, Size: 4 << 20}, {GPA: 1 << 32, Size: 2<<20 + 5*pageSize}}

// ways are all that a Tracker can be asked to do.
var ways = []dirty.Options{{}, {RingEntries: dirty.MinRingEntries}, {RingEntries: 4096}}

func name(o dirty.Options) string {
	if o.RingEntries == 0 {
		return "log"
	}
	return fmt.Sprintf("ring of %d", o.RingEntries)
}

func newMemory(t testing.TB, ranges []guestmem.Range) *guestmem.Memory {
	t.Helper()
	mem, err := guestmem.New(ranges)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { mem.Close() })
	return mem
}

func newTracked(t testing.TB, mem *guestmem.Memory, o dirty.Options) (*memguest.Guest, *dirty.Tracker) {
	t.Helper()
	var tracker *dirty.Tracker
	guest, err := memguest.New(mem, memguest.Options{
		Prepare: func(vm *kvm.VM) (err error) {
			if o.RingEntries != 0 && vm.Check(kvm.CapDirtyLogRingAcqRel) == 0 {
				t.Skip("needs KVM_CAP_DIRTY_LOG_RING_ACQ_REL")
			}
			tracker, err = dirty.New(vm, mem, o)
			return err
		},
		RingFull: func() error { return tracker.RingFull() },
	})
	if errors.Is(err, memguest.ErrNoKVM) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := guest.Close(); err != nil {
			t.Error(err)
		}
	})
	if err := tracker.AddVCPU(guest.VCPU); err != nil {
		t.Fatal(err)
	}
	return guest, tracker
}

// collect returns the pages from Free on: what lies below, a host may count as
// written when it is only run or walked.
func collect(t testing.TB, tracker *dirty.Tracker) (pages []uint64) {
	t.Helper()
	err := tracker.Collect(func(pfn, n uint64) {
		for p := pfn; p < pfn+n; p++ {
			if p >= memguest.Free/pageSize {
				pages = append(pages, p)
			}
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return pages
}

// TestTracker: random writes of the guest and of devices, and a model.
func TestTracker(t *testing.T) {
	for _, way := range ways {
		t.Run(name(way), func(t *testing.T) {
			mem := newMemory(t, layout)
			guest, tracker := newTracked(t, mem, way)
			seed := rand.Uint64()
			t.Logf("seed %d", seed)
			rng := rand.New(rand.NewPCG(seed, 0))
			place := func() (pfn, room uint64) {
				r := layout[rng.IntN(2)]
				first := max(r.GPA, memguest.Free) / pageSize
				end := (r.GPA + r.Size) / pageSize
				pfn = first + rng.Uint64N(end-first)
				return pfn, end - pfn
			}
			for round := range 30 {
				if round%10 == 0 { // tracking can stop, and then begins with nothing
					if err := tracker.Stop(); err != nil {
						t.Fatal(err)
					}
					if err := tracker.Collect(func(uint64, uint64) {}); !errors.Is(err, dirty.ErrCollect) {
						t.Errorf("collecting while stopped: %v", err)
					}
					if err := guest.Store(memguest.Free, 100, pageSize, 1); err != nil {
						t.Fatal(err)
					}
					if err := tracker.Start(); err != nil {
						t.Fatal(err)
					}
				}
				want := map[uint64]bool{}
				for range rng.IntN(8) {
					pfn, room := place()
					n := 1 + rng.Uint64N(min(room, 1<<rng.IntN(11)))
					if rng.IntN(3) == 0 {
						if err := mem.Write(pfn*pageSize, make([]byte, n*pageSize)); err != nil {
							t.Fatal(err)
						}
					} else if err := guest.Store(pfn*pageSize, n, pageSize, uint64(round)); err != nil {
						t.Fatal(err)
					}
					for p := pfn; p < pfn+n; p++ {
						want[p] = true
					}
					if rng.IntN(4) == 0 {
						if err := tracker.Harvest(); err != nil {
							t.Fatal(err)
						}
					}
				}
				// KVM may map a page for writing, and then counts it, when
				// the guest reads it for the first time.
				pfn, room := place()
				read := min(room, 20)
				if _, err := guest.Load(pfn*pageSize, read, pageSize); err != nil {
					t.Fatal(err)
				}
				got := slices.DeleteFunc(collect(t, tracker), func(p uint64) bool { return p-pfn < read && !want[p] })
				var wanted []uint64
				for p := range want {
					wanted = append(wanted, p)
				}
				slices.Sort(wanted)
				if !slices.Equal(got, wanted) {
					t.Fatalf("round %d: pages %v, want %v", round, got, wanted)
				}
			}
			if got := tracker.Ring(); got != (way.RingEntries != 0) {
				t.Errorf("Ring() = %v", got)
			}
		})
	}
}

// TestRingFull: a guest that writes many times more pages than the smallest
// ring holds, in one go.
func TestRingFull(t *testing.T) {
	mem := newMemory(t, []guestmem.Range{{Size: 16 << 20}})
	guest, tracker := newTracked(t, mem, dirty.Options{RingEntries: dirty.MinRingEntries})
	if err := tracker.Start(); err != nil {
		t.Fatal(err)
	}
	const first, count = memguest.Free / pageSize, 12 * dirty.MinRingEntries
	for round := range uint64(3) {
		if err := guest.Store(first*pageSize, count, pageSize, round); err != nil {
			t.Fatal(err)
		}
		got := collect(t, tracker)
		if len(got) != count || got[0] != first || got[count-1] != first+count-1 {
			t.Fatalf("round %d: %d pages, want %d", round, len(got), count)
		}
	}
	if s := tracker.Stats(); s.RingFull < 3*11 || s.Collected < 3*count {
		t.Errorf("a ring of %d over %d pages: %+v", dirty.MinRingEntries, 3*count, s)
	}
}

// TestCollectWhileRunning: a guest writes while another goroutine collects;
// each page comes, then or later.
func TestCollectWhileRunning(t *testing.T) {
	for _, way := range ways {
		t.Run(name(way), func(t *testing.T) {
			mem := newMemory(t, []guestmem.Range{{Size: 16 << 20}})
			guest, tracker := newTracked(t, mem, way)
			if err := tracker.Start(); err != nil {
				t.Fatal(err)
			}
			const first, count = memguest.Free / pageSize, 3000
			done := make(chan error)
			seen := dirty.NewBitmapOf(mem)
			for round := range uint64(3) {
				seen.Reset()
				go func() { done <- guest.Store(first*pageSize, count, pageSize, round) }()
				for running := true; running; {
					select {
					case err := <-done:
						if err != nil {
							t.Fatal(err)
						}
						running = false
					default:
					}
					if err := tracker.CollectInto(seen); err != nil {
						t.Fatal(err)
					}
				}
				for p := uint64(first); p < first+count; p++ {
					if !seen.Has(p) {
						t.Fatalf("round %d: page %d was lost", round, p)
					}
				}
			}
		})
	}
}

func TestCollectDoesNotAllocate(t *testing.T) {
	for _, way := range ways {
		t.Run(name(way), func(t *testing.T) {
			mem := newMemory(t, layout)
			guest, tracker := newTracked(t, mem, way)
			if err := tracker.Start(); err != nil {
				t.Fatal(err)
			}
			b := dirty.NewBitmapOf(mem)
			pages := uint64(0)
			count := func(_, n uint64) { pages += n }
			allocs := testing.AllocsPerRun(20, func() {
				if err := errors.Join(guest.Store(memguest.Free, 50, pageSize, 7), tracker.Collect(count)); err != nil {
					t.Fatal(err)
				}
				if err := errors.Join(guest.Store(memguest.Free, 50, pageSize, 7), tracker.CollectInto(b)); err != nil {
					t.Fatal(err)
				}
			})
			if allocs != 0 || pages < 20*50 || b.Count() < 50 {
				t.Errorf("%v allocations for %d pages, %v", allocs, pages, b)
			}
		})
	}
}

func TestNewRefusesRings(t *testing.T) {
	mem := newMemory(t, layout)
	for _, entries := range []int{-1, 1, dirty.MinRingEntries / 2, dirty.MinRingEntries + 1, 3000, 1 << 30} {
		_, err := dirty.New(&fakeVM{ringBytes: 1 << 20}, mem, dirty.Options{RingEntries: entries})
		if !errors.Is(err, dirty.ErrSetup) {
			t.Errorf("%d entries: %v", entries, err)
		}
	}
	if _, err := dirty.New(&fakeVM{}, mem, dirty.Options{RingEntries: 4096}); !errors.Is(err, dirty.ErrSetup) {
		t.Errorf("a host without rings: %v", err)
	}
}

// fakeVM is a host that fails, or sends nonsense.
type fakeVM struct {
	ringBytes int
	failed    map[string]bool // calls that fail
	flags     map[uint32]uint32
	log       uint64   // each word of each log
	cleared   []uint64 // page counts of ClearDirtyLog
}

func (f *fakeVM) fail(call string) error {
	if f.failed[call] {
		return fmt.Errorf("%s: %w", call, unix.EIO)
	}
	return nil
}

func (f *fakeVM) Check(c kvm.Cap) int {
	switch c {
	case kvm.CapDirtyLogRingAcqRel:
		return f.ringBytes
	case kvm.CapManualDirtyLogProtect2:
		return 3
	}
	return 0
}

func (f *fakeVM) EnableCap(kvm.Cap, ...uint64) error { return f.fail("enable") }

func (f *fakeVM) SetMemory(slot, flags uint32, _ uint64, _ []byte) error {
	if err := f.fail(fmt.Sprintf("set %d to %d", slot, flags)); err != nil {
		return err
	}
	if f.flags == nil {
		f.flags = map[uint32]uint32{}
	}
	f.flags[slot] = flags
	return nil
}

func (f *fakeVM) DirtyLog(slot uint32, bitmap []uint64) error {
	if err := f.fail(fmt.Sprintf("log %d", slot)); err != nil {
		return err
	}
	for i := range bitmap {
		bitmap[i] = f.log
	}
	return nil
}

func (f *fakeVM) ClearDirtyLog(slot uint32, first uint64, pages uint32, _ []uint64) error {
	f.cleared = append(f.cleared, uint64(pages))
	return f.fail(fmt.Sprintf("clear %d", slot))
}

func (f *fakeVM) ResetDirtyRings() (int, error) { return 0, f.fail("reset") }

// fakeVCPU has the same entries in its ring again and again.
type fakeVCPU struct{ entries [][2]uint64 }

func (*fakeVCPU) MapDirtyRing(int) error { return nil }

func (f *fakeVCPU) HarvestDirty(page func(uint32, uint64)) int {
	for _, e := range f.entries {
		page(uint32(e[0]), e[1])
	}
	return len(f.entries)
}

// TestFailures: whatever fails, nothing that was read gets lost, and tracking
// that did not start leaves no slot logging.
func TestFailures(t *testing.T) {
	mem := newMemory(t, layout)
	vm := &fakeVM{failed: map[string]bool{"enable": true}}
	if _, err := dirty.New(vm, mem, dirty.Options{}); !errors.Is(err, dirty.ErrSetup) || !errors.Is(err, unix.EIO) {
		t.Errorf("New: %v", err)
	}
	vm.failed = map[string]bool{"set 1 to 1": true}
	tracker, err := dirty.New(vm, mem, dirty.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := tracker.Start(); !errors.Is(err, dirty.ErrStart) || !errors.Is(err, unix.EIO) {
		t.Errorf("Start: %v", err)
	}
	if vm.flags[0] != 0 {
		t.Error("slot 0 still logs")
	}
	vm.failed = nil
	if err := tracker.Start(); err != nil {
		t.Fatal(err)
	}
	vm.log = 1 << 2
	vm.failed = map[string]bool{"clear 1": true}
	if err := tracker.Collect(func(pfn, n uint64) { t.Error("collected") }); !errors.Is(err, dirty.ErrCollect) {
		t.Errorf("Collect: %v", err)
	}
	vm.log, vm.failed = 0, nil
	var pages uint64
	if err := tracker.Collect(func(_, n uint64) { pages += n }); err != nil || pages != 16+9 {
		t.Errorf("%d pages after a failure, %v", pages, err)
	}
	if slices.Max(vm.cleared) != layout[0].Size/pageSize {
		t.Errorf("cleared %d", vm.cleared)
	}
	if err := tracker.CollectInto(dirty.NewBitmap(layout[:1])); !errors.Is(err, dirty.ErrCollect) || !errors.Is(err, dirty.ErrRanges) {
		t.Errorf("into a bitmap of other memory: %v", err)
	}
}

// TestNonsenseInRing: entries for slots and pages that do not exist.
func TestNonsenseInRing(t *testing.T) {
	mem := newMemory(t, layout)
	vm := &fakeVM{ringBytes: 1 << 20}
	tracker, err := dirty.New(vm, mem, dirty.Options{RingEntries: 256})
	if err != nil {
		t.Fatal(err)
	}
	cpu := &fakeVCPU{entries: [][2]uint64{
		{0, 5},
		{1, 7},
		{1 << 16, 6}, // SMM's view of slot 0
		{2, 0},
		{0xffff, 1},
		{0, 1 << 40},
		{1, ^uint64(0)},
		{1, layout[1].Size / pageSize},
	}}
	if err := errors.Join(tracker.AddVCPU(cpu), tracker.Start()); err != nil {
		t.Fatal(err)
	}
	var got []uint64
	if err := tracker.Collect(func(pfn, n uint64) { got = append(got, pfn, n) }); err != nil {
		t.Fatal(err)
	}
	if want := []uint64{5, 2, 1<<20 + 7, 1}; !slices.Equal(got, want) {
		t.Errorf("runs %v, want %v", got, want)
	}
	vm.failed = map[string]bool{"reset": true}
	if err := tracker.Harvest(); !errors.Is(err, dirty.ErrCollect) {
		t.Errorf("Harvest: %v", err)
	}
}

// BenchmarkRound: the guest writes pages and they are collected.
func BenchmarkRound(b *testing.B) {
	for _, way := range []dirty.Options{{}, {RingEntries: 4096}} {
		for _, size := range []uint64{256 << 20, 2 << 30} {
			for _, pages := range []uint64{16, 2048} {
				b.Run(fmt.Sprintf("%s/%d MiB/%d pages", name(way), size>>20, pages), func(b *testing.B) {
					mem := newMemory(b, []guestmem.Range{{Size: size}})
					guest, tracker := newTracked(b, mem, way)
					if err := tracker.Start(); err != nil {
						b.Fatal(err)
					}
					for b.Loop() {
						b.StopTimer()
						if err := guest.Store(memguest.Free, pages, 8*pageSize, 1); err != nil {
							b.Fatal(err)
						}
						b.StartTimer()
						if err := tracker.Collect(func(uint64, uint64) {}); err != nil {
							b.Fatal(err)
						}
					}
				})
			}
		}
	}
}
