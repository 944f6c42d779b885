package capture

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/mm/dirty"
	"github.com/gnomon-vmm/gnomon/mm/guestmem"
	"github.com/gnomon-vmm/gnomon/mm/internal/memguest"
	"github.com/gnomon-vmm/gnomon/mm/uffd"
)

var layout = []guestmem.Range{{GPA: 0, Size: 12 << 20}, {GPA: 1 << 32, Size: 4<<20 + 5*pageSize}}

// TestInstant: the guest and devices write all memory again and again, ahead of
// the instant, and while it is saved; what is saved is the instant.
func TestInstant(t *testing.T) {
	for _, sideCopies := range []int{1, 16, 100000} {
		t.Run(fmt.Sprintf("%d side copies", sideCopies), func(t *testing.T) {
			m := newMachine(t, layout)
			seed := rand.Uint64()
			t.Logf("seed %d", seed)
			rng := rand.New(rand.NewPCG(seed, 0))
			pfns := allPages(layout)

			// A third is never touched, the rest has something in it.
			for range 300 {
				pfn := pfns[rng.IntN(len(pfns))]
				m.store(pfn, min(8, pagesBehind(pfn)), rng.Uint64())
			}
			const pinnedAt = 3 << 20
			ring, err := m.mem.Pin(pinnedAt+100, 2*pageSize)
			if err != nil {
				t.Fatal(err)
			}

			c := newCapture(t, m.mem, Options{Side: newSide(t, sideCopies)})
			var stop atomic.Bool
			var stores atomic.Uint64 // that the guest has done
			var writers sync.WaitGroup
			// What the guest does: write everywhere.
			guestRuns := func(seed uint64) {
				rng := rand.New(rand.NewPCG(seed, 1))
				for !stop.Load() {
					pfn := pfns[rng.IntN(len(pfns))]
					m.store(pfn, min(32, pagesBehind(pfn)), rng.Uint64())
					stores.Add(1)
				}
			}
			// What devices do: disk reads, discards, and rings.
			deviceRuns := func(seed uint64) {
				rng := rand.New(rand.NewPCG(seed, 2))
				data := make([]byte, 5*pageSize)
				for n := uint64(0); !stop.Load(); n++ {
					pfn := pfns[rng.IntN(len(pfns))]
					size := rng.Uint64N(min(5, pagesBehind(pfn))*pageSize) + 1
					gpa := pfn * pageSize
					var err error
					if rng.IntN(10) == 0 {
						err = m.mem.Discard(gpa, size)
					} else {
						binary.LittleEndian.PutUint64(data[rng.IntN(int(size))&^7:], rng.Uint64())
						err = m.mem.Write(gpa, data[:size])
					}
					if err != nil {
						t.Error(err)
						return
					}
					binary.LittleEndian.PutUint64(ring[rng.IntN(len(ring)-8):], n)
					for at := stores.Load(); stores.Load() == at && !stop.Load(); {
						runtime.Gosched() // leaves something to the guest
					}
				}
			}
			// A second writer in the guest's mapping, as another vCPU is: the
			// kernel writes there for us.
			source := randomFile(t, rng)
			kernelWrites := func(seed uint64) {
				rng := rand.New(rand.NewPCG(seed, 3))
				for !stop.Load() {
					r := m.mem.Regions()[rng.IntN(2)]
					first := max(r.GPA, memguest.Free) - r.GPA
					at := first + rng.Uint64N(r.Size-first)
					into := r.GuestBytes()[at:min(at+rng.Uint64N(3*pageSize)+1, r.Size)]
					if n, err := unix.Pread(source, into, rng.Int64N(pageSize)); err != nil || n != len(into) {
						t.Errorf("write %d bytes at %#x: %d, %v", len(into), r.GPA+at, n, err)
						return
					}
					for before := stores.Load(); stores.Load() == before && !stop.Load(); {
						runtime.Gosched()
					}
				}
			}
			run := func() {
				stop.Store(false)
				for _, f := range []func(uint64){guestRuns, deviceRuns, kernelWrites} {
					seed := rng.Uint64()
					writers.Go(func() { f(seed) })
				}
			}
			pause := func() { stop.Store(true); writers.Wait() }

			run()
			if err := c.Arm(nil); err != nil {
				t.Fatal(err)
			}
			for c.Stats().FaultsArming < 300 {
				runtime.Gosched()
			}
			pause()
			if err := c.Freeze(nil); err != nil {
				t.Fatal(err)
			}
			want := m.content()
			run()

			order := slices.Clone(pfns)
			rng.Shuffle(len(order), func(i, j int) { order[i], order[j] = order[j], order[i] })
			order = append(order[:len(order)/2], order[10], order[20], 1<<20-1, 1<<40, ^uint64(0))
			w := newWriter()
			// For each block the sweeper waits until the guest has stored some
			// more, unless the guest or a device waits for the sweeper.
			w.before = func() error {
				for at := stores.Load(); stores.Load() < at+4 && len(c.urgent) == 0; {
					runtime.Gosched()
				}
				return nil
			}
			var last, total uint64
			err = c.Save(t.Context(), w, order, func(done, of uint64) {
				if done < last {
					t.Errorf("progress went from %d to %d", last, done)
				}
				last, total = done, of
			})
			pause()
			if err != nil {
				t.Fatal(err)
			}
			w.compare(t, want, nil)
			s := c.Stats()
			t.Logf("%+v", s)
			if last != uint64(len(want)) || total != last {
				t.Errorf("progress ended at %d of %d, not %d", last, total, len(want))
			}
			if s.Rewritten == 0 || s.Pinned != 3 || s.Frozen == 0 || s.FaultsSaving == 0 ||
				s.CopiedByFault+s.CopiedByTouch == 0 || s.Swept == 0 {
				t.Errorf("something did not take place: %+v", s)
			}
			if sideCopies > 100 && (s.CopiedByFault < 100 || s.CopiedByTouch < 5) {
				t.Errorf("the sweeper was not overtaken: %+v", s)
			}
			if s.SideCopies > uint64(sideCopies) {
				t.Errorf("%d side copies were kept, %d allowed", s.SideCopies, sideCopies)
			}
			if sideCopies < 100 && s.Waited < 10 {
				t.Error("nobody waited for room")
			}
		})
	}
}

