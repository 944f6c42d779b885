package vmm

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/raw"
	"github.com/gnomon-vmm/gnomon/vmm/device"
)

// slotted is a machine whose guest does nothing, and whose driver of slots the test is.
type slotted struct {
	*Machine
	gone chan string // disks that were unplugged, in their order
}

func newSlotted(t *testing.T, cfg Config, run bool) *slotted {
	t.Helper()
	cfg.Cmdline = "spin"
	s := &slotted{gone: make(chan string, 100)}
	s.Machine = newMachine(t, cfg)
	resumed := make(chan struct{}, 100)
	s.Observe(func(e Event) {
		switch e := e.(type) {
		case Unplugged:
			s.gone <- e.Device
		case Resumed:
			resumed <- struct{}{}
		}
	})
	if run {
		s.run(t)
		<-resumed
	}
	return s
}

func (s *slotted) run(t *testing.T) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		if _, err := s.Run(context.Background()); err != nil {
			t.Errorf("run: %v", err)
		}
	}()
	t.Cleanup(func() {
		s.Close()
		<-done
	})
}

// register is a read or write of the slots' registers, as the guest's AML does it.
func (s *slotted) register(off uint64) uint32 {
	var p [4]byte
	s.pio.Read(device.PortPCIHotplug+off, p[:])
	return binary.LittleEndian.Uint32(p[:])
}

func (s *slotted) eject(slot int) {
	s.pio.Write(device.PortPCIHotplug+device.PCIHotplugEject, binary.LittleEndian.AppendUint32(nil, 1<<slot))
}

func (s *slotted) identity(slot int) uint32 {
	var p [4]byte
	s.mmio.Read(device.ECAMBase+uint64(slot)<<15, p[:])
	return binary.LittleEndian.Uint32(p[:])
}

// event tells whether GPEPCIHotplug is raised, and clears it.
func (s *slotted) event() bool {
	var p [1]byte
	s.pio.Read(device.PortGPE0, p[:])
	s.pio.Write(device.PortGPE0, []byte{1 << device.GPEPCIHotplug})
	return p[0]&(1<<device.GPEPCIHotplug) != 0
}

func (s *slotted) ids() (all []string) {
	for _, d := range s.Disks() {
		all = append(all, d.ID)
	}
	return all
}

// counted is a node that knows how often it was closed.
type counted struct {
	block.Node
	closed int
}

func (c *counted) Close() error { c.closed++; return c.Node.Close() }

func node(t *testing.T) *counted {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	n, err := raw.Open(path, false)
	if err != nil {
		t.Fatal(err)
	}
	return &counted{Node: n}
}

func plugged(t *testing.T, s *slotted, id string) *counted {
	t.Helper()
	n := node(t)
	if err := s.Plug(Disk{ID: id, Node: n, Serial: "of " + id}); err != nil {
		t.Fatal(err)
	}
	return n
}

const virtioBlk = 0x1042_1AF4

// A disk comes, is found, is asked back and goes, again and again.
func TestPlugAndUnplug(t *testing.T) {
	s := newSlotted(t, Config{Disks: []Disk{{Node: node(t)}}}, true)
	const slot = device.PCIHotplugFirst
	for turn := range 3 {
		n := plugged(t, s, "hot")
		if !s.event() || s.register(device.PCIHotplugUp) != 1<<slot || s.identity(slot) != virtioBlk {
			t.Fatalf("turn %d: the guest is not told of the disk in slot %d: identity %#x", turn, slot, s.identity(slot))
		}
		if got := s.ids(); !slices.Equal(got, []string{"disk0", "hot"}) {
			t.Fatalf("disks %v", got)
		}
		if err := s.Unplug("hot"); err != nil {
			t.Fatal(err)
		}
		if !s.event() || s.register(device.PCIHotplugDown) != 1<<slot || s.register(device.PCIHotplugUp) != 0 {
			t.Fatal("the guest is not asked")
		}
		if err := s.Unplug("hot"); err != nil || !s.event() || s.register(device.PCIHotplugDown) != 1<<slot {
			t.Fatalf("the guest is not asked again: %v", err)
		}
		if s.identity(slot) != virtioBlk || n.closed != 0 {
			t.Fatal("the disk went before the guest let go of it")
		}
		s.eject(slot)
		s.eject(slot)
		if id := <-s.gone; id != "hot" {
			t.Fatalf("%s has gone", id)
		}
		if got := s.ids(); !slices.Equal(got, []string{"disk0"}) || s.identity(slot) != 0xFFFF_FFFF || n.closed != 1 {
			t.Fatalf("disks %v, identity %#x, node closed %d times", got, s.identity(slot), n.closed)
		}
	}
	if len(s.gone) != 0 {
		t.Errorf("%s has gone too", <-s.gone)
	}
}

