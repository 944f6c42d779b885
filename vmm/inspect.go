package vmm

import (
	"fmt"

	"github.com/gnomon-vmm/gnomon/kvm"
	"github.com/gnomon-vmm/gnomon/mm/dirty"
	"github.com/gnomon-vmm/gnomon/mm/guestmem"
	"github.com/gnomon-vmm/gnomon/vmm/chardev"
	"github.com/gnomon-vmm/gnomon/vmm/device"
	"github.com/gnomon-vmm/gnomon/vmm/virtio"
)

// Name is the machine's name.
func (m *Machine) Name() string { return m.cfg.Name }

// UUID is the machine's UUID.
func (m *Machine) UUID() UUID { return m.cfg.UUID }

// Assisted tells whether the host interprets the guest's ring 0 and vmm/assist
// completes it.
func (m *Machine) Assisted() bool { return m.assisted }

// Memory is the guest's RAM.
func (m *Machine) Memory() *guestmem.Memory { return m.mem }

// Dirty tells which pages of memory were written, once it is started.
func (m *Machine) Dirty() *dirty.Tracker { return m.dirty }

// Disks are the machine's disks in the order of Config; those that were plugged in
// since follow.
func (m *Machine) Disks() []AttachedDisk {
	m.list.Lock()
	defer m.list.Unlock()
	return m.disks
}

// Nets are the machine's network devices in the order of Config.
func (m *Machine) Nets() []AttachedNet { return m.nets }

// Balloon is the machine's balloon, or nil.
func (m *Machine) Balloon() *virtio.Balloon { return m.balloon }

// PCI lists the functions on the machine's PCI bus.
func (m *Machine) PCI() []device.PCIInfo { return m.pci.Info() }

// Virtio are the transports of the virtio devices, each in the PCI slot that its
// Function tells.
func (m *Machine) Virtio() []*virtio.PCI {
	m.list.Lock()
	defer m.list.Unlock()
	return m.virtio
}

// Chardevs lists the host ends of the serial port and the console.
func (m *Machine) Chardevs() []chardev.Info {
	var infos []chardev.Info
	for _, b := range []chardev.Backend{m.cfg.Serial, m.cfg.Console} {
		if b != nil {
			infos = append(infos, b.Info())
		}
	}
	return infos
}

// CPUInfo is one vCPU as the host sees it.
type CPUInfo struct {
	Index    int
	ThreadID int    // of the host thread that runs it; 0: not started
	Exits    uint64 // returns from KVM_RUN to this process
}

// CPUs lists the vCPUs; they need not stand still.
func (m *Machine) CPUs() []CPUInfo {
	infos := make([]CPUInfo, len(m.cpus))
	for i, c := range m.cpus {
		infos[i] = CPUInfo{Index: i, ThreadID: int(c.tid.Load()), Exits: c.exits.Load()}
	}
	return infos
}

// Stats are KVM's statistics of the VM (cpu < 0) or of a vCPU.
func (m *Machine) Stats(cpu int) (stats []kvm.Stat, err error) {
	if cpu < 0 {
		m.ctl.Lock()
		defer m.ctl.Unlock()
		if m.closed {
			return nil, ErrClosed
		}
		return m.vm.Stats()
	}
	// KVM_GET_STATS_FD on a vCPU waits for KVM_RUN to return.
	err = m.Stopped(func() error {
		c, err := m.cpu(cpu)
		if err != nil {
			return err
		}
		stats, err = c.Stats()
		return err
	})
	return stats, err
}

func (m *Machine) cpu(index int) (*vcpu, error) {
	if index < 0 || index >= len(m.cpus) {
		return nil, fmt.Errorf("%w: there is no vCPU %d; they are 0 to %d", ErrState, index, len(m.cpus)-1)
	}
	return m.cpus[index], nil
}

// InjectNMI sends a non-maskable interrupt to every vCPU.
func (m *Machine) InjectNMI() error {
	return m.Stopped(func() error {
		for _, c := range m.cpus {
			if err := c.NMI(); err != nil {
				return fmt.Errorf("vCPU %d: %w", c.id, err)
			}
		}
		return nil
	})
}

// Stopped calls f while the vCPUs and devices stand still, whether the machine
// runs or not; the guest's clock goes on. f must not call the machine's controls.
func (m *Machine) Stopped(f func() error) error {
	m.ctl.Lock()
	defer m.ctl.Unlock()
	if m.closed {
		return ErrClosed
	}
	m.hurryDisks(true)
	m.gate.hold(holdControl)
	defer m.gate.release(holdControl)
	m.gate.wait()
	if m.Status() == StatusRunning {
		defer m.hurryDisks(false)
		for _, d := range m.virtio {
			d.Pause()
			defer d.Resume()
		}
	}
	return f()
}

// CPUState reads a vCPU's state. Call it inside Stopped.
func (m *Machine) CPUState(index int) (*CPUState, error) {
	c, err := m.cpu(index)
	if err != nil {
		return nil, err
	}
	return c.saveState()
}

// Translate tells where a guest-virtual address lies by a vCPU's page tables.
// Call it inside Stopped.
func (m *Machine) Translate(cpu int, gva uint64) (gpa uint64, err error) {
	c, err := m.cpu(cpu)
	if err != nil {
		return 0, err
	}
	t, err := c.VCPU.Translate(gva)
	if err != nil {
		return 0, err
	}
	if !t.Valid {
		return 0, fmt.Errorf("%w: GVA %#x is not mapped on vCPU %d", ErrState, gva, cpu)
	}
	return t.PhysicalAddress, nil
}

// ReadVirtual copies guest memory by guest-virtual address, as a vCPU's page
// tables have it. Call it inside Stopped.
func (m *Machine) ReadVirtual(cpu int, gva uint64, p []byte) error {
	for len(p) > 0 {
		n := min(len(p), guestmem.PageSize-int(gva%guestmem.PageSize))
		gpa, err := m.Translate(cpu, gva)
		if err != nil {
			return err
		}
		if err := m.mem.Read(gpa, p[:n]); err != nil {
			return err
		}
		gva, p = gva+uint64(n), p[n:]
	}
	return nil
}