// TestAllMemoryRewritten: between the first block and the second, the guest
// rewrites all that there is; or as soon as it is let, when there is no room.
func TestAllMemoryRewritten(t *testing.T) {
	for _, sideCopies := range []int{8, 100000} {
		t.Run(fmt.Sprintf("%d side copies", sideCopies), func(t *testing.T) {
			m := newMachine(t, layout)
			first := layout[0].Size/pageSize - memguest.Free/pageSize
			second := layout[1].Size / pageSize
			rewrite := func(value uint64) {
				for slot := range uint64(4) { // all over the page
					m.store(memguest.Free/pageSize, first, value+slot*100)
					m.store(1<<20, second, value+slot*100)
				}
			}
			rewrite(1)
			c := newCapture(t, m.mem, Options{Workers: 1, Side: newSide(t, sideCopies)})
			freeze(t, c)
			want := m.content()
			w := newWriter()
			var guest sync.WaitGroup
			w.before = sync.OnceValue(func() error {
				guest.Go(func() { rewrite(2) })
				if sideCopies > 100 {
					guest.Wait()
				}
				for sideCopies < 100 && len(c.urgent) == 0 {
					runtime.Gosched()
				}
				return nil
			})
			if err := c.Save(t.Context(), w, nil, nil); err != nil {
				t.Fatal(err)
			}
			guest.Wait()
			w.compare(t, want, nil)
			s := c.Stats()
			// The first block was copied before.
			if rest := first + second - BlockPages; sideCopies > 100 && s.CopiedByFault < rest ||
				sideCopies < 100 && (s.Waited == 0 || s.SideCopies > 8) {
				t.Errorf("%d pages were rewritten: %+v", rest, s)
			}
			for pfn, page := range m.content() {
				if pfn >= memguest.Free/pageSize && bytes.Equal(page, want[pfn]) {
					t.Fatalf("page %#x was not rewritten", pfn)
				}
			}
		})
	}
}