func TestPlugRefuses(t *testing.T) {
	s := newSlotted(t, Config{Disks: []Disk{{Node: node(t)}}}, false)
	release := s.HoldDevices()
	again := s.HoldDevices()
	release()
	release()
	n := node(t)
	defer n.Close()
	for _, c := range []struct {
		disk Disk
		want error
	}{
		{Disk{ID: "hot", Node: n}, ErrHeld},
		{Disk{ID: "hot"}, ErrConfig},
		{Disk{ID: "hot", Node: n, Serial: "one that is far too long"}, ErrConfig},
		{Disk{ID: "disk0", Node: n}, ErrTwoDevices},
		{Disk{ID: "rng0", Node: n}, ErrTwoDevices},
		{Disk{Node: n}, ErrTwoDevices},
	} {
		if c.want != ErrHeld {
			again()
		}
		if err := s.Plug(c.disk); !errors.Is(err, c.want) || !errors.Is(err, ErrPlug) {
			t.Errorf("plug %q: %v, want %v", c.disk.ID, err, c.want)
		}
	}
	for id, want := range map[string]error{"disk0": ErrFixed, "rng0": ErrFixed, "hot": ErrNoDevice} {
		if err := s.Unplug(id); !errors.Is(err, want) {
			t.Errorf("unplug %s: %v, want %v", id, err, want)
		}
	}
	for i := range 8 {
		plugged(t, s, fmt.Sprint("hot", i))
	}
	if err := s.Plug(Disk{ID: "more", Node: n}); !errors.Is(err, ErrNoSlot) {
		t.Errorf("a ninth disk: %v", err)
	}
	// Nobody has seen it yet, so that nobody need be asked.
	if err := s.Unplug("hot7"); err != nil {
		t.Fatal(err)
	}
	<-s.gone
	if s.event() || s.register(device.PCIHotplugUp) != 0 {
		t.Error("a guest that has not begun is told of disks")
	}
	s.Close()
	for _, err := range []error{s.Plug(Disk{ID: "late", Node: n}), s.Unplug("hot0")} {
		if !errors.Is(err, ErrClosed) {
			t.Errorf("of a closed machine: %v", err)
		}
	}
}

// A disk that somebody works with stays until they have done with it.
func TestUnpluggedWhenFree(t *testing.T) {
	s := newSlotted(t, Config{}, true)
	n := plugged(t, s, "hot")
	given := make(chan AttachedDisk, 1)
	s.OnUnplug(func(d AttachedDisk) error { given <- d; return nil })
	d := s.Disks()[0]
	if err := d.Root.Claim("a job"); err != nil {
		t.Fatal(err)
	}
	release := s.HoldDevices()
	s.eject(device.PCIHotplugFirst)
	if err := s.Unplug("hot"); !errors.Is(err, ErrLeaving) {
		t.Errorf("ask back what the guest let go of: %v", err)
	}
	stays := func(when string) {
		t.Helper()
		if len(given) != 0 || len(s.Disks()) != 1 || s.identity(device.PCIHotplugFirst) != virtioBlk {
			t.Fatalf("the disk went %s", when)
		}
	}
	stays("while a job works with it")
	d.Root.Release()
	stays("while devices are held")
	release()
	if got := <-given; got.ID != "hot" || got.Root != d.Root || n.closed != 0 {
		t.Errorf("%s was handed over, its node closed %d times", got.ID, n.closed)
	}
	<-s.gone
	if err := d.Root.ClaimWhenFree(t.Context(), "the next"); err != nil {
		t.Errorf("the disk stays claimed: %v", err)
	}
	n.Close()
}

