package vmm

import (
	"context"
	"errors"
	"fmt"
	"math/bits"
	"slices"
	"sync"

	"github.com/gnomon-vmm/gnomon/vmm/device"
)

// ErrPlug is the stage of plugging a disk in or asking it back.
var ErrPlug = errors.New("plug device")

// Causes of ErrPlug.
var (
	ErrNoDevice   = errors.New("there is no such device")
	ErrTwoDevices = errors.New("another device has that name")
	ErrFixed      = errors.New("its slot is not one for devices that come and go")
	ErrLeaving    = errors.New("it is already in the process of unplug")
	ErrNoSlot     = errors.New("no slot is free")
	ErrHeld       = errors.New("not while the machine's devices are saved or restored")
)

// hotplug is what a machine knows of devices that come and go. A machine restored from
// a state without them has none.
type hotplug struct {
	regs *device.PCIHotplug // nil: none
	// holds are what keeps devices from coming and going; free, where not nil, is closed
	// when there are none. Both are guarded by Machine.ctl.
	holds int
	free  chan struct{}
	// gone gets disks that were unplugged; nil: they are closed. Guarded by Machine.ctl.
	gone func(AttachedDisk) error

	ctx    context.Context // ends with the machine
	cancel context.CancelFunc
	work   sync.WaitGroup // removals under way
}

// hotplugState is the section of devices that come and go.
type hotplugState struct {
	Slots     uint32 // one bit each
	Registers device.PCIHotplugState
	Disks     []pluggedDisk `json:",omitempty"` // by ascending slot
}

// pluggedDisk is what makes a disk that was plugged in the same for the guest.
type pluggedDisk struct {
	Slot                  int
	ID, Serial            string
	Queues                int
	ReadError, WriteError OnError
}

const hotplugPart = "pci-hotplug"

// buildHotplug makes the registers. The slots are those that the saved machine had, or
// the last ones of the bus that no device of the configuration takes.
func (m *Machine) buildHotplug() error {
	m.hotplug.ctx, m.hotplug.cancel = context.WithCancel(context.Background())
	slots := uint32(0)
	if m.cfg.Restore == nil {
		slots = ^uint32(0) << max(device.PCIHotplugFirst, m.cfg.devices()+1)
	} else if m.savedHotplug == nil {
		return nil
	} else {
		slots = m.savedHotplug.Slots
	}
	m.hotplug.regs = device.NewPCIHotplug(slots, m.power.NotifyPCI, m.ejected)
	return m.hotplug.regs.Map(m.pio)
}

// devices is how many virtio devices the configuration has.
func (c *Config) devices() int {
	n := len(c.Disks) + len(c.Nets)
	for _, there := range []bool{c.Vsock != nil, c.Console != nil, !c.NoRNG, !c.NoBalloon} {
		if there {
			n++
		}
	}
	return n
}

// hotplugSlots are the slots that devices can be plugged into.
func (m *Machine) hotplugSlots() uint32 {
	if m.hotplug.regs == nil {
		return 0
	}
	return m.hotplug.regs.Slots()
}

// Plug gives a machine another disk, which it owns from then on. A guest that runs is
// told of it.
func (m *Machine) Plug(d Disk) error {
	if err := m.plug(d); err != nil {
		return fmt.Errorf("%w %s: %w", ErrPlug, d.ID, err)
	}
	return nil
}

func (m *Machine) plug(d Disk) error {
	d.setDefaults(m.cfg.CPUs)
	if err := d.validate(); err != nil {
		return err
	}
	m.ctl.Lock()
	defer m.ctl.Unlock()
	switch {
	case m.closed:
		return ErrClosed
	case m.hotplug.holds > 0:
		return ErrHeld
	case d.ID == "" || m.named(d.ID):
		return ErrTwoDevices
	}
	free := m.hotplugSlots() &^ m.takenSlots()
	if free == 0 {
		return ErrNoSlot
	}
	d.slot = bits.TrailingZeros32(free)
	// A guest that has not begun finds the device as it finds the others.
	begins := m.Status() == StatusPrelaunch && m.saved == nil
	if err := m.attachDisk(d, !begins); err != nil {
		return err
	}
	m.hotplug.regs.Fill(d.slot, !begins)
	return nil
}

