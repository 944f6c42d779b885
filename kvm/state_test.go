package kvm_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/gnomon-vmm/gnomon/kvm"
	"github.com/gnomon-vmm/gnomon/kvm/internal/tinyguest"
)

func TestRegisters(t *testing.T) {
	guest := newGuest(t, tinyguest.Config{Mode: tinyguest.Ring3, Code: code(
		[]byte{0x48, 0x01, 0xd8}, // add rax, rbx
		out(0x80),
	)})
	var regs kvm.Regs
	if err := guest.VCPU.GetRegs(&regs); err != nil {
		t.Fatal(err)
	}
	regs.RAX, regs.RBX, regs.R15 = 40, 2, 0x1122334455667788
	if err := guest.VCPU.SetRegs(&regs); err != nil {
		t.Fatal(err)
	}
	if data := runToOut(t, guest, 0x80); data[0] != 42 {
		t.Errorf("the guest added %d", data[0])
	}
	if err := guest.VCPU.GetRegs(&regs); err != nil {
		t.Fatal(err)
	}
	if regs.RAX != 42 || regs.R15 != 0x1122334455667788 {
		t.Errorf("registers %+v", regs)
	}
	var sregs kvm.Sregs
	if err := guest.VCPU.GetSregs(&sregs); err != nil {
		t.Fatal(err)
	}
	if sregs.CS.DPL != 3 || sregs.CS.Selector != tinyguest.Ring3CS || sregs.EFER != 0x500 {
		t.Errorf("special registers %+v", sregs)
	}
}

func TestSyncRegs(t *testing.T) {
	guest := newGuest(t, tinyguest.Config{Mode: tinyguest.Ring3, Code: code(out(0x80), out(0x80))})
	have := guest.VM.Check(kvm.CapSyncRegs)
	const all = kvm.SyncRegsGeneral | kvm.SyncRegsSpecial | kvm.SyncRegsEvents
	if have&all != all {
		t.Skipf("needs KVM_CAP_SYNC_REGS with %#x, has %#x", all, have)
	}
	guest.VCPU.EnableSyncRegs(all)
	sync := guest.VCPU.SyncRegs()
	if err := guest.VCPU.GetRegs(&sync.Regs); err != nil {
		t.Fatal(err)
	}
	sync.Regs.RAX = 0x11
	guest.VCPU.SetDirtyRegs(kvm.SyncRegsGeneral)
	if data := runToOut(t, guest, 0x80); data[0] != 0x11 {
		t.Errorf("the guest wrote %#x", data[0])
	}
	if sync.Regs.RAX != 0x11 || sync.Sregs.CR3 == 0 || sync.Sregs.CS.DPL != 3 {
		t.Errorf("registers at the exit %+v", sync)
	}
	sync.Regs.RAX = 0x22
	guest.VCPU.SetDirtyRegs(kvm.SyncRegsGeneral)
	if data := runToOut(t, guest, 0x80); data[0] != 0x22 {
		t.Errorf("the guest wrote %#x", data[0])
	}
	var regs kvm.Regs
	if err := guest.VCPU.GetRegs(&regs); err != nil || regs != sync.Regs {
		t.Errorf("the run page says %+v, the ioctl %+v (%v)", sync.Regs, regs, err)
	}
}

