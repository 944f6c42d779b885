package vmm

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/gnomon-vmm/gnomon/mm/guestmem"
	"github.com/gnomon-vmm/gnomon/vmm/device"
)

// ErrRestore is the stage of taking over a saved machine's state.
var ErrRestore = errors.New("restore machine state")

// Section is the state of one part of a machine.
type Section struct {
	Name    string
	Version uint32
	Data    []byte
}

// Restore says what New makes a machine of instead of loading a kernel. What
// the host holds for a guest does not come back with it: the guest's vsock
// connections are reset, and its TCP connections through a user network end
// when it next sends on them.
type Restore struct {
	// Sections are what SaveState returned. Config must describe the same
	// machine: the same devices in the same order. CPUs, Memory and UUID come
	// from here where Config leaves them 0.
	Sections []Section
	// Prepare, where not nil, is called with the machine's memory before
	// anything reads it: it fills it, or adds a pager that will.
	Prepare func(*guestmem.Memory) error
	// ClockGoesOn has all the guest's clocks, the monotonic one too, jump at the
	// first Resume by the time since the saved machine stopped, as the host's
	// wall clock has it, so that the guest's wall clock is right. Otherwise they go on
	// where they stood.
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
	Clock    time.Duration // the machine's time
	KVMClock uint64        // nanoseconds
	Stopped  time.Time     // when these clocks were stopped, by the host's wall clock
	Host     hostState
}

const (
	machinePart = "machine"
	partVersion = 1 // of every section so far
)

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
		name: name, version: partVersion,
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
	if err := d.Decode(into); err != nil {
		return err
	}
	if d.More() {
		return errors.New("something follows the state")
	}
	return nil
}

func infallible[T any](get func() T) func() (T, error) {
	return func() (T, error) { return get(), nil }
}

// parts lists the machine's parts in the order in which they are restored.
//
// The vCPUs' local APICs come before the controllers that send to them, and
// these before the devices, which drive their lines as they are restored: so a
// line that changes while the state is read is seen, at worst twice. Devices
// come after their PCI functions and before their transports, which start them.
func (m *Machine) parts() []part {
	parts := []part{partOf(machinePart, m.machineState, m.restoreClocks)}
	for _, c := range m.cpus {
		parts = append(parts, partOf(fmt.Sprintf("cpu%d", c.id), c.checkpointState, c.restoreState))
	}
	parts = append(parts,
		partOf("interrupts", func() (interruptState, error) { return readInterrupts(m.vm) }, func(s interruptState) error { return s.write(m.vm) }),
		partOf("serial0", infallible(m.serial.State), m.serial.Restore),
		partOf("rtc", infallible(m.rtc.State), m.restoreRTC),
		partOf("i8042", infallible(m.i8042.State), func(s device.I8042State) error { m.i8042.Restore(s); return nil }),
		partOf("power", infallible(m.power.State), m.power.Restore),
		partOf("generation-id", infallible(m.generation.State), m.generation.Restore),
		partOf("pci", infallible(m.pci.State), m.pci.Restore),
	)
	if m.hotplug.regs != nil {
		parts = append(parts, partOf(hotplugPart, infallible(m.hotplugState), m.restoreHotplug))
	}
	for _, d := range m.disks {
		parts = append(parts, partOf("virtio-blk:"+d.ID, infallible(d.Device.State), d.Device.Restore))
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
	return parts
}

// SaveState reads the state of everything but memory. The machine must be
// paused, or not have run yet; a saved machine may go on. While a reset or
// power-off that the guest asked for is under way it returns ErrState.
func (m *Machine) SaveState() ([]Section, error) {
	m.ctl.Lock()
	defer m.ctl.Unlock()
	switch s := m.Status(); {
	case m.closed:
		return nil, ErrClosed
	case s != StatusPaused && s != StatusPrelaunch && s != StatusIOError:
		return nil, fmt.Errorf("%w: its state can be saved while it is paused, not while it is %q", ErrState, s)
	case m.gate.holds(holdRequest) != 0:
		return nil, fmt.Errorf("%w: the guest is being reset or powered off: its state can be saved after that", ErrState)
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
	sections, err := m.sectionsOfParts(m.cfg.Restore.Sections)
	if err != nil {
		return err
	}
	m.stopDevices()
	return m.takeOver(sections)
}

// sectionsOfParts finds sections by name: each of the machine's parts has its
// like, before anything is changed.
func (m *Machine) sectionsOfParts(all []Section) (map[string]Section, error) {
	sections, err := indexSections(all)
	if err != nil {
		return nil, err
	}
	parts := m.parts()
	for _, p := range parts {
		if _, ok := sections[p.name]; !ok {
			return nil, fmt.Errorf("%w: the saved machine has no %s: describe the same devices, in the same order", ErrRestore, p.name)
		}
	}
	for _, s := range all { // in their order, so that the device itself is named
		if !slices.ContainsFunc(parts, func(p part) bool { return p.name == s.Name }) {
			return nil, fmt.Errorf("%w: the saved machine has %s, which this one has not: describe the same devices, or use the Gnomon that saved it", ErrRestore, s.Name)
		}
	}
	if m.hotplug.regs != nil {
		if err := m.checkHotplug(sections[hotplugPart]); err != nil {
			return nil, err
		}
	}
	return sections, nil
}

// takeOver sets every part to its section, and tells the guest that it is
// another now.
func (m *Machine) takeOver(sections map[string]Section) error {
	for _, p := range m.parts() {
		if err := p.set(sections[p.name].Data); err != nil {
			return fmt.Errorf("%w: %s: %w", ErrRestore, p.name, err)
		}
	}
	if m.cfg.Restore.KeepGenerationID {
		return nil
	}
	if err := m.generation.Change(device.NewGUID()); err != nil {
		return fmt.Errorf("%w: %w", ErrRestore, err)
	}
	return nil
}

// Revert takes a paused machine to the state in r, as New makes a machine of it.
// Its memory is discarded before r.Prepare is called. When the state does not fit
// the machine is as before; when taking it over fails it has ended, with the error.
func (m *Machine) Revert(r Restore) (err error) {
	m.ctl.Lock()
	defer m.ctl.Unlock()
	switch s := m.Status(); {
	case m.closed:
		return ErrClosed
	case s != StatusPaused:
		return fmt.Errorf("%w: it can be taken to a saved state while it is paused, not while it is %q", ErrState, s)
	case m.gate.holds(holdRequest) != 0:
		return fmt.Errorf("%w: the guest is being reset or powered off", ErrState)
	}
	same := Config{CPUs: m.cfg.CPUs, Memory: m.cfg.Memory, Restore: &r}
	saved, _, err := same.applyRestore()
	if err != nil {
		return err
	}
	if !slices.Equal(saved.Host.CPUID, m.cpuid) {
		return fmt.Errorf("%w: the saved guest was shown another CPU: restore it as a machine of its own", ErrRestore)
	}
	if err := m.checkHost(&saved.Host); err != nil {
		return err
	}
	sections, err := m.sectionsOfParts(r.Sections)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			m.Fail(err)
		}
	}()
	m.cfg.Restore = &r
	if err := m.resetDevices(); err != nil {
		return fmt.Errorf("%w: %w", ErrRestore, err)
	}
	for _, c := range m.cpus {
		if err := c.resetState(); err != nil {
			return fmt.Errorf("%w: %w", ErrRestore, err)
		}
	}
	for _, region := range m.mem.Regions() {
		if err := m.mem.Discard(region.GPA, region.Size); err != nil {
			return fmt.Errorf("%w: %w", ErrRestore, err)
		}
	}
	if r.Prepare != nil {
		if err := r.Prepare(m.mem); err != nil {
			return fmt.Errorf("%w: %w", ErrRestore, err)
		}
	}
	m.clock.stop()
	return m.takeOver(sections)
}

