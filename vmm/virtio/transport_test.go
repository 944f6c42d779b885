package virtio

import (
	"encoding/json"
	"errors"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/gnomon-vmm/gnomon/vmm/device"
	"github.com/google/go-cmp/cmp"
)

// echoDevice copies what it can read to what it can write. Queue 1 is like a
// network card's receive queue: it takes a chain only for each packet that
// the host gives.
type echoDevice struct {
	started, stopped atomic.Int32
	handled          atomic.Int64
	inside           atomic.Int32
	overlap          atomic.Bool // Handle ran twice at a time for a queue
	packets          atomic.Int64
	config           [8]byte

	mu       sync.Mutex
	host     Host          // guarded by mu
	queues   []*Queue      // guarded by mu
	startErr error         // guarded by mu
	block    chan struct{} // guarded by mu; Handle of queue 0 waits for it to close
	entered  chan struct{} // guarded by mu; gets a value when Handle begins to wait
	fail     error         // guarded by mu; of the next Handle
}

func (d *echoDevice) ID() DeviceID         { return IDConsole }
func (d *echoDevice) Features() uint64     { return 1 << 3 }
func (d *echoDevice) QueueSizes() []uint16 { return []uint16{64, 64} }

func (d *echoDevice) ReadConfig(off int, p []byte) {
	if off < len(d.config) {
		copy(p, d.config[off:])
	}
}

func (d *echoDevice) WriteConfig(off int, p []byte) {
	if off < len(d.config) {
		copy(d.config[off:], p)
	}
}

func (d *echoDevice) Start(_ uint64, queues []*Queue, host Host) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.startErr != nil {
		return d.startErr
	}
	d.host, d.queues = host, queues
	d.started.Add(1)
	return nil
}

func (d *echoDevice) Stop() {
	d.stopped.Add(1)
}

func (d *echoDevice) Handle(q *Queue) error {
	d.handled.Add(1)
	if q.Index() == 1 {
		return d.receive(q)
	}
	if d.inside.Add(1) > 1 {
		d.overlap.Store(true)
	}
	defer d.inside.Add(-1)
	d.mu.Lock()
	block, entered, err := d.block, d.entered, d.fail
	d.mu.Unlock()
	if err != nil {
		return err
	}
	if block != nil {
		select {
		case entered <- struct{}{}:
		case <-block:
		}
		<-block
	}
	var c Chain
	for {
		ok, err := q.Pop(&c)
		if !ok || err != nil {
			return err
		}
		n := 0
		if len(c.Read) > 0 && len(c.Write) > 0 {
			n = copy(c.Write[0].Data, c.Read[0].Data)
		}
		if err := q.Push(&c, uint32(n)); err != nil {
			return err
		}
	}
}

func (d *echoDevice) receive(q *Queue) error {
	var c Chain
	for d.packets.Load() > 0 {
		ok, err := q.Pop(&c)
		if !ok || err != nil {
			return err
		}
		d.packets.Add(-1)
		c.Write[0].Data[0] = 0x77
		if err := q.Push(&c, 1); err != nil {
			return err
		}
	}
	return nil
}

func (d *echoDevice) set(f func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	f()
}

func (d *echoDevice) hostNow() Host {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.host
}

func (d *echoDevice) queue(i int) *Queue {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.queues[i]
}

// echoGuest is a guest with an echoDevice and drivers for both its queues.
type echoGuest struct {
	*guest
	dev  *echoDevice
	drv  [2]*driver
	heap uint64
	n    int
}

func newEchoGuest(t testing.TB, features uint64) *echoGuest {
	t.Helper()
	e := &echoGuest{dev: &echoDevice{}}
	e.guest = newGuest(t, e.dev)
	e.layout(features)
	e.start(features, e.drv[0], e.drv[1])
	return e
}

