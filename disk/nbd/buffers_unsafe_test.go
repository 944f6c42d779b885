package nbd

import (
	"math/rand/v2"
	"testing"
	"unsafe"
)

// Buffers that are in use do not overlap, begin where direct requests may, and take
// no more chunks than they need.
func TestBuffers(t *testing.T) {
	random := rand.New(rand.NewPCG(6, 7))
	var s chunks
	type held struct {
		*buffer
		mark byte
	}
	var all []held
	ends := func(h held) []*byte {
		return []*byte{&h.bytes[0], &h.bytes[len(h.bytes)/2], &h.bytes[len(h.bytes)-1]}
	}
	giveBack := func(i int) {
		for _, b := range ends(all[i]) {
			if *b != all[i].mark {
				t.Fatalf("a buffer of %d bytes holds what was written to another", len(all[i].bytes))
			}
		}
		s.put(all[i].buffer)
		all[i] = all[len(all)-1]
		all = all[:len(all)-1]
	}
	for range 20_000 {
		if len(all) > 0 && (len(all) > 40 || random.IntN(2) == 0) {
			giveBack(random.IntN(len(all)))
			continue
		}
		size := 128 << 10 << random.IntN(9)
		h := held{s.get(size), byte(random.Uint32())}
		if len(h.bytes) != size || uintptr(unsafe.Pointer(&h.bytes[0]))%4096 != 0 {
			t.Fatalf("%d bytes at %p for %d", len(h.bytes), &h.bytes[0], size)
		}
		for _, b := range ends(h) {
			*b = h.mark
		}
		all = append(all, h)
	}
	for len(all) > 0 {
		giveBack(0)
	}
	spare := 0
	for _, c := range s.all {
		spare += len(c.bytes)
	}
	if spare != s.spare || spare > maxSpare {
		t.Errorf("%d bytes are spare, %d are counted", spare, s.spare)
	}
	s.trim()
	s.trim()
	if len(s.all) > 0 || s.spare != 0 {
		t.Errorf("%d chunks are left, %d bytes", len(s.all), s.spare)
	}
	for range chunkParts {
		s.get(chunkSize / chunkParts)
	}
	if len(s.all) != 1 {
		t.Errorf("%d chunks for what one holds", len(s.all))
	}
}
