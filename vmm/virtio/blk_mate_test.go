package virtio

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"runtime"
	"testing"
)

// largeGuest is a guest whose requests are large, of a disk whose do not wait for a device.
type largeGuest struct {
	*laneGuest
	indirect bool // the device takes indirect tables
}

func newLargeGuest(t *testing.T, features uint64, cfg BlkConfig) *largeGuest {
	t.Helper()
	if runtime.NumCPU() == 1 {
		t.Skip("the host has one processor")
	}
	g := newLaneGuest(t, laneKind{features: features}, cfg)
	g.disk.waits.Store(false)
	return &largeGuest{g, features&FeatureIndirectDesc != 0}
}

// add makes requests available, and kicks once for all of them. Each is for blkLarge bytes
// at as many times its tag, in two buffers.
func (g *largeGuest) add(kind uint32, tags ...int) {
	g.t.Helper()
	for _, tag := range tags {
		at := g.place(tag)
		if err := g.mem.Write(at, le.AppendUint64(le.AppendUint32(le.AppendUint32(nil, kind), 0), uint64(tag)*blkLarge/blkSector)); err != nil {
			g.t.Fatal(err)
		}
		data, in := g.data(tag), kind == blkIn
		if !g.drv.add([]segment{{at, 16, false}, {data, 4096, in}, {data + 4096, blkLarge - 4096, in}, {at + 16, 1, true}}, g.indirect, tag) {
			g.t.Fatal("ring is full")
		}
	}
	if g.drv.wantsKick() {
		g.kick(0)
	}
}

// written is the disk's content, after the first n requests were written from guest memory.
func (g *largeGuest) written(n int, content []byte) []byte {
	if err := g.mem.Read(g.data(0), content[:n*blkLarge]); err != nil {
		g.t.Fatal(err)
	}
	return content
}

// data is where a request's data lies.
func (g *largeGuest) data(tag int) uint64 { return 4<<20 + uint64(tag)*blkLarge }

// reapAll waits for n requests and compares with want, the disk's content or what it shall be.
func (g *largeGuest) reapAll(n int, want []byte) {
	g.t.Helper()
	got, status := make([]byte, blkLarge), make([]byte, 1)
	for range n {
		tag, _ := g.reap(g.drv, 0)
		if err := errors.Join(g.mem.Read(g.data(tag), got), g.mem.Read(g.place(tag)+16, status)); err != nil {
			g.t.Fatal(err)
		}
		if status[0] != blkOK || !bytes.Equal(got, want[tag*blkLarge:][:blkLarge]) {
			g.t.Fatalf("request %d: status %d, or other data", tag, status[0])
		}
	}
}

// Two large reads are served at a time; one that comes alone, small ones, writes, and those
// of a device that serves one at a time, by the worker.
func TestBlkLargeInPairs(t *testing.T) {
	for ring, features := range ringKinds {
		t.Run(ring, func(t *testing.T) {
			g := newLargeGuest(t, features, BlkConfig{Depth: 64})
			want := g.node.content(0, 1<<20)
			g.disk.set(true)
			for tag := range 20 {
				g.laneGuest.add(blkIn, tag, uint64(tag))
			}
			g.reapReads(20)
			g.add(blkIn, 0)
			g.reapAll(1, want)
			g.add(blkOut, 0, 1, 2, 3)
			g.reapAll(4, g.written(4, want))
			g.pci.Pause()
			if g.blk.lanes[0].mate.wake != nil {
				t.Error("requests that need no goroutine have one")
			}
			g.pci.Resume()
			for range 3 {
				g.disk.set(false)
				g.add(blkIn, 0, 1, 2, 3, 4, 5, 6, 7)
				g.disk.await(2)
				g.disk.set(true)
				g.reapAll(8, want)
			}
			if most, begun := g.disk.counts(); most != 2 || begun != 25+3*8 {
				t.Errorf("%d requests at a time, %d in all", most, begun)
			}
		})
	}
	g := newLargeGuest(t, allFeatures, BlkConfig{})
	g.disk.set(true)
	g.add(blkIn, 0, 1, 2, 3, 4, 5, 6, 7)
	g.reapAll(8, g.node.content(0, 1<<20))
	if most, begun := g.disk.counts(); most != 1 || begun != 8 {
		t.Errorf("%d requests at a time, %d in all", most, begun)
	}
}

