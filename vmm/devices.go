package vmm

import (
	"errors"
	"fmt"
	"io"
	"math/bits"
	"slices"
	"sync"

	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/vmm/boot"
	"github.com/gnomon-vmm/gnomon/vmm/chardev"
	"github.com/gnomon-vmm/gnomon/vmm/device"
	"github.com/gnomon-vmm/gnomon/vmm/virtio"
)

// devices are the machine's devices.
type devices struct {
	serial     *device.Serial
	rtc        *device.RTC
	i8042      *device.I8042
	power      *device.Power
	generation *device.GenerationID

	// virtio are all below, and disks, in the order in which they came. Both are
	// replaced, never changed; guarded by list, and while ctl is held they stay.
	virtio []*virtio.PCI
	disks  []AttachedDisk
	list   sync.Mutex

	nets    []AttachedNet
	balloon *virtio.Balloon // nil: none
	console *virtio.Console // nil: none
	vsock   *virtio.Vsock   // nil: none
}

// AttachedDisk is a disk and the virtio device that shows it to the guest.
type AttachedDisk struct {
	Disk
	// Root is the disk's Node. What it passes requests on to can be replaced
	// while the machine is paused.
	Root   *block.Root
	Device *virtio.Blk
}

// AttachedNet is a network device of the machine.
type AttachedNet struct {
	Net
	Device *virtio.Net
}

// buildDevices puts every device on its bus.
func (m *Machine) buildDevices() error {
	m.pio, m.mmio = device.NewBus("I/O port"), device.NewBus("MMIO")
	line := func(gsi uint32) device.Line { return gsiLine{m.vm, gsi} }

	var out io.Writer = io.Discard
	if m.cfg.Serial != nil {
		out = m.cfg.Serial
	}
	m.serial = device.NewSerial(line(device.GSICOM1), out)
	m.rtc = device.NewRTC(line(device.GSIRTC))
	low := min(m.cfg.Memory, device.LowRAMEnd)
	m.rtc.SetMemory(low, m.cfg.Memory-low)
	m.rtc.SetCPUs(m.cfg.CPUs)
	m.i8042 = device.NewI8042(m)
	m.power = device.NewPower(line(device.GSISCI), m.clock, m)
	var err error
	m.generation, err = device.NewGenerationID(m.mem, m.power, boot.GenerationIDAddr, device.NewGUID())
	if err != nil {
		return err
	}
	var intx [device.GSIPCICount]device.Line
	for i := range intx {
		intx[i] = line(uint32(device.GSIPCIFirst + i))
	}
	m.pci = device.NewPCIHost(m.mmio, m.vm, intx)
	if err := m.buildHotplug(); err != nil {
		return err
	}

	if err := errors.Join(
		m.serial.Map(m.pio, device.PortCOM1),
		m.rtc.Map(m.pio),
		m.i8042.Map(m.pio),
		m.power.Map(m.pio),
		m.pio.Map(device.PortPVPanic, 1, device.NewPVPanic(m)),
		m.pio.Map(device.PortPCIAddress, 8, m.pci.Ports(device.NewResetPort(m))),
		m.mmio.Map(device.ECAMBase, device.ECAMSize, m.pci.ECAM()),
		m.pio.Map(device.PortBIOSDebug, 1, device.Ignore{}),
	); err != nil {
		return err
	}
	return m.buildVirtio()
}

// connect lets the host's ends of the serial port, console and vsock deliver
// what comes in.
func (m *Machine) connect() {
	if m.cfg.Serial != nil {
		m.cfg.Serial.Connect(chardev.Frontend{Input: m.serial.Feed, Break: m.serial.Break})
	}
	if m.console != nil {
		m.cfg.Console.Connect(chardev.Frontend{Input: m.console.Input})
	}
	if m.vsock != nil {
		m.cfg.Vsock.Host.Serve(m.vsock)
	}
}

