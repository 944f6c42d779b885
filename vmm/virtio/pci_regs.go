package virtio

import (
	"github.com/gnomon-vmm/gnomon/vmm/device"
)

// The BAR: each structure has a page, or half of one.
const (
	pciBAR       = 0
	barCommon    = 0x0000
	barISR       = 0x0800
	barDevice    = 0x1000
	barNotify    = 0x2000
	barMSIX      = 0x3000
	barSize      = 0x4000
	notifyStride = 4 // bytes between the queues' notify addresses
)

// Common configuration structure (section 4.1.4.3).
const (
	commonDeviceFeatureSelect = 0
	commonDeviceFeature       = 4
	commonDriverFeatureSelect = 8
	commonDriverFeature       = 12
	commonConfigVector        = 16
	commonNumQueues           = 18
	commonStatus              = 20
	commonGeneration          = 21
	commonQueueSelect         = 22
	commonQueueSize           = 24
	commonQueueVector         = 26
	commonQueueEnable         = 28
	commonQueueNotifyOff      = 30
	commonQueueDesc           = 32
	commonQueueDriver         = 40
	commonQueueDevice         = 48
	commonSize                = 56
)

// Types of the vendor capabilities (section 4.1.4).
const (
	capVendor = 0x09
	capCommon = 1
	capNotify = 2
	capISR    = 3
	capDevice = 4
	capAccess = 5

	// Offsets in a capability.
	capBAR    = 4
	capOffset = 8
	capLength = 12
	capData   = 16
)

// classes are the PCI class codes of the device types.
var classes = map[DeviceID]uint32{
	IDNet:     0x020000, // Ethernet controller
	IDBlock:   0x010000, // SCSI storage controller, as QEMU says
	IDConsole: 0x078000, // communication controller
	IDRNG:     0x00FF00,
	IDBalloon: 0x00FF00,
	IDVsock:   0x078000,
}

// buildFunction puts the PCI function together.
func (p *PCI) buildFunction() error {
	p.fn = device.NewPCIFunction(device.PCIIdentity{
		Vendor: pciVendor, Device: pciDeviceBase + uint16(p.dev.ID()),
		SubsystemVendor: pciVendor, Subsystem: pciSubsystem,
		Class: classes[p.dev.ID()], Revision: pciRevision,
	})
	p.fn.OnMove = p.moved
	p.fn.EnableINTx()
	if err := p.fn.AddBAR(pciBAR, barSize, (*bar)(p)); err != nil {
		return err
	}
	var err error
	if p.msix, err = p.fn.AddMSIX(len(p.sizes)+1, pciBAR, barMSIX); err != nil {
		return err
	}
	notifySize := uint32(len(p.sizes) * notifyStride)
	for _, c := range []struct {
		kind           byte
		offset, length uint32
		extra          []byte
	}{
		{capCommon, barCommon, commonSize, nil},
		{capISR, barISR, 4, nil},
		{capDevice, barDevice, barNotify - barDevice, nil},
		{capNotify, barNotify, notifySize, le.AppendUint32(nil, notifyStride)},
	} {
		if _, err := p.fn.AddCapability(capVendor, capBody(c.kind, c.offset, c.length, c.extra), nil); err != nil {
			return err
		}
	}
	body := capBody(capAccess, 0, 0, make([]byte, 4))
	writable := make([]byte, len(body))
	for _, i := range []int{capBAR, capOffset, capOffset + 1, capOffset + 2, capOffset + 3, capLength, capLength + 1, capLength + 2, capLength + 3} {
		writable[i-2] = 0xFF
	}
	if p.cfgCap, err = p.fn.AddCapability(capVendor, body, writable); err != nil {
		return err
	}
	p.fn.SetWindow(p.cfgCap+capData, 4, (*accessWindow)(p))
	return nil
}

// capBody is a struct virtio_pci_cap behind its id and link.
func capBody(kind byte, offset, length uint32, extra []byte) []byte {
	b := []byte{byte(capData + len(extra)), kind, pciBAR, 0, 0, 0}
	b = le.AppendUint32(b, offset)
	b = le.AppendUint32(b, length)
	return append(b, extra...)
}

// accessWindow is the data field of the configuration access capability, by
// which a guest without MMIO reaches the BAR (section 4.1.4.9).
type accessWindow PCI

