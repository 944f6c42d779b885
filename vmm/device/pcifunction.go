package device

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
)

// Configuration space of a function (PCI Local Bus 3.0, section 6.1).
const (
	pciConfigSize = 256

	pciVendorID       = 0x00
	pciCommand        = 0x04
	pciStatus         = 0x06
	pciRevision       = 0x08 // class code in the three bytes after it
	pciCacheLine      = 0x0C
	pciBAR0           = 0x10
	pciSubsystem      = 0x2C
	pciCapabilities   = 0x34
	pciInterruptLine  = 0x3C
	pciInterruptPin   = 0x3D
	pciFirstCap       = 0x40
	pciBARs           = 6
	pciCommandMemory  = 1 << 1
	pciCommandMaster  = 1 << 2
	pciCommandNoINTx  = 1 << 10
	pciCommandMask    = 1<<0 | pciCommandMemory | pciCommandMaster | 1<<6 | 1<<8 | pciCommandNoINTx
	pciStatusINTx     = 1 << 3
	pciStatusCapList  = 1 << 4
	pciCapMSIX        = 0x11
	pciMSIXControlOff = 2
)

// ErrPCI is the stage of putting a function together and on the bus.
var ErrPCI = errors.New("set up PCI device")

// PCIIdentity is what a function's header says about it.
type PCIIdentity struct {
	Vendor, Device             uint16
	SubsystemVendor, Subsystem uint16
	Class                      uint32 // 24 bits: class, subclass, programming interface
	Revision                   uint8
}

// PCIDevice is what a PCIHost carries.
type PCIDevice interface {
	// Function is the device's configuration space, the same at each call.
	Function() *PCIFunction
	// Reset brings the device to its power-on state; the host resets the
	// function itself.
	Reset()
}

// PCIFunction is the configuration space of one function: a header with
// masks of writable bits, memory BARs, a capability list, INTx and MSI-X. It is
// put together before PCIHost.Add and belongs to that host from then on.
type PCIFunction struct {
	// OnMove, where set, is called when a memory BAR appears at base or, with
	// mapped false, goes from base, with the host's lock held: it must not
	// access configuration space.
	OnMove func(bar int, base uint64, mapped bool)

	identity PCIIdentity
	host     *PCIHost // nil before Add
	slot     int

	// The fields below are guarded by host.mu once the function is added.

	config  [pciConfigSize]byte
	mask    [pciConfigSize]byte // bits the guest can write
	initial [pciConfigSize]byte // config at reset
	bars    [pciBARs]pciBAR
	window  pciWindow
	nextCap int
	lastCap int // offset of the byte that will hold the next capability's offset
	msix    *MSIX
	msixCap int

	// The interrupt line, guarded by host.intxMu.

	intxHigh     bool
	intxDisabled bool
	gone         bool // from the bus
}

// pciBAR is one memory BAR; size 0 means there is none.
type pciBAR struct {
	size    uint64
	handler Handler
	mapped  bool
	base    uint64 // where it is mapped
}

// pciWindow is a part of the configuration space that a Handler serves.
type pciWindow struct {
	off, size int
	handler   Handler
}

// NewPCIFunction returns a function without BARs or capabilities.
func NewPCIFunction(id PCIIdentity) *PCIFunction {
	f := &PCIFunction{identity: id, nextCap: pciFirstCap, lastCap: pciCapabilities}
	le := binary.LittleEndian
	le.PutUint16(f.config[pciVendorID:], id.Vendor)
	le.PutUint16(f.config[pciVendorID+2:], id.Device)
	le.PutUint32(f.config[pciRevision:], id.Class<<8|uint32(id.Revision))
	le.PutUint16(f.config[pciSubsystem:], id.SubsystemVendor)
	le.PutUint16(f.config[pciSubsystem+2:], id.Subsystem)
	le.PutUint16(f.mask[pciCommand:], pciCommandMask)
	f.mask[pciCacheLine] = 0xFF
	f.mask[pciInterruptLine] = 0xFF
	return f
}

// AddBAR gives the function a 32-bit memory BAR of size bytes, a power of two
// of at least a page, served by h.
func (f *PCIFunction) AddBAR(bar int, size uint64, h Handler) error {
	if bar < 0 || bar >= pciBARs || f.bars[bar].size != 0 || bits.OnesCount64(size) != 1 || size < 4096 || size > PCIMMIOSize {
		return fmt.Errorf("%w: BAR %d of %d bytes", ErrPCI, bar, size)
	}
	f.bars[bar] = pciBAR{size: size, handler: h}
	binary.LittleEndian.PutUint32(f.mask[pciBAR0+4*bar:], uint32(-size))
	return nil
}

