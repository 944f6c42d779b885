package device

import (
	"encoding/binary"
	"fmt"
	"sync"
)

// PCIHotplugFirst is the first of the slots that devices can be plugged into while
// the machine runs, where no device of its configuration takes it.
const PCIHotplugFirst = 24

// Registers of a PCIHotplug, each of 32 bits with one for each slot of bus 0, as
// QEMU's docs/specs/acpi_pci_hotplug has them.
const (
	PCIHotplugPorts = 0x10

	PCIHotplugUp        = 0x0 // read: slots with a new device
	PCIHotplugDown      = 0x4 // read: slots whose device is asked back
	PCIHotplugEject     = 0x8 // written: slots whose device the guest lets go of
	PCIHotplugRemovable = 0xC // read: slots whose device can be asked back
)

// PCIHotplug are the registers by which a guest learns of devices that come and go,
// and lets go of them. The ACPI tables have a device object for each slot, and a
// method for GPEPCIHotplug that reads them.
//
// What the guest reads of Up and Down is gone from there, so that it is told once of
// each change.
type PCIHotplug struct {
	notify func()
	eject  func(slot int)
	slots  uint32 // those that devices can be plugged into

	mu     sync.Mutex
	s      PCIHotplugState // guarded by mu
	filled uint32          // slots that hold a plugged device; guarded by mu
}

// PCIHotplugState is what survives a checkpoint: a bit for each slot.
type PCIHotplugState struct {
	Up, Down uint32 // what the guest has not read
	Leaving  uint32 // the device was asked back
	Ejected  uint32 // the guest let go of the device, and it is still there
}

// NewPCIHotplug returns the registers of the given slots, one bit each. notify raises
// GPEPCIHotplug. eject is told when the guest lets go of a device, from the vCPU's
// thread and with no lock held; the device is there until Removed.
func NewPCIHotplug(slots uint32, notify func(), eject func(slot int)) *PCIHotplug {
	return &PCIHotplug{notify: notify, eject: eject, slots: slots &^ 1}
}

// Map puts the registers at their ports.
func (p *PCIHotplug) Map(ports *Bus) error { return ports.Map(PortPCIHotplug, PCIHotplugPorts, p) }

// Slots are the slots that devices can be plugged into.
func (p *PCIHotplug) Slots() uint32 { return p.slots }

// Fill notes that a slot holds a plugged device, of which the guest is told
// where tell says so.
func (p *PCIHotplug) Fill(slot int, tell bool) {
	p.mu.Lock()
	p.filled |= 1 << slot
	if tell {
		p.s.Up |= 1 << slot
	}
	p.mu.Unlock()
	if tell {
		p.notify()
	}
}

// Ask asks the guest to let go of a slot's device, again if it was asked before.
func (p *PCIHotplug) Ask(slot int) {
	p.mu.Lock()
	p.s.Down |= p.filled & (1 << slot)
	p.s.Leaving |= p.filled & (1 << slot)
	p.mu.Unlock()
	p.notify()
}

// LetGo does what the guest does by writing to the eject register.
func (p *PCIHotplug) LetGo(slots uint32) {
	p.mu.Lock()
	slots &= p.filled &^ p.s.Ejected
	p.s.Ejected |= slots
	p.mu.Unlock()
	for slot := range PCISlots {
		if slots&(1<<slot) != 0 {
			p.eject(slot)
		}
	}
}

// Removed notes that a slot is empty.
func (p *PCIHotplug) Removed(slot int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.filled &^= 1 << slot
	p.s = p.s.of(p.filled)
}

// of leaves out what concerns other slots.
func (s PCIHotplugState) of(slots uint32) PCIHotplugState {
	return PCIHotplugState{Up: s.Up & slots, Down: s.Down & slots, Leaving: s.Leaving & slots, Ejected: s.Ejected & slots}
}

// Reset forgets what the guest was to be told: its firmware finds the devices that are
// there. Those that were asked back leave now.
func (p *PCIHotplug) Reset() {
	p.mu.Lock()
	p.s.Up, p.s.Down = 0, 0
	leaving := p.s.Leaving
	p.mu.Unlock()
	p.LetGo(leaving)
}

// State returns what must survive a checkpoint.
func (p *PCIHotplug) State() PCIHotplugState {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.s
}

// Restore takes over saved state; the same slots must have been filled. What was
// ejected is not told to eject again.
func (p *PCIHotplug) Restore(s PCIHotplugState) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if s.of(p.filled) != s {
		return fmt.Errorf("%w: PCI hot plug: it tells of slots without a device that was plugged in", ErrState)
	}
	p.s = s
	return nil
}

// Read reads the registers at any width.
func (p *PCIHotplug) Read(off uint64, data []byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	le := binary.LittleEndian
	var regs, read [PCIHotplugPorts]byte
	le.PutUint32(regs[PCIHotplugUp:], p.s.Up)
	le.PutUint32(regs[PCIHotplugDown:], p.s.Down)
	le.PutUint32(regs[PCIHotplugRemovable:], p.slots)
	clear(data)
	if off < PCIHotplugPorts {
		for i := range copy(data, regs[off:]) {
			read[int(off)+i] = 0xFF
		}
	}
	p.s.Up &^= le.Uint32(read[PCIHotplugUp:])
	p.s.Down &^= le.Uint32(read[PCIHotplugDown:])
}

// Write lets go of devices, by writes of any width to the eject register.
func (p *PCIHotplug) Write(off uint64, data []byte) {
	var slots uint32
	for i, v := range data {
		if at := off + uint64(i); at >= PCIHotplugEject && at < PCIHotplugEject+4 {
			slots |= uint32(v) << (8 * (at - PCIHotplugEject))
		}
	}
	p.LetGo(slots)
}
