package device

import (
	"encoding/binary"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// hotplugged is a PCIHotplug with what it tells others.
type hotplugged struct {
	*PCIHotplug
	ports
	notified int
	ejected  []int
}

func newHotplugged(t testing.TB, slots uint32) *hotplugged {
	h := &hotplugged{}
	h.PCIHotplug = NewPCIHotplug(slots, func() { h.notified++ }, func(slot int) { h.ejected = append(h.ejected, slot) })
	h.ports = newPorts(t, h.PCIHotplug.Map)
	return h
}

func (h *hotplugged) dword(reg uint64) uint32 {
	var p [4]byte
	h.ports.Read(PortPCIHotplug+reg, p[:])
	return binary.LittleEndian.Uint32(p[:])
}

func (h *hotplugged) letGo(slots uint32) {
	h.ports.Write(PortPCIHotplug+PCIHotplugEject, binary.LittleEndian.AppendUint32(nil, slots))
}

// A guest is told once of each change, and lets go of what it was asked for.
func TestPCIHotplugSequence(t *testing.T) {
	h := newHotplugged(t, 0xFF00_0000)
	if got := h.dword(PCIHotplugRemovable); got != 0xFF00_0000 {
		t.Errorf("removable slots %#x", got)
	}
	h.Fill(24, true)
	h.Fill(26, false) // found by the firmware
	if h.notified != 1 {
		t.Errorf("notified %d times", h.notified)
	}
	for _, want := range []uint32{1 << 24, 0} {
		if got := h.dword(PCIHotplugUp); got != want {
			t.Errorf("came %#x, want %#x", got, want)
		}
	}
	h.Ask(24)
	h.Ask(25) // empty
	for _, want := range []uint32{1 << 24, 0} {
		if got := h.dword(PCIHotplugDown); got != want {
			t.Errorf("asked back %#x, want %#x", got, want)
		}
	}
	h.Ask(24) // again, for a guest that did not listen
	if got := h.dword(PCIHotplugDown); got != 1<<24 {
		t.Errorf("asked back again %#x", got)
	}
	h.letGo(1<<24 | 1<<25 | 1<<1)
	h.letGo(1 << 24)
	h.letGo(1 << 26) // which was not asked back
	if want := []int{24, 26}; !slices.Equal(h.ejected, want) {
		t.Errorf("ejected %v, want %v", h.ejected, want)
	}
	if got, want := h.State(), (PCIHotplugState{Leaving: 1 << 24, Ejected: 1<<24 | 1<<26}); got != want {
		t.Errorf("state %+v, want %+v", got, want)
	}
	h.Removed(24)
	h.letGo(1 << 24)
	h.Fill(24, true)
	h.letGo(1 << 24)
	if want := []int{24, 26, 24}; !slices.Equal(h.ejected, want) {
		t.Errorf("ejected %v, want %v", h.ejected, want)
	}
}

// At a reset what was asked back leaves, and the rest is found by the firmware.
func TestPCIHotplugReset(t *testing.T) {
	h := newHotplugged(t, 0xFF00_0000)
	h.Fill(24, true)
	h.Fill(25, true)
	h.Ask(25)
	h.Reset()
	if up, down := h.dword(PCIHotplugUp), h.dword(PCIHotplugDown); up != 0 || down != 0 {
		t.Errorf("after a reset %#x came and %#x are asked back", up, down)
	}
	if want := []int{25}; !slices.Equal(h.ejected, want) {
		t.Errorf("ejected %v, want %v", h.ejected, want)
	}
}

func TestPCIHotplugRestore(t *testing.T) {
	h := newHotplugged(t, 0xFF00_0000)
	h.Fill(24, true)
	h.Fill(25, true)
	h.Ask(25)
	h.letGo(1 << 25)
	next := newHotplugged(t, 0xFF00_0000)
	if err := next.Restore(h.State()); err == nil {
		t.Error("slots without devices were restored")
	}
	next.Fill(24, false)
	next.Fill(25, false)
	if err := next.Restore(h.State()); err != nil {
		t.Fatal(err)
	}
	if got := next.dword(PCIHotplugUp); got != 3<<24 || len(next.ejected) != 0 {
		t.Errorf("came %#x, ejected %v", got, next.ejected)
	}
}

// A device that is plugged in is on no bus until the guest has placed it; one that is
// removed answers no more, and its room and line are another's.
func TestPCIPlugAndRemove(t *testing.T) {
	m := newTestPCI(t)
	fixed := m.add(t, 1)
	d := newTestFunction(t)
	if err := m.host.Plug(24, d); err != nil {
		t.Fatal(err)
	}
	if bar, command := m.read(24, pciBAR0, 4), m.read(24, pciCommand, 2); bar != 0 || command != 0 || d.moves != nil {
		t.Errorf("BAR 0 at %#x, command %#x, moves %x", bar, command, d.moves)
	}
	const at = PCIMMIOBase + 0x10_0000
	m.write(24, pciBAR0, 4, at)
	m.write(24, pciBAR0+16, 4, at+0x4000)
	m.write(24, pciCommand, 2, pciCommandMemory)
	if !m.mmio.Write(at, []byte{7}) || d.ram[0] != 7 {
		t.Error("the placed BAR is not reached")
	}
	d.fn.SetINTx(true)
	if !m.lines[0] {
		t.Fatal("the line is not driven")
	}
	before := m.host.State()

	m.host.Remove(24)
	m.host.Remove(24) // which is empty
	m.host.Remove(0)
	if m.lines[0] {
		t.Error("a device that is gone holds its line")
	}
	d.fn.SetINTx(true)
	if m.lines[0] {
		t.Error("a device that is gone drives its line")
	}
	if id := m.read(24, pciVendorID, 4); id != 0xFFFF_FFFF {
		t.Errorf("an empty slot reads %#x", id)
	}
	m.write(24, pciCommand, 2, pciCommandMemory)
	if m.mmio.Write(at, []byte{8}) || d.ram[0] != 7 {
		t.Error("a BAR of a device that is gone is reached")
	}
	if want := []uint64{at, 0}; !cmp.Equal(d.moves, want) {
		t.Errorf("moves %x, want %x", d.moves, want)
	}
	if err := m.host.Restore(before); err == nil {
		t.Error("state with a device that is gone was restored")
	}

	// Its place at reset is free for the next, which after the reset is there.
	next := newTestFunction(t)
	if err := m.host.Plug(24, next); err != nil {
		t.Fatal(err)
	}
	m.host.Reset()
	for slot, f := range map[int]*testFunction{1: fixed, 24: next} {
		for _, b := range f.fn.bars {
			if b.size != 0 && !b.mapped {
				t.Errorf("slot %d: a BAR is not on the bus after a reset", slot)
			}
		}
	}
	if next.fn.initial[pciBAR0+1] != d.fn.initial[pciBAR0+1] {
		t.Errorf("the room at reset of a device that is gone is lost: %x, then %x", d.fn.initial[pciBAR0:pciBAR0+4], next.fn.initial[pciBAR0:pciBAR0+4])
	}
}

// Slots can be filled and emptied for ever.
func TestPCIRoomIsGivenBack(t *testing.T) {
	m := newTestPCI(t)
	for n := range PCIMMIOSize/0x8000 + 1 {
		if err := m.host.Plug(31, newTestFunction(t)); err != nil {
			t.Fatalf("after %d: %v", n, err)
		}
		m.host.Remove(31)
	}
}

// FuzzPCIHotplug lets a guest do what it likes with the registers while devices come
// and go: a model of what it may be told holds.
func FuzzPCIHotplug(f *testing.F) {
	// Steps: what, slot or offset, value. A disk comes and is asked back.
	f.Add([]byte{0, 24, 0, 2, 0, 0, 1, 24, 0, 2, 4, 0, 3, 8 + 3, 1, 4, 24, 0})
	// Ejects of everything, at every width, of what is not there too.
	f.Add([]byte{0, 25, 0, 0, 26, 0, 3, 8, 0xFF, 3, 9, 0xFF, 3, 10, 0xFF, 3, 11, 0xFF, 4, 25, 0, 4, 26, 0, 0, 25, 0, 3, 11 | 0xC0, 0xFF})
	f.Add([]byte{0, 31, 0, 1, 31, 0, 5, 0, 0, 2, 0x80 | 2, 0, 2, 0xC0 | 7, 0, 6, 0, 0, 4, 31, 0, 3, 0x80 | 14, 0xFF})
	f.Fuzz(func(t *testing.T, steps []byte) {
		const slots = 0xFF00_0000
		h := newHotplugged(t, slots)
		var filled uint32
		for ; len(steps) >= 3; steps = steps[3:] {
			slot := 24 + int(steps[1])%8
			off := PortPCIHotplug + uint64(steps[1]&0x3F)
			data := make([]byte, 1<<(steps[1]>>6))
			for i := range data {
				data[i] = steps[2]
			}
			ejected := len(h.ejected)
			before := h.State()
			switch steps[0] % 7 {
			case 0:
				if filled&(1<<slot) == 0 {
					filled |= 1 << slot
					h.Fill(slot, true)
				}
			case 1:
				h.Ask(slot)
			case 2:
				h.ports.Read(off, data)
			case 3:
				h.ports.Write(off, data)
			case 4:
				filled &^= 1 << slot
				h.Removed(slot)
			case 5:
				h.PCIHotplug.Reset()
			case 6:
				next := newHotplugged(t, slots)
				for slot := range PCISlots {
					if filled&(1<<slot) != 0 {
						next.Fill(slot, false)
					}
				}
				if err := next.Restore(before); err != nil {
					t.Fatal(err)
				}
				h, ejected = next, 0
			}
			s := h.State()
			if s.of(filled) != s {
				t.Fatalf("state %+v, and only %#x hold devices", s, filled)
			}
			for _, slot := range h.ejected[ejected:] {
				if before.Ejected&(1<<slot) != 0 || s.Ejected&(1<<slot) == 0 || filled&(1<<slot) == 0 {
					t.Fatalf("slot %d was ejected: %+v, then %+v", slot, before, s)
				}
			}
		}
	})
}