// TestOrder: blocks hold the pages of order, then the rest by number.
func TestOrder(t *testing.T) {
	m := newMachine(t, layout)
	m.store(memguest.Free/pageSize, 500, 1)
	m.store(1<<20+3, 300, 2)
	order := []uint64{1<<20 + 5, 200, 1<<20 + 5, 7000, 201, 1 << 50, 100}
	c := newCapture(t, m.mem, Options{Workers: 1})
	freeze(t, c)
	w := newWriter()
	if err := c.Save(t.Context(), w, order, nil); err != nil {
		t.Fatal(err)
	}
	w.compare(t, m.content(), nil)
	// Page 7000 was never touched.
	want := []uint64{1<<20 + 5, 200, 201, 100}
	if got := w.order[:4]; !slices.Equal(got, want) {
		t.Errorf("the first pages are %d, want %d", got, want)
	}
	if rest := w.order[4:]; !slices.IsSorted(rest) {
		t.Errorf("the others are not in order: %d", rest)
	}
}

// TestHoles: memory that was never touched is neither read nor allocated, but
// the first write to it is seen.
func TestHoles(t *testing.T) {
	m := newMachine(t, layout)
	m.store(1000, 100, 1)
	before := m.allocated()
	c := newCapture(t, m.mem, Options{})
	freeze(t, c)
	want := m.content()
	m.store(2000, 50, 2) // a first touch by the guest
	if err := m.mem.Write(2500*pageSize, []byte{1}); err != nil {
		t.Fatal(err)
	}
	// What becomes a hole now was none at the instant.
	if err := m.mem.Discard(1000*pageSize, 10*pageSize); err != nil {
		t.Fatal(err)
	}
	w := newWriter()
	if err := c.Save(t.Context(), w, nil, nil); err != nil {
		t.Fatal(err)
	}
	w.compare(t, want, nil)
	s := c.Stats()
	if s.CopiedByFault != 50 || s.CopiedByTouch != 11 || s.Swept != uint64(before)-10 || s.SideCopies > 11 {
		t.Errorf("%d pages before, 50 and 1 touched and 10 discarded since: %+v", before, s)
	}
	if after := m.allocated(); after != before+41 {
		t.Errorf("%d pages were allocated, %d after", before, after)
	}
	if len(w.order) != int(before)+51 {
		t.Errorf("%d pages were written, not %d", len(w.order), before+51)
	}
}

// TestDiscardWhileArmed: a page that was given back to the host after it was
// protected is still protected.
func TestDiscardWhileArmed(t *testing.T) {
	m := newMachine(t, layout)
	m.store(1000, 100, 1)
	c := newCapture(t, m.mem, Options{})
	if err := c.Arm(nil); err != nil {
		t.Fatal(err)
	}
	if err := m.mem.Discard(1010*pageSize, 10*pageSize); err != nil {
		t.Fatal(err)
	}
	if err := c.Freeze(nil); err != nil {
		t.Fatal(err)
	}
	want := m.content()
	if !isZero(want[1015]) {
		t.Fatal("page 1015 is not zero")
	}
	m.store(1000, 100, 2)
	w := newWriter()
	if err := c.Save(t.Context(), w, nil, nil); err != nil {
		t.Fatal(err)
	}
	w.compare(t, want, nil)
	if s := c.Stats(); s.CopiedByFault != 100 {
		t.Errorf("%+v", s)
	}
}

// TestIncremental: only the pages written since an earlier instant are
// saved, those written while they are protected or copied among them.
func TestIncremental(t *testing.T) {
	t.Run("protected", func(t *testing.T) { testIncremental(t, true) })
	t.Run("copied early", func(t *testing.T) { testIncremental(t, false) })
}

