package virtio

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/disk/aio"
	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/qcow2"
	"github.com/gnomon-vmm/gnomon/disk/raw"
	"github.com/gnomon-vmm/gnomon/mm/guestmem"
)

// waitingNode is a node whose requests wait for a device, which the test plays.
type waitingNode struct {
	*memNode
	waits   atomic.Bool
	mu      sync.Mutex
	changed sync.Cond // of anything below
	open    bool      // requests go through; guarded by mu
	under   int       // requests under way; guarded by mu
	most    int       // of those, ever; guarded by mu
	begun   int       // requests, ever; guarded by mu

	// Reads that were started wait for bytes of the pipe; reader is -1 where none are.
	reader atomic.Int32
	writer int
	piped  int // reads that wait; guarded by mu
}

// newWaitingNode returns a node that is a block.Starter of reads, or none.
func newWaitingNode(t *testing.T, starts bool) *waitingNode {
	w := &waitingNode{memNode: &memNode{data: pattern(1<<20, 3)}}
	w.reader.Store(-1)
	w.changed.L = &w.mu
	w.waits.Store(true)
	if starts {
		var p [2]int
		if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
			t.Fatal(err)
		}
		w.reader.Store(int32(p[0]))
		w.writer = p[1]
		t.Cleanup(func() { unix.Close(p[0]); unix.Close(p[1]) })
	}
	return w
}

