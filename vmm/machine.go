// Package vmm is one virtual machine: Config says what it is, New builds it,
// Run runs it, Pause, Resume and the other controls work from any goroutine
// meanwhile, and Close releases everything.
package vmm

import (
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/gnomon-vmm/gnomon/kvm"
	"github.com/gnomon-vmm/gnomon/mm/dirty"
	"github.com/gnomon-vmm/gnomon/mm/guestmem"
	"github.com/gnomon-vmm/gnomon/vmm/assist"
	"github.com/gnomon-vmm/gnomon/vmm/boot"
	"github.com/gnomon-vmm/gnomon/vmm/device"
)

// Machine is a virtual machine.
type Machine struct {
	cfg Config
	pid int // ours, for kicks

	sys *kvm.System
	vm  *kvm.VM
	mem *guestmem.Memory
	// dirty knows which pages were written, while it is on.
	dirty *dirty.Tracker

	pio, mmio *device.Bus
	pci       *device.PCIHost
	devices

	cpus    []*vcpu
	threads sync.WaitGroup
	gate    *gate
	clock   *clock

	hotplug hotplug

	saved        *machineState // what Config.Restore says of the whole machine, or nil
	savedHotplug *hotplugState // and of devices that come and go

	assisted   bool // vmm/assist is in the path
	tscKHz     int
	cpuid      []kvm.CPUIDEntry // what cpuidFor makes the vCPUs' tables of
	entry      boot.Entry
	interrupts interruptState // as KVM made the controllers: what a reset goes back to

	requests requests
	ended    chan struct{} // closed when Run returns
	events   events

	// ctl makes pause, resume, reset and close one at a time.
	ctl         sync.Mutex
	started     bool           // guarded by ctl
	startPaused bool           // guarded by ctl: Run leaves the start to Resume
	suspended   int            // guarded by ctl: Suspends that have not ended
	goOn        bool           // guarded by ctl: the machine runs when they have
	pausedFor   error          // guarded by ctl: why Resume fails, once it does
	closed      bool           // guarded by ctl
	atClose     []func() error // guarded by ctl
	kvmClock    kvm.ClockData  // guarded by ctl: the guest's clock while stopped
	stopped     time.Time      // guarded by ctl: when that was
	clockBehind bool           // guarded by ctl: kvmClock and clock jump by the time since then

	stateMu sync.Mutex
	status  Status // guarded by stateMu
}

// New builds the machine: memory, vCPUs, devices, and the guest loaded. On an
// error nothing is left behind and what cfg holds is still the caller's.
func New(cfg Config) (*Machine, error) {
	var saved *machineState
	var plugged *hotplugState
	if cfg.Restore != nil {
		var err error
		if saved, plugged, err = cfg.applyRestore(); err != nil {
			return nil, err
		}
	}
	cfg.setDefaults()
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	m := &Machine{cfg: cfg, pid: os.Getpid(), saved: saved, savedHotplug: plugged, status: StatusPrelaunch, startPaused: cfg.Paused, clock: newClock()}
	m.requests.wake = make(chan struct{}, 1)
	m.ended = make(chan struct{})
	if err := m.build(); err != nil {
		m.release()
		return nil, err
	}
	return m, nil
}

func (m *Machine) build() error {
	guest := m.load
	if m.saved != nil {
		guest = m.restore
	}
	for _, stage := range []struct {
		sentinel error
		name     string
		do       func() error
	}{
		{ErrSetup, "KVM", m.openKVM},
		{ErrSetup, "guest memory", m.buildMemory},
		{ErrSetup, "interrupt controllers", m.buildInterrupts},
		{ErrSetup, "vCPUs", m.buildCPUs},
		{ErrSetup, "devices", m.buildDevices},
		{ErrLoad, "", guest},
	} {
		if err := stage.do(); err != nil {
			if stage.name == "" {
				return fmt.Errorf("%w: %w", stage.sentinel, err)
			}
			return fmt.Errorf("%w: %s: %w", stage.sentinel, stage.name, err)
		}
	}
	return nil
}

func (m *Machine) openKVM() error {
	path := m.cfg.KVM
	if path == "" {
		path = kvm.DevicePath
	}
	var err error
	if m.sys, err = kvm.OpenPath(path); err != nil {
		return err
	}
	if m.vm, err = m.sys.CreateVM(); err != nil {
		return err
	}
	m.assisted = !m.cfg.NoAssist && !hostRunsRing0()
	if m.assisted {
		// The assist must learn where the guest's SYSCALL goes.
		return m.vm.ExitOnMSRWrite(assist.MSRLSTAR)
	}
	return nil
}

// hostRunsRing0 tells whether guest kernels run natively here: with VT-x or
// AMD-V. The only other KVM for x86 is PVM.
func hostRunsRing0() bool {
	for _, module := range []string{"kvm_intel", "kvm_amd"} {
		if _, err := os.Stat("/sys/module/" + module); err == nil {
			return true
		}
	}
	return false
}

// buildMemory comes before the irqchip: setting a memslot costs far more after.
func (m *Machine) buildMemory() error {
	low := min(m.cfg.Memory, device.LowRAMEnd)
	ranges := []guestmem.Range{{GPA: 0, Size: low}}
	if high := m.cfg.Memory - low; high > 0 {
		ranges = append(ranges, guestmem.Range{GPA: device.HighRAMBase, Size: high})
	}
	var err error
	if m.mem, err = guestmem.New(ranges); err != nil {
		return err
	}
	for i, r := range m.mem.Regions() {
		if err := m.vm.SetMemory(uint32(i), 0, r.GPA, r.GuestBytes()); err != nil {
			return err
		}
	}
	if m.dirty, err = dirty.New(m.vm, m.mem, dirty.Options{RingEntries: m.cfg.DirtyRing}); err != nil {
		return err
	}
	if r := m.cfg.Restore; r != nil && r.Prepare != nil {
		return r.Prepare(m.mem)
	}
	return nil
}

