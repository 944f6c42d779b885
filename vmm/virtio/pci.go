package virtio

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/gnomon-vmm/gnomon/vmm/device"
)

// Identity of virtio functions (section 4.1.2).
const (
	pciVendor     = 0x1AF4
	pciDeviceBase = 0x1040
	pciRevision   = 1
	pciSubsystem  = 0x1100
)

// Device status bits (section 2.1).
const (
	StatusAcknowledge = 1
	StatusDriver      = 2
	StatusDriverOK    = 4
	StatusFeaturesOK  = 8
	StatusNeedsReset  = 64
	StatusFailed      = 128
)

// NoVector is the MSI-X vector of a queue or of configuration changes that
// interrupt by none.
const NoVector = 0xFFFF

// Bits of the ISR status field (section 4.1.4.5).
const (
	isrQueue  = 1
	isrConfig = 2
)

// ErrTransport is the stage of running a device's PCI transport.
var ErrTransport = errors.New("virtio transport")

// TransportState is what survives a checkpoint of a transport. Configuration space and
// the MSI-X table are in device.PCIState, the device's own state with the device.
type TransportState struct {
	Status         uint8
	DriverFeatures uint64
	// The selectors say which half of the features, and which queue, the common
	// configuration shows.
	DeviceFeatureSelect, DriverFeatureSelect uint32
	QueueSelect                              uint16
	ConfigVector                             uint16
	Generation                               uint8 // of the device configuration
	ISR                                      uint8
	ConfigPending                            bool // a configuration interrupt waits for Resume
	Queues                                   []QueueState
}

// PCI is the transport of one device: a PCI function with one memory BAR
// that holds the virtio structures (section 4.1.4). Add it to a
// device.PCIHost.
//
// Locks: mu may be taken with the PCI host's lock held, and is held while
// workers are waited for. So nothing a worker calls takes mu.
type PCI struct {
	dev      Device
	name     string
	env      Env
	features uint64 // offered
	sizes    []uint16
	fn       *device.PCIFunction
	msix     *device.MSIX
	gate     *gate
	cfgCap   int // offset of the configuration access capability

	status       atomic.Uint32
	generation   atomic.Uint32
	configVector atomic.Uint32
	vectors      []atomic.Uint32 // of the queues
	session      atomic.Pointer[session]
	broken       atomic.Bool

	// isrMu guards isr and the interrupt line that follows it.
	isrMu sync.Mutex
	isr   uint8

	// configPending says that the configuration interrupt waits for Resume;
	// guarded by gate.mu.
	configPending bool

	mu     sync.Mutex
	regs   TransportState // guarded by mu; the atomics above hold its other part
	events []*eventFD     // of the queues; guarded by mu; nil after Close
	base   uint64         // where the guest has the BAR; 0 while it has not; guarded by mu
	armed  bool           // notify addresses are on env.EventFDs; guarded by mu
	closed bool           // guarded by mu
}

// session is a device from DRIVER_OK to its reset. It is what the device knows as
// its Host, so that calls after the reset have no effect.
type session struct {
	pci     *PCI
	queues  []*Queue
	workers []*worker // nil where there is no queue
}

// NewPCI makes a device a PCI function. name stands in errors and events.
func NewPCI(dev Device, name string, env Env) (*PCI, error) {
	p := &PCI{
		dev:      dev,
		name:     name,
		env:      env,
		features: dev.Features() | FeatureVersion1 | FeatureEventIdx | FeatureIndirectDesc | FeatureRingPacked,
		sizes:    dev.QueueSizes(),
		gate:     newGate(),
	}
	if len(p.sizes) == 0 || len(p.sizes) >= device.MaxMSIXVectors {
		return nil, fmt.Errorf("%w: %s: %d queues", ErrTransport, name, len(p.sizes))
	}
	p.vectors = make([]atomic.Uint32, len(p.sizes))
	if err := p.buildFunction(); err != nil {
		return nil, fmt.Errorf("%w: %s: %w", ErrTransport, name, err)
	}
	for range p.sizes {
		e, err := newEventFD()
		if err != nil {
			p.closeEvents()
			return nil, fmt.Errorf("%w: %s: %w", ErrTransport, name, err)
		}
		p.events = append(p.events, e)
	}
	p.clearRegs()
	return p, nil
}

// Name is the name given to NewPCI.
func (p *PCI) Name() string { return p.name }

// Device is the device given to NewPCI.
func (p *PCI) Device() Device { return p.dev }