func (e *echoGuest) layout(features uint64) {
	e.drv[0], e.heap = newDriver(e.mem, 0x10000, 64, features)
	e.drv[1], e.heap = newDriver(e.mem, e.heap, 64, features)
}

// send makes one echo request available and kicks if the device wants that.
func (e *echoGuest) send() bool {
	e.n++
	at := e.heap + uint64(e.n%64)*64
	if err := e.mem.Write(at, le.AppendUint64(nil, uint64(e.n))); err != nil {
		e.t.Fatal(err)
	}
	if !e.drv[0].add([]segment{{at, 8, false}, {at + 8, 8, true}}, false, e.n) {
		e.n--
		return false
	}
	if e.drv[0].wantsKick() {
		e.kick(0)
	}
	return true
}

// receive waits for one echo and checks it.
func (e *echoGuest) receive() {
	e.t.Helper()
	tag, written := e.reap(e.drv[0], 0)
	var p [8]byte
	if err := e.mem.Read(e.heap+uint64(tag%64)*64+8, p[:]); err != nil {
		e.t.Fatal(err)
	}
	if written != 8 || le.Uint64(p[:]) != uint64(tag) {
		e.t.Fatalf("echo of %d: %d bytes, %d", tag, written, le.Uint64(p[:]))
	}
}

func (e *echoGuest) errors() []error {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.broken
}

func TestPCITransportIdentityAndCapabilities(t *testing.T) {
	g := newGuest(t, &echoDevice{})
	if got := g.config(0, 4); got != 0x1043_1AF4 {
		t.Errorf("ids %#x", got)
	}
	if rev := g.config(8, 1); rev != 1 {
		t.Errorf("revision %d", rev)
	}
	type capability struct {
		kind           byte
		offset, length uint32
	}
	var got []capability
	access := 0
	for at := int(g.config(0x34, 1)); at != 0; at = int(g.config(at+1, 1)) {
		if g.config(at, 1) != capVendor {
			continue
		}
		c := capability{byte(g.config(at+3, 1)), g.config(at+capOffset, 4), g.config(at+capLength, 4)}
		if c.kind == capAccess {
			access = at
		}
		if c.kind == capNotify && (g.config(at+2, 1) != 20 || g.config(at+16, 4) != notifyStride) {
			t.Errorf("notify capability of %d bytes, multiplier %d", g.config(at+2, 1), g.config(at+16, 4))
		}
		got = append(got, c)
	}
	want := []capability{{capCommon, 0, 56}, {capISR, 0x800, 4}, {capDevice, 0x1000, 0x1000}, {capNotify, 0x2000, 8}, {capAccess, 0, 0}}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(capability{})); diff != "" {
		t.Errorf("capabilities (-want +got):\n%s", diff)
	}

	// The same registers through the configuration access capability.
	through := func(off, n uint32) uint32 {
		g.setConfig(access+capBAR, 1, 0)
		g.setConfig(access+capOffset, 4, off)
		g.setConfig(access+capLength, 4, n)
		return g.config(access+capData, int(n))
	}
	if n := through(commonNumQueues, 2); n != 2 {
		t.Errorf("number of queues through configuration space: %d", n)
	}
	through(commonQueueSelect, 2)
	g.setConfig(access+capData, 2, 1)
	if g.read(commonQueueSelect, 2) != 1 {
		t.Error("a write through configuration space did not arrive")
	}
	for _, bad := range [][2]uint32{{barSize, 4}, {0xFFFF_FFFC, 4}, {1, 2}, {0, 3}} {
		if v := through(bad[0], bad[1]); v != 0 {
			t.Errorf("access %v reads %#x", bad, v)
		}
		g.setConfig(access+capData, 4, 0xFFFF_FFFF)
	}
	g.setConfig(access+capBAR, 1, 1)
	if v := g.config(access+capData, 4); v != 0 {
		t.Errorf("access to BAR 1 reads %#x", v)
	}
}

