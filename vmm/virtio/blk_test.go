package virtio

import (
	"bytes"
	"errors"
	"sync"
	"testing"

	"github.com/gnomon-vmm/gnomon/disk/block"
)

// memNode is a disk in memory that records what is asked of it.
type memNode struct {
	mu       sync.Mutex
	data     []byte // guarded by mu
	flushes  int    // guarded by mu
	discards int    // guarded by mu
	unmaps   int    // guarded by mu
	readOnly bool
	fail     error  // guarded by mu
	called   func() // at each request, where not nil
}

// lock begins a request.
func (m *memNode) lock() {
	if m.called != nil {
		m.called()
	}
	m.mu.Lock()
}

func (m *memNode) each(bufs [][]byte, off int64, f func(disk, buf []byte)) error {
	m.lock()
	defer m.mu.Unlock()
	if m.fail != nil {
		return m.fail
	}
	for _, b := range bufs {
		if off < 0 || off+int64(len(b)) > int64(len(m.data)) {
			return block.ErrOutOfRange
		}
		f(m.data[off:off+int64(len(b))], b)
		off += int64(len(b))
	}
	return nil
}

func (m *memNode) Readv(bufs [][]byte, off int64) error {
	return m.each(bufs, off, func(disk, buf []byte) { copy(buf, disk) })
}

func (m *memNode) Writev(bufs [][]byte, off int64) error {
	return m.each(bufs, off, func(disk, buf []byte) { copy(disk, buf) })
}

func (m *memNode) Flush() error {
	m.lock()
	defer m.mu.Unlock()
	m.flushes++
	return m.fail
}

func (m *memNode) Discard(off, n int64) error {
	m.lock()
	defer m.mu.Unlock()
	m.discards++
	return m.fail
}

func (m *memNode) WriteZeroes(off, n int64, unmap bool) error {
	m.lock()
	defer m.mu.Unlock()
	if unmap {
		m.unmaps++
	}
	clear(m.data[off : off+n])
	return m.fail
}

// content is a copy of a part of the disk.
func (m *memNode) content(off uint64, n int) []byte {
	m.mu.Lock()
	defer m.mu.Unlock()
	return bytes.Clone(m.data[off:][:n])
}

// count reads one of the counters.
func (m *memNode) count(n *int) int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return *n
}

func (m *memNode) Size() int64      { return int64(len(m.data)) }
func (m *memNode) ReadOnly() bool   { return m.readOnly }
func (m *memNode) Info() block.Info { return block.Info{Format: "memory", VirtualSize: m.Size()} }
func (m *memNode) Close() error     { return nil }

var errDisk = errors.New("disk on fire")

const allFeatures = FeatureVersion1 | FeatureEventIdx | FeatureIndirectDesc | FeatureRingPacked

// ringKinds are the feature sets that make a difference to a ring.
var ringKinds = map[string]uint64{
	"split":        FeatureVersion1,
	"split,event":  FeatureVersion1 | FeatureEventIdx | FeatureIndirectDesc,
	"packed":       FeatureVersion1 | FeatureRingPacked | FeatureIndirectDesc,
	"packed,event": allFeatures,
}

// blkGuest is a guest with a block device and a driver for its first queue.
type blkGuest struct {
	*guest
	node *memNode
	blk  *Blk
	drv  *driver
	heap uint64 // free guest memory
}

func newBlkGuest(t testing.TB, features uint64, cfg BlkConfig) *blkGuest {
	t.Helper()
	node, _ := cfg.Node.(*memNode)
	if node == nil {
		node = &memNode{data: make([]byte, 1<<20)}
		cfg.Node = node
	}
	blk, err := NewBlk(cfg)
	if err != nil {
		t.Fatal(err)
	}
	b := &blkGuest{guest: newGuest(t, blk), node: node, blk: blk}
	b.drv, b.heap = newDriver(b.mem, 0x10000, 64, features)
	b.start(features|BlkFeatureFlush|BlkFeatureConfigWCE, b.drv)
	return b
}

