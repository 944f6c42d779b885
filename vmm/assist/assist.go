// Package assist completes hosts whose KVM has no hardware virtualisation
// (PVM: module kvm_pvm). There guest ring 3 runs natively and ring 0 is
// interpreted by KVM's instruction emulator, which lacks a few instructions
// and leaves SYSCALL in ring 3. Where ring 0 runs natively this package is
// not used.
package assist

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"

	"golang.org/x/arch/x86/x86asm"

	"github.com/gnomon-vmm/gnomon/kvm"
)

// ErrUnknown is what the host's KVM could not run and this package does not know.
var ErrUnknown = errors.New("the host's KVM interprets ring 0 and does not know this instruction")

// CPU is the vCPU as the assist sees it; *kvm.VCPU is one. All methods are
// called on the vCPU's thread between two KVM_RUN.
type CPU interface {
	GetRegs(*kvm.Regs) error
	SetRegs(*kvm.Regs) error
	GetSregs(*kvm.Sregs) error
	SetSregs(*kvm.Sregs) error
	GetMSRs([]kvm.MSREntry) (int, error)
	SetMSRs([]kvm.MSREntry) (int, error)
	GetEvents(*kvm.VCPUEvents) error
	SetEvents(*kvm.VCPUEvents) error
	SetGuestDebug(control uint32, dr [8]uint64) error
	EmulationBytes() []byte
	Translate(gva uint64) (kvm.Translation, error)
}

// Memory reads guest RAM by guest-physical address.
type Memory interface {
	Read(gpa uint64, p []byte) error
}

// MSRs the assist deals in (Intel SDM volume 4).
const (
	MSRSTAR         = 0xC000_0081
	MSRLSTAR        = 0xC000_0082
	MSRFMASK        = 0xC000_0084
	MSRKernelGSBase = 0xC000_0102
)

const (
	flagAC = 1 << 18
	flagDF = 1 << 10
	flagZF = 1 << 6
	// POPCNT clears these and sets ZF by its source.
	popcntFlags = 1<<11 | 1<<7 | flagZF | 1<<4 | 1<<2 | 1

	vectorBP = 3
	vectorPF = 14

	// dr7ExecuteDR0 enables DR0 as an execution breakpoint (L0, G0, and the
	// bit that always reads as 1).
	dr7ExecuteDR0 = 0x403
)

// Assist serves one vCPU. Its methods are called on the vCPU's thread.
type Assist struct {
	cpu CPU
	mem Memory

	lstar   uint64 // SYSCALL entry; 0 until the guest sets one
	entry   uint64 // where the kernel goes on after the SWAPGS at lstar
	swapsGS bool   // lstar begins with SWAPGS
	pfEntry uint64 // #PF handler, on which the hardware breakpoint stands

	// afterINT3 is where the guest goes on from an INT3 whose #BP was injected
	// and that may not have been delivered; 0: none.
	afterINT3 uint64
}

// New makes the assist of one vCPU.
func New(cpu CPU, mem Memory) *Assist { return &Assist{cpu: cpu, mem: mem} }

// Reset forgets the guest's entry points, as a reset of the machine does.
func (a *Assist) Reset() error {
	a.lstar, a.entry, a.swapsGS, a.pfEntry, a.afterINT3 = 0, 0, false, 0, 0
	return a.cpu.SetGuestDebug(0, [8]uint64{})
}

// Restore learns the entry points from a vCPU whose state was loaded.
func (a *Assist) Restore() error {
	m := [1]kvm.MSREntry{{Index: MSRLSTAR}}
	if n, err := a.cpu.GetMSRs(m[:]); err != nil || n != 1 {
		return fmt.Errorf("read LSTAR: %w", err)
	}
	if m[0].Data == 0 {
		return nil
	}
	return a.arm(m[0].Data)
}

