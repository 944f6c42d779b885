package device

import "encoding/binary"

// PCIPortCount is how many ports PCIHost.Ports serves from PortPCIAddress on.
const PCIPortCount = 8

const pciAddressEnable = 1 << 31

// Ports serves configuration mechanism #1: PCIPortCount ports from
// PortPCIAddress on. The reset register at PortReset lies among them: byte
// accesses there go to reset, with offset 0, where it is not nil.
func (h *PCIHost) Ports(reset Handler) Handler { return &pciPorts{h, reset} }

type pciPorts struct {
	host  *PCIHost
	reset Handler
}

func (p *pciPorts) isReset(off uint64, data []byte) bool {
	return p.reset != nil && off == PortReset-PortPCIAddress && len(data) == 1
}

// target takes the address register apart.
func (p *pciPorts) target(off uint64) (bus, slot, function, reg int, ok bool) {
	p.host.mu.Lock()
	a := p.host.address
	p.host.mu.Unlock()
	return int(a >> 16 & 0xFF), int(a >> 11 & 0x1F), int(a >> 8 & 7), int(a&0xFC) + int(off&3), a&pciAddressEnable != 0
}

// Read reads the address register, as a whole, or the data of the word it names.
func (p *pciPorts) Read(off uint64, data []byte) {
	fill(data, 0xFF)
	switch {
	case p.isReset(off, data):
		p.reset.Read(0, data)
	case off == 0 && len(data) == 4:
		p.host.mu.Lock()
		defer p.host.mu.Unlock()
		binary.LittleEndian.PutUint32(data, p.host.address)
	case off >= 4 && off&3+uint64(len(data)) <= 4:
		if bus, slot, function, reg, ok := p.target(off); ok {
			p.host.access(bus, slot, function, reg, data, false)
		}
	}
}

// Write writes the address register, as a whole, or the data of the word it names.
func (p *pciPorts) Write(off uint64, data []byte) {
	switch {
	case p.isReset(off, data):
		p.reset.Write(0, data)
	case off == 0 && len(data) == 4:
		p.host.mu.Lock()
		defer p.host.mu.Unlock()
		p.host.address = binary.LittleEndian.Uint32(data) & (pciAddressEnable | 0x00FF_FFFC)
	case off >= 4 && off&3+uint64(len(data)) <= 4:
		if bus, slot, function, reg, ok := p.target(off); ok {
			p.host.access(bus, slot, function, reg, data, true)
		}
	}
}

// ECAM serves the enhanced configuration space: ECAMSize bytes at ECAMBase.
func (h *PCIHost) ECAM() Handler { return (*pciECAM)(h) }

type pciECAM PCIHost

func (e *pciECAM) Read(off uint64, p []byte)  { e.access(off, p, false) }
func (e *pciECAM) Write(off uint64, p []byte) { e.access(off, p, true) }

// access splits what crosses a 32-bit word, which only careless guests do.
func (e *pciECAM) access(off uint64, p []byte, write bool) {
	for len(p) > 0 {
		n := min(len(p), 4-int(off&3))
		(*PCIHost)(e).access(int(off>>20), int(off>>15&0x1F), int(off>>12&7), int(off&0xFFF), p[:n:n], write)
		off, p = off+uint64(n), p[n:]
	}
}