func testIncremental(t *testing.T, protect bool) {
	m := newMachine(t, layout)
	m.store(1000, 2000, 1)
	if err := m.tracker.Start(); err != nil {
		t.Fatal(err)
	}
	m.store(1000, 2000, 2) // KVM maps all for writing: what is written is known from here
	only, more := dirty.NewBitmapOf(m.mem), dirty.NewBitmapOf(m.mem)
	if err := m.tracker.CollectInto(more); err != nil {
		t.Fatal(err)
	}
	more.Reset()

	m.store(1100, 50, 3)
	m.store(2000, 1, 3)
	if err := m.mem.Discard(2100*pageSize, pageSize); err != nil {
		t.Fatal(err)
	}
	if err := m.tracker.CollectInto(only); err != nil {
		t.Fatal(err)
	}
	c := newCapture(t, m.mem, Options{Protect: protect})
	if err := c.Arm(only); err != nil {
		t.Fatal(err)
	}
	m.store(1120, 40, 4) // 30 of them are protected
	m.store(1<<20+2, 3, 4)
	faults := uint64(0)
	if protect {
		faults = 30
	}
	if s := c.Stats(); s.FaultsArming != faults {
		t.Errorf("%d faults, %d protected pages were written", s.FaultsArming, faults)
	}
	meanwhile := func() {
		t.Helper()
		more.Reset()
		if err := errors.Join(m.tracker.CollectInto(more), only.Merge(more)); err != nil {
			t.Fatal(err)
		}
	}
	// Pages that were not written before Arm, some of which are written once more.
	meanwhile()
	if enough, err := c.Refresh(more); !enough || err != nil {
		t.Fatalf("Refresh: %v, %v", enough, err)
	}
	if err := c.Rearm(); err != nil {
		t.Fatal(err)
	}
	m.store(1<<20+3, 3, 4)
	m.store(1150, 10, 5)
	meanwhile()
	if err := c.Freeze(more); err != nil {
		t.Fatal(err)
	}
	want := m.content()
	m.store(1000, 2000, 6)
	m.store(1<<20+2, 4, 6)
	w := newWriter()
	if err := c.Save(t.Context(), w, []uint64{2000, 1130, 5000}, nil); err != nil {
		t.Fatal(err)
	}
	w.compare(t, want, only.Has)
	for _, pfn := range []uint64{1100, 1159, 2000, 2100, 1<<20 + 2, 1<<20 + 5} {
		if w.pages[pfn] == nil {
			t.Errorf("page %d was written and not saved", pfn)
		}
	}
	if n := len(w.pages); n > 60+1+1+4+int(memguest.Free/pageSize) {
		t.Errorf("%d pages were saved", n)
	}
}

var errDiskFull = fmt.Errorf("block: %w", unix.ENOSPC)

// TestSaveFails: the guest goes on when the writer fails or the job is
// cancelled, those included who wait for the sweeper.
func TestSaveFails(t *testing.T) {
	for name, fail := range map[string]func(c *Capture, cancel func()) error{
		"disk full": func(*Capture, func()) error { return errDiskFull },
		"cancelled": func(_ *Capture, cancel func()) error { cancel(); return nil },
		"closed": func(c *Capture, _ func()) error {
			c.end() // what Close does first; all of it would wait for us
			return nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t, layout)
			m.store(1000, 2000, 1)
			c := newCapture(t, m.mem, Options{Side: newSide(t, 1)})
			freeze(t, c)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			// The guest and a device are stuck in the second page that each writes.
			var stuck sync.WaitGroup
			stuck.Go(func() { m.store(1000, 2000, 2) })
			stuck.Go(func() {
				if err := m.mem.Write(1500*pageSize, make([]byte, 200*pageSize)); err != nil {
					t.Error(err)
				}
			})
			for c.Stats().Waited < 2 {
				runtime.Gosched()
			}
			w := newWriter()
			w.before = func() error { return fail(c, cancel) }
			err := c.Save(ctx, w, nil, nil)
			want := map[string]error{"disk full": unix.ENOSPC, "cancelled": context.Canceled, "closed": ErrClosed}[name]
			if !errors.Is(err, ErrSave) || !errors.Is(err, want) {
				t.Errorf("Save: %v", err)
			}
			stuck.Wait()
			m.store(1000, 2000, 3)
			if err := c.Save(t.Context(), w, nil, nil); !errors.Is(err, ErrClosed) {
				t.Errorf("a second Save: %v", err)
			}
			// And a new capture can begin.
			c2 := newCapture(t, m.mem, Options{})
			freeze(t, c2)
			content, w2 := m.content(), newWriter()
			if err := c2.Save(t.Context(), w2, nil, nil); err != nil {
				t.Fatal(err)
			}
			w2.compare(t, content, nil)
		})
	}
}