// request performs one request with the data in two buffers of guest memory,
// the header split in an odd place, and returns status and data.
func (b *blkGuest) request(kind uint32, sector uint64, data []byte, in bool) (byte, []byte) {
	b.t.Helper()
	header := le.AppendUint64(le.AppendUint32(le.AppendUint32(nil, kind), 0), sector)
	at := b.heap
	if err := b.mem.Write(at, header); err != nil {
		b.t.Fatal(err)
	}
	segs := []segment{{at, 5, false}, {at + 5, 11, false}}
	at += 64
	dataAt := at
	if err := b.mem.Write(at, data); err != nil {
		b.t.Fatal(err)
	}
	if cut := uint32(len(data) / 3); cut > 0 {
		segs = append(segs, segment{at, cut, in})
		segs = append(segs, segment{at + uint64(cut), uint32(len(data)) - cut, in})
	}
	at += uint64(len(data))
	if err := b.mem.Write(at, []byte{0xEE}); err != nil {
		b.t.Fatal(err)
	}
	segs = append(segs, segment{at, 1, true})
	if !b.drv.add(segs, false, 1) {
		b.t.Fatal("ring is full")
	}
	if b.drv.wantsKick() {
		b.kick(0)
	}
	b.reap(b.drv, 0)
	got := make([]byte, len(data)+1)
	if err := b.mem.Read(dataAt, got); err != nil {
		b.t.Fatal(err)
	}
	return got[len(data)], got[:len(data)]
}

func pattern(n int, seed byte) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(i)*7 + byte(i>>8) + seed
	}
	return p
}

func TestBlkReadsWhatItWrote(t *testing.T) {
	for name, features := range ringKinds {
		t.Run(name, func(t *testing.T) {
			b := newBlkGuest(t, features, BlkConfig{Serial: "gnomon-1"})
			for i := range 200 {
				want := pattern(512*(1+i%9), byte(i))
				sector := uint64(i * 8 % 1024)
				if s, _ := b.request(blkOut, sector, want, false); s != blkOK {
					t.Fatalf("write %d: status %d", i, s)
				}
				if got := b.node.content(sector*512, len(want)); !bytes.Equal(got, want) {
					t.Fatalf("write %d: disk holds other data", i)
				}
				s, got := b.request(blkIn, sector, make([]byte, len(want)), true)
				if s != blkOK || !bytes.Equal(got, want) {
					t.Fatalf("read %d: status %d, data equal: %v", i, s, bytes.Equal(got, want))
				}
			}
			if s, _ := b.request(blkFlush, 0, nil, false); s != blkOK || b.node.count(&b.node.flushes) != 1 {
				t.Errorf("flush: status %d, %d flushes", s, b.node.count(&b.node.flushes))
			}
			if s, id := b.request(blkGetID, 0, make([]byte, 20), true); s != blkOK || string(id[:9]) != "gnomon-1\x00" {
				t.Errorf("id: status %d, %q", s, id)
			}
			st := b.blk.Stats()
			if st.Read.Ops != 200 || st.Write.Ops != 200 || st.Flush.Ops != 1 || st.Read.Bytes != st.Write.Bytes {
				t.Errorf("statistics: %+v", st)
			}
		})
	}
}

func TestBlkConfiguration(t *testing.T) {
	b := newBlkGuest(t, allFeatures, BlkConfig{Queues: 4, QueueSize: 128, BlockSize: 4096})
	for _, c := range []struct {
		name   string
		off, n int
		want   uint64
	}{
		{"capacity", 0, 8, 2048},
		{"seg_max", 12, 4, 126},
		{"blk_size", 20, 4, 4096},
		{"physical block exponent", 24, 1, 0},
		{"writeback", 32, 1, 1},
		{"num_queues", 34, 2, 4},
		{"max_discard_sectors", 36, 4, blkMaxRangeSectors},
		{"max_discard_seg", 40, 4, blkMaxRanges},
		{"discard alignment", 44, 4, 8},
		{"max_write_zeroes_seg", 52, 4, blkMaxRanges},
		{"may unmap", 56, 1, 1},
		{"behind the end", 60, 4, 0},
	} {
		if got := b.read(barDevice+uint64(c.off), c.n); got != c.want {
			t.Errorf("%s: %d, want %d", c.name, got, c.want)
		}
	}
	if f := b.blk.Features(); f&BlkFeatureMultiQueue == 0 || f&BlkFeatureReadOnly != 0 {
		t.Errorf("features %#x", f)
	}
	for _, bad := range []BlkConfig{
		{},
		{Node: b.node, Queues: 65},
		{Node: b.node, Queues: -1},
		{Node: b.node, QueueSize: 100},
		{Node: b.node, QueueSize: 2048},
		{Node: b.node, BlockSize: 1024},
		{Node: b.node, Serial: "a serial of more than twenty bytes"},
	} {
		if _, err := NewBlk(bad); !errors.Is(err, ErrBlk) {
			t.Errorf("%+v: error %v", bad, err)
		}
	}
}

