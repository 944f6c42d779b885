package vmm

import (
	"errors"
	"fmt"
	"io"

	"github.com/gnomon-vmm/gnomon/vmm/boot"
	"github.com/gnomon-vmm/gnomon/vmm/device"
)

// devices are the machine's devices apart from what hangs on PCI.
type devices struct {
	serial     *device.Serial
	rtc        *device.RTC
	i8042      *device.I8042
	power      *device.Power
	generation *device.GenerationID
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

	return errors.Join(
		m.serial.Map(m.pio, device.PortCOM1),
		m.rtc.Map(m.pio),
		m.i8042.Map(m.pio),
		m.power.Map(m.pio),
		m.pio.Map(device.PortPVPanic, 1, device.NewPVPanic(m)),
		m.pio.Map(device.PortPCIAddress, 8, m.pci.Ports(device.NewResetPort(m))),
		m.mmio.Map(device.ECAMBase, device.ECAMSize, m.pci.ECAM()),
	)
}

// resetDevices brings every device to its power-on state. Preconditions: the
// vCPUs and virtio workers stand still.
func (m *Machine) resetDevices() error {
	m.pci.Reset() // and with it the virtio devices
	m.serial.Reset()
	m.rtc.Reset()
	m.i8042.Reset()
	m.power.Reset()
	if err := m.generation.Place(); err != nil {
		return err
	}
	return m.interrupts.write(m.vm)
}

// closeDevices ends the devices and what they hold on the host.
func (m *Machine) closeDevices() error {
	return nil
}

// reset resets the machine for r. It runs on Run's goroutine.
func (m *Machine) reset(r request) error {
	m.ctl.Lock()
	defer m.ctl.Unlock()
	running := m.Status() == StatusRunning
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
