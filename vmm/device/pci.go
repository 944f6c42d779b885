package device

import (
	"encoding/binary"
	"fmt"
	"sync"
)

// PCISlots is how many devices bus 0 has; slot 0 is the host bridge.
const PCISlots = 32

// The host bridge's identity, that of Intel's Q35 memory controller.
var pciHostBridge = PCIIdentity{Vendor: 0x8086, Device: 0x29C0, SubsystemVendor: 0x1AF4, Subsystem: 0x1100, Class: 0x060000}

// PCIHost is bus 0 of the machine: it routes configuration accesses from ports
// and from the enhanced configuration space (ECAM) to functions, keeps their
// memory BARs on the MMIO bus, and joins their INTx pins into the machine's
// lines.
//
// BARs get addresses in the PCI window when a device is added, and again at
// reset, with memory decoding on: no firmware does that here. Those of a device
// that is plugged in have none until the guest places them. A BAR that the
// guest moves outside the window or over another is on no bus until
// it is moved again or the other goes.
type PCIHost struct {
	mmio  *Bus
	msi   MSISender
	lines [GSIPCICount]Line

	// mu guards the fields below and the configuration space of every function.
	mu       sync.Mutex
	devices  [PCISlots]PCIDevice
	funcs    [PCISlots]*PCIFunction
	address  uint32 // the register at PortPCIAddress
	restless bool   // some BAR wants an address it could not get

	// intxMu guards the interrupt lines. It may be taken with mu held.
	intxMu sync.Mutex
	driven [GSIPCICount]uint32 // slots that hold the line high
}

// PCIState is what survives a checkpoint.
type PCIState struct {
	Address   uint32
	Functions []PCIFunctionState // by ascending slot
}

// PCIFunctionState is one function's part of PCIState.
type PCIFunctionState struct {
	Slot   int
	Config []byte // configuration space
	INTx   bool   // the function holds its pin
	MSIX   *MSIXState
}

// NewPCIHost returns a host bridge alone on its bus. BARs are mapped on mmio,
// MSI-X vectors go to msi; lines[i] is GSIPCIFirst+i and may be nil.
func NewPCIHost(mmio *Bus, msi MSISender, lines [GSIPCICount]Line) *PCIHost {
	h := &PCIHost{mmio: mmio, msi: msi, lines: lines}
	bridge := NewPCIFunction(pciHostBridge)
	bridge.host = h
	bridge.initial = bridge.config
	h.funcs[0] = bridge
	return h
}

// Add puts a device in a slot from 1 to PCISlots-1 and places its BARs.
func (h *PCIHost) Add(slot int, d PCIDevice) error { return h.add(slot, d, true) }

// Plug is Add while the guest runs, which places the BARs itself.
func (h *PCIHost) Plug(slot int, d PCIDevice) error { return h.add(slot, d, false) }

func (h *PCIHost) add(slot int, d PCIDevice, placed bool) error {
	f := d.Function()
	h.mu.Lock()
	defer h.mu.Unlock()
	if slot < 1 || slot >= PCISlots || h.funcs[slot] != nil || f.host != nil {
		return fmt.Errorf("%w: slot %d is taken or does not exist", ErrPCI, slot)
	}
	bare := f.config
	for i := range f.bars {
		size := f.bars[i].size
		if size == 0 {
			continue
		}
		base, ok := h.room(f, i, size)
		if !ok {
			f.config = bare
			return fmt.Errorf("%w: slot %d: no room for BAR %d of %d bytes", ErrPCI, slot, i, size)
		}
		binary.LittleEndian.PutUint32(f.config[pciBAR0+4*i:], uint32(base))
	}
	f.config[pciCommand] |= pciCommandMemory
	if f.config[pciInterruptPin] != 0 {
		f.config[pciInterruptLine] = byte(pciGSI(slot))
	}
	f.initial = f.config
	if !placed {
		f.config = bare
	}
	f.host, f.slot = h, slot
	if f.msix != nil {
		f.msix.sender = h.msi
	}
	h.devices[slot], h.funcs[slot] = d, f
	f.follow()
	return nil
}