// TestFaultsCannotBeAnswered: when reading faults fails, nobody stays stuck and
// nothing is saved.
func TestFaultsCannotBeAnswered(t *testing.T) {
	m := newMachine(t, layout)
	m.store(1000, 2000, 1)
	c := newCapture(t, m.mem, Options{Side: newSide(t, 1)})
	freeze(t, c)
	var stuck sync.WaitGroup
	stuck.Go(func() { m.store(1000, 2000, 2) })
	for c.Stats().Waited == 0 {
		runtime.Gosched()
	}
	c.fail(unix.EIO)
	stuck.Wait()
	if err := c.Save(t.Context(), newWriter(), nil, nil); !errors.Is(err, ErrSave) || !errors.Is(err, ErrClosed) || !errors.Is(err, unix.EIO) {
		t.Errorf("Save: %v", err)
	}
}

// TestLetGoWhileSaving: when pages are not protected to the end of Save, it fails, even if
// nothing has told it so meanwhile.
func TestLetGoWhileSaving(t *testing.T) {
	m := newMachine(t, layout)
	m.store(1000, 2000, 1)
	c := newCapture(t, m.mem, Options{Workers: 1})
	freeze(t, c)
	w := newWriter()
	var once sync.Once
	w.before = func() error {
		once.Do(func() {
			c.letGo()
			m.store(1000, 2000, 2)
		})
		return nil
	}
	if err := c.Save(t.Context(), w, nil, nil); !errors.Is(err, ErrSave) || !errors.Is(err, ErrClosed) {
		t.Errorf("Save: %v", err)
	}
}

// TestClose: at any stage it lets writers go, and leaves nothing behind.
func TestClose(t *testing.T) {
	m := newMachine(t, layout)
	descriptors := func() int {
		d, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(d)
	}
	before := descriptors()
	for stage := range 4 {
		c, err := New(m.mem, Options{Side: newSide(t, 1)})
		if errors.Is(err, uffd.ErrOpen) {
			t.Skip(err)
		}
		if err != nil {
			t.Fatal(err)
		}
		if stage > 0 {
			err = c.Arm(nil)
		}
		if stage > 1 {
			err = errors.Join(err, c.Freeze(nil))
		}
		if err != nil {
			t.Fatal(err)
		}
		var writers sync.WaitGroup
		if stage > 2 {
			writers.Go(func() { m.store(1000, 100, uint64(stage)) })
			for c.Stats().Waited == 0 {
				runtime.Gosched()
			}
		}
		if err := errors.Join(c.Close(), c.Close()); err != nil {
			t.Errorf("stage %d: %v", stage, err)
		}
		writers.Wait()
		m.store(1000, 100, 7)
		for name, err := range map[string]error{"Arm": c.Arm(nil), "Freeze": c.Freeze(nil), "Save": c.Save(t.Context(), newWriter(), nil, nil)} {
			if !errors.Is(err, ErrClosed) {
				t.Errorf("stage %d: %s after Close: %v", stage, name, err)
			}
		}
	}
	if after := descriptors(); after != before {
		t.Errorf("%d descriptors before, %d after", before, after)
	}
}