// Start implements block.Starter.
func (w *waitingNode) Start(r *block.Request, _ block.Node) bool {
	reader := int(w.reader.Load())
	if reader < 0 || r.Write || !r.Enter(w, 0) {
		return false
	}
	if !r.Ring.Start(r, reader) {
		r.Leave()
		return false
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.begin()
	w.piped++
	w.release()
	return true
}

// Ended implements block.Ender: it puts the disk's content in the place of the pipe's.
func (w *waitingNode) Ended(r *block.Request, _ int64, err error) {
	if err == nil {
		_ = w.memNode.Readv(r.Bufs, r.Off)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.under--
}

var blankSector = make([]byte, 512)

// release has the reads that were started end, if requests go through. Preconditions:
// mu is held.
func (w *waitingNode) release() {
	for ; w.open && w.piped > 0; w.piped-- {
		_, _ = unix.Write(w.writer, blankSector)
	}
}

func (w *waitingNode) Waits() bool { return w.waits.Load() }

// begin counts a request. Preconditions: mu is held.
func (w *waitingNode) begin() {
	w.under++
	w.begun++
	w.most = max(w.most, w.under)
	w.changed.Broadcast()
}

func (w *waitingNode) wait() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.begin()
	for !w.open {
		w.changed.Wait()
	}
	w.under--
}

func (w *waitingNode) Readv(bufs [][]byte, off int64) error {
	w.wait()
	return w.memNode.Readv(bufs, off)
}

func (w *waitingNode) Writev(bufs [][]byte, off int64) error {
	w.wait()
	return w.memNode.Writev(bufs, off)
}

// await returns when so many requests are under way.
func (w *waitingNode) await(n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for w.under < n {
		w.changed.Wait()
	}
}

// set has requests go through, or wait.
func (w *waitingNode) set(open bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.open = open
	w.changed.Broadcast()
	w.release()
}

// counts are the most requests that were under way, and all.
func (w *waitingNode) counts() (most, begun int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.most, w.begun
}

// laneGuest is a guest whose disk serves requests side by side.
type laneGuest struct {
	*blkGuest
	disk *waitingNode
}

func newLaneGuest(t *testing.T, kind laneKind, cfg BlkConfig) *laneGuest {
	t.Helper()
	disk := newWaitingNode(t, kind.starts)
	cfg.Node = disk
	blk, err := NewBlk(cfg)
	if err != nil {
		t.Fatal(err)
	}
	b := &blkGuest{guest: newGuest(t, blk), node: disk.memNode, blk: blk}
	t.Cleanup(func() { disk.set(true) }) // before the transport is closed
	g := &laneGuest{b, disk}
	g.boot(kind.features)
	return g
}

// boot has a new driver start the device.
func (g *laneGuest) boot(features uint64) {
	g.t.Helper()
	g.drv, g.heap = newDriver(g.mem, 0x10000, 128, features)
	g.start(features|BlkFeatureFlush|BlkFeatureConfigWCE, g.drv)
}

// place is where a request's header, data and status lie.
func (g *laneGuest) place(tag int) uint64 { return g.heap + uint64(tag)*2048 }

// add makes a request for one sector available, and kicks as a driver does.
func (g *laneGuest) add(kind uint32, tag int, sector uint64) {
	g.t.Helper()
	at := g.place(tag)
	if err := g.mem.Write(at, le.AppendUint64(le.AppendUint32(le.AppendUint32(nil, kind), 0), sector)); err != nil {
		g.t.Fatal(err)
	}
	if !g.drv.add([]segment{{at, 16, false}, {at + 512, 512, kind == blkIn}, {at + 1024, 1, true}}, false, tag) {
		g.t.Fatal("ring is full")
	}
	if g.drv.wantsKick() {
		g.kick(0)
	}
}

// reapReads waits for n reads, of the sectors that their tags name.
func (g *laneGuest) reapReads(n int) {
	g.t.Helper()
	got := make([]byte, 513)
	for range n {
		tag, _ := g.reap(g.drv, 0)
		if err := g.mem.Read(g.place(tag)+512, got); err != nil {
			g.t.Fatal(err)
		}
		if got[512] != blkOK || !bytes.Equal(got[:512], g.node.content(uint64(tag)*512, 512)) {
			g.t.Fatalf("request %d: status %d, or other data", tag, got[512])
		}
	}
}

// held returns when the transport has asked its workers to come out.
func (g *laneGuest) held() {
	for !g.pci.gate.hold.Load() {
		runtime.Gosched()
	}
}

// laneKind is a kind of ring, and whether the worker begins reads or all are left to
// goroutines.
type laneKind struct {
	features uint64
	starts   bool
}

func eachRing(t *testing.T, test func(t *testing.T, kind laneKind)) {
	for name, features := range ringKinds {
		t.Run(name, func(t *testing.T) { test(t, laneKind{features, false}) })
		t.Run(name+",started", func(t *testing.T) { test(t, laneKind{features, true}) })
	}
}

// A request begins while all those before it wait, whenever it comes; and each gets
// what is its own.
func TestBlkSideBySide(t *testing.T) {
	eachRing(t, func(t *testing.T, kind laneKind) {
		const requests = 32
		g := newLaneGuest(t, kind, BlkConfig{Depth: requests})
		for round := range 4 {
			for tag := range requests {
				g.add(blkIn, tag, uint64(tag))
				if round%2 == 0 {
					g.disk.await(tag + 1)
				}
			}
			g.disk.await(requests)
			g.disk.set(true)
			g.reapReads(requests)
			g.disk.set(false)
		}
		g.pci.Pause() // all lanes are free
		if g.blk.lanes[0].all != requests {
			t.Errorf("%d lanes for %d requests at a time", g.blk.lanes[0].all, requests)
		}
		for _, lane := range g.blk.lanes[0].free {
			if (lane.begin == nil) != kind.starts {
				t.Fatal("served by the worker's ring, or not, and should not be, or should")
			}
		}
	})
}

// No more requests are under way than are allowed; those that come while all lanes are
// taken are served when one is free.
func TestBlkSideBySideBound(t *testing.T) {
	eachRing(t, func(t *testing.T, kind laneKind) {
		const depth, requests = 4, 30
		g := newLaneGuest(t, kind, BlkConfig{Depth: depth})
		for range 20 {
			for tag := range requests / 2 {
				g.add(blkIn, tag, uint64(tag))
			}
			g.disk.await(depth)
			for tag := requests / 2; tag < requests; tag++ {
				g.add(blkIn, tag, uint64(tag))
			}
			g.disk.set(true)
			g.reapReads(requests)
			g.disk.set(false)
		}
		if most, begun := g.disk.counts(); most != depth || begun != 20*requests {
			t.Errorf("%d requests at a time, %d in all; want %d and %d", most, begun, depth, 20*requests)
		}
	})
}

// A device that is to pause waits for all requests under way and begins no more. Its
// state has none twice and misses none.
func TestBlkSideBySidePause(t *testing.T) {
	eachRing(t, func(t *testing.T, kind laneKind) {
		const depth, early, late = 8, 12, 5
		g := newLaneGuest(t, kind, BlkConfig{Depth: depth})
		for tag := range early {
			g.add(blkIn, tag, uint64(tag))
		}
		g.disk.await(depth)
		paused := make(chan struct{})
		go func() {
			defer close(paused)
			g.pci.Pause()
		}()
		g.held()
		for tag := range late {
			g.add(blkIn, early+tag, uint64(early+tag))
		}
		select {
		case <-paused:
			t.Fatal("paused with requests under way")
		default:
		}
		g.disk.set(true)
		<-paused
		messages := g.msi.total()
		if _, begun := g.disk.counts(); begun != depth {
			t.Errorf("%d requests begun, want the %d that were under way", begun, depth)
		}
		g.reapReads(depth)
		// Another device goes on from the state. It finds the rest in the rings.
		state, blkState := g.pci.State(), g.blk.State()
		g.pci.Reset()
		if g.drv.hasUsed() || g.msi.total() != messages {
			t.Error("something was served while paused")
		}
		if err := errors.Join(g.blk.Restore(blkState), g.pci.Restore(state)); err != nil {
			t.Fatal(err)
		}
		g.pci.Resume()
		g.reapReads(early + late - depth)
		if _, begun := g.disk.counts(); begun != early+late {
			t.Errorf("%d requests begun of %d", begun, early+late)
		}
	})
}

// A reset waits for what is under way, and nothing of it appears in the rings that
// come after.
func TestBlkSideBySideReset(t *testing.T) {
	eachRing(t, func(t *testing.T, kind laneKind) {
		const depth, requests = 8, 12
		g := newLaneGuest(t, kind, BlkConfig{Depth: depth})
		for range 3 {
			for tag := range requests {
				g.add(blkIn, tag, uint64(tag))
			}
			g.disk.await(depth)
			reset := make(chan struct{})
			go func() {
				defer close(reset)
				g.write(commonStatus, 1, 0)
			}()
			g.held()
			select {
			case <-reset:
				t.Fatal("reset with requests under way")
			default:
			}
			g.disk.set(true)
			<-reset
			_, before := g.disk.counts()
			g.boot(kind.features)
			g.add(blkIn, 1, 1)
			g.reapReads(1)
			if _, begun := g.disk.counts(); g.drv.hasUsed() || begun != before+1 {
				t.Errorf("%d requests were served by the new rings, or there is more", begun-before)
			}
			g.disk.set(false)
		}
	})
}

// A node that stops to wait is served by the worker again, once no lane is busy; one
// that begins to, by lanes.
func TestBlkSideBySideChanges(t *testing.T) {
	eachRing(t, func(t *testing.T, kind laneKind) {
		g := newLaneGuest(t, kind, BlkConfig{Depth: 8})
		g.add(blkIn, 0, 0)
		g.add(blkIn, 1, 1)
		g.disk.await(2)
		g.disk.waits.Store(false)
		g.add(blkIn, 2, 2)
		g.disk.await(3) // the worker must not serve it beside the lanes
		g.disk.set(true)
		g.reapReads(3)
		for tag := range 20 {
			g.add(blkIn, tag, uint64(tag))
			g.reapReads(1)
		}
		g.disk.set(false)
		g.disk.waits.Store(true)
		for tag := range 3 {
			g.add(blkIn, tag, uint64(tag))
			g.disk.await(tag + 1)
		}
		g.disk.set(true)
		g.reapReads(3)
	})
}

// A request that breaks the device, or what is no request, does not keep others from
// ending.
func TestBlkSideBySideBroken(t *testing.T) {
	eachRing(t, func(t *testing.T, kind laneKind) {
		g := newLaneGuest(t, kind, BlkConfig{Depth: 8})
		for name, bad := range map[string]segment{
			"no place for a status": {g.heap, 16, false},
			"no memory":             {1 << 40, 16, true},
		} {
			for tag := range 3 {
				g.add(blkIn, tag, uint64(tag))
			}
			g.disk.await(3)
			g.drv.add([]segment{bad}, false, 4)
			g.kick(0)
			for data := range g.msi.arrived {
				if data == 0x40 { // configuration
					break
				}
			}
			g.guest.mu.Lock()
			if len(g.broken) != 1 || !errors.Is(g.broken[0], ErrBlk) && !errors.Is(g.broken[0], ErrQueue) {
				t.Errorf("%s: reported %v", name, g.broken)
			}
			g.broken = nil
			g.guest.mu.Unlock()
			g.disk.set(true)
			g.reapReads(3)
			g.write(commonStatus, 1, 0)
			g.boot(kind.features)
			g.add(blkIn, 1, 1)
			g.reapReads(1)
			g.disk.set(false)
		}
	})
}

// A request that the ring did in part is served from its beginning, and an error is
// told.
func TestBlkSideBySideInPart(t *testing.T) {
	errs := make(chan error, 1)
	g := newLaneGuest(t, laneKind{allFeatures, true}, BlkConfig{Depth: 8, OnIOError: func(_ BlkOp, err error) BlkAction {
		errs <- err
		return BlkReport
	}})
	g.add(blkIn, 0, 0)
	g.add(blkIn, 1, 1)
	g.disk.await(2)
	_, _ = unix.Write(g.disk.writer, make([]byte, 100))
	for { // until the goroutine has it
		if _, begun := g.disk.counts(); begun == 3 {
			break
		}
		runtime.Gosched()
	}
	g.disk.mu.Lock()
	g.disk.piped--
	g.disk.mu.Unlock()
	g.disk.set(true)
	g.reapReads(2)

	reader := g.disk.reader.Swap(int32(g.disk.writer)) // which cannot be read
	if s, _ := g.request(blkIn, 0, make([]byte, 512), true); s != blkIOErr {
		t.Errorf("status %d", s)
	}
	g.disk.reader.Store(reader)
	if err := <-errs; !errors.Is(err, unix.EBADF) {
		t.Errorf("reported %v", err)
	}
	if s := g.blk.Stats().Read; s.Ops != 2 || s.Failed != 1 {
		t.Errorf("%+v", s)
	}
}

// With requests side by side none can wait for Retry.
func TestBlkSideBySideError(t *testing.T) {
	g := newLaneGuest(t, laneKind{features: allFeatures}, BlkConfig{Depth: 2, OnIOError: func(BlkOp, error) BlkAction { return BlkStop }})
	g.disk.set(true)
	g.node.mu.Lock()
	g.node.fail = errDisk
	g.node.mu.Unlock()
	if s, _ := g.request(blkIn, 0, make([]byte, 512), true); s != blkIOErr || g.blk.Stopped() != nil {
		t.Errorf("status %d, stopped: %v", s, g.blk.Stopped())
	}
	for _, depth := range []int{-1, MaxQueueSize + 1} {
		if _, err := NewBlk(BlkConfig{Node: g.node, Depth: depth}); !errors.Is(err, ErrBlk) {
			t.Errorf("depth %d: %v", depth, err)
		}
	}
}

// A disk is what an array of sectors is, whatever requests are under way at once, while
// the machine is paused and goes on.
func TestBlkSideBySideModel(t *testing.T) {
	eachRing(t, func(t *testing.T, kind laneKind) {
		g := newLaneGuest(t, kind, BlkConfig{Depth: 16})
		g.disk.set(true)
		g.model(g.disk)
	})
}

// So are real disks past the page cache.
func TestBlkSideBySideDisks(t *testing.T) {
	const size = 1 << 20
	options := raw.Options{Direct: true, Engine: aio.IOUring}
	kinds := map[string]func(path string) (block.Node, error){
		"raw": func(path string) (block.Node, error) {
			return raw.OpenWith(path, false, options)
		},
		"qcow2": func(path string) (block.Node, error) {
			return qcow2.OpenWith(path, false, options)
		},
	}
	for format, open := range kinds {
		for ring, features := range ringKinds {
			t.Run(format+","+ring, func(t *testing.T) {
				path := filepath.Join(t.TempDir(), "disk")
				if out, err := exec.Command("qemu-img", "create", "-q", "-f", format, path, fmt.Sprint(size)).CombinedOutput(); err != nil {
					t.Fatalf("%v: %s", err, out)
				}
				disk, err := open(path)
				if err != nil {
					t.Fatal(err)
				}
				root := block.NewRoot(disk)
				blk, err := NewBlk(BlkConfig{Node: root, Depth: 16})
				if err != nil {
					t.Fatal(err)
				}
				g := &laneGuest{&blkGuest{guest: newGuest(t, blk), blk: blk}, nil}
				g.boot(features)
				g.model(root)
				g.pci.Close()
				if err := disk.Close(); err != nil {
					t.Fatal(err)
				}
				if format == "raw" {
					return
				}
				if out, err := exec.Command("qemu-img", "check", path).CombinedOutput(); err != nil {
					t.Errorf("%v: %s", err, out)
				}
			})
		}
	}
}

// pauseOften pauses a device and has it go on, again and again, until stop is called.
func pauseOften(p *PCI) (stop func()) {
	ended := make(chan struct{})
	var pausing sync.WaitGroup
	pausing.Go(func() {
		for {
			select {
			case <-ended:
				return
			default:
				p.Pause()
				p.Resume()
				runtime.Gosched()
			}
		}
	})
	return func() {
		close(ended)
		pausing.Wait()
	}
}

// model compares a disk of 1 MiB with an array of sectors.
func (g *laneGuest) model(disk block.Node) {
	g.t.Helper()
	const requests, rounds, sectors = 40, 10, 2048
	stop := pauseOften(g.pci)
	content := func() []byte {
		p := make([]byte, sectors*512)
		if err := disk.Readv([][]byte{p}, 0); err != nil {
			g.t.Fatal(err)
		}
		return p
	}
	rng := rand.New(rand.NewPCG(1, 2))
	want := content()
	var at [requests]uint64
	var kinds [requests]uint32
	under := map[uint64]bool{} // sectors of which a request is under way
	add := func(tag int) {
		sector := rng.Uint64N(sectors)
		for under[sector] {
			sector = rng.Uint64N(sectors)
		}
		under[sector] = true
		at[tag], kinds[tag] = sector*512, blkIn
		if rng.IntN(2) == 0 {
			kinds[tag] = blkOut
			data := pattern(512, byte(rng.Int()))
			copy(want[at[tag]:], data)
			if err := g.mem.Write(g.place(tag)+512, data); err != nil {
				g.t.Fatal(err)
			}
		}
		g.add(kinds[tag], tag, sector)
	}
	for tag := range requests {
		add(tag)
	}
	got := make([]byte, 513)
	for left := requests * rounds; left > 0; left-- {
		tag, written := g.reap(g.drv, 0)
		if err := g.mem.Read(g.place(tag)+512, got); err != nil {
			g.t.Fatal(err)
		}
		if got[512] != blkOK || !bytes.Equal(got[:512], want[at[tag]:][:512]) || (kinds[tag] == blkIn) != (written == 513) {
			g.t.Fatalf("request of kind %d: status %d, %d bytes, or other data", kinds[tag], got[512], written)
		}
		delete(under, at[tag]/512)
		if left > requests {
			add(tag)
		}
	}
	stop()
	if !bytes.Equal(content(), want) {
		g.t.Error("the disk holds something else")
	}
	if g.drv.hasUsed() || len(g.drv.chains) != 0 {
		g.t.Errorf("%d requests are under way", len(g.drv.chains))
	}
}

// gatherGuest returns a guest with a disk past the page cache, whose memory is all there, what the disk
// holds, and a function that tells how much of the memory has come to lie in huge pages.
func gatherGuest(t *testing.T) (g *laneGuest, content []byte, gathered func() int) {
	t.Helper()
	content = pattern(2<<20, 7)
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	disk, err := raw.OpenWith(path, false, raw.Options{Direct: true, Engine: aio.IOUring})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { disk.Close() })
	blk, err := NewBlk(BlkConfig{Node: block.NewRoot(disk), Depth: 16})
	if err != nil {
		t.Fatal(err)
	}
	g = &laneGuest{&blkGuest{guest: newGuest(t, blk), blk: blk}, nil}
	g.boot(allFeatures)
	t.Cleanup(func() { g.pci.Close() })
	memory := g.mem.Regions()[0].Bytes()
	copy(memory[g.heap:], pattern(len(memory), 1))
	huge := func() (bytes int) {
		smaps, err := os.ReadFile("/proc/self/smaps")
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(smaps)) {
			var kib int
			if n, _ := fmt.Sscanf(line, "ShmemPmdMapped: %d kB", &kib); n == 1 {
				bytes += kib << 10
			}
		}
		return bytes
	}
	if err := unix.Madvise(memory[:guestmem.HugePage], unix.MADV_COLLAPSE); err == unix.EINVAL {
		t.Skip("MADV_COLLAPSE of shared memory (Linux 6.1)")
	}
	before := huge()
	return g, content, func() int { return huge() - before }
}