func (a *accessWindow) target(n int) (off uint64, ok bool) {
	p := (*PCI)(a)
	var c [capData]byte
	p.fn.Config(p.cfgCap, c[:])
	off = uint64(le.Uint32(c[capOffset:]))
	length := le.Uint32(c[capLength:])
	ok = c[capBAR] == pciBAR && int(length) == n && (n == 1 || n == 2 || n == 4) && off%uint64(n) == 0 && off < barSize
	return off, ok
}

func (a *accessWindow) Read(_ uint64, p []byte) {
	clear(p)
	if off, ok := a.target(len(p)); ok {
		(*bar)(a).Read(off, p)
	}
}

func (a *accessWindow) Write(_ uint64, p []byte) {
	if off, ok := a.target(len(p)); ok {
		(*bar)(a).Write(off, p)
	}
}

// bar is the transport as its BAR's Handler.
type bar PCI

func (b *bar) Read(off uint64, data []byte) {
	p := (*PCI)(b)
	switch {
	case off >= barMSIX:
		p.msix.Read(off-barMSIX, data)
	case off >= barNotify:
		clear(data)
	case off >= barDevice:
		clear(data)
		p.dev.ReadConfig(int(off-barDevice), data)
	case off >= barISR:
		clear(data)
		if off == barISR {
			data[0] = p.setISR(0, true)
		}
	default:
		p.readCommon(int(off), data)
	}
}

func (b *bar) Write(off uint64, data []byte) {
	p := (*PCI)(b)
	switch {
	case off >= barMSIX:
		p.msix.Write(off-barMSIX, data)
	case off >= barNotify:
		p.kick(int(off-barNotify) / notifyStride)
	case off >= barDevice:
		p.dev.WriteConfig(int(off-barDevice), data)
	case off >= barISR:
	default:
		p.writeCommon(int(off), data)
	}
}

// kick wakes a queue's worker for a notification that came as an MMIO write.
func (p *PCI) kick(queue int) {
	s := p.session.Load()
	if s == nil || queue >= len(s.queues) || s.queues[queue] == nil {
		return
	}
	s.queues[queue].Wake()
}

// readCommon reads any part of the common configuration.
func (p *PCI) readCommon(off int, data []byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	var c [commonSize]byte
	r := &p.regs
	le.PutUint32(c[commonDeviceFeatureSelect:], r.DeviceFeatureSelect)
	le.PutUint32(c[commonDeviceFeature:], half(p.features, r.DeviceFeatureSelect))
	le.PutUint32(c[commonDriverFeatureSelect:], r.DriverFeatureSelect)
	le.PutUint32(c[commonDriverFeature:], half(r.DriverFeatures, r.DriverFeatureSelect))
	le.PutUint16(c[commonConfigVector:], uint16(p.configVector.Load()))
	le.PutUint16(c[commonNumQueues:], uint16(len(r.Queues)))
	c[commonStatus] = byte(p.status.Load())
	c[commonGeneration] = byte(p.generation.Load())
	le.PutUint16(c[commonQueueSelect:], r.QueueSelect)
	if i := int(r.QueueSelect); i < len(r.Queues) {
		q := &r.Queues[i]
		le.PutUint16(c[commonQueueSize:], q.Size)
		le.PutUint16(c[commonQueueVector:], uint16(p.vectors[i].Load()))
		if q.Enabled {
			c[commonQueueEnable] = 1
		}
		le.PutUint16(c[commonQueueNotifyOff:], r.QueueSelect)
		le.PutUint64(c[commonQueueDesc:], q.Desc)
		le.PutUint64(c[commonQueueDriver:], q.Driver)
		le.PutUint64(c[commonQueueDevice:], q.Device)
	}
	clear(data)
	if off < commonSize {
		copy(data, c[off:])
	}
}

// half is the 32 bits of v that a selector names.
func half(v uint64, selector uint32) uint32 {
	if selector > 1 {
		return 0
	}
	return uint32(v >> (32 * selector))
}

// setHalf replaces 32 bits of v.
func setHalf(v uint64, selector, to uint32) uint64 {
	switch selector {
	case 0:
		return v&^0xFFFF_FFFF | uint64(to)
	case 1:
		return v&0xFFFF_FFFF | uint64(to)<<32
	}
	return v
}

// writeCommon writes one field of the common configuration, with an access of
// the field's size; 64-bit fields also by halves (section 4.1.3.1). Others
// have no effect.
func (p *PCI) writeCommon(off int, data []byte) {
	var v uint64
	for i, b := range data {
		v |= uint64(b) << (8 * i)
	}
	if err := p.writeField(off, len(data), v); err != nil {
		p.fail(err)
	}
}