func TestMisplacedCalls(t *testing.T) {
	m := newMachine(t, layout)
	c := newCapture(t, m.mem, Options{})
	w := newWriter()
	if err := c.Freeze(nil); !errors.Is(err, ErrFreeze) {
		t.Errorf("Freeze before Arm: %v", err)
	}
	if err := c.Save(t.Context(), w, nil, nil); !errors.Is(err, ErrSave) {
		t.Errorf("Save before Arm: %v", err)
	}
	if err := c.Arm(dirty.NewBitmap(layout[:1])); !errors.Is(err, ErrArm) || !errors.Is(err, dirty.ErrRanges) {
		t.Errorf("Arm for other memory: %v", err)
	}
	if err := c.Arm(nil); err != nil {
		t.Fatal(err)
	}
	if err := c.Arm(nil); !errors.Is(err, ErrArm) {
		t.Errorf("second Arm: %v", err)
	}
	if err := c.Save(t.Context(), w, nil, nil); !errors.Is(err, ErrSave) {
		t.Errorf("Save before Freeze: %v", err)
	}
	// Memory that another userfaultfd watches is left to it.
	c2 := newCapture(t, m.mem, Options{})
	if err := c2.Arm(nil); !errors.Is(err, ErrArm) || !errors.Is(err, unix.EBUSY) {
		t.Errorf("Arm of memory that is armed: %v", err)
	}
	if err := c2.Close(); err != nil {
		t.Error(err)
	}
	if err := c.Freeze(nil); err != nil {
		t.Fatal(err)
	}
	if err := c.Freeze(nil); !errors.Is(err, ErrFreeze) {
		t.Errorf("second Freeze: %v", err)
	}
	want := m.content()
	m.store(1000, 10, 1)
	if err := c.Save(t.Context(), w, nil, nil); err != nil {
		t.Fatal(err)
	}
	w.compare(t, want, nil)
}

// TestSavedPagesAreLetGoTogether: after pages are saved, one fault lets a whole
// neighbourhood of them go.
func TestSavedPagesAreLetGoTogether(t *testing.T) {
	m := newMachine(t, layout)
	m.store(1024, 1024, 1)
	c := newCapture(t, m.mem, Options{Workers: 1})
	freeze(t, c)
	w := newWriter()
	blocks := 0
	w.before = func() error {
		if blocks++; blocks == 1024/BlockPages+1 { // the pages from 1024 on came first, and are saved
			before := c.Stats()
			m.store(1024, 1024, 2)
			if n := c.Stats().FaultsSaving - before.FaultsSaving; n != 1024/liftPages {
				t.Errorf("%d faults for 1024 saved pages, want %d", n, 1024/liftPages)
			}
		}
		return nil
	}
	want := m.content()
	var order []uint64
	for pfn := uint64(1024); pfn < 2048; pfn++ {
		order = append(order, pfn)
	}
	if err := c.Save(t.Context(), w, order, nil); err != nil {
		t.Fatal(err)
	}
	w.compare(t, want, nil)
	if blocks <= 1024/BlockPages {
		t.Errorf("%d blocks", blocks)
	}
}

func TestTouchDoesNotAllocate(t *testing.T) {
	m := newMachine(t, layout)
	m.store(1000, 1000, 1)
	c := newCapture(t, m.mem, Options{})
	freeze(t, c)
	pfn := uint64(1000)
	if n := testing.AllocsPerRun(500, func() { c.Touch(pfn*pageSize, pageSize); pfn++ }); n != 0 {
		t.Errorf("%v allocations when a page is kept", n)
	}
	if n := testing.AllocsPerRun(100, func() { c.Touch(1000*pageSize, 400*pageSize) }); n != 0 {
		t.Errorf("%v allocations when there is nothing to do", n)
	}
	if s := c.Stats(); s.CopiedByTouch != 501 {
		t.Errorf("%+v", s)
	}
	addr := c.regions[0].guest
	i := uintptr(1600)
	if n := testing.AllocsPerRun(100, func() {
		if err := c.answer(addr + i*pageSize); err != nil {
			t.Fatal(err)
		}
		i++
	}); n != 0 {
		t.Errorf("%v allocations for a fault", n)
	}
}