// WroteMSR performs a WRMSR that KVM's MSR filter handed to us: LSTAR, which
// tells where SYSCALL goes and that the IDT stands.
func (a *Assist) WroteMSR(index uint32, value uint64) error {
	if _, err := a.cpu.SetMSRs([]kvm.MSREntry{{Index: index, Data: value}}); err != nil {
		return fmt.Errorf("set MSR %#x: %w", index, err)
	}
	if index != MSRLSTAR || value == 0 {
		return nil
	}
	return a.arm(value)
}

// arm sets the breakpoint on the guest's #PF entry.
//
// SYSCALL from ring 3 loads RIP, RCX, R11 and RFLAGS but stays in ring 3, so
// the first fetch at LSTAR raises #PF, which arrives properly in ring 0. (A
// breakpoint on LSTAR itself does not fire.)
func (a *Assist) arm(lstar uint64) error {
	var code [8]byte
	if err := a.read(lstar, code[:]); err != nil {
		return fmt.Errorf("read the SYSCALL entry at %#x: %w", lstar, err)
	}
	a.lstar, a.entry, a.swapsGS = lstar, lstar, false
	next := code[:]
	if string(next[:4]) == "\xf3\x0f\x1e\xfa" { // ENDBR64
		next, a.entry = next[4:], a.entry+4
	}
	if string(next[:3]) == "\x0f\x01\xf8" { // SWAPGS
		a.entry, a.swapsGS = a.entry+3, true
	}

	var s kvm.Sregs
	if err := a.cpu.GetSregs(&s); err != nil {
		return fmt.Errorf("read special registers: %w", err)
	}
	var gate [16]byte // Intel SDM volume 3, figure 6-8
	if err := a.read(s.IDT.Base+vectorPF*16, gate[:]); err != nil {
		return fmt.Errorf("read IDT gate %d: %w", vectorPF, err)
	}
	a.pfEntry = uint64(binary.LittleEndian.Uint16(gate[0:])) |
		uint64(binary.LittleEndian.Uint16(gate[6:]))<<16 |
		uint64(binary.LittleEndian.Uint32(gate[8:]))<<32
	err := a.cpu.SetGuestDebug(kvm.GuestDebugEnable|kvm.GuestDebugUseHWBP, [8]uint64{0: a.pfEntry, 7: dr7ExecuteDR0})
	if err != nil {
		return fmt.Errorf("set a breakpoint on the #PF entry at %#x: %w", a.pfEntry, err)
	}
	return nil
}

// Debug handles KVM_EXIT_DEBUG: the guest is about to run its #PF handler,
// because of a page fault or because of a SYSCALL.
func (a *Assist) Debug() error {
	var r kvm.Regs
	if err := a.cpu.GetRegs(&r); err != nil {
		return fmt.Errorf("read registers: %w", err)
	}
	if r.RIP != a.pfEntry {
		return fmt.Errorf("debug exit at RIP %#x, where no breakpoint is set", r.RIP)
	}
	var raw [48]byte
	if err := a.read(r.RSP, raw[:]); err != nil {
		return fmt.Errorf("read the #PF frame at %#x: %w", r.RSP, err)
	}
	// The frame: error code, RIP, CS, RFLAGS, RSP, SS.
	word := func(i int) uint64 { return binary.LittleEndian.Uint64(raw[8*i:]) }
	if word(1) == a.lstar && word(2)&3 == 3 {
		return a.enterSyscall(&r, word(3), word(4))
	}
	return a.beginPageFault(&r)
}