func TestPCITransportNegotiation(t *testing.T) {
	g := newGuest(t, &echoDevice{})
	offered := uint64(0)
	for i := range uint64(4) {
		g.write(commonDeviceFeatureSelect, 4, i)
		if v := g.read(commonDeviceFeature, 4); i < 2 {
			offered |= v << (32 * i)
		} else if v != 0 {
			t.Errorf("features %d: %#x", i, v)
		}
	}
	if want := FeatureVersion1 | FeatureEventIdx | FeatureIndirectDesc | FeatureRingPacked | 1<<3; offered != want {
		t.Errorf("offered %#x, want %#x", offered, want)
	}
	accept := func(f uint64) bool {
		g.write(commonStatus, 1, 0)
		g.write(commonStatus, 1, StatusAcknowledge|StatusDriver)
		for i := range uint64(2) {
			g.write(commonDriverFeatureSelect, 4, i)
			g.write(commonDriverFeature, 4, f>>(32*i)&0xFFFF_FFFF)
		}
		g.write(commonStatus, 1, StatusAcknowledge|StatusDriver|StatusFeaturesOK)
		return g.read(commonStatus, 1)&StatusFeaturesOK != 0
	}
	for _, c := range []struct {
		features uint64
		ok       bool
	}{
		{FeatureVersion1, true},
		{offered, true},
		{0, false},
		{FeatureEventIdx, false},
		{FeatureVersion1 | 1<<40, false},
		{FeatureVersion1 | 1<<5, false},
	} {
		if got := accept(c.features); got != c.ok {
			t.Errorf("features %#x accepted: %v", c.features, got)
		}
	}

	// Without FEATURES_OK the device does not start; with it, features stay.
	g.driverOK()
	if g.read(commonStatus, 1)&StatusDriverOK != 0 {
		t.Error("device runs without agreed features")
	}
	accept(FeatureVersion1)
	g.write(commonDriverFeature, 4, 0)
	g.write(commonDriverFeatureSelect, 4, 1)
	if g.read(commonDriverFeature, 4) != 1 || g.pci.Features() != FeatureVersion1 {
		t.Error("features changed after FEATURES_OK")
	}

	// Queue registers: sizes and vectors are checked, nothing outside exists.
	g.write(commonQueueSelect, 2, 0)
	g.write(commonQueueSize, 2, 65)
	if g.read(commonQueueSize, 2) != 64 {
		t.Errorf("queue size %d", g.read(commonQueueSize, 2))
	}
	g.write(commonQueueVector, 2, 3)
	if g.read(commonQueueVector, 2) != NoVector {
		t.Error("a vector that does not exist was taken")
	}
	g.write(commonQueueVector, 2, 2)
	if g.read(commonQueueVector, 2) != 2 {
		t.Error("a vector that exists was refused")
	}
	g.write(commonQueueDesc, 8, 0x1122_3344_5566_7788)
	if g.read(commonQueueDesc+4, 4) != 0x1122_3344 || g.read(commonQueueDesc, 8) != 0x1122_3344_5566_7788 {
		t.Errorf("descriptor area %#x", g.read(commonQueueDesc, 8))
	}
	g.write(commonQueueSelect, 2, 2)
	g.write(commonQueueSize, 2, 8)
	if g.read(commonQueueSize, 2) != 0 {
		t.Error("queue 2 exists")
	}
	g.write(commonStatus, 1, 0)
	g.write(commonQueueSelect, 2, 0)
	if g.read(commonQueueDesc, 8) != 0 || g.read(commonQueueSize, 2) != 64 || g.read(commonQueueVector, 2) != NoVector || g.read(commonStatus, 1) != 0 {
		t.Error("reset left the queue set up")
	}

	g.write(barDevice+2, 2, 0xABCD)
	if g.read(barDevice, 4) != 0xABCD_0000 || g.read(barDevice+0xF00, 4) != 0 {
		t.Error("device configuration does not read back")
	}
}