// Function is the transport's PCI function.
func (p *PCI) Function() *device.PCIFunction { return p.fn }

// Features are the feature bits the driver accepted, or 0 before it did.
func (p *PCI) Features() uint64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.status.Load()&StatusFeaturesOK == 0 {
		return 0
	}
	return p.regs.DriverFeatures
}

// Status is the device status field.
func (p *PCI) Status() uint8 { return uint8(p.status.Load()) }

// clearRegs brings the registers to their state after reset; mu is held, or p is new.
func (p *PCI) clearRegs() {
	p.regs = TransportState{Queues: make([]QueueState, len(p.sizes))}
	for i, size := range p.sizes {
		p.regs.Queues[i].Size = size
		p.vectors[i].Store(NoVector)
	}
	p.configVector.Store(NoVector)
	p.status.Store(0)
	p.broken.Store(false)
	p.gate.mu.Lock()
	p.configPending = false
	p.gate.mu.Unlock()
	p.setISR(0, true)
}

// Reset ends the device's work and brings the transport to power-on state. It
// returns when the workers have ended, paused or not.
func (p *PCI) Reset() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.reset()
}

// reset is Reset with mu held.
func (p *PCI) reset() {
	if s := p.session.Swap(nil); s != nil {
		p.end(s)
	}
	p.clearRegs()
}

// end stops a session's workers, then the device; mu is held.
func (p *PCI) end(s *session) {
	p.disarm()
	p.gate.stop()
	for i, w := range s.workers {
		if w != nil {
			p.events[i].signal()
			<-w.done
		}
	}
	p.dev.Stop()
	s.release()
	p.gate.open()
}

// release lets go of the queues' rings.
func (s *session) release() {
	for _, q := range s.queues {
		if q != nil {
			q.release()
		}
	}
}

// begin starts the device with the queues the driver enabled; mu is held.
func (p *PCI) begin() error {
	s := &session{pci: p, queues: make([]*Queue, len(p.sizes)), workers: make([]*worker, len(p.sizes))}
	for i := range p.regs.Queues {
		if !p.regs.Queues[i].Enabled {
			continue
		}
		q, err := newQueue(p.env.Mem, i, p.regs.DriverFeatures, &p.regs.Queues[i])
		if err != nil {
			s.release()
			return err
		}
		w := &worker{
			queue: q, dev: p.dev, gate: p.gate, event: p.events[i],
			chains: pollChains, ends: pollEnds, fail: s.Fail, broken: &p.broken, done: make(chan struct{}),
		}
		q.event, q.gate, q.wake = p.events[i], p.gate, w.wake
		q.intr = func() { p.interrupt(isrQueue, p.vectors[i].Load()) }
		s.queues[i], s.workers[i] = q, w
	}
	p.session.Store(s)
	if err := p.dev.Start(p.regs.DriverFeatures, s.queues, s); err != nil {
		p.session.Store(nil)
		s.release()
		return fmt.Errorf("start: %w", err)
	}
	p.arm()
	for _, w := range s.workers {
		if w != nil {
			go w.run()
		}
	}
	return nil
}

// interrupt sends an interrupt for the reason isr: by the MSI-X vector, or by
// the interrupt line while the guest does not use MSI-X.
func (p *PCI) interrupt(isr uint8, vector uint32) {
	if p.msix.Enabled() {
		p.msix.Notify(int(vector))
		return
	}
	p.setISR(isr, false)
}

// setISR adds bits to the ISR status field, or replaces it, and sets the
// interrupt line accordingly.
func (p *PCI) setISR(bits uint8, replace bool) uint8 {
	p.isrMu.Lock()
	defer p.isrMu.Unlock()
	old := p.isr
	if replace {
		p.isr = bits
	} else {
		p.isr |= bits
	}
	if (p.isr != 0) != (old != 0) {
		p.fn.SetINTx(p.isr != 0)
	}
	return old
}

// ConfigChanged raises the configuration interrupt, on Resume if paused.
func (s *session) ConfigChanged() {
	if s.pci.session.Load() == s {
		s.pci.configChanged()
	}
}

func (p *PCI) configChanged() {
	p.generation.Add(1)
	p.gate.mu.Lock()
	defer p.gate.mu.Unlock()
	if p.gate.paused {
		p.configPending = true
		return
	}
	p.interrupt(isrConfig, p.configVector.Load())
}

// Fail marks the device broken.
func (s *session) Fail(err error) {
	if s.pci.session.Load() == s {
		s.pci.fail(err)
	}
}

