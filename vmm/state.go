package vmm

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/gnomon-vmm/gnomon/kvm"
	"github.com/gnomon-vmm/gnomon/mm/guestmem"
	"github.com/gnomon-vmm/gnomon/vmm/device"
	"github.com/gnomon-vmm/gnomon/vmm/virtio"
)

// ErrRestore is the stage of taking over a saved machine's state.
var ErrRestore = errors.New("restore machine state")

// Section is the state of one part of a machine.
type Section struct {
	Name    string
	Version uint32
	Data    []byte
}

// Restore says what New makes a machine of instead of loading a kernel.
type Restore struct {
	// Sections are what SaveState returned. Config must describe the same
	// machine: the same devices in the same order. CPUs, Memory and UUID come
	// from here.
	Sections []Section
	// Prepare, where not nil, is called with the machine's memory before
	// anything reads it: it fills it, or adds a pager that will.
	Prepare func(*guestmem.Memory) error
	// ClockGoesOn has the guest's clocks go on by the time since it was saved,
	// by the host's wall clock. Otherwise they stand where they stood.
	ClockGoesOn bool
	// KeepGenerationID leaves the generation id as it was. Otherwise the guest
	// is told of a new one: there may be several of it now.
	KeepGenerationID bool
}

// machineState is the section of what concerns the machine as a whole.
type machineState struct {
	UUID     string
	CPUs     int
	Memory   uint64
	Assisted bool // ring 0 was interpreted (vmm/assist)
	TSCKHz   int
	Clock    time.Duration // the machine's time
	KVMClock uint64        // nanoseconds
	SavedAt  time.Time     // by the host's wall clock
	CPUID    []kvm.CPUIDEntry
}

// part is one section: how it is read and how it is taken over.
type part struct {
	name    string
	version uint32
	get     func() (any, error)
	set     func(json.RawMessage) error
}

// partOf makes a part of a device's State and Restore.
func partOf[T any](name string, get func() (T, error), set func(T) error) part {
	return part{
		name: name, version: 1,
		get: func() (any, error) { return get() },
		set: func(data json.RawMessage) error {
			var state T
			if err := decode(data, &state); err != nil {
				return err
			}
			return set(state)
		},
	}
}

// decode reads a section's data; what it does not know it refuses.
func decode(data []byte, into any) error {
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	return d.Decode(into)
}

func infallible[T any](get func() T) func() (T, error) {
	return func() (T, error) { return get(), nil }
}

// parts lists the machine's parts in the order in which they are restored: what
// drives interrupt lines before the controllers, and these before the vCPUs,
// whose local APICs have what was delivered; transports after their devices.
func (m *Machine) parts() []part {
	parts := []part{
		partOf("machine", m.machineState, m.restoreMachine),
		partOf("pci", infallible(m.pci.State), m.pci.Restore),
		partOf("serial0", infallible(m.serial.State), m.serial.Restore),
		partOf("rtc", infallible(m.rtc.State), m.rtc.Restore),
		partOf("i8042", infallible(m.i8042.State), func(s device.I8042State) error { m.i8042.Restore(s); return nil }),
		partOf("power", infallible(m.power.State), m.power.Restore),
		partOf("generation-id", infallible(m.generation.State), m.generation.Restore),
	}
	for _, d := range m.disks {
		parts = append(parts, partOf("virtio-blk:"+d.ID, infallible(d.Device.State), func(s virtio.BlkState) error { d.Device.Restore(s); return nil }))
	}
	for _, n := range m.nets {
		parts = append(parts, partOf("virtio-net:"+n.ID, infallible(n.Device.State), n.Device.SetState))
	}
	if m.vsock != nil {
		parts = append(parts, partOf("virtio-vsock", infallible(m.vsock.State), m.vsock.SetState))
	}
	if m.console != nil {
		parts = append(parts, partOf("virtio-console", infallible(m.console.State), m.console.SetState))
	}
	if m.balloon != nil {
		parts = append(parts, partOf("virtio-balloon", infallible(m.balloon.State), m.balloon.SetState))
	}
	for _, p := range m.virtio {
		parts = append(parts, partOf("virtio:"+p.Name(), infallible(p.State), p.Restore))
	}
	parts = append(parts, partOf("interrupts", func() (interruptState, error) { return readInterrupts(m.vm) },
		func(s interruptState) error { return s.write(m.vm) }))
	for _, c := range m.cpus {
		parts = append(parts, partOf(fmt.Sprintf("cpu%d", c.id), c.checkpointState, c.restoreState))
	}
	return parts
}