// What a disk reads and writes directly, in large requests, comes to lie in huge pages.
func TestBlkGathersMemory(t *testing.T) {
	g, _, gathered := gatherGuest(t)
	g.heap = guestmem.HugePage
	for _, n := range []int{gatherBytes / 2, gatherBytes} {
		want := pattern(n, byte(n>>10))
		if status, _ := g.request(blkOut, 0, want, false); status != blkOK {
			t.Errorf("status %d of a write", status)
		}
		if status, got := g.request(blkIn, 0, make([]byte, n), true); status != blkOK || !bytes.Equal(got, want) {
			t.Errorf("status %d of a read, or other data", status)
		}
		if (gathered() > 0) != (n >= gatherBytes) {
			t.Errorf("requests of %d bytes have gathered %d", n, gathered())
		}
	}
}

// Requests that are held for their memory are done, whether the device is paused or not.
func TestBlkHeldRequestsAreDone(t *testing.T) {
	for _, paused := range []bool{false, true} {
		t.Run(fmt.Sprintf("paused=%v", paused), func(t *testing.T) {
			g, content, gathered := gatherGuest(t)
			stop := func() {}
			if paused {
				stop = pauseOften(g.pci)
			}
			const requests, rounds = 8, 200
			data := func(tag int) uint64 { return guestmem.HugePage + uint64(tag*gatherBytes) }
			add := func(tag int) {
				at := g.heap + uint64(tag)*32
				header := le.AppendUint64(le.AppendUint32(le.AppendUint32(nil, blkIn), 0), uint64(tag*gatherBytes/512))
				if err := g.mem.Write(at, header); err != nil {
					t.Fatal(err)
				}
				if !g.drv.add([]segment{{at, 16, false}, {data(tag), gatherBytes, true}, {at + 16, 1, true}}, false, tag) {
					t.Fatal("ring is full")
				}
				if g.drv.wantsKick() {
					g.kick(0)
				}
			}
			for tag := range requests {
				add(tag)
			}
			for left := requests * rounds; left > 0; left-- {
				tag, written := g.reap(g.drv, 0)
				if written != gatherBytes+1 {
					t.Fatalf("%d bytes were read", written)
				}
				if left > requests {
					add(tag)
				}
			}
			stop()
			if n := gathered(); n != guestmem.HugePage {
				t.Errorf("%d bytes are gathered of one huge page", n)
			}
			got := make([]byte, requests*gatherBytes)
			if err := g.mem.Read(data(0), got); err != nil || !bytes.Equal(got, content) {
				t.Errorf("something else was read (%v)", err)
			}
		})
	}
}

