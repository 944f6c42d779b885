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
	fail     error // guarded by mu
}

func (m *memNode) each(bufs [][]byte, off int64, f func(disk, buf []byte)) error {
	m.mu.Lock()
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
	m.mu.Lock()
	defer m.mu.Unlock()
	m.flushes++
	return m.fail
}

func (m *memNode) Discard(off, n int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.discards++
	return m.fail
}

func (m *memNode) WriteZeroes(off, n int64, unmap bool) error {
	m.mu.Lock()
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