// SaveState reads the state of everything but memory. The machine must be
// paused, or not have run yet; a saved machine may go on.
func (m *Machine) SaveState() ([]Section, error) {
	m.ctl.Lock()
	defer m.ctl.Unlock()
	if s := m.Status(); m.closed || s != StatusPaused && s != StatusPrelaunch {
		return nil, fmt.Errorf("%w: its state can be saved while it is paused, not while it is %q", ErrState, s)
	}
	var sections []Section
	for _, p := range m.parts() {
		state, err := p.get()
		if err != nil {
			return nil, fmt.Errorf("%w: %s: %w", ErrState, p.name, err)
		}
		data, err := json.Marshal(state)
		if err != nil {
			return nil, fmt.Errorf("%w: %s: %w", ErrState, p.name, err)
		}
		sections = append(sections, Section{p.name, p.version, data})
	}
	return sections, nil
}

// restore takes over the state in Config.Restore. Preconditions: everything is
// built, the vCPUs have not run, the devices are paused.
func (m *Machine) restore() error {
	byName, err := index(m.cfg.Restore.Sections)
	if err != nil {
		return err
	}
	for _, p := range m.parts() {
		s, ok := byName[p.name]
		if !ok {
			return fmt.Errorf("%w: the saved machine has no %s: describe the same devices, in the same order", ErrRestore, p.name)
		}
		delete(byName, p.name)
		if s.Version > p.version {
			return fmt.Errorf("%w: %s has version %d, of a newer Gnomon; this one knows %d", ErrRestore, p.name, s.Version, p.version)
		}
		if err := p.set(s.Data); err != nil {
			return fmt.Errorf("%w: %s: %w", ErrRestore, p.name, err)
		}
	}
	for name := range byName {
		return fmt.Errorf("%w: the saved machine has %s, which this one has not: describe the same devices", ErrRestore, name)
	}
	if !m.cfg.Restore.KeepGenerationID {
		if err := m.generation.Change(device.NewGUID()); err != nil {
			return fmt.Errorf("%w: %w", ErrRestore, err)
		}
	}
	return nil
}

func index(sections []Section) (map[string]Section, error) {
	byName := make(map[string]Section, len(sections))
	for _, s := range sections {
		if _, twice := byName[s.Name]; twice {
			return nil, fmt.Errorf("%w: %s is there twice", ErrRestore, s.Name)
		}
		byName[s.Name] = s
	}
	return byName, nil
}

// applyRestore gives cfg what the saved machine decides, before it is built.
func (c *Config) applyRestore() (*machineState, error) {
	var s machineState
	byName, err := index(c.Restore.Sections)
	if err != nil {
		return nil, err
	}
	if err := decode(byName["machine"].Data, &s); err != nil {
		return nil, fmt.Errorf("%w: machine: %w", ErrRestore, err)
	}
	if c.UUID, err = ParseUUID(s.UUID); err != nil {
		return nil, fmt.Errorf("%w: machine: %w", ErrRestore, err)
	}
	c.CPUs, c.Memory = s.CPUs, s.Memory
	return &s, nil
}

func (m *Machine) machineState() (machineState, error) {
	return machineState{
		UUID: m.cfg.UUID.String(), CPUs: m.cfg.CPUs, Memory: m.cfg.Memory, Assisted: m.assisted, TSCKHz: m.tscKHz,
		Clock: m.clock.Now(), KVMClock: m.kvmClock.Clock, SavedAt: time.Now(), CPUID: m.cpuid,
	}, nil
}

// restoreMachine sets the clocks; the rest of the state went into building.
func (m *Machine) restoreMachine(s machineState) error {
	away := time.Duration(0)
	if m.cfg.Restore.ClockGoesOn {
		away = max(0, time.Since(s.SavedAt))
	}
	if s.Clock < 0 || s.Clock > 1<<61 || s.KVMClock > 1<<61 || away > 1<<61 {
		return fmt.Errorf("clock of %v and %d ns is out of range", s.Clock, s.KVMClock)
	}
	m.clock.set(s.Clock + away)
	if s.KVMClock != 0 {
		m.kvmClock = kvm.ClockData{Clock: s.KVMClock + uint64(away)}
	}
	return nil
}