func TestMSRs(t *testing.T) {
	guest := newGuest(t, tinyguest.Config{Mode: tinyguest.Ring3, Code: loop})
	const star, lstar, unknown = 0xc0000081, 0xc0000082, 0xdeadbeef
	set := []kvm.MSREntry{{Index: star, Data: 0x23001000000000}, {Index: lstar, Data: 0x123456}}
	if n, err := guest.VCPU.SetMSRs(set); n != 2 || err != nil {
		t.Fatalf("set %d, %v", n, err)
	}
	get := []kvm.MSREntry{{Index: lstar}, {Index: unknown}, {Index: star}}
	if n, err := guest.VCPU.GetMSRs(get); n != 1 || err != nil || get[0].Data != 0x123456 || get[2].Data != 0 {
		t.Errorf("got %d, %v: %+v", n, err, get)
	}
	if _, err := guest.VCPU.GetMSRs(make([]kvm.MSREntry, 257)); !errors.Is(err, kvm.ErrTooMany) {
		t.Errorf("257 MSRs: %v", err)
	}
	// All that KVM lists are to be readable, in portions.
	indices, err := openKVM(t).MSRIndexList()
	if err != nil || len(indices) < 10 {
		t.Fatalf("%d MSRs, %v", len(indices), err)
	}
	for _, index := range indices {
		if index == lstar {
			return
		}
	}
	t.Errorf("LSTAR is not among %#x", indices)
}

func TestFloatingPointState(t *testing.T) {
	guest := newGuest(t, tinyguest.Config{Mode: tinyguest.Ring3, Code: code(
		[]byte{0x0f, 0x11, 0x04, 0x25, 0x00, 0x80, 0x00, 0x00}, // movups [0x8000], xmm0
		out(0x80),
		[]byte{0x0f, 0x11, 0x0c, 0x25, 0x00, 0x80, 0x00, 0x00}, // movups [0x8000], xmm1
		out(0x80),
	)})
	image, err := guest.VCPU.XSave()
	if err != nil {
		t.Fatal(err)
	}
	if len(image) < 4096 || len(image) != guest.VCPU.XSaveSize() {
		t.Fatalf("image of %d bytes, XSaveSize %d", len(image), guest.VCPU.XSaveSize())
	}
	const mxcsr, xmm0, xstateBV = 24, 160, 512 // Intel SDM volume 1, 13.4
	binary.LittleEndian.PutUint32(image[mxcsr:], 0x1f80)
	copy(image[xmm0:], "sixteen bytes...")
	image[xstateBV] |= 3 // x87 and SSE
	if err := guest.VCPU.SetXSave(image); err != nil {
		t.Fatal(err)
	}
	runToOut(t, guest, 0x80)
	if got := guest.Memory[tinyguest.Data:][:16]; string(got) != "sixteen bytes..." {
		t.Errorf("xmm0 in the guest is %q", got)
	}
	again, err := guest.VCPU.XSave()
	if err != nil || !bytes.Equal(again[xmm0:xmm0+16], image[xmm0:xmm0+16]) {
		t.Errorf("xmm0 comes back as %q, %v", again[xmm0:xmm0+16], err)
	}

	var fpu kvm.FPU
	if err := guest.VCPU.GetFPU(&fpu); err != nil {
		t.Fatal(err)
	}
	if string(fpu.XMM[0][:]) != "sixteen bytes..." {
		t.Errorf("KVM_GET_FPU has xmm0 %q", fpu.XMM[0])
	}
	copy(fpu.XMM[1][:], "another sixteen.")
	if err := guest.VCPU.SetFPU(&fpu); err != nil {
		t.Fatal(err)
	}
	runToOut(t, guest, 0x80)
	if got := guest.Memory[tinyguest.Data:][:16]; string(got) != "another sixteen." {
		t.Errorf("xmm1 in the guest is %q", got)
	}

	for _, err := range []error{guest.VCPU.GetXSave(image[1:]), guest.VCPU.SetXSave(nil)} {
		if !errors.Is(err, kvm.ErrXSaveSize) {
			t.Errorf("short image: %v", err)
		}
	}
}