// enterSyscall completes a SYSCALL: ring 0, the kernel's segments and GS base,
// flags masked, at the instruction behind the SWAPGS.
func (a *Assist) enterSyscall(r *kvm.Regs, flags, rsp uint64) error {
	msrs := [3]kvm.MSREntry{{Index: MSRSTAR}, {Index: MSRFMASK}, {Index: MSRKernelGSBase}}
	if n, err := a.cpu.GetMSRs(msrs[:]); err != nil || n != len(msrs) {
		return fmt.Errorf("read SYSCALL MSRs: %d of %d: %w", n, len(msrs), err)
	}
	var s kvm.Sregs
	if err := a.cpu.GetSregs(&s); err != nil {
		return fmt.Errorf("read special registers: %w", err)
	}
	cs := uint16(msrs[0].Data>>32) &^ 3
	s.CS = kvm.Segment{Limit: 0xFFFF_FFFF, Selector: cs, Type: 11, Present: 1, S: 1, L: 1, G: 1}
	s.SS = kvm.Segment{Limit: 0xFFFF_FFFF, Selector: cs + 8, Type: 3, Present: 1, S: 1, DB: 1, G: 1}
	r.RFlags = flags&^msrs[1].Data&^flagRF | 2
	r.RSP, r.RIP = rsp, a.entry
	if a.swapsGS {
		user := kvm.MSREntry{Index: MSRKernelGSBase, Data: s.GS.Base}
		s.GS.Base = msrs[2].Data
		if _, err := a.cpu.SetMSRs([]kvm.MSREntry{user}); err != nil {
			return fmt.Errorf("swap GS base: %w", err)
		}
	}
	if err := a.cpu.SetSregs(&s); err != nil {
		return fmt.Errorf("enter ring 0: %w", err)
	}
	return a.cpu.SetRegs(r)
}

const flagRF = 1 << 16

// beginPageFault performs the handler's first instruction, on which the
// breakpoint stands.
func (a *Assist) beginPageFault(r *kvm.Regs) error {
	var code [15]byte
	n := len(code)
	if rest := 4096 - int(r.RIP&4095); rest < n {
		n = rest
	}
	if err := a.read(r.RIP, code[:n]); err != nil {
		return fmt.Errorf("read the #PF handler at %#x: %w", r.RIP, err)
	}
	length, err := a.harmless(r, code[:n])
	if err != nil {
		return err
	}
	r.RIP += uint64(length)
	return a.cpu.SetRegs(r)
}

// harmless performs an instruction that changes flags at most.
func (a *Assist) harmless(r *kvm.Regs, code []byte) (length int, err error) {
	switch {
	case len(code) >= 3 && string(code[:3]) == "\x0f\x01\xca": // CLAC
		r.RFlags &^= flagAC
		return 3, nil
	case len(code) >= 3 && string(code[:3]) == "\x0f\x01\xcb": // STAC
		r.RFlags |= flagAC
		return 3, nil
	case len(code) >= 4 && string(code[:4]) == "\xf3\x0f\x1e\xfa": // ENDBR64
		return 4, nil
	case len(code) >= 1 && code[0] == 0xFC: // CLD
		r.RFlags &^= flagDF
		return 1, nil
	case len(code) >= 1 && code[0] == 0x9B: // FWAIT
		return 1, nil
	}
	if inst, err := x86asm.Decode(code, 64); err == nil && inst.Op == x86asm.NOP {
		return inst.Len, nil
	}
	return 0, unknown(r.RIP, code)
}

// EmulationFailed performs the instruction KVM's emulator gave up on.
func (a *Assist) EmulationFailed() error {
	var r kvm.Regs
	if err := a.cpu.GetRegs(&r); err != nil {
		return fmt.Errorf("read registers: %w", err)
	}
	code := a.cpu.EmulationBytes()
	if len(code) == 0 {
		var buf [15]byte
		if err := a.read(r.RIP, buf[:]); err != nil {
			return fmt.Errorf("%w: RIP %#x, whose bytes cannot be read: %w", ErrUnknown, r.RIP, err)
		}
		code = buf[:]
	}
	if code[0] == 0xCC { // INT3
		return a.breakpoint(&r)
	}
	if length, err := a.harmless(&r, code); err == nil {
		r.RIP += uint64(length)
		return a.cpu.SetRegs(&r)
	}
	return a.popcnt(&r, code)
}