func TestPCITransportEchoes(t *testing.T) {
	for name, features := range ringKinds {
		t.Run(name, func(t *testing.T) {
			e := newEchoGuest(t, features)
			for range 500 {
				for e.n%5 == 0 || e.n%7 != 0 {
					if !e.send() {
						break
					}
				}
				e.send()
				for len(e.drv[0].chains) > 0 {
					e.receive()
				}
			}
			if e.kicks.Load() > 0 {
				t.Errorf("%d kicks came by MMIO in spite of eventfds", e.kicks.Load())
			}
		})
	}
}

func TestPCITransportNotifiesByMMIOWithoutEventFDs(t *testing.T) {
	dev := &echoDevice{}
	e := &echoGuest{dev: dev, guest: newGuest(t, dev)}
	e.pci.env.EventFDs = nil
	e.layout(FeatureVersion1)
	e.start(FeatureVersion1, e.drv[0], e.drv[1])
	for range 100 {
		e.send()
		e.receive()
	}
	if e.kicks.Load() == 0 {
		t.Error("no kick was an MMIO write")
	}
	// Kicks of queues that are not there do nothing.
	e.mmio.Write(e.base+barNotify+2*notifyStride, []byte{2, 0})
	e.mmio.Write(e.base+barMSIX-4, []byte{2, 0})
}

func TestPCITransportNotifyFollowsBAR(t *testing.T) {
	e := newEchoGuest(t, allFeatures)
	for i := range uint32(20) {
		e.setConfig(0x10, 4, device.PCIMMIOBase+0x100_0000+i*barSize)
		e.base = uint64(e.config(0x10, 4))
		if len(e.fds.fds) != 2 {
			t.Fatalf("%d eventfds assigned", len(e.fds.fds))
		}
		e.send()
		e.receive()
	}
	e.setConfig(4, 2, 0)
	e.pci.mu.Lock()
	e.pci.arm() // as a start by the configuration access capability would
	e.pci.mu.Unlock()
	if len(e.fds.fds) != 0 {
		t.Error("eventfds are assigned without memory decoding")
	}
	e.setConfig(4, 2, 2)
	e.write(commonStatus, 1, 0)
	if len(e.fds.fds) != 0 {
		t.Error("eventfds stay after reset")
	}
	if e.kicks.Load() > 0 {
		t.Errorf("%d kicks by MMIO", e.kicks.Load())
	}
}

func TestPCITransportInterruptLine(t *testing.T) {
	e := newEchoGuest(t, FeatureVersion1)
	e.setConfig(0x42, 2, 0) // MSI-X off
	line := guestSlot % device.GSIPCICount
	e.send()
	for high := range e.raised {
		if high == line {
			break
		}
	}
	if got := e.read(barISR, 1); got != isrQueue {
		t.Errorf("ISR %d", got)
	}
	if e.line(line) || e.read(barISR, 1) != 0 {
		t.Error("reading the ISR did not clear the line")
	}
	e.dev.hostNow().ConfigChanged()
	if !e.line(line) {
		t.Error("no interrupt for the configuration")
	}
	if got := e.read(barISR, 4); got != isrConfig {
		t.Errorf("ISR %d", got)
	}
	if e.msi.total() != 0 {
		t.Errorf("%d messages with MSI-X off", e.msi.total())
	}
}