func TestXCRS(t *testing.T) {
	guest := newGuest(t, tinyguest.Config{Mode: tinyguest.Ring3, Code: loop})
	var before, after kvm.XCRS
	if err := guest.VCPU.GetXCRS(&before); err != nil {
		t.Fatal(err)
	}
	if before.Count != 1 || before.XCR[0].Value&1 == 0 {
		t.Fatalf("%d registers, XCR0 %#x", before.Count, before.XCR[0].Value)
	}
	before.XCR[0].Value = 3
	if err := guest.VCPU.SetXCRS(&before); err != nil {
		t.Fatal(err)
	}
	if err := guest.VCPU.GetXCRS(&after); err != nil || after != before {
		t.Errorf("XCR0 %#x, %v", after.XCR[0].Value, err)
	}
	before.XCR[0].Value = 2 // SSE without x87 is not allowed
	if err := guest.VCPU.SetXCRS(&before); err == nil {
		t.Error("an XCR0 that no processor has was accepted")
	}
}

func TestInjectedException(t *testing.T) {
	const undefined = 6 // KVM_GET_VCPU_EVENTS hides software exceptions, such as #BP
	guest := newGuest(t, tinyguest.Config{
		Mode:  tinyguest.Ring0,
		Code:  append(at(handlerOff, code(out(0x80), loop)), out(0x83)...),
		Gates: map[uint8]uint64{undefined: tinyguest.Code + handlerOff},
	})
	runToOut(t, guest, 0x80)
	var events kvm.VCPUEvents
	if err := guest.VCPU.GetEvents(&events); err != nil {
		t.Fatal(err)
	}
	if events.Exception.Injected != 0 || events.NMI.Injected != 0 {
		t.Fatalf("events %+v before any", events)
	}
	events.Exception = kvm.ExceptionEvent{Injected: 1, Nr: undefined}
	if err := guest.VCPU.SetEvents(&events); err != nil {
		t.Fatal(err)
	}
	var again kvm.VCPUEvents
	if err := guest.VCPU.GetEvents(&again); err != nil || again.Exception.Injected != 1 || again.Exception.Nr != undefined {
		t.Errorf("events %+v, %v", again, err)
	}
	runToOut(t, guest, 0x83)
}

func TestDebugRegs(t *testing.T) {
	guest := newGuest(t, tinyguest.Config{Mode: tinyguest.Ring3, Code: loop})
	want := kvm.DebugRegs{DB: [4]uint64{0x1000, 0x2000, 0x3000, 0x4000}, DR6: 0xffff0ff0, DR7: 0x400}
	if err := guest.VCPU.SetDebugRegs(&want); err != nil {
		t.Fatal(err)
	}
	var got kvm.DebugRegs
	if err := guest.VCPU.GetDebugRegs(&got); err != nil || got != want {
		t.Errorf("debug registers %+v, %v", got, err)
	}
}

// In ring 0, because PVM hosts have no debugging of ring 3.
func TestGuestDebug(t *testing.T) {
	guest := newGuest(t, tinyguest.Config{Mode: tinyguest.Ring0, Code: code(bytes.Repeat([]byte{0x90}, 8), out(0x80))})
	const break0 = 0x403 // DR7: DR0 enabled, for execution
	err := guest.VCPU.SetGuestDebug(kvm.GuestDebugEnable|kvm.GuestDebugUseHWBP, [8]uint64{0: tinyguest.Code + 5, 7: break0})
	if err != nil {
		t.Fatal(err)
	}
	runTo(t, guest, kvm.ExitDebug)
	if d := guest.VCPU.Debug(); d.Exception != 1 || d.PC != tinyguest.Code+5 || d.DR6&1 == 0 {
		t.Errorf("hardware breakpoint: %+v", d)
	}
	if err := guest.VCPU.SetGuestDebug(kvm.GuestDebugEnable|kvm.GuestDebugSingleStep, [8]uint64{}); err != nil {
		t.Fatal(err)
	}
	for pc := uint64(tinyguest.Code + 6); pc <= tinyguest.Code+8; pc++ {
		runTo(t, guest, kvm.ExitDebug)
		if d := guest.VCPU.Debug(); d.PC != pc || d.DR6&(1<<14) == 0 {
			t.Errorf("single step: %+v, not at %#x", d, pc)
		}
	}
	if err := guest.VCPU.SetGuestDebug(0, [8]uint64{}); err != nil {
		t.Fatal(err)
	}
	runToOut(t, guest, 0x80)
}