// indexSections finds sections by name and refuses those of another version.
func indexSections(sections []Section) (map[string]Section, error) {
	byName := make(map[string]Section, len(sections))
	for _, s := range sections {
		switch _, twice := byName[s.Name]; {
		case twice:
			return nil, fmt.Errorf("%w: %s is there twice", ErrRestore, s.Name)
		case s.Version > partVersion:
			return nil, fmt.Errorf("%w: %s has version %d, of a newer Gnomon; this one knows %d", ErrRestore, s.Name, s.Version, partVersion)
		case s.Version == 0:
			return nil, fmt.Errorf("%w: %s has no version", ErrRestore, s.Name)
		}
		byName[s.Name] = s
	}
	return byName, nil
}

// SavedUUID is the UUID of a saved machine; zero if its state does not tell.
func SavedUUID(sections []Section) UUID {
	var s struct{ UUID string }
	for i := range sections {
		if sections[i].Name == machinePart {
			_ = json.Unmarshal(sections[i].Data, &s)
		}
	}
	uuid, err := ParseUUID(s.UUID)
	if err != nil {
		return UUID{}
	}
	return uuid
}

// applyRestore gives cfg what the saved machine decides, before it is built.
func (c *Config) applyRestore() (*machineState, *hotplugState, error) {
	sections, err := indexSections(c.Restore.Sections)
	if err != nil {
		return nil, nil, err
	}
	section, ok := sections[machinePart]
	if !ok {
		return nil, nil, fmt.Errorf("%w: section %s is missing", ErrRestore, machinePart)
	}
	var s machineState
	if err := decode(section.Data, &s); err != nil {
		return nil, nil, fmt.Errorf("%w: %s: %w", ErrRestore, machinePart, err)
	}
	uuid, err := ParseUUID(s.UUID)
	if err != nil {
		return nil, nil, fmt.Errorf("%w: %s: %w", ErrRestore, machinePart, err)
	}
	if c.UUID == (UUID{}) {
		c.UUID = uuid
	}
	if c.CPUs != 0 && c.CPUs != s.CPUs || c.Memory != 0 && c.Memory != s.Memory {
		return nil, nil, fmt.Errorf("%w: the saved machine has %d vCPUs and %d bytes of memory: leave these out, or ask for the same", ErrRestore, s.CPUs, s.Memory)
	}
	c.CPUs, c.Memory = s.CPUs, s.Memory
	section, ok = sections[hotplugPart]
	if !ok {
		return &s, nil, nil
	}
	plugged, err := readHotplug(section)
	if err != nil {
		return nil, nil, err
	}
	c.plugSaved(&plugged)
	return &s, &plugged, nil
}

func (m *Machine) machineState() (machineState, error) {
	return machineState{
		UUID: m.cfg.UUID.String(), CPUs: m.cfg.CPUs, Memory: m.cfg.Memory,
		Clock: m.clock.Now(), KVMClock: m.kvmClock.Clock, Stopped: m.stopped, Host: m.hostState(),
	}, nil
}