func (p *PCI) writeField(off, n int, v uint64) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil
	}
	r := &p.regs
	switch {
	case off == commonDeviceFeatureSelect && n == 4:
		r.DeviceFeatureSelect = uint32(v)
	case off == commonDriverFeatureSelect && n == 4:
		r.DriverFeatureSelect = uint32(v)
	case off == commonDriverFeature && n == 4:
		if p.status.Load()&StatusFeaturesOK == 0 {
			r.DriverFeatures = setHalf(r.DriverFeatures, r.DriverFeatureSelect, uint32(v))
		}
	case off == commonConfigVector && n == 2:
		p.configVector.Store(p.vector(v))
	case off == commonStatus && n == 1:
		return p.setStatus(uint32(v))
	case off == commonQueueSelect && n == 2:
		r.QueueSelect = uint16(v)
	case off >= commonQueueSize && int(r.QueueSelect) < len(r.Queues):
		p.writeQueueField(off, n, v)
	}
	return nil
}

// vector is a vector that the driver chose, or NoVector where it does not exist.
func (p *PCI) vector(v uint64) uint32 {
	if v >= uint64(p.msix.Vectors()) {
		return NoVector
	}
	return uint32(v)
}

// writeQueueField changes the selected queue, until the device runs; mu is held.
func (p *PCI) writeQueueField(off, n int, v uint64) {
	i := int(p.regs.QueueSelect)
	q := &p.regs.Queues[i]
	if off == commonQueueVector && n == 2 {
		p.vectors[i].Store(p.vector(v))
		return
	}
	if p.status.Load()&StatusDriverOK != 0 || q.Enabled {
		return
	}
	switch {
	case off == commonQueueSize && n == 2:
		if v <= uint64(p.sizes[i]) {
			q.Size = uint16(v)
		}
	case off == commonQueueEnable && n == 2:
		if v == 1 {
			q.Enabled = true
			q.AvailWrap, q.UsedWrap = true, true
		}
	case off < commonQueueDesc || off%4 != 0 || n != 4 && n != 8:
	default:
		field := [...]*uint64{&q.Desc, &q.Driver, &q.Device}[(off-commonQueueDesc)/8]
		switch {
		case n == 4:
			*field = setHalf(*field, uint32(off/4%2), uint32(v))
		case off%8 == 0:
			*field = v
		}
	}
}

// setStatus follows a write of the device status (section 3.1.1); mu is held.
// An error means the device is to be marked broken.
func (p *PCI) setStatus(v uint32) error {
	if v == 0 {
		p.reset()
		return nil
	}
	old := p.status.Load()
	v |= old // only a reset clears bits
	if v&StatusFeaturesOK != 0 && old&StatusFeaturesOK == 0 && !p.featuresOK() {
		v &^= StatusFeaturesOK
	}
	if v&StatusFeaturesOK == 0 {
		v &^= StatusDriverOK
	}
	p.status.Or(v)
	if v&StatusDriverOK != 0 && old&StatusDriverOK == 0 && !p.broken.Load() {
		return p.begin()
	}
	return nil
}

// featuresOK tells whether the device can work with what the driver accepted.
func (p *PCI) featuresOK() bool {
	f := p.regs.DriverFeatures
	return f&^p.features == 0 && f&FeatureVersion1 != 0
}

// moved follows the guest's placing of the BAR.
func (p *PCI) moved(_ int, base uint64, mapped bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.disarm()
	p.base = 0
	if mapped {
		p.base = base
		p.arm()
	}
}

// arm has the running queues' notify addresses signal their workers' eventfds;
// mu is held. Where that fails notifications arrive as MMIO writes.
func (p *PCI) arm() {
	s := p.session.Load()
	if p.env.EventFDs == nil || p.base == 0 || s == nil || p.armed {
		return
	}
	p.armed = true
	for i, q := range s.queues {
		if q != nil {
			_ = p.env.EventFDs.AssignIOEventFD(p.events[i].fd, p.notifyAddr(i), 0, nil, false)
		}
	}
}

// disarm undoes arm; mu is held.
func (p *PCI) disarm() {
	if !p.armed {
		return
	}
	p.armed = false
	for i := range p.events {
		// Those that were never assigned fail, which does no harm.
		_ = p.env.EventFDs.DeassignIOEventFD(p.events[i].fd, p.notifyAddr(i), 0, nil, false)
	}
}

func (p *PCI) notifyAddr(queue int) uint64 {
	return p.base + barNotify + uint64(queue)*notifyStride
}