// A request whose memory cannot be gathered before others have ended waits for them, but not often.
func TestBlkHold(t *testing.T) {
	g, _, gathered := gatherGuest(t)
	var used, slow [2]int // pipes: what the page in use is in, and what the other request reads
	for _, p := range []*[2]int{&used, &slow} {
		if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
			t.Fatal(err)
		}
		defer unix.Close(p[0])
		defer unix.Close(p[1])
	}
	fd := must(unix.Eventfd(0, unix.EFD_CLOEXEC))
	defer unix.Close(fd)
	ring := must(aio.NewRing(fd))
	defer ring.Close()
	l := &blkLanes{queue: &Queue{mem: g.mem}, ring: ring}
	memory := g.mem.Regions()[0].Bytes()[guestmem.HugePage:]
	lane := &blkLane{lanes: l}
	lane.chain.Write = []Buffer{{GPA: guestmem.HugePage, Data: memory[:gatherBytes]}}

	page := unix.Iovec{Base: &memory[guestmem.HugePage-guestmem.PageSize], Len: guestmem.PageSize}
	if n, err := unix.Vmsplice(used[1], []unix.Iovec{page}, 0); n != guestmem.PageSize || err != nil {
		t.Fatal(n, err)
	}
	if lane.hold() {
		t.Error("a request waits for nothing")
	}
	other := block.Request{Bufs: [][]byte{make([]byte, 1)}, Ring: ring}
	begin := func() {
		other.Enter(ended{}, 0)
		if !ring.Start(&other, slow[0]) {
			t.Fatal("no request was begun")
		}
		ring.Submit()
	}
	end := func() {
		if _, err := unix.Write(slow[1], []byte{1}); err != nil {
			t.Fatal(err)
		}
		for ring.UnderWay() > 0 {
			ring.Reap()
		}
	}
	begin()
	if !lane.hold() || l.held != lane {
		t.Error("the request does not wait")
	}
	end()
	waited := time.Minute
	l.heldSince = l.heldSince.Add(-waited)
	if l.release() != lane || l.release() != nil {
		t.Error("the request still waits")
	}
	if d := time.Until(l.noHold); d < (holdShare-1)*waited || d > holdShare*waited+time.Minute {
		t.Errorf("after %v none waits for %v", waited, d)
	}
	begin()
	if lane.hold() {
		t.Error("a request waits at once again")
	}
	l.noHold = time.Time{}
	if _, err := unix.Read(used[0], make([]byte, guestmem.PageSize)); err != nil {
		t.Fatal(err)
	}
	if lane.hold() || gathered() != guestmem.HugePage {
		t.Errorf("%d bytes are gathered of what nothing uses", gathered())
	}
	end()
}

