package capture

import (
	"encoding/binary"
	"slices"
	"sync/atomic"
	"testing"
)

// FuzzPlan: whatever an order says, each page that is to be saved comes once:
// first those of the order, then the others by their number.
func FuzzPlan(f *testing.F) {
	pfns := func(pfns ...uint64) (b []byte) {
		for _, p := range pfns {
			b = binary.LittleEndian.AppendUint64(b, p)
		}
		return b
	}
	f.Add([]byte{}, []byte{})
	f.Add(pfns(1, 2, 3, 70, 2, 1, 1<<20, 1<<20+69, 1<<20+70, ^uint64(0), 1<<52), []byte{0xff, 0x0f})
	f.Add(pfns(99, 98, 1<<20+1, 100), []byte{0, 0, 0, 0, 0, 0, 0, 0, 0xaa, 0xff, 0, 0, 0, 0x81})
	f.Fuzz(func(t *testing.T, order, notToSave []byte) {
		c := &Capture{regions: []region{{firstPFN: 0, firstIndex: 0, pages: 100}, {firstPFN: 1 << 20, firstIndex: 100, pages: 70}}}
		c.pages.init(make([]atomic.Uint32, 170), &Side{bytes: make([]byte, pageSize)})
		var want []uint32
		toSave := map[uint64]bool{}
		for i := range uint64(170) {
			if int(i/8) >= len(notToSave) || notToSave[i/8]>>(i%8)&1 == 0 {
				c.pages.state[i].Store(pending)
				toSave[i] = true
			}
		}
		var list []uint64
		for ; len(order) >= 8; order = order[8:] {
			pfn := binary.LittleEndian.Uint64(order)
			list = append(list, pfn)
			i := pfn
			if pfn >= 1<<20 {
				i = pfn - 1<<20 + 100
			} else if pfn >= 100 {
				continue
			}
			if toSave[i] {
				want = append(want, uint32(i))
				delete(toSave, i)
			}
		}
		for i := range uint64(170) {
			if toSave[i] {
				want = append(want, uint32(i))
			}
		}
		s := &sweep{Capture: c}
		s.plan(list)
		if !slices.Equal(s.sequence, want) {
			t.Errorf("sequence %d, want %d", s.sequence, want)
		}
		for n, i := range s.sequence {
			if s.position[i] != uint32(n+1) {
				t.Errorf("page %d is at %d, and said to be at %d", i, n, s.position[i])
			}
		}
		if len(s.claimed)*BlockPages < len(want) {
			t.Errorf("%d blocks for %d pages", len(s.claimed), len(want))
		}
	})
}