// room is the first address of the window where a BAR fits among those that other
// functions have at reset, and f's own before it; h.mu is held.
func (h *PCIHost) room(f *PCIFunction, bar int, size uint64) (base uint64, ok bool) {
	le := binary.LittleEndian
	taken := func(from uint64) (end uint64, taken bool) {
		for _, other := range append(h.funcs[:], f) {
			for i := 0; other != nil && i < pciBARs; i++ {
				config := &other.initial
				if other == f {
					if i == bar {
						break
					}
					config = &f.config
				}
				at, n := uint64(le.Uint32(config[pciBAR0+4*i:])), other.bars[i].size
				if n != 0 && at < from+size && from < at+n {
					return at + n, true
				}
			}
		}
		return 0, false
	}
	for base = PCIMMIOBase; base+size <= PCIMMIOBase+PCIMMIOSize; {
		end, hit := taken(base)
		if !hit {
			return base, true
		}
		base = (end + size - 1) &^ (size - 1)
	}
	return 0, false
}

// Remove takes a slot's device off the bus. It must have been closed: what it does
// later has no effect.
func (h *PCIHost) Remove(slot int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	f := h.funcs[slot]
	if slot < 1 || f == nil {
		return
	}
	h.intxMu.Lock()
	f.intxHigh, f.gone = false, true
	h.driveINTx(f)
	h.intxMu.Unlock()
	f.config[pciCommand] &^= pciCommandMemory
	h.devices[slot], h.funcs[slot] = nil, nil
	h.placeBARs(f)
}

func pciGSI(slot int) int { return GSIPCIFirst + slot%GSIPCICount }

// driveINTx sets the line that f's pin is joined to; intxMu is held.
func (h *PCIHost) driveINTx(f *PCIFunction) {
	i := f.slot % GSIPCICount
	was := h.driven[i] != 0
	if f.intxHigh && !f.intxDisabled {
		h.driven[i] |= 1 << f.slot
	} else {
		h.driven[i] &^= 1 << f.slot
	}
	if is := h.driven[i] != 0; is != was && h.lines[i] != nil {
		h.lines[i].Set(is)
	}
}

// placeBARs moves f's BARs to where its configuration space says, and lets
// other functions' BARs have what became free; h.mu is held.
func (h *PCIHost) placeBARs(f *PCIFunction) {
	freed := h.unmapBARs(f)
	h.mapBARs(f)
	if freed && h.restless {
		h.restless = false
		for _, other := range h.funcs {
			if other != nil {
				h.mapBARs(other)
			}
		}
	}
}

// unmapBARs takes those of f's BARs off the bus that do not belong where they
// are, and tells whether there were any; h.mu is held.
func (h *PCIHost) unmapBARs(f *PCIFunction) bool {
	freed := false
	decode := f.command()&pciCommandMemory != 0
	for i := range f.bars {
		b := &f.bars[i]
		if !b.mapped || decode && f.barAddress(i) == b.base {
			continue
		}
		if f.OnMove != nil {
			f.OnMove(i, b.base, false)
		}
		h.mmio.Unmap(b.base)
		b.mapped, freed = false, true
	}
	return freed
}

// mapBARs puts those of f's BARs on the bus that should be there and are not; h.mu is held.
func (h *PCIHost) mapBARs(f *PCIFunction) {
	if f.command()&pciCommandMemory == 0 {
		return
	}
	for i := range f.bars {
		b := &f.bars[i]
		if b.size == 0 || b.mapped {
			continue
		}
		base := f.barAddress(i)
		if base < PCIMMIOBase || base+b.size > PCIMMIOBase+PCIMMIOSize {
			continue
		}
		if h.mmio.Map(base, b.size, b.handler) != nil {
			h.restless = true
			continue
		}
		b.mapped, b.base = true, base
		if f.OnMove != nil {
			f.OnMove(i, base, true)
		}
	}
}

// access performs one configuration access of up to 4 bytes inside an aligned
// 32-bit word.
func (h *PCIHost) access(bus, slot, function, reg int, p []byte, write bool) {
	var f *PCIFunction
	if bus == 0 && function == 0 {
		h.mu.Lock()
		f = h.funcs[slot]
		h.mu.Unlock()
	}
	switch {
	case f == nil:
		if !write {
			fill(p, 0xFF)
		}
	case f.window.handler != nil && reg >= f.window.off && reg+len(p) <= f.window.off+f.window.size:
		// Outside h.mu: what the window shows may be anything the device has.
		if write {
			f.window.handler.Write(uint64(reg-f.window.off), p)
		} else {
			f.window.handler.Read(uint64(reg-f.window.off), p)
		}
	default:
		h.mu.Lock()
		defer h.mu.Unlock()
		switch {
		case !write:
			f.read(reg, p)
		case h.funcs[slot] == f: // it may have gone
			f.write(reg, p)
		}
	}
}

func fill(p []byte, v byte) {
	for i := range p {
		p[i] = v
	}
}

