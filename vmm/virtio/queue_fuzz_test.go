package virtio

import (
	"testing"

	"github.com/gnomon-vmm/gnomon/mm/guestmem"
)

// A fuzz input is two bytes, for features and queue size, and then the
// guest's memory from fuzzRing on, as the driver model lays it out there.
const (
	fuzzRing = 0x1000
	fuzzLen  = 0x500
	fuzzData = fuzzRing + 0x400 // where the seeds' requests are
	fuzzRAM  = 1 << 20
)

var fuzzFeatures = []uint64{
	FeatureVersion1,
	FeatureVersion1 | FeatureEventIdx | FeatureIndirectDesc,
	FeatureVersion1 | FeatureRingPacked,
	FeatureVersion1 | FeatureRingPacked | FeatureIndirectDesc | FeatureEventIdx,
}

// fuzzLayout is where the rings are for the first two bytes of an input.
func fuzzLayout(mem *guestmem.Memory, kind, size byte) (*driver, uint64, uint64) {
	features := fuzzFeatures[int(kind)%len(fuzzFeatures)]
	d, end := newDriverTables(mem, fuzzRing, 1<<(size%3+1), 4, features)
	return d, end, features
}

// addSeeds records what the driver model writes while it sends requests.
func addSeeds(f *testing.F, fill func(mem *guestmem.Memory, heap uint64) []segment) {
	for kind := range fuzzFeatures {
		for _, indirect := range []bool{false, true} {
			if indirect && fuzzFeatures[kind]&FeatureIndirectDesc == 0 {
				continue
			}
			mem := testMemory(f, guestmem.Range{GPA: 0, Size: fuzzRAM})
			d, end, _ := fuzzLayout(mem, byte(kind), 2)
			if end > fuzzData {
				f.Fatalf("rings end at %#x", end)
			}
			for i := 0; d.add(fill(mem, fuzzData+uint64(i)*0x800), indirect, i) && i < 3; i++ {
			}
			image := append([]byte{byte(kind), 2}, must(mem.Slice(fuzzRing, fuzzLen))...)
			f.Add(image)
		}
	}
}

// FuzzQueue has a driver write anything into the rings, and change it between
// one look of the device and the next.
func FuzzQueue(f *testing.F) {
	n := uint32(0)
	addSeeds(f, func(_ *guestmem.Memory, heap uint64) []segment {
		n++
		return []segment{{heap, 16, false}, {heap + 16, 100 * n, true}, {heap + 0x400, 1, true}}
	})
	f.Fuzz(func(t *testing.T, in []byte) {
		if len(in) < 2 {
			return
		}
		mem := testMemory(t, guestmem.Range{GPA: 0, Size: fuzzRAM})
		d, _, features := fuzzLayout(mem, in[0], in[1])
		image := in[2:min(len(in), 2+fuzzLen)]
		copy(must(mem.Slice(fuzzRing, fuzzLen)), image)
		q, err := newQueue(mem, 0, features, &d.state)
		if err != nil {
			t.Fatal(err)
		}
		interrupts := 0
		q.intr = func() { interrupts++ }
		var c Chain
		pushed := 0
		for i := range 64 {
			q.suppressKicks()
			ok, err := q.Pop(&c)
			if err != nil || !ok && !q.wantKicks() {
				break
			}
			if !ok {
				continue
			}
			if len(c.Read)+len(c.Write) > MaxChain {
				t.Fatalf("chain of %d buffers", len(c.Read)+len(c.Write))
			}
			for _, b := range c.Read {
				_ = b.Data[0] + b.Data[len(b.Data)-1]
			}
			for _, b := range c.Write {
				// As a device would, this writes over the rings too.
				b.Data[0] ^= byte(i)
				b.Data[len(b.Data)-1] ^= byte(i)
			}
			if i%5 == 4 {
				q.Undo(&c)
				continue
			}
			if err := q.Push(&c, uint32(i)); err != nil {
				t.Fatal(err)
			}
			pushed++
			q.Flush()
			if len(image) > 8 {
				at := int(image[i%len(image)]) * len(image) / 256
				must(mem.Slice(fuzzRing, fuzzLen))[at] ^= 1 << (i % 8)
			}
		}
		if interrupts > pushed {
			t.Fatalf("%d interrupts for %d chains", interrupts, pushed)
		}
	})
}

// FuzzBlk has a driver send anything to a block device. The first bytes
// behind the rings are the requests' memory.
func FuzzBlk(f *testing.F) {
	kinds := []uint32{blkIn, blkOut, blkFlush, blkGetID, blkDiscard, blkWriteZeroes, 99}
	for _, kind := range kinds {
		addSeeds(f, func(mem *guestmem.Memory, _ uint64) []segment {
			at := uint64(fuzzData)
			header := le.AppendUint64(le.AppendUint32(le.AppendUint32(nil, kind), 0), 8)
			data := le.AppendUint32(le.AppendUint32(le.AppendUint64(nil, 16), 8), 0)
			_ = mem.Write(at, append(header, data...))
			in := kind == blkIn || kind == blkGetID
			n := map[uint32]uint32{blkDiscard: 16, blkWriteZeroes: 16, blkFlush: 0}[kind]
			if kind == blkIn || kind == blkOut || kind == blkGetID {
				n = 512
			}
			return []segment{{at, 16, false}, {at + 16, n, in}, {at + 0x800, 1, true}}
		})
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		if len(in) < 2 {
			return
		}
		mem := testMemory(t, guestmem.Range{GPA: 0, Size: fuzzRAM})
		d, _, features := fuzzLayout(mem, in[0], in[1])
		copy(must(mem.Slice(fuzzRing, fuzzLen)), in[2:])
		q := must(newQueue(mem, 0, features, &d.state))
		node := &memNode{data: make([]byte, 64<<10)}
		blk, err := NewBlk(BlkConfig{Node: node, ReadOnly: in[0]&0x80 != 0})
		if err != nil {
			t.Fatal(err)
		}
		if err := blk.Start(features|BlkFeatureFlush, []*Queue{q}, nil); err != nil {
			t.Fatal(err)
		}
		// A request may lie over the rings, and so make more requests.
		q.gate = newGate()
		calls := 0
		node.called = func() { calls++; q.gate.hold.Store(calls > 1000) }
		_ = blk.Handle(q)
		if s := blk.Stats(); in[0]&0x80 != 0 && s.Write.Ops+s.Discard.Ops+s.WriteZeroes.Ops > 0 {
			t.Fatalf("read-only disk was changed: %+v", s)
		}
	})
}
