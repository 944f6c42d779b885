package kvm_test

import (
	"encoding/binary"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/kvm"
	"github.com/gnomon-vmm/gnomon/kvm/internal/tinyguest"
)

const (
	vector     = 0x40
	handlerOff = 0x100
	msiAddress = 0xfee00000 // to the APIC with id 0
)

// newIRQGuest makes a guest that waits for interrupts and answers vector with
// an OUT to port 0x80; its APIC is enabled.
func newIRQGuest(t testing.TB) *tinyguest.Guest {
	t.Helper()
	guest := newGuest(t, tinyguest.Config{
		Mode: tinyguest.Real,
		Code: append(at(handlerOff, []byte{
			sti,
			hlt,
			0xeb, 0xfd, // jmp to the hlt
		}), 0xe6, 0x80, 0xcf), // out 0x80, al; iret
		Gates:   map[uint8]uint64{vector: tinyguest.Code + handlerOff},
		Prepare: (*kvm.VM).CreateIRQChip,
	})
	enableAPIC(t, guest)
	return guest
}

// enableAPIC lets the guest's APIC take interrupts, but not from the PICs.
func enableAPIC(t testing.TB, guest *tinyguest.Guest) {
	t.Helper()
	var lapic kvm.LAPIC
	if err := guest.VCPU.GetLAPIC(&lapic); err != nil {
		t.Fatal(err)
	}
	const spurious, lint0 = 0xf0, 0x350
	binary.LittleEndian.PutUint32(lapic[spurious:], 0x1ff)
	binary.LittleEndian.PutUint32(lapic[lint0:], 0x10000)
	if err := guest.VCPU.SetLAPIC(&lapic); err != nil {
		t.Fatal(err)
	}
}

// endOfInterrupt clears the APIC's in-service bits, as a write to EOI would.
func endOfInterrupt(t testing.TB, guest *tinyguest.Guest) {
	t.Helper()
	var lapic kvm.LAPIC
	if err := guest.VCPU.GetLAPIC(&lapic); err != nil {
		t.Fatal(err)
	}
	const inService = 0x100
	clear(lapic[inService : inService+0x80])
	if err := guest.VCPU.SetLAPIC(&lapic); err != nil {
		t.Fatal(err)
	}
}

func eventFD(t testing.TB) int {
	t.Helper()
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

func signalEvent(t testing.TB, fd int) {
	t.Helper()
	if _, err := unix.Write(fd, binary.NativeEndian.AppendUint64(nil, 1)); err != nil {
		t.Fatal(err)
	}
}

// events reads how often an eventfd was signalled since the last time.
func events(t testing.TB, fd int) uint64 {
	t.Helper()
	var count [8]byte
	if _, err := unix.Read(fd, count[:]); err == unix.EAGAIN {
		return 0
	} else if err != nil {
		t.Fatal(err)
	}
	return binary.NativeEndian.Uint64(count[:])
}

func TestSignalMSI(t *testing.T) {
	guest := newIRQGuest(t)
	for range 3 {
		if err := guest.VM.SignalMSI(msiAddress, vector); err != nil {
			t.Fatal(err)
		}
		runToOut(t, guest, 0x80)
		endOfInterrupt(t, guest)
	}
}

func TestIRQLine(t *testing.T) {
	guest := newIRQGuest(t)
	const pin = 4
	chip, err := guest.VM.IRQChip(kvm.IRQChipIOAPIC)
	if err != nil {
		t.Fatal(err)
	}
	const redirections = 24                                                   // where struct kvm_ioapic_state has them
	binary.LittleEndian.PutUint64(chip.State[redirections+8*pin:], vector)    // edge, to APIC 0
	binary.LittleEndian.PutUint64(chip.State[redirections+8*(pin+1):], 1<<16) // masked
	if err := guest.VM.SetIRQChip(chip); err != nil {
		t.Fatal(err)
	}
	again, err := guest.VM.IRQChip(kvm.IRQChipIOAPIC)
	if err != nil || again != chip {
		t.Errorf("IOAPIC state does not come back as it was set (%v)", err)
	}
	for range 3 {
		for _, level := range []bool{true, false} {
			if err := guest.VM.IRQLine(pin, level); err != nil {
				t.Fatal(err)
			}
		}
		runToOut(t, guest, 0x80)
		endOfInterrupt(t, guest)
	}
	if _, err := guest.VM.IRQChip(3); err == nil {
		t.Error("there is a fourth interrupt controller")
	}
}

func TestIRQFDThroughMSIRoute(t *testing.T) {
	guest := newIRQGuest(t)
	const gsi = 30
	routes := append(kvm.DefaultIRQRoutes(), kvm.RouteToMSI(gsi, msiAddress, vector))
	if err := guest.VM.SetGSIRouting(routes); err != nil {
		t.Fatal(err)
	}
	fd := eventFD(t)
	if err := guest.VM.AssignIRQFD(fd, gsi, -1); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		signalEvent(t, fd)
		runToOut(t, guest, 0x80)
		endOfInterrupt(t, guest)
	}
	if err := guest.VM.AssignIRQFD(fd, gsi, -1); err == nil {
		t.Error("an eventfd was assigned twice")
	}
	if err := guest.VM.DeassignIRQFD(fd, gsi); err != nil {
		t.Fatal(err)
	}
	signalEvent(t, fd)
	if got := events(t, fd); got != 1 {
		t.Errorf("after deassign the kernel still takes signals: %d left of 1", got)
	}
	if err := guest.VM.SetGSIRouting([]kvm.IRQRoute{kvm.RouteToPin(0, 7, 0)}); err == nil {
		t.Error("a route to interrupt controller 7 was accepted")
	}
}