func (m *Machine) named(id string) bool {
	for _, p := range m.virtio {
		if p.Name() == id {
			return true
		}
	}
	return false
}

// takenSlots has a bit for each slot with a device.
func (m *Machine) takenSlots() uint32 {
	taken := uint32(1)
	for _, p := range m.virtio {
		taken |= 1 << p.Function().Slot()
	}
	return taken
}

// Unplug asks the guest to let go of a disk that was plugged in, again if it was asked
// before. When it has, the disk
// is handed to OnUnplug's function, or closed, and observers are told: Unplugged.
func (m *Machine) Unplug(id string) error {
	if err := m.unplug(id); err != nil {
		return fmt.Errorf("%w: ask %s back: %w", ErrPlug, id, err)
	}
	return nil
}

func (m *Machine) unplug(id string) error {
	m.ctl.Lock()
	defer m.ctl.Unlock()
	i := slices.IndexFunc(m.disks, func(d AttachedDisk) bool { return d.ID == id })
	switch {
	case m.closed:
		return ErrClosed
	case i < 0 && m.named(id):
		return ErrFixed
	case i < 0:
		return ErrNoDevice
	case !m.disks[i].plugged(m):
		return ErrFixed
	}
	slot := m.disks[i].slot
	if m.hotplug.regs.State().Ejected&(1<<slot) != 0 {
		return ErrLeaving
	}
	if m.Status() == StatusPrelaunch && m.saved == nil {
		m.hotplug.regs.LetGo(1 << slot) // there is nobody to ask
	} else {
		m.hotplug.regs.Ask(slot)
	}
	return nil
}

// plugged tells whether the disk's slot is one for devices that come and go.
func (d *AttachedDisk) plugged(m *Machine) bool { return m.hotplugSlots()&(1<<d.slot) != 0 }

// OnUnplug has disks that were unplugged be given to f, which closes their nodes, or
// keeps them for another use. It is called once for each, from any goroutine; nothing
// uses the disk any more, and it is claimed.
func (m *Machine) OnUnplug(f func(AttachedDisk) error) {
	m.ctl.Lock()
	defer m.ctl.Unlock()
	m.hotplug.gone = f
}

// HoldDevices has no device come or go until release is called.
func (m *Machine) HoldDevices() (release func()) {
	m.ctl.Lock()
	defer m.ctl.Unlock()
	if m.hotplug.holds++; m.hotplug.holds == 1 {
		m.hotplug.free = make(chan struct{})
	}
	return sync.OnceFunc(func() {
		m.ctl.Lock()
		defer m.ctl.Unlock()
		if m.hotplug.holds--; m.hotplug.holds == 0 {
			close(m.hotplug.free)
		}
	})
}

// ejected is called when the guest lets go of a slot's device. It may be on a vCPU's
// thread, which must not wait.
func (m *Machine) ejected(slot int) {
	m.hotplug.work.Add(1)
	go func() {
		defer m.hotplug.work.Done()
		m.finishEject(slot)
	}()
}

// finishEjects goes on with removals that a state was saved amid.
func (m *Machine) finishEjects() {
	if m.hotplug.regs == nil {
		return
	}
	ejected := m.hotplug.regs.State().Ejected
	for slot := range device.PCISlots {
		if ejected&(1<<slot) != 0 {
			m.ejected(slot)
		}
	}
}

// finishEject takes the disk in a slot away, as soon as nothing else works with it.
func (m *Machine) finishEject(slot int) {
	d, ok := m.takeOut(slot)
	if !ok {
		return
	}
	defer d.Root.Release()
	if err := m.handOver(d); err != nil {
		m.cfg.Log("device %s: unplugged: %v", d.ID, err)
	}
	m.events.emit(Unplugged{Device: d.ID})
}

// takeOut removes the disk in a slot from the machine. The disk is then claimed.
func (m *Machine) takeOut(slot int) (AttachedDisk, bool) {
	for {
		d, free, ok := m.tryTakeOut(slot)
		switch {
		case ok:
			return d, true
		case d.Root == nil:
			return d, false
		case free != nil:
			select {
			case <-free:
			case <-m.hotplug.ctx.Done():
				return d, false
			}
		}
	}
}