// TestPCITransportReceiveQueue shows that a device that leaves chains for later
// neither spins nor misses what comes from the host or the driver.
func TestPCITransportReceiveQueue(t *testing.T) {
	for name, features := range ringKinds {
		t.Run(name, func(t *testing.T) {
			e := newEchoGuest(t, features)
			page := e.heap + 0x10000
			for i := range 32 {
				e.drv[1].add([]segment{{page + uint64(i), 1, true}}, false, i)
			}
			if e.drv[1].wantsKick() {
				e.kick(1)
			}
			for i := range 1000 {
				e.dev.packets.Add(1)
				e.dev.queue(1).Wake()
				tag, _ := e.reap(e.drv[1], 1)
				if i%100 < 50 {
					e.drv[1].add([]segment{{page + uint64(tag), 1, true}}, false, tag)
				} else if len(e.drv[1].chains) == 0 {
					// Packets wait for buffers.
					e.dev.packets.Add(1)
					e.dev.queue(1).Wake()
					for tag := range 32 {
						e.drv[1].add([]segment{{page + uint64(tag), 1, true}}, false, tag)
					}
					if e.drv[1].wantsKick() {
						e.kick(1)
					}
					e.reap(e.drv[1], 1)
				}
				if e.drv[1].wantsKick() {
					e.kick(1)
				}
			}
			if n := e.dev.handled.Load(); n > 6000 {
				t.Errorf("Handle was called %d times for 1000 packets", n)
			}
		})
	}
}

func TestPCITransportPauseLosesNothing(t *testing.T) {
	for name, features := range ringKinds {
		t.Run(name, func(t *testing.T) {
			e := newEchoGuest(t, features)
			stop := make(chan struct{})
			var pauser sync.WaitGroup
			pauses := 0
			pauser.Go(func() {
				for pauses < 1000 {
					e.pci.Pause()
					if e.dev.inside.Load() != 0 {
						t.Error("worker is in Handle while paused")
					}
					before := e.msi.total()
					handled := e.dev.handled.Load()
					e.dev.hostNow().ConfigChanged()
					if e.msi.total() != before || e.dev.handled.Load() != handled {
						t.Error("something happened while paused")
					}
					e.pci.Resume()
					pauses++
				}
				close(stop)
			})
			for done := false; !done; {
				select {
				case <-stop:
					done = true
				default:
				}
				for e.send() {
				}
				for len(e.drv[0].chains) > 0 {
					e.receive()
				}
			}
			pauser.Wait()
			if e.dev.overlap.Load() {
				t.Error("two calls of Handle at a time")
			}
			if n := e.msi.data(0x40); n != 1000 {
				t.Errorf("%d configuration interrupts for 1000 changes", n)
			}
		})
	}
}

func TestPCITransportPauseWaitsForHandle(t *testing.T) {
	e := newEchoGuest(t, allFeatures)
	block, entered := make(chan struct{}), make(chan struct{})
	e.dev.set(func() { e.dev.block, e.dev.entered = block, entered })
	e.send()
	<-entered
	var released atomic.Bool
	var pause sync.WaitGroup
	pause.Go(func() {
		e.pci.Pause()
		if !released.Load() {
			t.Error("Pause returned while a worker was in Handle")
		}
	})
	for paused := false; !paused; runtime.Gosched() {
		e.pci.gate.mu.Lock()
		paused = e.pci.gate.paused
		e.pci.gate.mu.Unlock()
	}
	for range 1000 { // time for a Pause that does not wait to return
		runtime.Gosched()
	}
	released.Store(true)
	close(block)
	pause.Wait()
	// The request that came before is served after.
	if e.drv[0].hasUsed() {
		t.Error("Handle went on to a request although it was to pause")
	}
	e.pci.Resume()
	e.receive()
}