// ranges is the data of a discard or write-zeroes request.
func rangeData(r ...[3]uint64) []byte {
	var b []byte
	for _, x := range r {
		b = le.AppendUint32(le.AppendUint32(le.AppendUint64(b, x[0]), uint32(x[1])), uint32(x[2]))
	}
	return b
}

func TestBlkRefusals(t *testing.T) {
	b := newBlkGuest(t, allFeatures, BlkConfig{})
	end := uint64(2048)
	for _, c := range []struct {
		name   string
		kind   uint32
		sector uint64
		data   []byte
		in     bool
		want   byte
	}{
		{"last sector", blkIn, end - 1, make([]byte, 512), true, blkOK},
		{"read past the end", blkIn, end - 1, make([]byte, 1024), true, blkIOErr},
		{"read behind the end", blkIn, end, make([]byte, 512), true, blkIOErr},
		{"read at a sector whose offset overflows", blkIn, 1 << 55, make([]byte, 512), true, blkIOErr},
		{"read at the last sector number", blkIn, ^uint64(0), make([]byte, 512), true, blkIOErr},
		{"read of half a sector", blkIn, 0, make([]byte, 256), true, blkIOErr},
		{"read of nothing", blkIn, 0, nil, true, blkOK},
		{"write past the end", blkOut, end - 1, make([]byte, 1024), false, blkIOErr},
		{"write of a sector and a bit", blkOut, 0, make([]byte, 515), false, blkIOErr},
		{"id into too little", blkGetID, 0, make([]byte, 12), true, blkIOErr},
		{"unknown", 77, 0, make([]byte, 512), true, blkUnsup},
		{"discard", blkDiscard, 0, rangeData([3]uint64{0, 8, 0}, [3]uint64{8, 8, 0}), false, blkOK},
		{"discard with a flag", blkDiscard, 0, rangeData([3]uint64{0, 8, 1}), false, blkUnsup},
		{"discard past the end", blkDiscard, 0, rangeData([3]uint64{end - 1, 2, 0}), false, blkIOErr},
		{"discard far past the end", blkDiscard, 0, rangeData([3]uint64{^uint64(0), 0xFFFF_FFFF, 0}), false, blkIOErr},
		{"discard of half a range", blkDiscard, 0, make([]byte, 24), false, blkIOErr},
		{"discard of nothing", blkDiscard, 0, nil, false, blkIOErr},
		{"discard of too many", blkDiscard, 0, make([]byte, 16*(blkMaxRanges+1)), false, blkIOErr},
		{"zeroes with unmap", blkWriteZeroes, 0, rangeData([3]uint64{0, 8, 1}), false, blkOK},
		{"zeroes with an unknown flag", blkWriteZeroes, 0, rangeData([3]uint64{0, 8, 2}), false, blkUnsup},
		{"zeroes past the end", blkWriteZeroes, 0, rangeData([3]uint64{end, 1, 0}), false, blkIOErr},
	} {
		if got, _ := b.request(c.kind, c.sector, c.data, c.in); got != c.want {
			t.Errorf("%s: status %d, want %d", c.name, got, c.want)
		}
	}
	if b.node.count(&b.node.discards) != 2 || b.node.count(&b.node.unmaps) != 1 {
		t.Errorf("%d discards, %d unmaps", b.node.discards, b.node.unmaps)
	}
	if len(b.broken) != 0 {
		t.Errorf("device broke: %v", b.broken)
	}
}

func TestBlkReadOnly(t *testing.T) {
	for name, cfg := range map[string]BlkConfig{
		"by configuration": {ReadOnly: true},
		"by its node":      {Node: &memNode{data: make([]byte, 1<<20), readOnly: true}},
	} {
		b := newBlkGuest(t, allFeatures, cfg)
		if f := b.blk.Features(); f&BlkFeatureReadOnly == 0 || f&(BlkFeatureDiscard|BlkFeatureWriteZeroes) != 0 {
			t.Errorf("%s: features %#x", name, f)
		}
		before := b.node.content(0, 4096)
		for _, kind := range []uint32{blkOut, blkDiscard, blkWriteZeroes} {
			data := rangeData([3]uint64{0, 1, 0})
			if kind == blkOut {
				data = pattern(512, 9)
			}
			if s, _ := b.request(kind, 0, data, false); s != blkIOErr {
				t.Errorf("%s: request %d: status %d", name, kind, s)
			}
		}
		if !bytes.Equal(before, b.node.content(0, 4096)) {
			t.Errorf("%s: disk changed", name)
		}
		if s, _ := b.request(blkIn, 0, make([]byte, 512), true); s != blkOK {
			t.Errorf("%s: read: status %d", name, s)
		}
	}
}