// AddCapability appends a capability: id and link, then body. writable, which
// may be short, are the bits of body the guest can change. It returns the offset of the
// capability.
func (f *PCIFunction) AddCapability(id byte, body, writable []byte) (int, error) {
	off := f.nextCap
	end := off + 2 + len(body)
	if end > pciConfigSize || len(writable) > len(body) {
		return 0, fmt.Errorf("%w: no room for capability %#x of %d bytes", ErrPCI, id, 2+len(body))
	}
	f.config[pciStatus] |= pciStatusCapList
	f.config[f.lastCap] = byte(off)
	f.config[off] = id
	copy(f.config[off+2:], body)
	copy(f.mask[off+2:], writable)
	f.lastCap, f.nextCap = off+1, (end+3)&^3
	return off, nil
}

// AddMSIX appends an MSI-X capability, whose table the device shows at
// tableOffset of a BAR: there MSIXSize bytes belong to the returned Handler.
func (f *PCIFunction) AddMSIX(vectors, bar int, tableOffset uint32) (*MSIX, error) {
	if vectors < 1 || vectors > MaxMSIXVectors || f.msix != nil {
		return nil, fmt.Errorf("%w: %d MSI-X vectors", ErrPCI, vectors)
	}
	body := binary.LittleEndian.AppendUint16(nil, uint16(vectors-1))
	body = binary.LittleEndian.AppendUint32(body, tableOffset|uint32(bar))
	body = binary.LittleEndian.AppendUint32(body, (tableOffset+MSIXPBAOffset)|uint32(bar))
	writable := binary.LittleEndian.AppendUint16(nil, msixControlEnable|msixControlMask)
	off, err := f.AddCapability(pciCapMSIX, body, writable)
	if err != nil {
		return nil, err
	}
	f.msix, f.msixCap = newMSIX(vectors), off
	return f.msix, nil
}

// SetWindow sends configuration accesses that lie in the size bytes from off
// on to h, called without locks held.
func (f *PCIFunction) SetWindow(off, size int, h Handler) {
	f.window = pciWindow{off: off, size: size, handler: h}
}

// Slot is where PCIHost.Add put the function.
func (f *PCIFunction) Slot() int { return f.slot }

// EnableINTx says that the function drives pin INTA.
func (f *PCIFunction) EnableINTx() { f.config[pciInterruptPin] = 1 }

// SetINTx sets the function's interrupt line. Any goroutine may call it.
func (f *PCIFunction) SetINTx(high bool) {
	if f.host == nil {
		return
	}
	f.host.intxMu.Lock()
	defer f.host.intxMu.Unlock()
	if f.gone {
		return
	}
	f.intxHigh = high
	f.host.driveINTx(f)
}

// Config copies configuration space from off on into p, as the guest would read it.
func (f *PCIFunction) Config(off int, p []byte) {
	if f.host != nil {
		f.host.mu.Lock()
		defer f.host.mu.Unlock()
	}
	f.read(off, p)
}

// read copies configuration space; host.mu is held.
func (f *PCIFunction) read(off int, p []byte) {
	for i := range p {
		o := off + i
		if o < 0 || o >= pciConfigSize {
			p[i] = 0xFF
			continue
		}
		p[i] = f.config[o]
		if o == pciStatus && f.host != nil && f.intxLevel() {
			p[i] |= pciStatusINTx
		}
	}
}

// write changes the writable bits of configuration space; host.mu is held.
func (f *PCIFunction) write(off int, p []byte) {
	for i, v := range p {
		if o := off + i; o >= 0 && o < pciConfigSize {
			f.config[o] = f.config[o]&^f.mask[o] | v&f.mask[o]
		}
	}
	f.follow()
}

// follow brings interrupts and BARs in line with the configuration space; host.mu is held.
func (f *PCIFunction) follow() {
	if f.msix != nil {
		f.msix.setControl(binary.LittleEndian.Uint16(f.config[f.msixCap+pciMSIXControlOff:]))
	}
	f.host.intxMu.Lock()
	if off := f.command()&pciCommandNoINTx != 0; off != f.intxDisabled {
		f.intxDisabled = off
		f.host.driveINTx(f)
	}
	f.host.intxMu.Unlock()
	f.host.placeBARs(f)
}

func (f *PCIFunction) command() uint16 { return binary.LittleEndian.Uint16(f.config[pciCommand:]) }

// intxLevel is the line before the command register masks it.
func (f *PCIFunction) intxLevel() bool {
	f.host.intxMu.Lock()
	defer f.host.intxMu.Unlock()
	return f.intxHigh
}

// barAddress is where the guest wants a BAR; host.mu is held.
func (f *PCIFunction) barAddress(bar int) uint64 {
	return uint64(binary.LittleEndian.Uint32(f.config[pciBAR0+4*bar:]) &^ 0xF)
}