func TestPCITransportResetAgainstEverything(t *testing.T) {
	e := newEchoGuest(t, allFeatures)
	// A reset ends the paused device too.
	e.send()
	e.pci.Pause()
	e.write(commonStatus, 1, 0)
	if e.dev.stopped.Load() != 1 {
		t.Fatal("device was not stopped")
	}
	old, oldQueue := e.dev.hostNow(), e.dev.queue(0)
	e.layout(allFeatures)
	e.start(allFeatures, e.drv[0], e.drv[1])
	e.pci.Resume()
	// What belongs to the time before the reset has no effect.
	old.Fail(errors.New("too late"))
	oldQueue.Wake()
	e.send()
	e.receive()
	if e.pci.Status()&StatusNeedsReset != 0 {
		t.Error("a host of before the reset broke the device")
	}

	// A reset waits for Handle, which may meanwhile call the host; and other
	// vCPUs get answers.
	block, entered := make(chan struct{}), make(chan struct{})
	e.dev.set(func() { e.dev.block, e.dev.entered = block, entered })
	e.send()
	<-entered
	done := make(chan struct{})
	go func() {
		e.write(commonStatus, 1, 0)
		close(done)
	}()
	e.dev.hostNow().ConfigChanged()
	e.read(barISR, 1)
	e.read(barDevice, 4)
	e.kick(0)
	select {
	case <-done:
		t.Error("reset did not wait for the worker")
	default:
	}
	close(block)
	<-done
	if e.dev.stopped.Load() != 2 {
		t.Error("device was not stopped")
	}
	e.dev.set(func() { e.dev.block, e.dev.entered = nil, nil })

	// Many at once: vCPUs reset, configure, kick and move the BAR while the
	// machine pauses.
	var all sync.WaitGroup
	for i := range 4 {
		all.Go(func() {
			for n := range 300 {
				switch (n + i) % 4 {
				case 0:
					e.write(commonStatus, 1, 0)
				case 1:
					e.write(commonStatus, 1, 15)
				case 2:
					e.kick(n % 2)
					e.setConfig(4, 2, uint32(n&2))
				case 3:
					e.setConfig(4, 2, 2)
					e.pci.Pause()
					e.pci.State()
					e.pci.Resume()
				}
			}
		})
	}
	all.Wait()
	e.setConfig(4, 2, 2)
	e.layout(allFeatures)
	e.start(allFeatures, e.drv[0], e.drv[1])
	e.send()
	e.receive()
	e.pci.Close()
	e.kick(0)
	e.driverOK()
	e.pci.Close()
	if n := len(e.fds.fds); n != 0 {
		t.Errorf("%d eventfds assigned after Close", n)
	}
}

func TestPCITransportBreaks(t *testing.T) {
	wait := func(e *echoGuest) {
		t.Helper()
		for {
			if data := <-e.msi.arrived; data == 0x40 {
				return
			}
		}
	}
	t.Run("by the ring", func(t *testing.T) {
		e := newEchoGuest(t, FeatureVersion1)
		store16(e.drv[0].drv, 2, 1000)
		e.kick(0)
		wait(e)
		if e.read(commonStatus, 1)&StatusNeedsReset == 0 {
			t.Error("status does not say that the device needs a reset")
		}
		if errs := e.errors(); len(errs) != 1 || !errors.Is(errs[0], ErrQueue) || !errors.Is(errs[0], ErrTransport) {
			t.Errorf("reported: %v", errs)
		}
		// It stays dead, and quiet, until the reset; then it works.
		handled := e.dev.handled.Load()
		e.kick(0)
		e.kick(1)
		e.pci.Pause()
		e.pci.Resume()
		if n := len(e.errors()); n != 1 || e.dev.handled.Load() > handled+1 {
			t.Errorf("%d reports, %d calls after it broke", n, e.dev.handled.Load()-handled)
		}
		e.layout(FeatureVersion1)
		e.start(FeatureVersion1, e.drv[0], e.drv[1])
		e.send()
		e.receive()
	})
	t.Run("by the device", func(t *testing.T) {
		e := newEchoGuest(t, allFeatures)
		e.dev.set(func() { e.dev.fail = errDisk })
		e.send()
		wait(e)
		if errs := e.errors(); len(errs) != 1 || !errors.Is(errs[0], errDisk) {
			t.Errorf("reported: %v", errs)
		}
	})
	t.Run("by its host side", func(t *testing.T) {
		e := newEchoGuest(t, allFeatures)
		e.dev.hostNow().Fail(errDisk)
		e.dev.hostNow().Fail(errDisk)
		wait(e)
		if errs := e.errors(); len(errs) != 1 || !errors.Is(errs[0], errDisk) {
			t.Errorf("reported: %v", errs)
		}
	})
	t.Run("by its set-up", func(t *testing.T) {
		for name, change := range map[string]func(s *QueueState){
			"rings in MMIO space": func(s *QueueState) { s.Device = 0xFEE0_0000 },
			"rings past RAM":      func(s *QueueState) { s.Desc = 8 << 20 },
			"size":                func(s *QueueState) { s.Size = 3 },
		} {
			e := &echoGuest{dev: &echoDevice{}}
			e.guest = newGuest(t, e.dev)
			e.layout(FeatureVersion1)
			change(&e.drv[0].state)
			e.start(FeatureVersion1, e.drv[0], e.drv[1])
			wait(e)
			if errs := e.errors(); len(errs) != 1 || !errors.Is(errs[0], ErrQueue) || e.pci.Status()&StatusNeedsReset == 0 {
				t.Errorf("%s: reported: %v", name, errs)
			}
			if e.dev.started.Load() != 0 {
				t.Errorf("%s: device was started", name)
			}
		}
	})
	t.Run("by its start", func(t *testing.T) {
		dev := &echoDevice{startErr: errDisk}
		e := &echoGuest{dev: dev, guest: newGuest(t, dev)}
		e.layout(FeatureVersion1)
		e.start(FeatureVersion1, e.drv[0], e.drv[1])
		wait(e)
		if errs := e.errors(); len(errs) != 1 || !errors.Is(errs[0], errDisk) {
			t.Errorf("reported: %v", errs)
		}
	})
}