// breakpoint performs INT3: #BP with RIP behind it.
func (a *Assist) breakpoint(r *kvm.Regs) error {
	r.RIP++
	if err := a.cpu.SetRegs(r); err != nil {
		return fmt.Errorf("step over INT3: %w", err)
	}
	var ev kvm.VCPUEvents
	if err := a.cpu.GetEvents(&ev); err != nil {
		return fmt.Errorf("read events: %w", err)
	}
	ev.Exception.Injected, ev.Exception.Nr, ev.Exception.HasErrorCode = 1, vectorBP, 0
	if err := a.cpu.SetEvents(&ev); err != nil {
		return fmt.Errorf("inject #BP: %w", err)
	}
	a.afterINT3 = r.RIP
	return nil
}

// Entered says that the guest has run since the last call of another method.
func (a *Assist) Entered() { a.afterINT3 = 0 }

// INT3Again tells whether a vCPU that stands at rip has yet to get the #BP of the
// INT3 just before it. KVM_GET_VCPU_EVENTS says nothing of that, since it
// expects whoever loads the state to perform the INT3 again.
func (a *Assist) INT3Again(rip uint64) bool { return a.afterINT3 != 0 && a.afterINT3 == rip }

// popcnt performs POPCNT between registers (F3 [REX] 0F B8 /r, mod 11).
func (a *Assist) popcnt(r *kvm.Regs, code []byte) error {
	inst, err := x86asm.Decode(code, 64)
	if err != nil || inst.Op != x86asm.POPCNT {
		return unknown(r.RIP, code)
	}
	dst, dstBits := register(r, inst.Args[0])
	src, srcBits := register(r, inst.Args[1])
	if dst == nil || src == nil || dstBits != srcBits {
		return unknown(r.RIP, code)
	}
	value := *src
	if srcBits < 64 {
		value &= 1<<srcBits - 1
	}
	count := uint64(bits.OnesCount64(value))
	if dstBits == 16 {
		count |= *dst &^ 0xFFFF // a 16-bit result leaves the rest of the register
	}
	*dst = count
	r.RFlags &^= popcntFlags
	if value == 0 {
		r.RFlags |= flagZF
	}
	r.RIP += uint64(inst.Len)
	return a.cpu.SetRegs(r)
}

// register finds a general-purpose register operand and its width in bits.
func register(r *kvm.Regs, arg x86asm.Arg) (*uint64, int) {
	reg, ok := arg.(x86asm.Reg)
	if !ok {
		return nil, 0
	}
	all := [16]*uint64{
		&r.RAX, &r.RCX, &r.RDX, &r.RBX, &r.RSP, &r.RBP, &r.RSI, &r.RDI,
		&r.R8, &r.R9, &r.R10, &r.R11, &r.R12, &r.R13, &r.R14, &r.R15,
	}
	switch {
	case reg >= x86asm.RAX && reg <= x86asm.R15:
		return all[reg-x86asm.RAX], 64
	case reg >= x86asm.EAX && reg <= x86asm.R15L:
		return all[reg-x86asm.EAX], 32
	case reg >= x86asm.AX && reg <= x86asm.R15W:
		return all[reg-x86asm.AX], 16
	}
	return nil, 0
}

func unknown(rip uint64, code []byte) error {
	name := ""
	if inst, err := x86asm.Decode(code, 64); err == nil {
		name, code = " "+inst.Op.String(), code[:inst.Len]
	}
	return fmt.Errorf("%w:%s bytes % x at RIP %#x; boot the guest with the feature off (clearcpuid=, noxsave) or use a host with VT-x or AMD-V", ErrUnknown, name, code, rip)
}

// read copies guest-virtual memory, translated as the vCPU would.
func (a *Assist) read(gva uint64, p []byte) error {
	for len(p) > 0 {
		n := min(len(p), 4096-int(gva&4095))
		t, err := a.cpu.Translate(gva)
		if err != nil {
			return fmt.Errorf("translate GVA %#x: %w", gva, err)
		}
		if !t.Valid {
			return fmt.Errorf("GVA %#x is not mapped", gva)
		}
		if err := a.mem.Read(t.PhysicalAddress, p[:n]); err != nil {
			return err
		}
		gva, p = gva+uint64(n), p[n:]
	}
	return nil
}