// Reset brings every device, and then its configuration space, to power-on
// state. vCPUs must not run.
func (h *PCIHost) Reset() {
	for _, d := range h.snapshot() {
		d.Reset()
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.address = 0
	for _, f := range h.funcs {
		if f == nil {
			continue
		}
		f.config = f.initial
		if f.msix != nil {
			f.msix.reset()
		}
		h.intxMu.Lock()
		f.intxHigh = false
		h.driveINTx(f)
		h.intxMu.Unlock()
		h.unmapBARs(f)
	}
	for _, f := range h.funcs {
		if f != nil {
			f.follow()
		}
	}
}

// snapshot returns the devices, so that they can be called without h.mu.
func (h *PCIHost) snapshot() []PCIDevice {
	h.mu.Lock()
	defer h.mu.Unlock()
	var all []PCIDevice
	for _, d := range h.devices {
		if d != nil {
			all = append(all, d)
		}
	}
	return all
}

// State returns what must survive a checkpoint. vCPUs and devices must be paused.
func (h *PCIHost) State() PCIState {
	h.mu.Lock()
	defer h.mu.Unlock()
	s := PCIState{Address: h.address}
	for slot, f := range h.funcs {
		if f == nil {
			continue
		}
		fs := PCIFunctionState{Slot: slot, Config: append([]byte(nil), f.config[:]...), INTx: f.intxLevel()}
		if f.msix != nil {
			fs.MSIX = f.msix.save()
		}
		s.Functions = append(s.Functions, fs)
	}
	return s
}

// Restore takes over saved state: the same devices must have been added. It
// comes before the devices' own state.
func (h *PCIHost) Restore(s PCIState) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	seen := 0
	for slot, f := range h.funcs {
		if f != nil {
			if seen >= len(s.Functions) || s.Functions[seen].Slot != slot {
				return fmt.Errorf("%w: saved state has nothing of slot %d", ErrPCI, slot)
			}
			seen++
		}
	}
	if seen != len(s.Functions) {
		return fmt.Errorf("%w: saved state of slot %d fits no device here", ErrPCI, s.Functions[seen].Slot)
	}
	for _, fs := range s.Functions {
		if len(fs.Config) != pciConfigSize {
			return fmt.Errorf("%w: slot %d: saved configuration space of %d bytes", ErrPCI, fs.Slot, len(fs.Config))
		}
		f := h.funcs[fs.Slot]
		for i, v := range fs.Config {
			if (v^f.initial[i])&^f.mask[i] != 0 {
				return fmt.Errorf("%w: slot %d: saved state is of another device (configuration byte %#x)", ErrPCI, fs.Slot, i)
			}
		}
		if f.msix != nil {
			if err := f.msix.load(fs.MSIX); err != nil {
				return fmt.Errorf("%w: slot %d: %w", ErrPCI, fs.Slot, err)
			}
		}
		copy(f.config[:], fs.Config)
		h.intxMu.Lock()
		f.intxHigh = fs.INTx
		h.driveINTx(f)
		h.intxMu.Unlock()
		h.unmapBARs(f)
	}
	h.address = s.Address
	for _, f := range h.funcs {
		if f != nil {
			f.follow()
		}
	}
	return nil
}

// PCIInfo describes a function, for query-pci.
type PCIInfo struct {
	Bus, Slot, Function int
	PCIIdentity
	Command      uint16
	InterruptPin uint8 // 1 is INTA; 0 none
	GSI          int   // of the pin; 0 none
	BARs         []PCIBARInfo
}

// PCIBARInfo is one memory BAR.
type PCIBARInfo struct {
	BAR     int
	Address uint64
	Size    uint64
	Mapped  bool // the guest can reach it there
}

// Info describes every function, the host bridge first.
func (h *PCIHost) Info() []PCIInfo {
	h.mu.Lock()
	defer h.mu.Unlock()
	var all []PCIInfo
	for slot, f := range h.funcs {
		if f == nil {
			continue
		}
		i := PCIInfo{Slot: slot, PCIIdentity: f.identity, Command: f.command(), InterruptPin: f.config[pciInterruptPin]}
		if i.InterruptPin != 0 {
			i.GSI = pciGSI(slot)
		}
		for n := range f.bars {
			if b := &f.bars[n]; b.size != 0 {
				i.BARs = append(i.BARs, PCIBARInfo{BAR: n, Address: f.barAddress(n), Size: b.size, Mapped: b.mapped})
			}
		}
		all = append(all, i)
	}
	return all
}