func TestBlkReportsErrors(t *testing.T) {
	type report struct {
		op  BlkOp
		err error
	}
	reports := make(chan report, 10)
	b := newBlkGuest(t, allFeatures, BlkConfig{OnIOError: func(op BlkOp, err error) BlkAction {
		reports <- report{op, err}
		return BlkReport
	}})
	b.node.mu.Lock()
	b.node.fail = errDisk
	b.node.mu.Unlock()
	for _, c := range []struct {
		kind uint32
		data []byte
		op   BlkOp
	}{
		{blkIn, make([]byte, 512), BlkRead},
		{blkOut, make([]byte, 512), BlkWrite},
		{blkFlush, nil, BlkFlush},
		{blkDiscard, rangeData([3]uint64{0, 1, 0}), BlkDiscard},
		{blkWriteZeroes, rangeData([3]uint64{0, 1, 0}), BlkWriteZeroes},
	} {
		if s, _ := b.request(c.kind, 0, c.data, c.kind == blkIn); s != blkIOErr {
			t.Errorf("%s: status %d", c.op, s)
		}
		if r := <-reports; r.op != c.op || !errors.Is(r.err, errDisk) {
			t.Errorf("%s: reported %s: %v", c.op, r.op, r.err)
		}
	}
	// A refused request is the guest's error, not the disk's.
	b.request(blkIn, 1<<40, make([]byte, 512), true)
	s := b.blk.Stats()
	for name, o := range map[string]BlkOpStats{"read": s.Read, "write": s.Write, "flush": s.Flush, "discard": s.Discard, "zeroes": s.WriteZeroes} {
		if o.Failed != 1 || o.Ops != 0 {
			t.Errorf("%s: %+v", name, o)
		}
	}
	if s.Read.Invalid != 1 || len(reports) != 0 {
		t.Errorf("refused request: %+v, %d reports", s.Read, len(reports))
	}
}

func TestBlkWriteThrough(t *testing.T) {
	b := newBlkGuest(t, allFeatures, BlkConfig{})
	write := func() int {
		before := b.node.count(&b.node.flushes)
		if s, _ := b.request(blkOut, 0, make([]byte, 512), false); s != blkOK {
			t.Fatalf("status %d", s)
		}
		return b.node.count(&b.node.flushes) - before
	}
	if write() != 0 {
		t.Error("flush after a write with the cache on")
	}
	b.write(barDevice+blkConfigWriteback, 1, 0)
	if b.read(barDevice+blkConfigWriteback, 1) != 0 || write() != 1 {
		t.Error("no flush after a write with the cache off")
	}
	// The choice survives a checkpoint, and ends with a reset.
	s := b.blk.State()
	for _, state := range []BlkState{{Writeback: true}, s} { // the first as older ones are
		if err := b.blk.Restore(state); err != nil {
			t.Error(err)
		}
	}
	other, readOnly := s, !*s.ReadOnly
	other.Writeback, other.ReadOnly = !s.Writeback, &readOnly
	larger := s
	larger.Writeback, larger.Size = !s.Writeback, s.Size+512
	for _, state := range []BlkState{other, larger} {
		if err := b.blk.Restore(state); !errors.Is(err, ErrBlk) {
			t.Errorf("another disk than %+v: %v", state, err)
		}
	}
	if write() != 1 {
		t.Error("restore lost the cache mode")
	}
	// A driver that cannot flush gets durable writes.
	b.write(commonStatus, 1, 0) // the device lets go of the rings before they are made anew
	b.drv, _ = newDriver(b.mem, 0x10000, 64, FeatureVersion1)
	b.start(FeatureVersion1, b.drv)
	if b.read(barDevice+blkConfigWriteback, 1) != 1 || write() != 1 {
		t.Error("no flush after a write of a driver that cannot flush")
	}
	b.write(barDevice+blkConfigWriteback, 1, 0)
	if b.read(barDevice+blkConfigWriteback, 1) != 1 {
		t.Error("a driver that did not negotiate it changed the cache mode")
	}
}