func TestPCITransportSurvivesCheckpoint(t *testing.T) {
	for name, features := range ringKinds {
		t.Run(name, func(t *testing.T) {
			e := newEchoGuest(t, features)
			for range 100 {
				e.send()
				e.receive()
			}
			// A request arrives while the transport is paused, and a change.
			e.pci.Pause()
			e.send()
			e.dev.hostNow().ConfigChanged()
			encoded, err := json.Marshal(struct {
				PCI       device.PCIState
				Transport TransportState
			}{e.host.State(), e.pci.State()})
			if err != nil {
				t.Fatal(err)
			}
			var s struct {
				PCI       device.PCIState
				Transport TransportState
			}
			if err := json.Unmarshal(encoded, &s); err != nil {
				t.Fatal(err)
			}

			// The new machine has the same memory.
			e2 := &echoGuest{dev: &echoDevice{}, drv: e.drv, heap: e.heap, n: e.n}
			e2.guest = newGuest(t, e2.dev)
			e2.pci.env.Mem = e.mem
			e2.mem = e.mem
			e2.pci.Pause()
			if err := e2.host.Restore(s.PCI); err != nil {
				t.Fatal(err)
			}
			if err := e2.pci.Restore(s.Transport); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(s.Transport, e2.pci.State()); diff != "" {
				t.Errorf("state changed (-want +got):\n%s", diff)
			}
			if e2.dev.handled.Load() != 0 || e2.msi.total() != 0 {
				t.Error("restored device runs before Resume")
			}
			e2.pci.Resume()
			for range 100 {
				e2.receive()
				e2.send()
			}
			e2.receive()
			if e2.msi.data(0x40) != 1 {
				t.Errorf("%d configuration interrupts", e2.msi.data(0x40))
			}

			bad := s.Transport
			bad.Queues = bad.Queues[:1]
			if err := e2.pci.Restore(bad); !errors.Is(err, ErrTransport) {
				t.Errorf("restore with one queue: %v", err)
			}
			bad = s.Transport
			bad.DriverFeatures |= 1 << 60
			if err := e2.pci.Restore(bad); !errors.Is(err, ErrTransport) {
				t.Errorf("restore with unknown features: %v", err)
			}
		})
	}
}