// A device that is to pause waits for the requests that were taken from the queue, and
// takes no more.
func TestBlkLargePause(t *testing.T) {
	g := newLargeGuest(t, allFeatures, BlkConfig{Depth: 64})
	want := g.node.content(0, 1<<20)
	g.add(blkIn, 0, 1, 2, 3, 4, 5, 6, 7)
	g.disk.await(2)
	paused := make(chan struct{})
	go func() {
		defer close(paused)
		g.pci.Pause()
	}()
	g.held()
	select {
	case <-paused:
		t.Fatal("paused with requests under way")
	default:
	}
	g.disk.set(true)
	<-paused
	_, begun := g.disk.counts()
	if begun < 2 || begun > blkAhead+2 {
		t.Errorf("%d requests were served, of which %d were taken ahead at most", begun, blkAhead)
	}
	g.reapAll(begun, want)
	if g.drv.hasUsed() {
		t.Error("something was served while paused")
	}
	g.pci.Resume()
	g.reapAll(8-begun, want)
}

// A request that breaks the device does not keep others from ending.
func TestBlkLargeBroken(t *testing.T) {
	g := newLargeGuest(t, allFeatures, BlkConfig{Depth: 64})
	g.add(blkIn, 0, 1, 2)
	g.disk.await(2)
	at := g.place(9)
	g.drv.add([]segment{{at, 16, false}, {g.data(0), blkLarge, false}}, true, 9) // no place for a status
	g.add(blkIn, 3)
	g.disk.set(true)
	for data := range g.msi.arrived {
		if data == 0x40 { // configuration
			break
		}
	}
	g.pci.Pause()
	g.guest.mu.Lock()
	defer g.guest.mu.Unlock()
	if len(g.broken) != 1 || !errors.Is(g.broken[0], ErrBlk) {
		t.Errorf("reported %v", g.broken)
	}
	for n := 0; n < 3; n++ {
		if _, _, ok := g.drv.used(); !ok {
			t.Fatalf("%d requests ended of 3 that came before", n)
		}
	}
}

// A disk is what an array of bytes is, whoever serves a request, while the machine is paused
// and goes on.
func TestBlkLargeModel(t *testing.T) {
	for ring, features := range ringKinds {
		t.Run(ring, func(t *testing.T) {
			g := newLargeGuest(t, features, BlkConfig{Depth: 64})
			g.disk.set(true)
			want := g.node.content(0, 1<<20)
			stop := pauseOften(g.pci)
			rng := rand.New(rand.NewPCG(1, 2))
			fill := rand.NewChaCha8([32]byte{3})
			for range 30 {
				var reads, writes []int
				for tag := range 8 {
					switch rng.IntN(3) {
					case 0:
						reads = append(reads, tag)
					case 1:
						writes = append(writes, tag)
						fill.Read(want[tag*blkLarge:][:blkLarge])
						if err := g.mem.Write(g.data(tag), want[tag*blkLarge:][:blkLarge]); err != nil {
							t.Fatal(err)
						}
					}
				}
				g.add(blkOut, writes...)
				g.laneGuest.add(blkFlush, 20, 0)
				g.add(blkIn, reads...)
				for n := len(reads) + len(writes) + 1; n > 0; n-- {
					tag, _ := g.reap(g.drv, 0)
					if tag == 20 {
						continue
					}
					got := make([]byte, blkLarge)
					if err := g.mem.Read(g.data(tag), got); err != nil || !bytes.Equal(got, want[tag*blkLarge:][:blkLarge]) {
						t.Fatalf("request %d: other data (%v)", tag, err)
					}
				}
			}
			stop()
			if !bytes.Equal(g.node.content(0, 1<<20), want) {
				t.Error("the disk holds something else")
			}
		})
	}
}

func TestBlkLargeDoesNotAllocate(t *testing.T) {
	if extra := blkAllocations(t, &memNode{data: make([]byte, 1<<20)}, 16, blkLarge); extra > 1 {
		t.Errorf("%v allocations for 16 requests", extra)
	}
}