// ended does not care about a request's end.
type ended struct{}

func (ended) Ended(*block.Request, int64, error) {}

func TestBlkSideBySideDoesNotAllocate(t *testing.T) {
	for _, starts := range []bool{false, true} {
		node := newWaitingNode(t, starts)
		node.set(true)
		if extra := blkAllocations(t, node, 32, 512); extra > 1 {
			t.Errorf("started %v: %v allocations for 32 requests", starts, extra)
		}
	}
}

// blkAllocations is how often memory is allocated for so many reads of so many bytes, which
// the device serves 8 of side by side. What the driver model allocates does not count.
func blkAllocations(t *testing.T, node block.Node, requests, bytes int) float64 {
	t.Helper()
	mem := testMemory(t)
	d, heap := newDriver(mem, 0x4000, 64, allFeatures)
	q := must(newQueue(mem, 0, allFeatures, &d.state))
	q.gate, q.event = newGate(), must(newEventFD())
	defer q.event.close()
	blk, err := NewBlk(BlkConfig{Node: node, Depth: 8})
	if err != nil {
		t.Fatal(err)
	}
	if err := blk.Start(allFeatures, []*Queue{q}, nil); err != nil {
		t.Fatal(err)
	}
	defer func() {
		q.gate.stop()
		blk.Stop()
	}()
	if err := mem.Write(heap, make([]byte, 16)); err != nil {
		t.Fatal(err)
	}
	segs := []segment{{heap, 16, false}, {heap + 4096, uint32(bytes), true}, {heap + 16, 1, true}}
	round := func(serve func()) func() {
		return func() {
			for tag := range requests {
				if !d.add(segs, true, tag) {
					t.Fatal("ring is full")
				}
			}
			serve()
			for n := 0; n < requests; {
				if _, _, ok := d.used(); ok {
					n++
				} else {
					runtime.Gosched()
				}
			}
		}
	}
	var c Chain
	driver := testing.AllocsPerRun(100, round(func() {
		for range requests {
			if ok, err := q.Pop(&c); !ok || err != nil {
				t.Fatal(ok, err)
			}
			if err := q.Push(&c, 0); err != nil {
				t.Fatal(err)
			}
		}
	}))
	all := testing.AllocsPerRun(100, round(func() {
		for q.hasAvail() || q.begun > 0 {
			if err := blk.Handle(q); err != nil {
				t.Fatal(err)
			}
			runtime.Gosched()
		}
	}))
	return all - driver
}