// attachDisk makes a disk's device and puts it in its slot, or the next. One that is
// plugged in is left to a guest that runs, which places it.
func (m *Machine) attachDisk(d Disk, plug bool) error {
	root, ok := d.Node.(*block.Root)
	if !ok {
		root = block.NewRoot(d.Node)
	}
	if d.Changes != nil {
		root.RecordAlways(d.Changes)
	}
	d.Node = root
	blk, err := virtio.NewBlk(virtio.BlkConfig{
		Node: d.Node, Serial: d.Serial, Queues: d.Queues, Depth: d.depth(),
		OnIOError: func(op virtio.BlkOp, err error) virtio.BlkAction {
			action := d.onIOError(op, err)
			m.events.emit(BlockIOError{Device: d.ID, Operation: string(op), Action: string(action), Err: err})
			return action
		},
		OnStop: func() { go m.pauseForIOError() }, // which waits for the worker that calls this
	})
	if err != nil {
		return fmt.Errorf("disk %s: %w", d.ID, err)
	}
	if d.slot == 0 {
		d.slot = m.nextSlot()
	}
	p, err := m.attachAt(d.slot, blk, d.ID, plug)
	if err != nil {
		return err
	}
	m.setDevices(append(slices.Clone(m.virtio), p), append(slices.Clone(m.disks), AttachedDisk{d, root, blk}))
	return nil
}

// setDevices replaces the lists of what comes and goes.
func (m *Machine) setDevices(all []*virtio.PCI, disks []AttachedDisk) {
	m.list.Lock()
	defer m.list.Unlock()
	m.virtio, m.disks = all, disks
}

// buildVirtio makes the virtio devices and puts each in the next PCI slot, or in that
// into which it was plugged.
func (m *Machine) buildVirtio() error {
	for _, d := range m.cfg.Disks {
		if err := m.attachDisk(d, false); err != nil {
			return err
		}
		if d.slot != 0 {
			m.hotplug.regs.Fill(d.slot, false)
		}
	}
	for _, n := range m.cfg.Nets {
		nic, err := virtio.NewNet(virtio.NetConfig{Backend: n.Backend, MAC: n.MAC})
		if err != nil {
			return fmt.Errorf("network device %s: %w", n.ID, err)
		}
		if err := m.attach(nic, n.ID); err != nil {
			return err
		}
		m.nets = append(m.nets, AttachedNet{n, nic})
	}
	if m.cfg.Vsock != nil {
		var err error
		if m.vsock, err = virtio.NewVsock(m.cfg.Vsock.CID, m.cfg.Vsock.Host); err != nil {
			return err
		}
		if err := m.attach(m.vsock, "vsock0"); err != nil {
			return err
		}
	}
	if m.cfg.Console != nil {
		var err error
		if m.console, err = virtio.NewConsole(virtio.ConsoleConfig{Output: m.cfg.Console}); err != nil {
			return err
		}
		if err := m.attach(m.console, "console0"); err != nil {
			return err
		}
	}
	if !m.cfg.NoRNG {
		if err := m.attach(virtio.NewRNG(0), "rng0"); err != nil {
			return err
		}
	}
	if !m.cfg.NoBalloon {
		m.balloon = virtio.NewBalloon(virtio.BalloonConfig{
			Memory:   m.mem,
			OnChange: func(actual uint64) { m.events.emit(BalloonChanged{actual}) },
		})
		if err := m.attach(m.balloon, "balloon0"); err != nil {
			return err
		}
	}
	return nil
}

// nextSlot is the first without a device.
func (m *Machine) nextSlot() int { return bits.TrailingZeros32(^m.takenSlots()) }

// attach puts a virtio device in the next PCI slot.
func (m *Machine) attach(dev virtio.Device, name string) error {
	p, err := m.attachAt(m.nextSlot(), dev, name, false)
	if err != nil {
		return err
	}
	m.setDevices(append(slices.Clone(m.virtio), p), m.disks)
	return nil
}