// fail has the device wait for a reset (section 2.1.2). It takes no lock that is
// held while workers are waited for.
func (p *PCI) fail(err error) {
	if p.broken.Swap(true) {
		return
	}
	old := p.status.Or(StatusNeedsReset)
	if p.env.OnBroken != nil {
		p.env.OnBroken(p.name, fmt.Errorf("%w: %s: %w", ErrTransport, p.name, err))
	}
	if old&StatusDriverOK != 0 {
		p.configChanged()
	}
}

// Pause returns when every worker is outside Handle. Until Resume none
// enters it and no interrupt is sent; what wakes a worker meanwhile takes effect then.
func (p *PCI) Pause() { p.gate.pause() }

// Resume lets the workers go on.
func (p *PCI) Resume() {
	var pending bool
	p.gate.set(func() {
		p.gate.paused = false
		pending, p.configPending = p.configPending, false
	})
	if pending {
		p.interrupt(isrConfig, p.configVector.Load())
	}
}

// Close ends the device's work for good. The BAR, where the guest still
// reaches it, is then without effect.
func (p *PCI) Close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.reset()
	p.closed = true
	p.closeEvents()
}

func (p *PCI) closeEvents() {
	for _, e := range p.events {
		e.close()
	}
}

// State returns what must survive a checkpoint. The transport must be paused.
func (p *PCI) State() TransportState {
	p.mu.Lock()
	defer p.mu.Unlock()
	t := p.regs
	t.Status = uint8(p.status.Load())
	t.Generation = uint8(p.generation.Load())
	t.ConfigVector = uint16(p.configVector.Load())
	t.Queues = append([]QueueState(nil), p.regs.Queues...)
	for i := range t.Queues {
		t.Queues[i].Vector = uint16(p.vectors[i].Load())
	}
	if s := p.session.Load(); s != nil {
		for i, q := range s.queues {
			if q != nil {
				q.progress(&t.Queues[i])
			}
		}
	}
	p.isrMu.Lock()
	t.ISR = p.isr
	p.isrMu.Unlock()
	p.gate.mu.Lock()
	t.ConfigPending = p.configPending
	p.gate.mu.Unlock()
	return t
}

// Restore takes over saved state, after the PCI host's and the device's own,
// and starts the device if it was running. The transport must be paused.
func (p *PCI) Restore(t TransportState) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(t.Queues) != len(p.sizes) {
		return fmt.Errorf("%w: %s: saved state is of a device with %d queues, this one has %d", ErrTransport, p.name, len(t.Queues), len(p.sizes))
	}
	// Before FEATURES_OK the driver may have written anything.
	if lost := t.DriverFeatures &^ p.features; t.Status&StatusFeaturesOK != 0 && (lost != 0 || t.DriverFeatures&FeatureVersion1 == 0) {
		return fmt.Errorf("%w: %s: the saved driver uses features %#x, of which this device lacks %#x", ErrTransport, p.name, t.DriverFeatures, lost)
	}
	if t.Status&StatusDriverOK != 0 && t.Status&StatusFeaturesOK == 0 {
		return fmt.Errorf("%w: %s: saved status %#x", ErrTransport, p.name, t.Status)
	}
	for i := range t.Queues {
		if t.Queues[i].Size > p.sizes[i] {
			return fmt.Errorf("%w: %s: saved queue %d has size %d of at most %d", ErrTransport, p.name, i, t.Queues[i].Size, p.sizes[i])
		}
	}
	p.reset()
	p.regs = t
	p.regs.Queues = append([]QueueState(nil), t.Queues...)
	for i := range t.Queues {
		p.vectors[i].Store(uint32(t.Queues[i].Vector))
	}
	p.configVector.Store(uint32(t.ConfigVector))
	p.generation.Store(uint32(t.Generation))
	p.status.Store(uint32(t.Status))
	p.broken.Store(t.Status&StatusNeedsReset != 0)
	p.isrMu.Lock()
	p.isr = t.ISR // the line is part of the PCI host's state
	p.isrMu.Unlock()
	p.gate.mu.Lock()
	p.configPending = t.ConfigPending
	p.gate.mu.Unlock()
	if t.Status&StatusDriverOK == 0 || p.broken.Load() {
		return nil
	}
	if err := p.begin(); err != nil {
		return fmt.Errorf("%w: %s: %w", ErrTransport, p.name, err)
	}
	return nil
}
