package pager

import (
	"testing"

	"golang.org/x/sys/unix"
)

// TestNoAllocations: neither faults nor devices' accesses cost garbage.
func TestNoAllocations(t *testing.T) {
	const runs = 200
	for _, tt := range []struct {
		policy Policy
		stride int // in pages of the virtual order
	}{{0, 1}, {Physical, 1}, {Locality, BlockPages}, {Locality, 3 * BlockPages}} {
		f, order := scattered((runs+20)*tt.stride, 12)
		f.quiet = true
		m := newMachine(t, f, Options{Policy: tt.policy, CacheBlocks: 2, Pages: 4})
		m.p.Start()
		c := m.vcpu()
		at := 0
		access := func() {
			if _, err := c.read(order[at], 8); err != nil {
				t.Fatal(err)
			}
			at += tt.stride
		}
		for range 10 { // until buffers and threads are there
			access()
		}
		if n := testing.AllocsPerRun(runs, access); n != 0 {
			t.Errorf("%v: %v allocations a page", tt.policy, n)
		}
		if s := m.p.Stats(); s.GuestFaults == 0 {
			t.Errorf("%+v", s)
		}
	}
}

func TestTouchDoesNotAllocate(t *testing.T) {
	f, order := scattered(64, 13)
	m := newMachine(t, f, Options{Policy: Locality})
	m.walk(order[:0])
	if err := m.p.Touch(0, 64*pageSize); err != nil {
		t.Fatal(err)
	}
	reads := f.total.Load()
	if n := testing.AllocsPerRun(1000, func() {
		if err := m.p.Touch(5000, 3*pageSize); err != nil {
			t.Fatal(err)
		}
	}); n != 0 || f.total.Load() != reads {
		t.Errorf("%v allocations and %d reads for what is there", n, f.total.Load()-reads)
	}
}

// benchmarkWalk has a guest walk by virtual addresses that are scattered
// physically; it gives the time per page.
func benchmarkWalk(b *testing.B, o Options) {
	f, order := scattered(16384, 14)
	f.quiet = true
	b.ReportAllocs()
	b.ResetTimer()
	for done := 0; done < b.N; {
		b.StopTimer()
		m := newMachine(b, f, o)
		m.p.Start()
		c := m.vcpu()
		b.StartTimer()
		for _, pfn := range order[:min(len(order), b.N-done)] {
			if _, err := c.read(pfn, 8); err != nil {
				b.Fatal(err)
			}
			done++
		}
		b.StopTimer()
		s := m.p.Stats()
		b.ReportMetric(float64(s.GuestFaults)/float64(len(order)), "faults/page")
		m.p.Close()
		m.mem.Close()
		b.StartTimer()
	}
}

func BenchmarkWalkNone(b *testing.B)     { benchmarkWalk(b, Options{}) }
func BenchmarkWalkLocality(b *testing.B) { benchmarkWalk(b, Options{Policy: Locality}) }

// BenchmarkBackground loads everything; the time is per page.
func BenchmarkBackground(b *testing.B) {
	f, _ := scattered(16384, 14)
	f.quiet = true
	b.SetBytes(pageSize)
	b.ResetTimer()
	for done := 0; done < b.N; done += 16384 {
		b.StopTimer()
		m := newMachine(b, f, Options{Policy: Locality})
		b.StartTimer()
		m.p.LoadAll()
		m.p.Start()
		<-m.p.Done()
		b.StopTimer()
		m.p.Close()
		m.mem.Close()
		b.StartTimer()
	}
}

func BenchmarkTouchPresent(b *testing.B) {
	f, _ := scattered(64, 15)
	m := newMachine(b, f, Options{Policy: Locality})
	if err := m.p.Touch(0, 64*pageSize); err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	b.ResetTimer()
	for range b.N {
		if err := m.p.Touch(5000, 100); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkResident is the walk with all memory there.
func BenchmarkResident(b *testing.B) {
	f, order := scattered(16384, 14)
	m := newMachine(b, f, Options{Policy: Locality})
	m.p.LoadAll()
	m.p.Start()
	<-m.p.Done()
	c := m.vcpu()
	m.walk(order)
	b.ResetTimer()
	for i := range b.N {
		if _, err := c.read(order[i%len(order)], 8); err != nil && err != unix.EINTR {
			b.Fatal(err)
		}
	}
}