func TestBlkBreaksWithoutAStatusByte(t *testing.T) {
	b := newBlkGuest(t, allFeatures, BlkConfig{})
	b.drv.add([]segment{{b.heap, 16, false}}, false, 1)
	b.kick(0)
	for data := range b.msi.arrived {
		if data == 0x40 {
			break
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.broken) != 1 || !errors.Is(b.broken[0], ErrBlk) {
		t.Errorf("reported %v", b.broken)
	}
}

func TestBlkShortHeader(t *testing.T) {
	b := newBlkGuest(t, allFeatures, BlkConfig{})
	for _, segs := range [][]segment{
		{{b.heap + 100, 1, true}},
		{{b.heap, 15, false}, {b.heap + 100, 1, true}},
	} {
		b.drv.add(segs, false, 1)
		if b.drv.wantsKick() {
			b.kick(0)
		}
		b.reap(b.drv, 0)
		var s [1]byte
		if _ = b.mem.Read(b.heap+100, s[:]); s[0] != blkIOErr {
			t.Errorf("status %d", s[0])
		}
	}
}

func TestBlkServesEveryQueue(t *testing.T) {
	node := &memNode{data: pattern(1<<20, 3)}
	blk, err := NewBlk(BlkConfig{Node: node, Queues: 4})
	if err != nil {
		t.Fatal(err)
	}
	g := newGuest(t, blk)
	var drivers []*driver
	heap := uint64(0x10000)
	for range 4 {
		var d *driver
		d, heap = newDriver(g.mem, heap, 64, allFeatures)
		drivers = append(drivers, d)
	}
	g.start(allFeatures|BlkFeatureMultiQueue, drivers...)
	for round := range 50 {
		for i, d := range drivers {
			for n := range 4 {
				at := heap + uint64(i*4+n)*0x1000
				header := le.AppendUint64(make([]byte, 8), uint64(round*16+i*4+n))
				_ = g.mem.Write(at, header)
				d.add([]segment{{at, 16, false}, {at + 512, 512, true}, {at + 1024, 1, true}}, true, n)
			}
			if d.wantsKick() {
				g.kick(i)
			}
		}
		for i, d := range drivers {
			for range 4 {
				tag, _ := g.reap(d, i)
				got := must(g.mem.Slice(heap+uint64(i*4+tag)*0x1000+512, 513))
				if want := node.content(uint64(round*16+i*4+tag)*512, 512); !bytes.Equal(got[:512], want) || got[512] != blkOK {
					t.Fatalf("queue %d: request %d: status %d or wrong data", i, tag, got[512])
				}
			}
		}
	}
}

func TestBlkRequestDoesNotAllocate(t *testing.T) {
	mem := testMemory(t)
	d, heap := newDriver(mem, 0x4000, 64, allFeatures)
	q := must(newQueue(mem, 0, allFeatures, &d.state))
	blk, err := NewBlk(BlkConfig{Node: &memNode{data: make([]byte, 1<<20)}})
	if err != nil {
		t.Fatal(err)
	}
	if err := blk.Start(allFeatures, []*Queue{q}, nil); err != nil {
		t.Fatal(err)
	}
	for _, kind := range []uint32{blkIn, blkOut, blkFlush, blkGetID} {
		_ = mem.Write(heap, le.AppendUint64(le.AppendUint64(nil, uint64(kind)), 0))
		add := func(n int) {
			for i := range n {
				if !d.add([]segment{{heap, 16, false}, {heap + 4096, 4096, kind == blkIn || kind == blkGetID}, {heap + 16, 1, true}}, true, i) {
					t.Fatal("ring is full")
				}
			}
		}
		drain := func() {
			for {
				if _, _, ok := d.used(); !ok {
					return
				}
			}
		}
		// Handle's loop, request by request.
		add(32)
		bq := blk.queues[0]
		if n := testing.AllocsPerRun(31, func() {
			if ok, err := q.Pop(&bq.chain); !ok || err != nil {
				t.Fatal(ok, err)
			}
			written, err := blk.request(bq)
			if err != nil {
				t.Fatal(err)
			}
			_ = q.Push(&bq.chain, written)
			q.Flush()
		}); n != 0 {
			t.Errorf("request %d: %v allocations", kind, n)
		}
		drain()
		if len(d.chains) != 0 {
			t.Fatalf("%d requests were not served", len(d.chains))
		}
	}
}