// tryTakeOut is one attempt of takeOut; free, where not nil, tells when to make
// another, and a disk without a root that there is nothing to do.
func (m *Machine) tryTakeOut(slot int) (d AttachedDisk, free chan struct{}, ok bool) {
	for _, x := range m.Disks() {
		if x.slot == slot {
			d = x
		}
	}
	if d.Root == nil || d.Root.ClaimWhenFree(m.hotplug.ctx, "device_del") != nil {
		return AttachedDisk{}, nil, false
	}
	defer func() {
		if !ok {
			d.Root.Release()
			if free == nil {
				d = AttachedDisk{}
			}
		}
	}()
	m.ctl.Lock()
	defer m.ctl.Unlock()
	switch {
	case m.closed || m.hotplug.regs.State().Ejected&(1<<slot) == 0:
		return d, nil, false
	case m.hotplug.holds > 0:
		return d, m.hotplug.free, false
	}
	d.Root.Hurry(true)
	for i, p := range m.virtio {
		if p.Function().Slot() == slot {
			p.Close()
			m.setDevices(slices.Delete(slices.Clone(m.virtio), i, i+1),
				slices.DeleteFunc(slices.Clone(m.disks), func(x AttachedDisk) bool { return x.Root == d.Root }))
			break
		}
	}
	m.pci.Remove(slot)
	m.hotplug.regs.Removed(slot)
	return d, nil, true
}

// handOver gives an unplugged disk to whoever wants it.
func (m *Machine) handOver(d AttachedDisk) error {
	m.ctl.Lock()
	gone := m.hotplug.gone
	m.ctl.Unlock()
	var err error
	if gone != nil {
		err = gone(d)
	} else {
		err = d.Node.Close()
	}
	if d.Changes != nil {
		err = errors.Join(err, d.Changes.Close())
	}
	return err
}

// hotplugState describes the slots and what was plugged into them.
func (m *Machine) hotplugState() hotplugState {
	s := hotplugState{Slots: m.hotplugSlots(), Registers: m.hotplug.regs.State()}
	for _, d := range m.disks {
		if d.plugged(m) {
			s.Disks = append(s.Disks, pluggedDisk{d.slot, d.ID, d.Serial, d.Queues, d.ReadError, d.WriteError})
		}
	}
	slices.SortFunc(s.Disks, func(a, b pluggedDisk) int { return a.Slot - b.Slot })
	return s
}

// restoreHotplug takes over the registers; what was plugged in is there already.
func (m *Machine) restoreHotplug(s hotplugState) error { return m.hotplug.regs.Restore(s.Registers) }

// checkHotplug refuses a state in which other slots hold what was plugged in.
func (m *Machine) checkHotplug(section Section) error {
	saved, err := readHotplug(section)
	if err != nil {
		return err
	}
	same := func(a, b pluggedDisk) bool { return a.Slot == b.Slot && a.ID == b.ID }
	if now := m.hotplugState(); saved.Slots != now.Slots || !slices.EqualFunc(saved.Disks, now.Disks, same) {
		return fmt.Errorf("%w: the saved machine had other disks plugged in, or in other slots: restore it as a machine of its own", ErrRestore)
	}
	return nil
}

func readHotplug(section Section) (s hotplugState, err error) {
	if err := decode(section.Data, &s); err != nil {
		return s, fmt.Errorf("%w: %s: %w", ErrRestore, hotplugPart, err)
	}
	last := 0
	for _, d := range s.Disks {
		if d.Slot <= last || d.Slot >= device.PCISlots || s.Slots&(1<<d.Slot) == 0 {
			return s, fmt.Errorf("%w: %s: disk %s in slot %d", ErrRestore, hotplugPart, d.ID, d.Slot)
		}
		last = d.Slot
	}
	return s, nil
}

// plugSaved has those disks of the configuration that were plugged into the saved
// machine be as they were there.
func (c *Config) plugSaved(s *hotplugState) {
	c.Disks = slices.Clone(c.Disks)
	for i := range c.Disks {
		d := &c.Disks[i]
		at := slices.IndexFunc(s.Disks, func(p pluggedDisk) bool { return p.ID == d.ID })
		if at < 0 {
			continue
		}
		p := s.Disks[at]
		d.slot, d.Serial, d.Queues, d.ReadError, d.WriteError = p.Slot, p.Serial, p.Queues, p.ReadError, p.WriteError
	}
}