// A machine that ends while a removal waits does not wait for it.
func TestCloseAmidARemoval(t *testing.T) {
	s := newSlotted(t, Config{}, true)
	n := plugged(t, s, "hot")
	if err := s.Disks()[0].Root.Claim("a job"); err != nil {
		t.Fatal(err)
	}
	s.eject(device.PCIHotplugFirst)
	if err := s.Close(); err != nil || n.closed != 1 || len(s.gone) != 0 {
		t.Errorf("close: %v; the node was closed %d times", err, n.closed)
	}
}

// What was asked back goes at a reset, as in QEMU; what was not stays.
func TestResetUnplugs(t *testing.T) {
	s := newSlotted(t, Config{}, true)
	plugged(t, s, "stays")
	plugged(t, s, "goes")
	if err := s.Unplug("goes"); err != nil {
		t.Fatal(err)
	}
	s.SystemReset()
	if id := <-s.gone; id != "goes" {
		t.Errorf("%s has gone", id)
	}
	if got := s.ids(); !slices.Equal(got, []string{"stays"}) || s.register(device.PCIHotplugUp) != 0 {
		t.Errorf("disks %v", got)
	}
}

// A machine with a plugged disk is restored with the disk in its slot, as it was; a
// removal under way goes on.
func TestPluggedDisksAreRestored(t *testing.T) {
	s := newSlotted(t, Config{Disks: []Disk{{Node: node(t)}}}, true)
	for _, id := range []string{"one", "two", "three", "four"} {
		plugged(t, s, id)
	}
	two := s.Disks()[2]
	if two.ID != "two" {
		t.Fatal(s.ids())
	}
	s.eject(device.PCIHotplugFirst)
	<-s.gone
	if err := s.Pause(); err != nil {
		t.Fatal(err)
	}
	if err := s.Unplug("three"); err != nil {
		t.Fatal(err)
	}
	release := s.HoldDevices()
	s.eject(device.PCIHotplugFirst + 3)
	sections := saved(t, s.Machine)
	release()
	if id := <-s.gone; id != "four" {
		t.Fatalf("%s has gone", id)
	}

	restore := func(disks ...Disk) (*Machine, error) {
		return New(Config{Memory: 8 << 20, Restore: &Restore{Sections: sections}, Disks: disks})
	}
	next := newSlotted(t, Config{Restore: &Restore{Sections: sections}, Disks: []Disk{
		{ID: "four", Node: node(t)}, {ID: "disk0", Node: node(t)}, {ID: "three", Node: node(t)}, {ID: "two", Node: node(t)},
	}}, false)
	for slot, want := range map[int]uint32{1: virtioBlk, 24: 0xFFFF_FFFF, 25: virtioBlk, 26: virtioBlk, 27: virtioBlk, 28: 0xFFFF_FFFF} {
		if got := next.identity(slot); got != want {
			t.Errorf("slot %d: identity %#x, want %#x", slot, got, want)
		}
	}
	for _, d := range next.Disks() {
		if d.ID == "two" && (d.slot != 25 || d.Serial != "of two") {
			t.Errorf("disk two is in slot %d, its serial is %q", d.slot, d.Serial)
		}
	}
	if got := next.register(device.PCIHotplugDown); got != 1<<26 {
		t.Errorf("asked back %#x", got)
	}
	if got, want := saved(t, next.Machine), sections; len(got) != len(want) {
		t.Errorf("saved again there are %d sections, of %d", len(got), len(want))
	}
	next.run(t)
	if id := <-next.gone; id != "four" {
		t.Errorf("%s has gone", id)
	}

	// Without it, or in a machine that knows nothing of slots.
	if _, err := restore(Disk{ID: "disk0", Node: node(t)}, Disk{ID: "two", Node: node(t)}); !errors.Is(err, ErrRestore) {
		t.Errorf("without a plugged disk: %v", err)
	}
	if _, err := restore(Disk{ID: "disk0", Node: node(t)}, Disk{ID: "two", Node: node(t)}, Disk{ID: "three", Node: node(t)}, Disk{ID: "other", Node: node(t)}); !errors.Is(err, ErrRestore) {
		t.Errorf("with another disk in its place: %v", err)
	}
}

