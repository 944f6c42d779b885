package virtio

import (
	"errors"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/gnomon-vmm/gnomon/mm/guestmem"
	"github.com/gnomon-vmm/gnomon/vmm/device"
	"golang.org/x/sys/unix"
)

// guest is a model of a machine's guest that drives one transport through the
// MMIO bus and the configuration ports, as a virtio-pci driver does.
type guest struct {
	t     testing.TB
	mem   *guestmem.Memory
	mmio  *device.Bus
	ports *device.Bus
	host  *device.PCIHost
	pci   *PCI
	base  uint64 // of the BAR
	msi   *msiSink

	raised chan int // interrupt lines that came up

	mu     sync.Mutex
	broken []error                  // guarded by mu
	lines  [device.GSIPCICount]bool // guarded by mu

	kicks atomic.Int64 // notifications by MMIO
	fds   *fakeEventFDs
}

const guestSlot = 3

// msiSink collects messages; each is also sent to arrived where there is room.
type msiSink struct {
	mu      sync.Mutex
	count   map[uint32]int // by data; guarded by mu
	arrived chan uint32
}

func (m *msiSink) SignalMSI(addr uint64, data uint32) error {
	if addr != 0xFEE0_0000 {
		return errors.New("no interrupt controller there")
	}
	m.mu.Lock()
	m.count[data]++
	m.mu.Unlock()
	select {
	case m.arrived <- data:
	default:
	}
	return nil
}

func (m *msiSink) total() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	n := 0
	for _, c := range m.count {
		n += c
	}
	return n
}

// data is how many messages there were with this data.
func (m *msiSink) data(d uint32) int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.count[d]
}

// fakeEventFDs is KVM's part in notifications: a write to an assigned address
// signals the eventfd.
type fakeEventFDs struct {
	mu  sync.Mutex
	fds map[uint64]int // guarded by mu
}

func (f *fakeEventFDs) AssignIOEventFD(fd int, addr uint64, _ uint32, _ *uint64, _ bool) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, taken := f.fds[addr]; taken {
		return unix.EEXIST
	}
	f.fds[addr] = fd
	return nil
}

func (f *fakeEventFDs) DeassignIOEventFD(fd int, addr uint64, _ uint32, _ *uint64, _ bool) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fds[addr] != fd {
		return unix.ENOENT
	}
	delete(f.fds, addr)
	return nil
}

func (f *fakeEventFDs) write(addr uint64) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	fd, ok := f.fds[addr]
	if ok {
		_, _ = unix.Write(fd, []byte{1, 0, 0, 0, 0, 0, 0, 0})
	}
	return ok
}