func TestMPStateAndSecondVCPU(t *testing.T) {
	guest := newGuest(t, tinyguest.Config{Mode: tinyguest.Real, Code: []byte{hlt}, Prepare: (*kvm.VM).CreateIRQChip})
	if state, err := guest.VCPU.MPState(); err != nil || state != kvm.MPRunnable {
		t.Errorf("first VCPU is %v, %v", state, err)
	}
	second, err := guest.VM.CreateVCPU(1)
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	if state, err := second.MPState(); err != nil || state != kvm.MPUninitialized {
		t.Errorf("second VCPU is %v, %v", state, err)
	}
	if err := second.SetMPState(kvm.MPHalted); err != nil {
		t.Fatal(err)
	}
	if state, err := second.MPState(); err != nil || state != kvm.MPHalted {
		t.Errorf("second VCPU is %v, %v", state, err)
	}
	if _, err := guest.VM.CreateVCPU(1); err == nil {
		t.Error("a VCPU was made twice")
	}
}

func TestLAPIC(t *testing.T) {
	guest := newIRQGuest(t)
	var before, after kvm.LAPIC
	if err := guest.VCPU.GetLAPIC(&before); err != nil {
		t.Fatal(err)
	}
	before[0x80] = 0x30 // task priority
	if err := guest.VCPU.SetLAPIC(&before); err != nil {
		t.Fatal(err)
	}
	if err := guest.VCPU.GetLAPIC(&after); err != nil || after[0x80] != 0x30 || after[0xf1] != 1 {
		t.Errorf("task priority %#x, enabled %d, %v", after[0x80], after[0xf1], err)
	}
}

func TestPITAndPIC(t *testing.T) {
	guest := newIRQGuest(t)
	if err := guest.VM.CreatePIT(); err != nil {
		t.Fatal(err)
	}
	pit, err := guest.VM.PIT()
	if err != nil {
		t.Fatal(err)
	}
	pit.Channels[2].Count, pit.Channels[2].Mode = 0x4321, 3
	pit.Flags |= kvm.PITSpeakerDataOn
	if err := guest.VM.SetPIT(pit); err != nil {
		t.Fatal(err)
	}
	again, err := guest.VM.PIT()
	if err != nil || again.Channels[2].Count != 0x4321 || again.Channels[2].Mode != 3 || again.Flags&kvm.PITSpeakerDataOn == 0 {
		t.Errorf("PIT %+v, %v", again, err)
	}
	for _, id := range []uint32{kvm.IRQChipPICMaster, kvm.IRQChipPICSlave} {
		chip, err := guest.VM.IRQChip(id)
		if err != nil {
			t.Fatal(err)
		}
		const mask, base = 2, 5 // in struct kvm_pic_state
		chip.State[mask], chip.State[base] = 0xff, 0x20
		if err := guest.VM.SetIRQChip(chip); err != nil {
			t.Fatal(err)
		}
		if again, err := guest.VM.IRQChip(id); err != nil || again != chip {
			t.Errorf("PIC %d: % x, %v", id, again.State[:16], err)
		}
	}
}

func TestClock(t *testing.T) {
	guest := newGuest(t, tinyguest.Config{Mode: tinyguest.Ring3, Code: loop})
	const set = uint64(1000 * time.Hour)
	if err := guest.VM.SetClock(kvm.ClockData{Clock: set}); err != nil {
		t.Fatal(err)
	}
	first, err := guest.VM.Clock()
	if err != nil || first.Clock < set || first.Clock > set+uint64(time.Hour) {
		t.Fatalf("clock %v, %v", time.Duration(first.Clock), err)
	}
	// What was read can be set as it is, and time goes on from there.
	if err := guest.VM.SetClock(first); err != nil {
		t.Fatal(err)
	}
	if second, err := guest.VM.Clock(); err != nil || second.Clock < first.Clock {
		t.Errorf("clock went from %d to %d, %v", first.Clock, second.Clock, err)
	}
}