// attachAt puts a virtio device in a PCI slot. It stands still until the machine runs.
func (m *Machine) attachAt(slot int, dev virtio.Device, name string, plug bool) (*virtio.PCI, error) {
	p, err := virtio.NewPCI(dev, name, virtio.Env{
		Mem:      m.mem,
		EventFDs: m.vm,
		OnBroken: func(name string, err error) {
			m.cfg.Log("device %s: the guest's driver broke it: %v", name, err)
			m.events.emit(DeviceBroken{Device: name, Err: err})
		},
	})
	if err != nil {
		return nil, fmt.Errorf("device %s: %w", name, err)
	}
	if m.Status() != StatusRunning {
		p.Pause()
	}
	add := m.pci.Add
	if plug {
		add = m.pci.Plug
	}
	if err := add(slot, p); err != nil {
		p.Close()
		return nil, fmt.Errorf("device %s: %w", name, err)
	}
	return p, nil
}

// resetDevices brings every device to its power-on state. Preconditions: the
// vCPUs and virtio workers stand still.
func (m *Machine) resetDevices() error {
	m.pci.Reset() // and with it the virtio devices
	m.serial.Reset()
	m.rtc.Reset()
	m.i8042.Reset()
	m.power.Reset()
	if m.hotplug.regs != nil {
		m.hotplug.regs.Reset()
	}
	return m.interrupts.write(m.vm)
}

// closeDevices ends the devices' work. Preconditions: the vCPUs have ended.
func (m *Machine) closeDevices() {
	if m.console != nil {
		m.console.Close()
	}
	for _, p := range m.virtio {
		p.Close()
	}
	if m.serial != nil {
		m.serial.Close()
	}
	if m.rtc != nil {
		m.rtc.Close()
	}
	if m.power != nil {
		m.power.Close()
	}
}

// closeHost closes what Config gave the machine.
func (m *Machine) closeHost() error {
	var errs []error
	for _, f := range m.atClose {
		errs = append(errs, f())
	}
	if m.cfg.Kernel != nil {
		errs = append(errs, m.cfg.Kernel.Close())
	}
	for _, d := range m.disks {
		errs = append(errs, d.Node.Close())
		if d.Changes != nil {
			errs = append(errs, d.Changes.Close())
		}
	}
	for _, n := range m.cfg.Nets {
		errs = append(errs, n.Backend.Close())
	}
	if m.cfg.Vsock != nil {
		errs = append(errs, m.cfg.Vsock.Host.Close())
	}
	if m.cfg.Serial != nil {
		errs = append(errs, m.cfg.Serial.Close())
	}
	if m.cfg.Console != nil {
		errs = append(errs, m.cfg.Console.Close())
	}
	return errors.Join(errs...)
}

// reset resets the machine for r. It runs on Run's goroutine.
func (m *Machine) reset(r request) error {
	m.ctl.Lock()
	defer m.ctl.Unlock()
	running := m.Status() == StatusRunning
	m.hurryDisks(true)
	m.gate.hold(holdControl)
	defer m.gate.release(holdControl)
	m.gate.wait()
	m.stopDevices()
	if err := m.resetDevices(); err != nil {
		return err
	}
	for _, c := range m.cpus {
		if err := c.resetState(); err != nil {
			return err
		}
	}
	if err := m.load(); err != nil {
		return fmt.Errorf("%w: %w", ErrLoad, err)
	}
	m.events.emit(Reset{Guest: r.guest, Reason: r.reason})
	m.gate.release(holdRequest)
	if running {
		return m.startDevices()
	}
	return nil
}

// Panicked is called by the guest's kernel through pvpanic.
func (m *Machine) Panicked(kind device.PanicKind) {
	crash := kind&device.GuestCrashLoaded != 0
	m.events.emit(Panicked{CrashLoaded: crash})
	if !crash {
		m.request(request{kind: requestPanic, guest: true, reason: "guest-panic"})
	}
}
