package device

import (
	"bytes"
	"errors"
	"math"
	"sync"
	"testing"

	"pgregory.net/rapid"
)

// recorder notes the accesses it gets and reads as its tag.
type recorder struct {
	tag  byte
	got  [][2]uint64 // offset, length
	last []byte
}

func (r *recorder) Read(off uint64, p []byte) {
	r.got = append(r.got, [2]uint64{off, uint64(len(p))})
	for i := range p {
		p[i] = r.tag
	}
}

func (r *recorder) Write(off uint64, p []byte) {
	r.got = append(r.got, [2]uint64{off, uint64(len(p))})
	r.last = append(r.last, p...)
}

func TestBusMapRefuses(t *testing.T) {
	b := NewBus("port")
	if err := b.Map(0x100, 0x10, &recorder{}); err != nil {
		t.Fatal(err)
	}
	for _, r := range [][2]uint64{
		{0x100, 0x10}, {0x10F, 1}, {0xFF, 2}, {0x80, 0x100}, {0x104, 2}, // overlaps
		{0x200, 0}, {math.MaxUint64, 2}, {0, 0}, {2, math.MaxUint64}, // no range at all
	} {
		if err := b.Map(r[0], r[1], &recorder{}); !errors.Is(err, ErrMap) {
			t.Errorf("Map(%#x, %#x) = %v, want ErrMap", r[0], r[1], err)
		}
	}
	for _, r := range [][2]uint64{{0xF0, 0x10}, {0x110, 1}, {math.MaxUint64, 1}} {
		if err := b.Map(r[0], r[1], &recorder{}); err != nil {
			t.Errorf("Map(%#x, %#x) = %v", r[0], r[1], err)
		}
	}
	b.Unmap(0x104) // nothing begins there
	if !b.Read(0x104, make([]byte, 1)) {
		t.Error("Unmap took a range that begins elsewhere")
	}
	b.Unmap(0x100)
	if b.Read(0x104, make([]byte, 1)) {
		t.Error("range is still there after Unmap")
	}
}

func TestBusSplitsOddLengths(t *testing.T) {
	b, r := NewBus("mmio"), &recorder{}
	if err := b.Map(0x1000, 0x100, r); err != nil {
		t.Fatal(err)
	}
	want := []byte{1, 2, 3, 4, 5, 6, 7}
	b.Write(0x1011, want)
	if !bytes.Equal(r.last, want) {
		t.Errorf("device got % x, want % x", r.last, want)
	}
	for i, p := range [][2]uint64{{0x11, 4}, {0x15, 2}, {0x17, 1}} {
		if r.got[i] != p {
			t.Errorf("piece %d is %v, want %v", i, r.got[i], p)
		}
	}
}

// A map from every address to its owner is the model.
func TestBusAgainstModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const space = 64
		b := NewBus("port")
		var owner [space + 8]*recorder
		var base [space + 8]uint64
		tag := byte(0)
		t.Repeat(map[string]func(*rapid.T){
			"map": func(t *rapid.T) {
				at, size := rapid.Uint64Range(0, space-1).Draw(t, "at"), rapid.Uint64Range(1, 16).Draw(t, "size")
				size = min(size, space-at)
				free := true
				for i := at; i < at+size; i++ {
					free = free && owner[i] == nil
				}
				tag++
				r := &recorder{tag: tag}
				if err := b.Map(at, size, r); (err == nil) != free {
					t.Fatalf("Map(%d, %d) = %v, free %v", at, size, err, free)
				}
				if free {
					for i := at; i < at+size; i++ {
						owner[i], base[i] = r, at
					}
				}
			},
			"unmap": func(t *rapid.T) {
				at := rapid.Uint64Range(0, space-1).Draw(t, "at")
				b.Unmap(at)
				if r := owner[at]; r != nil && base[at] == at {
					for i := range owner {
						if owner[i] == r {
							owner[i] = nil
						}
					}
				}
			},
			"read": func(t *rapid.T) {
				at, n := rapid.Uint64Range(0, space-1).Draw(t, "at"), rapid.SampledFrom([]uint64{1, 2, 4, 8}).Draw(t, "n")
				whole := owner[at] != nil
				for i := at; i < at+n; i++ {
					whole = whole && owner[i] == owner[at]
				}
				p := make([]byte, n)
				if got := b.Read(at, p); got != whole {
					t.Fatalf("Read(%d, %d bytes) = %v, want %v", at, n, got, whole)
				}
				want := byte(0xFF)
				if whole {
					want = owner[at].tag
					if g := owner[at].got; g[len(g)-1] != [2]uint64{at - base[at], n} {
						t.Fatalf("device got %v", g[len(g)-1])
					}
				}
				if !bytes.Equal(p, bytes.Repeat([]byte{want}, int(n))) {
					t.Fatalf("read % x, want %#x", p, want)
				}
			},
		})
	})
}

func TestBusConcurrent(t *testing.T) {
	b := NewBus("port")
	if err := b.Map(0x80, 1, Ignore{}); err != nil {
		t.Fatal(err)
	}
	var vcpus sync.WaitGroup
	for range 4 {
		vcpus.Go(func() {
			p := make([]byte, 1)
			for range 2000 {
				p[0] = 1
				if !b.Read(0x80, p) || p[0] != 0 {
					t.Error("a range that stays mapped was not found")
					return
				}
				b.Write(0x90, p)
			}
		})
	}
	for range 500 {
		if err := b.Map(0x90, 4, Ignore{}); err != nil {
			t.Error(err)
		}
		if err := b.Map(0x70, 2, Ignore{}); err != nil {
			t.Error(err)
		}
		b.Unmap(0x70)
		b.Unmap(0x90)
	}
	vcpus.Wait()
}

func TestBusAllocatesNothing(t *testing.T) {
	b := NewBus("port")
	for port := uint64(0); port < 0x400; port += 0x20 {
		if err := b.Map(port, 8, Ignore{}); err != nil {
			t.Fatal(err)
		}
	}
	p := make([]byte, 4)
	if n := testing.AllocsPerRun(1000, func() {
		b.Write(0x80, p)
		b.Read(0x80, p)
		b.Read(0x90, p)
	}); n != 0 {
		t.Errorf("%v allocations a run", n)
	}
}