func TestTSC(t *testing.T) {
	guest := newGuest(t, tinyguest.Config{Mode: tinyguest.Ring3, Code: loop})
	khz, err := guest.VCPU.TSCKHz()
	if err != nil || khz == 0 {
		t.Fatalf("TSC at %d kHz, %v", khz, err)
	}
	if err := guest.VCPU.SetTSCKHz(khz); err != nil {
		t.Error(err)
	}
}

func TestTranslate(t *testing.T) {
	guest := newGuest(t, tinyguest.Config{Mode: tinyguest.Ring3, Code: loop})
	got, err := guest.VCPU.Translate(tinyguest.Data + 0x123)
	if err != nil || !got.Valid || got.PhysicalAddress != tinyguest.Data+0x123 {
		t.Errorf("mapped address: %+v, %v", got, err)
	}
	if got, err = guest.VCPU.Translate(1 << 40); err != nil || got.Valid {
		t.Errorf("unmapped address: %+v, %v", got, err)
	}
}

func TestCPUID(t *testing.T) {
	sys := openKVM(t)
	table, err := sys.SupportedCPUID()
	if err != nil || len(table) < 10 {
		t.Fatalf("%d entries, %v", len(table), err)
	}
	table[0].EBX = 0x12345678
	again, err := sys.SupportedCPUID()
	if err != nil || again[0].EBX == 0x12345678 {
		t.Errorf("the caller's change shows in the next table (%v)", err)
	}
	guest := newGuest(t, tinyguest.Config{Mode: tinyguest.Ring0, Code: code(
		[]byte{0xb8, 0x00, 0x00, 0x00, 0x40, 0x0f, 0xa2}, // mov eax, 0x40000000; cpuid
		[]byte{0x89, 0xd8}, // mov eax, ebx
		[]byte{0xe7, 0x80}, // out 0x80, eax
	)})
	const hypervisor = 0x40000000
	set := append(again[:0:0], kvm.CPUIDEntry{Function: hypervisor, EAX: hypervisor, EBX: 0x6d6f6e67})
	for _, e := range again {
		if e.Function>>16 != hypervisor>>16 {
			set = append(set, e)
		}
	}
	if err := guest.VCPU.SetCPUID(set); err != nil {
		t.Fatal(err)
	}
	if data := runToOut(t, guest, 0x80); string(data) != "gnom" {
		t.Errorf("the guest's CPUID says %q", data)
	}
	kept, err := guest.VCPU.CPUID()
	if err != nil || len(kept) == 0 || kept[0].EBX != 0x6d6f6e67 {
		t.Fatalf("%v: KVM keeps %+v", err, kept)
	}
	// KVM keeps what was set and nothing else, but for leaves in which there is nothing: some
	// kernels leave those out.
	in := func(table []kvm.CPUIDEntry, e kvm.CPUIDEntry) bool {
		return slices.ContainsFunc(table, func(k kvm.CPUIDEntry) bool { return k.Function == e.Function && k.Index == e.Index })
	}
	for _, e := range set {
		if e.EAX|e.EBX|e.ECX|e.EDX != 0 && !in(kept, e) {
			t.Errorf("KVM has lost leaf %#x, index %d", e.Function, e.Index)
		}
	}
	for _, e := range kept {
		if !in(set, e) {
			t.Errorf("KVM has leaf %#x, index %d, which was not set", e.Function, e.Index)
		}
	}
	if err := guest.VCPU.SetCPUID(make([]kvm.CPUIDEntry, 257)); !errors.Is(err, kvm.ErrTooMany) {
		t.Errorf("257 entries: %v", err)
	}
}