// newGuest puts a device on a machine with 8 MiB of RAM.
func newGuest(t testing.TB, dev Device) *guest {
	t.Helper()
	g := &guest{
		t: t, mem: testMemory(t), mmio: device.NewBus("MMIO"), ports: device.NewBus("port"),
		msi:    &msiSink{count: map[uint32]int{}, arrived: make(chan uint32, 1024)},
		raised: make(chan int, 1024), fds: &fakeEventFDs{fds: map[uint64]int{}},
	}
	var lines [device.GSIPCICount]device.Line
	for i := range lines {
		lines[i] = device.LineFunc(func(high bool) { g.setLine(i, high) })
	}
	g.host = device.NewPCIHost(g.mmio, g.msi, lines)
	if err := g.ports.Map(device.PortPCIAddress, device.PCIPortCount, g.host.Ports(nil)); err != nil {
		t.Fatal(err)
	}
	if err := g.mmio.Map(device.ECAMBase, device.ECAMSize, g.host.ECAM()); err != nil {
		t.Fatal(err)
	}
	var err error
	g.pci, err = NewPCI(dev, "dev0", Env{Mem: g.mem, EventFDs: g.fds, OnBroken: func(_ string, err error) {
		g.mu.Lock()
		defer g.mu.Unlock()
		g.broken = append(g.broken, err)
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(g.pci.Close)
	if err := g.host.Add(guestSlot, g.pci); err != nil {
		t.Fatal(err)
	}
	g.base = uint64(g.config(0x10, 4)) &^ 0xF
	return g
}

func (g *guest) setLine(i int, high bool) {
	g.mu.Lock()
	g.lines[i] = high
	g.mu.Unlock()
	if high {
		g.raised <- i
	}
}

func (g *guest) line(i int) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.lines[i]
}

// config reads configuration space by ECAM.
func (g *guest) config(off, n int) uint32 {
	var p [4]byte
	g.mmio.Read(device.ECAMBase+guestSlot<<15+uint64(off), p[:n])
	return le.Uint32(p[:])
}

func (g *guest) setConfig(off, n int, v uint32) {
	g.mmio.Write(device.ECAMBase+guestSlot<<15+uint64(off), le.AppendUint32(nil, v)[:n])
}

// read and write access the BAR.
func (g *guest) read(off uint64, n int) uint64 {
	var p [8]byte
	g.mmio.Read(g.base+off, p[:n])
	return le.Uint64(p[:])
}

func (g *guest) write(off uint64, n int, v uint64) {
	g.mmio.Write(g.base+off, le.AppendUint64(nil, v)[:n])
}

// negotiate goes through the initialisation up to FEATURES_OK (section 3.1.1).
func (g *guest) negotiate(features uint64) {
	g.t.Helper()
	g.write(commonStatus, 1, 0)
	g.write(commonStatus, 1, StatusAcknowledge)
	g.write(commonStatus, 1, StatusAcknowledge|StatusDriver)
	for i := range uint64(2) {
		g.write(commonDriverFeatureSelect, 4, i)
		g.write(commonDriverFeature, 4, features>>(32*i)&0xFFFF_FFFF)
	}
	g.write(commonStatus, 1, StatusAcknowledge|StatusDriver|StatusFeaturesOK)
	if g.read(commonStatus, 1)&StatusFeaturesOK == 0 {
		g.t.Fatalf("device refuses features %#x", features)
	}
}

// enableMSIX gives vector i the data 0x40+i.
func (g *guest) enableMSIX() {
	for i := range g.pci.msix.Vectors() {
		at := uint64(barMSIX + 16*i)
		g.write(at, 8, 0xFEE0_0000)
		g.write(at+8, 4, uint64(0x40+i))
		g.write(at+12, 4, 0)
	}
	g.setConfig(0x40+2, 2, 1<<15)
	g.write(commonConfigVector, 2, 0)
}

// setQueue sets queue i up and enables it; its vector is i+1.
func (g *guest) setQueue(i int, s *QueueState) {
	g.write(commonQueueSelect, 2, uint64(i))
	g.write(commonQueueSize, 2, uint64(s.Size))
	g.write(commonQueueVector, 2, uint64(i+1))
	g.write(commonQueueDesc, 8, s.Desc)
	g.write(commonQueueDriver, 4, s.Driver&0xFFFF_FFFF)
	g.write(commonQueueDriver+4, 4, s.Driver>>32)
	g.write(commonQueueDevice, 8, s.Device)
	g.write(commonQueueEnable, 2, 1)
}

func (g *guest) driverOK() {
	g.write(commonStatus, 1, StatusAcknowledge|StatusDriver|StatusFeaturesOK|StatusDriverOK)
}

// start brings the device up with one queue for each driver.
func (g *guest) start(features uint64, drivers ...*driver) {
	g.t.Helper()
	g.negotiate(features)
	g.enableMSIX()
	for i, d := range drivers {
		g.setQueue(i, &d.state)
	}
	g.driverOK()
}

// kick notifies the device of queue i, as KVM would deliver it.
func (g *guest) kick(i int) {
	addr := g.base + barNotify + uint64(i*notifyStride)
	if g.fds.write(addr) {
		return
	}
	g.kicks.Add(1)
	g.mmio.Write(addr, []byte{byte(i), 0})
}

// reap waits for the next used request of queue i's driver by its interrupt.
func (g *guest) reap(d *driver, i int) (tag int, written uint32) {
	g.t.Helper()
	for {
		if tag, written, ok := d.used(); ok {
			return tag, written
		}
		if d.wantInterrupts() {
			continue
		}
		for data := range g.msi.arrived {
			if data == uint32(0x40+i+1) {
				break
			}
			if data == 0x40 {
				g.mu.Lock()
				err := g.broken
				g.mu.Unlock()
				if len(err) > 0 {
					g.t.Fatalf("device broke while waiting for queue %d: %v", i, err)
				}
			}
		}
	}
}
