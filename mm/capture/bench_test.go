package capture

import (
	"errors"
	"fmt"
	"testing"

	"github.com/gnomon-vmm/gnomon/mm/guestmem"
	"github.com/gnomon-vmm/gnomon/mm/internal/memguest"
)

// TestFreezeCountsWhatWasWritten: what Freeze does depends on the pages that
// were written since Arm, and not on the memory.
func TestFreezeCountsWhatWasWritten(t *testing.T) {
	var calls []uint64
	for _, size := range []uint64{64 << 20, 4 << 30} {
		m := newMachine(t, []guestmem.Range{{Size: size}})
		c := newCapture(t, m.mem, Options{Side: newSide(t, 16)})
		if err := c.Arm(nil); err != nil {
			t.Fatal(err)
		}
		for i := range uint64(20) {
			m.store(1000+i*500, 10, i)
		}
		if err := c.Freeze(nil); err != nil {
			t.Fatal(err)
		}
		s := c.Stats()
		if s.FaultsArming != 200 || s.Rewritten != 200 {
			t.Errorf("%d MiB: 200 pages were written: %+v", size>>20, s)
		}
		calls = append(calls, s.FreezeCalls)
	}
	if calls[0] != 20 || calls[1] != 20 {
		t.Errorf("%d system calls for 20 runs of pages", calls)
	}
}

// TestRearm: what was written since Arm is protected again before the pause, so
// that the pause has little to do.
func TestRearm(t *testing.T) {
	m := newMachine(t, []guestmem.Range{{Size: 64 << 20}})
	c := newCapture(t, m.mem, Options{})
	if err := c.Rearm(); !errors.Is(err, ErrArm) {
		t.Errorf("Rearm before Arm: %v", err)
	}
	if err := c.Arm(nil); err != nil {
		t.Fatal(err)
	}
	m.store(1000, 2000, 1)
	if err := c.Rearm(); err != nil {
		t.Fatal(err)
	}
	m.store(1500, 10, 2)
	if err := c.Freeze(nil); err != nil {
		t.Fatal(err)
	}
	if s := c.Stats(); s.FaultsArming != 2010 || s.Rewritten != 10 || s.FreezeCalls != 1 {
		t.Errorf("10 of 2000 pages were written again: %+v", s)
	}
	if err := c.Rearm(); !errors.Is(err, ErrArm) {
		t.Errorf("Rearm after Freeze: %v", err)
	}
	want, w := m.content(), newWriter()
	m.store(1000, 2000, 3)
	if err := c.Save(t.Context(), w, nil, nil); err != nil {
		t.Fatal(err)
	}
	w.compare(t, want, nil)
}

// sink is a Writer that does nothing.
type sink struct{}

func (sink) BlockAt(uint64, []uint64, [][]byte) error { return nil }
func (sink) Zero(...uint64) error                     { return nil }

// populate has all pages allocated, and something in each, with the host's mapping.
func populate(m *machine) {
	for _, r := range m.mem.Regions() {
		b := r.Bytes()
		for at := max(r.GPA, memguest.Free) - r.GPA; at < r.Size; at += pageSize {
			b[at] = 1
		}
	}
}

func capture(b *testing.B, m *machine) *Capture {
	c, err := New(m.mem, Options{})
	if err != nil {
		b.Fatal(err)
	}
	return c
}

// BenchmarkPause is Freeze after the guest wrote some pages, all apart.
func BenchmarkPause(b *testing.B) {
	for _, pages := range []uint64{100, 2000} {
		for _, gib := range []uint64{1, 8} {
			b.Run(fmt.Sprintf("%d pages of %d GiB", pages, gib), func(b *testing.B) {
				m := newMachine(b, []guestmem.Range{{Size: gib << 30}})
				for b.Loop() {
					b.StopTimer()
					c := capture(b, m)
					if err := c.Arm(nil); err != nil {
						b.Fatal(err)
					}
					if err := m.guest.Store(1<<20, pages, 100*pageSize, 1); err != nil {
						b.Fatal(err)
					}
					b.StartTimer()
					if err := c.Freeze(nil); err != nil {
						b.Fatal(err)
					}
					b.StopTimer()
					if err := c.Close(); err != nil {
						b.Fatal(err)
					}
					b.StartTimer()
				}
			})
		}
	}
}

// BenchmarkWrite is what the guest's first write to a page costs it, ahead of
// the instant and after it.
func BenchmarkWrite(b *testing.B) {
	for _, stage := range []string{"not captured", "armed", "frozen"} {
		b.Run(stage, func(b *testing.B) {
			m := newMachine(b, []guestmem.Range{{Size: 1 << 30}})
			if err := m.guest.Store(1<<20, 1024, pageSize, 1); err != nil {
				b.Fatal(err)
			}
			for b.Loop() {
				b.StopTimer()
				c := capture(b, m)
				var err error
				if stage != "not captured" {
					err = c.Arm(nil)
				}
				if stage == "frozen" {
					err = errors.Join(err, c.Freeze(nil))
				}
				b.StartTimer()
				err = errors.Join(err, m.guest.Store(1<<20, 1024, pageSize, 1))
				b.StopTimer()
				if err := errors.Join(err, c.Close()); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
			}
			b.ReportMetric(float64(b.Elapsed().Microseconds())/float64(b.N)/1024, "us/page")
		})
	}
}

// BenchmarkGiB is what a GiB costs at each stage: of holes, of memory that only
// the host has touched, and of memory that the guest has mapped.
func BenchmarkGiB(b *testing.B) {
	for _, kind := range []string{"holes", "allocated", "mapped"} {
		stages := []struct {
			name string
			do   func(c *Capture) error
		}{
			{"Arm", func(c *Capture) error { return c.Arm(nil) }},
			{"Save", func(c *Capture) error { return c.Save(b.Context(), sink{}, nil, nil) }},
			{"Close", func(c *Capture) error { return c.Close() }},
		}
		for timed, stage := range stages {
			b.Run(kind+"/"+stage.name, func(b *testing.B) {
				m := newMachine(b, []guestmem.Range{{Size: 1 << 30}})
				if kind != "holes" {
					populate(m)
				}
				if kind == "mapped" {
					if err := m.guest.Store(memguest.Free, (1<<30-memguest.Free)/pageSize, pageSize, 1); err != nil {
						b.Fatal(err)
					}
				}
				for b.Loop() {
					b.StopTimer()
					c := capture(b, m)
					var err error
					for i, s := range stages {
						if i == 1 {
							if err = errors.Join(err, c.Freeze(nil)); timed == 2 {
								continue // Save closes
							}
						}
						if i == timed {
							b.StartTimer()
						}
						err = errors.Join(err, s.do(c))
						b.StopTimer()
					}
					if err != nil {
						b.Fatal(err)
					}
					b.StartTimer()
				}
			})
		}
	}
}