func (m *Machine) buildInterrupts() error {
	if err := m.vm.SetTSSAddr(device.TSSAddr); err != nil {
		return err
	}
	if err := m.vm.SetIdentityMapAddr(device.IdentityMapAddr); err != nil {
		return err
	}
	if err := m.vm.CreateIRQChip(); err != nil {
		return err
	}
	if err := m.vm.CreatePIT(); err != nil {
		return err
	}
	var err error
	m.interrupts, err = readInterrupts(m.vm)
	return err
}

func (m *Machine) buildCPUs() error {
	var err error
	if m.cpuid, err = m.sys.SupportedCPUID(); err != nil {
		return err
	}
	if m.saved != nil {
		if err := m.checkHost(&m.saved.Host); err != nil {
			return err
		}
		m.cpuid = m.saved.Host.CPUID // what the guest has seen stays
	}
	for id := range m.cfg.CPUs {
		fd, err := m.vm.CreateVCPU(id)
		if err != nil {
			return fmt.Errorf("vCPU %d: %w", id, err)
		}
		c := &vcpu{VCPU: fd, m: m, id: id}
		m.cpus = append(m.cpus, c)
		if err := m.dirty.AddVCPU(fd); err != nil {
			return fmt.Errorf("vCPU %d: %w", id, err)
		}
		if err := m.setTSCRate(fd); err != nil {
			return fmt.Errorf("vCPU %d: %w", id, err)
		}
		if err := fd.SetCPUID(cpuidFor(m.cpuid, id, m.cfg.CPUs, m.tscKHz)); err != nil {
			return fmt.Errorf("vCPU %d: %w", id, err)
		}
		// Only our kick interrupts the guest, not what the Go runtime and
		// the rest of the process get.
		if err := fd.SetSignalMask(^uint64(0) &^ (1 << (kickSignal - 1))); err != nil {
			return fmt.Errorf("vCPU %d: %w", id, err)
		}
		if m.assisted {
			c.assist = assist.New(fd, m.mem)
		}
		if c.pristine, err = c.saveState(); err != nil {
			return fmt.Errorf("vCPU %d: %w", id, err)
		}
	}
	m.gate = newGate(m.cpus)
	return nil
}

// load puts the guest into memory and the first vCPU at its entry.
func (m *Machine) load() error {
	rsdp, err := boot.ACPITables(m.mem, boot.ACPIConfig{CPUs: m.cfg.CPUs, HotplugSlots: m.hotplugSlots()})
	if err != nil {
		return err
	}
	if err := m.generation.Place(); err != nil {
		return err
	}
	cmdline := m.cfg.Cmdline
	if m.assisted && m.cfg.Kernel.Linux() {
		cmdline = assist.Cmdline(cmdline)
		m.cfg.Log("this host interprets ring 0 (KVM without VT-x or AMD-V): kernel code will be slow; kernel command line: %s", cmdline)
	}
	m.entry, err = boot.Load(m.mem, m.cfg.Kernel, boot.Config{
		CommandLine: cmdline,
		Initrd:      m.cfg.Initrd,
		InitrdSize:  m.cfg.InitrdSize,
		RSDP:        rsdp,
	})
	if err != nil {
		return err
	}
	regs, sregs := m.entry.Registers()
	first := m.cpus[0]
	// What the entry does not say stays as KVM has it.
	base := first.pristine.Sregs
	sregs.APICBase = base.APICBase
	sregs.CR8 = base.CR8
	if err := first.SetSregs(&sregs); err != nil {
		return err
	}
	if err := first.SetRegs(&regs); err != nil {
		return err
	}
	for _, c := range m.cpus {
		if _, err := c.SetMSRs(firmwareMSRs[:]); err != nil {
			return err
		}
	}
	return nil
}

// firmwareMSRs are what a PC's firmware leaves for the OS (Intel SDM volume 4).
var firmwareMSRs = [...]kvm.MSREntry{
	{Index: 0x1A0, Data: 1},         // IA32_MISC_ENABLE: fast strings
	{Index: 0x2FF, Data: 1<<11 | 6}, // IA32_MTRR_DEF_TYPE: enabled, write-back
}

// AtClose has Close call f when nothing of the guest moves any more and its disks
// are still open.
func (m *Machine) AtClose(f func() error) {
	m.ctl.Lock()
	defer m.ctl.Unlock()
	m.atClose = append(m.atClose, f)
}

// Close releases everything, what Config gave included; a machine that still
// runs quits first.
func (m *Machine) Close() error {
	m.ctl.Lock()
	if m.closed {
		m.ctl.Unlock()
		return nil
	}
	m.closed = true
	started := m.started
	m.ctl.Unlock()
	if started {
		m.Quit()
		<-m.ended
	}
	m.hotplug.cancel()
	m.hurryDisks(true)
	m.gate.hold(holdClosed)
	m.threads.Wait()
	m.hotplug.work.Wait() // nothing can begin any more
	m.release()
	return m.closeHost()
}

// release undoes what New did, in reverse order. It works on a machine of
// which only a part was built.
func (m *Machine) release() {
	if m.hotplug.cancel != nil {
		m.hotplug.cancel()
	}
	m.closeDevices()
	for _, c := range m.cpus {
		c.VCPU.Close()
	}
	if m.vm != nil {
		m.vm.Close()
	}
	if m.sys != nil {
		m.sys.Close()
	}
	if m.mem != nil {
		m.mem.Close()
	}
}