// What Gnomon saved before it knew of slots is restored as it was: nothing can be
// plugged in.
func TestRestoredWithoutSlots(t *testing.T) {
	s := newSlotted(t, Config{}, false)
	sections := slices.DeleteFunc(saved(t, s.Machine), func(x Section) bool { return x.Name == hotplugPart })
	next := newSlotted(t, Config{Restore: &Restore{Sections: sections}}, true)
	n := node(t)
	defer n.Close()
	if err := next.Plug(Disk{ID: "hot", Node: n}); !errors.Is(err, ErrNoSlot) {
		t.Errorf("plug: %v", err)
	}
	if err := next.Pause(); err != nil {
		t.Fatal(err)
	}
	if again := saved(t, next.Machine); len(again) != len(sections) {
		t.Errorf("saved again there are %d sections, of %d", len(again), len(sections))
	}
}

// A machine goes back only to states with the same disks in the same slots.
func TestRevertNeedsThePluggedDisks(t *testing.T) {
	s := newSlotted(t, Config{}, true)
	plugged(t, s, "one")
	plugged(t, s, "two")
	if err := s.Pause(); err != nil {
		t.Fatal(err)
	}
	sections := saved(t, s.Machine)
	for range 2 {
		for slot := range 2 {
			s.eject(device.PCIHotplugFirst + slot)
			<-s.gone
		}
		if err := s.Revert(Restore{Sections: sections}); !errors.Is(err, ErrRestore) {
			t.Fatalf("go back without the disks: %v", err)
		}
		plugged(t, s, "two")
		plugged(t, s, "one")
		if err := s.Revert(Restore{Sections: sections}); !errors.Is(err, ErrRestore) {
			t.Fatalf("go back with the disks in other slots: %v", err)
		}
	}
	for slot := range 2 {
		s.eject(device.PCIHotplugFirst + slot)
		<-s.gone
	}
	plugged(t, s, "one")
	plugged(t, s, "two")
	if err := s.Revert(Restore{Sections: sections}); err != nil {
		t.Fatal(err)
	}
}

// Sections that tell of slots that cannot be are refused, and nothing panics.
func TestRestoreRefusesSlots(t *testing.T) {
	s := newSlotted(t, Config{}, false)
	plugged(t, s, "hot")
	sections := saved(t, s.Machine)
	at := slices.IndexFunc(sections, func(x Section) bool { return x.Name == hotplugPart })
	for name, change := range map[string]func(*hotplugState){
		"slot 0":              func(h *hotplugState) { h.Disks[0].Slot = 0 },
		"slot -1":             func(h *hotplugState) { h.Disks[0].Slot = -1 },
		"slot 99":             func(h *hotplugState) { h.Disks[0].Slot = 99 },
		"a slot that is not":  func(h *hotplugState) { h.Disks[0].Slot = 5 },
		"one slot twice":      func(h *hotplugState) { h.Disks = append(h.Disks, h.Disks[0]) },
		"no disk":             func(h *hotplugState) { h.Disks = nil },
		"another disk":        func(h *hotplugState) { h.Disks[0].ID = "other" },
		"an empty slot's bit": func(h *hotplugState) { h.Registers.Up = 1 << 30 },
		"no queues":           func(h *hotplugState) { h.Disks[0].Queues = -1 },
		"a policy":            func(h *hotplugState) { h.Disks[0].WriteError = "panic" },
	} {
		var h hotplugState
		if err := json.Unmarshal(sections[at].Data, &h); err != nil {
			t.Fatal(err)
		}
		change(&h)
		data, err := json.Marshal(h)
		if err != nil {
			t.Fatal(err)
		}
		changed := slices.Clone(sections)
		changed[at].Data = data
		if m, err := New(Config{Restore: &Restore{Sections: changed}, Disks: []Disk{{ID: "hot", Node: node(t)}}}); err == nil {
			m.Close()
			t.Errorf("%s: restored", name)
		}
	}
}