// A level-triggered irqfd keeps the line up until the guest's end of
// interrupt, which the kernel tells by the resample eventfd.
func TestIRQFDResample(t *testing.T) {
	guest := newGuest(t, tinyguest.Config{
		Mode: tinyguest.Ring0,
		Code: append(at(handlerOff, []byte{
			sti,
			hlt,
			0xeb, 0xfd,
		}),
			0x89, 0x04, 0x25, 0xb0, 0x00, 0xe0, 0x3e, // mov [0x3ee000b0], eax: the APIC's EOI
			0xe6, 0x80, // out 0x80, al
		),
		Gates:   map[uint8]uint64{vector: tinyguest.Code + handlerOff},
		Prepare: (*kvm.VM).CreateIRQChip,
	})
	// The guest's page tables reach 1 GiB: move the APIC there.
	var sregs kvm.Sregs
	if err := guest.VCPU.GetSregs(&sregs); err != nil {
		t.Fatal(err)
	}
	sregs.APICBase = 0x3ee00000 | 0x900 // enabled, boot processor
	if err := guest.VCPU.SetSregs(&sregs); err != nil {
		t.Fatal(err)
	}
	enableAPIC(t, guest)
	const pin, level = 10, 1 << 15
	chip, err := guest.VM.IRQChip(kvm.IRQChipIOAPIC)
	if err != nil {
		t.Fatal(err)
	}
	binary.LittleEndian.PutUint64(chip.State[24+8*pin:], vector|level)
	if err := guest.VM.SetIRQChip(chip); err != nil {
		t.Fatal(err)
	}
	trigger, resample := eventFD(t), eventFD(t)
	if err := guest.VM.AssignIRQFD(trigger, pin, resample); err != nil {
		t.Fatal(err)
	}
	signalEvent(t, trigger)
	runToOut(t, guest, 0x80)
	if got := events(t, resample); got != 1 {
		t.Errorf("resample eventfd has %d events, not 1", got)
	}
}

func TestIOEventFD(t *testing.T) {
	const mmio = 0x200000
	guest := newGuest(t, tinyguest.Config{Mode: tinyguest.Ring3, Code: code(
		[]byte{0xb0, 1}, out(0x50), out(0x50), // mov al, 1
		[]byte{0xb0, 2}, out(0x50), // another value: exits
		store(mmio, 1), store(mmio+8, 1), // the second is another address: exits
		out(0x50),
	)})
	port, memory := eventFD(t), eventFD(t)
	match := uint64(1)
	if err := guest.VM.AssignIOEventFD(port, 0x50, 1, &match, true); err != nil {
		t.Fatal(err)
	}
	if err := guest.VM.AssignIOEventFD(memory, mmio, 0, nil, false); err != nil {
		t.Fatal(err)
	}
	if data := runToOut(t, guest, 0x50); data[0] != 2 {
		t.Errorf("OUT of %d exits", data[0])
	}
	if got := events(t, port); got != 2 {
		t.Errorf("port signalled %d times, not 2", got)
	}
	runTo(t, guest, kvm.ExitMMIO)
	if got := guest.VCPU.MMIO().Addr; got != mmio+8 {
		t.Errorf("write to %#x exits", got)
	}
	if got := events(t, memory); got != 1 {
		t.Errorf("memory signalled %d times, not 1", got)
	}
	if err := guest.VM.DeassignIOEventFD(memory, mmio, 0, nil, false); err != nil {
		t.Fatal(err)
	}
	if err := guest.VM.DeassignIOEventFD(port, 0x50, 1, &match, true); err != nil {
		t.Fatal(err)
	}
	if err := guest.Reset(tinyguest.Ring3); err != nil {
		t.Fatal(err)
	}
	// The OUT that exited last completes first, and changes nothing.
	if data := runToOut(t, guest, 0x50); data[0] != 1 {
		t.Errorf("OUT of %d exits first after deassign", data[0])
	}
}

func TestNMI(t *testing.T) {
	for _, mode := range []tinyguest.Mode{tinyguest.Real, tinyguest.Ring0} {
		guest := newGuest(t, tinyguest.Config{
			Mode:  mode,
			Code:  append(at(handlerOff, []byte{hlt}), out(0x82)...),
			Gates: map[uint8]uint64{2: tinyguest.Code + handlerOff},
		})
		runTo(t, guest, kvm.ExitHLT)
		if err := guest.VCPU.NMI(); err != nil {
			t.Fatal(err)
		}
		runToOut(t, guest, 0x82)
	}
}

// Without an in-kernel interrupt controller, the program delivers interrupts.
func TestInterrupt(t *testing.T) {
	guest := newGuest(t, tinyguest.Config{
		Mode:  tinyguest.Real,
		Code:  append(at(handlerOff, code([]byte{sti}, out(0x80), loop)), out(0x81)...),
		Gates: map[uint8]uint64{vector: tinyguest.Code + handlerOff},
	})
	runToOut(t, guest, 0x80)
	if err := guest.VCPU.Interrupt(vector); err != nil {
		t.Fatal(err)
	}
	runToOut(t, guest, 0x81)
}
