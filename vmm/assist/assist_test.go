package assist

import (
	"encoding/binary"
	"errors"
	"math/bits"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/gnomon-vmm/gnomon/kvm"
)

// fakeCPU is a vCPU whose guest-virtual addresses are its guest-physical ones.
type fakeCPU struct {
	regs    kvm.Regs
	sregs   kvm.Sregs
	events  kvm.VCPUEvents
	msrs    map[uint32]uint64
	debug   [8]uint64
	control uint32
	bytes   []byte // of a failed emulation
	memory  []byte
}

func newFake() *fakeCPU {
	return &fakeCPU{msrs: map[uint32]uint64{}, memory: make([]byte, 64<<10)}
}

func (c *fakeCPU) GetRegs(r *kvm.Regs) error         { *r = c.regs; return nil }
func (c *fakeCPU) SetRegs(r *kvm.Regs) error         { c.regs = *r; return nil }
func (c *fakeCPU) GetSregs(s *kvm.Sregs) error       { *s = c.sregs; return nil }
func (c *fakeCPU) SetSregs(s *kvm.Sregs) error       { c.sregs = *s; return nil }
func (c *fakeCPU) GetEvents(e *kvm.VCPUEvents) error { *e = c.events; return nil }
func (c *fakeCPU) SetEvents(e *kvm.VCPUEvents) error { c.events = *e; return nil }
func (c *fakeCPU) EmulationBytes() []byte            { return c.bytes }
func (c *fakeCPU) Read(gpa uint64, p []byte) error   { copy(p, c.memory[gpa:]); return nil }
func (c *fakeCPU) write(gpa uint64, p ...byte)       { copy(c.memory[gpa:], p) }
func (c *fakeCPU) writeWord(gpa uint64, words ...uint64) {
	for i, w := range words {
		binary.LittleEndian.PutUint64(c.memory[gpa+uint64(8*i):], w)
	}
}

func (c *fakeCPU) GetMSRs(entries []kvm.MSREntry) (int, error) {
	for i := range entries {
		entries[i].Data = c.msrs[entries[i].Index]
	}
	return len(entries), nil
}

func (c *fakeCPU) SetMSRs(entries []kvm.MSREntry) (int, error) {
	for _, e := range entries {
		c.msrs[e.Index] = e.Data
	}
	return len(entries), nil
}

func (c *fakeCPU) SetGuestDebug(control uint32, dr [8]uint64) error {
	c.control, c.debug = control, dr
	return nil
}

func (c *fakeCPU) Translate(gva uint64) (kvm.Translation, error) {
	return kvm.Translation{PhysicalAddress: gva, Valid: gva < uint64(len(c.memory))}, nil
}

const (
	lstar   = 0x1000
	pfEntry = 0x2000
	idt     = 0x3000
	stack   = 0x4000
	userCS  = 0x33
	star    = 0x0023_0010_0000_0000
	fmask   = 0x4_7700
)

// guestKernel is a fake whose kernel has set LSTAR; first is the #PF handler's
// first instruction and entry the code at LSTAR.
func guestKernel(t *testing.T, entry, first string) (*fakeCPU, *Assist) {
	t.Helper()
	c := newFake()
	c.write(lstar, []byte(entry)...)
	c.write(pfEntry, []byte(first)...)
	c.sregs.IDT.Base = idt
	gate := idt + vectorPF*16
	c.write(uint64(gate), byte(pfEntry&0xFF), byte(pfEntry>>8), 0x10, 0, 0, 0x8E, 0, 0)
	c.msrs[MSRSTAR], c.msrs[MSRFMASK], c.msrs[MSRKernelGSBase] = star, fmask, 0xFFFF_8880_0000_0000
	a := New(c, c)
	if err := a.WroteMSR(MSRLSTAR, lstar); err != nil {
		t.Fatal(err)
	}
	return c, a
}

const swapgs, endbr64 = "\x0f\x01\xf8", "\xf3\x0f\x1e\xfa"

func TestLSTARArmsTheBreakpoint(t *testing.T) {
	c, _ := guestKernel(t, swapgs, "\xfc")
	if c.msrs[MSRLSTAR] != lstar {
		t.Errorf("LSTAR is %#x", c.msrs[MSRLSTAR])
	}
	if c.control != kvm.GuestDebugEnable|kvm.GuestDebugUseHWBP || c.debug[0] != pfEntry || c.debug[7] != dr7ExecuteDR0 {
		t.Errorf("guest debug %#x, %#x", c.control, c.debug)
	}
}

func TestResetDisarms(t *testing.T) {
	c, a := guestKernel(t, swapgs, "\xfc")
	if err := a.Reset(); err != nil {
		t.Fatal(err)
	}
	if c.control != 0 {
		t.Errorf("guest debug %#x", c.control)
	}
}

func TestSyscall(t *testing.T) {
	for _, test := range []struct {
		name, entry string
		rip         uint64
		swaps       bool
	}{
		{"swapgs first", swapgs, lstar + 3, true},
		{"endbr64 and swapgs", endbr64 + swapgs, lstar + 7, true},
		{"no swapgs", "\x90\x90\x90\x90\x90\x90\x90\x90", lstar, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			c, a := guestKernel(t, test.entry, "\xfc")
			const userGS, userRSP, flags = 0x7FFF_0000, 0x7FFE_0000, 0x4_0246
			c.sregs.GS.Base = userGS
			c.regs = kvm.Regs{RIP: pfEntry, RSP: stack, RCX: 0x1234, R11: flags, RAX: 39}
			c.writeWord(stack, 0x15, lstar, userCS, flags, userRSP, 0x2B)
			if err := a.Debug(); err != nil {
				t.Fatal(err)
			}
			if c.regs.RIP != test.rip || c.regs.RSP != userRSP || c.regs.RCX != 0x1234 || c.regs.RAX != 39 {
				t.Errorf("registers %+v", c.regs)
			}
			if want := uint64(flags&^fmask | 2); c.regs.RFlags != want {
				t.Errorf("RFLAGS %#x, want %#x", c.regs.RFlags, want)
			}
			if s := c.sregs.CS; s.Selector != 0x10 || s.DPL != 0 || s.L != 1 || s.Present != 1 {
				t.Errorf("CS %+v", s)
			}
			if s := c.sregs.SS; s.Selector != 0x18 || s.DPL != 0 || s.Present != 1 {
				t.Errorf("SS %+v", s)
			}
			swapped := c.sregs.GS.Base == 0xFFFF_8880_0000_0000 && c.msrs[MSRKernelGSBase] == userGS
			if swapped != test.swaps {
				t.Errorf("GS base %#x, kernel GS base %#x", c.sregs.GS.Base, c.msrs[MSRKernelGSBase])
			}
		})
	}
}

func TestPageFault(t *testing.T) {
	for _, test := range []struct {
		name, first string
		length      uint64
		flags       uint64 // after, of AC and DF set before
	}{
		{"CLAC", "\x0f\x01\xca", 3, flagDF},
		{"CLD", "\xfc", 1, flagAC},
		{"NOP", "\x90", 1, flagAC | flagDF},
		{"3-byte NOP", "\x0f\x1f\x00", 3, flagAC | flagDF},
		{"ENDBR64", endbr64, 4, flagAC | flagDF},
	} {
		t.Run(test.name, func(t *testing.T) {
			c, a := guestKernel(t, swapgs, test.first)
			c.regs = kvm.Regs{RIP: pfEntry, RSP: stack, RFlags: flagAC | flagDF}
			// A user's page fault whose address happens not to be LSTAR.
			c.writeWord(stack, 0x4, 0x40_0000, userCS, 0x246, 0x7FFE_0000, 0x2B)
			if err := a.Debug(); err != nil {
				t.Fatal(err)
			}
			if c.regs.RIP != pfEntry+test.length || c.regs.RSP != stack || c.regs.RFlags != test.flags {
				t.Errorf("registers %+v", c.regs)
			}
		})
	}
}

// The kernel's own fault at LSTAR is no SYSCALL.
func TestKernelFaultAtLSTAR(t *testing.T) {
	c, a := guestKernel(t, swapgs, "\xfc")
	c.regs = kvm.Regs{RIP: pfEntry, RSP: stack}
	c.writeWord(stack, 0x10, lstar, 0x10, 0x46, 0xFFFF_C900_0000_0000, 0x18)
	if err := a.Debug(); err != nil {
		t.Fatal(err)
	}
	if c.regs.RIP != pfEntry+1 {
		t.Errorf("RIP %#x", c.regs.RIP)
	}
}

func TestHandlerThatBeginsWithSomethingElse(t *testing.T) {
	c, a := guestKernel(t, swapgs, "\x48\x89\xe5") // MOV RBP, RSP
	c.regs = kvm.Regs{RIP: pfEntry, RSP: stack}
	c.writeWord(stack, 0x4, 0x40_0000, userCS, 0x246, 0x7FFE_0000, 0x2B)
	if err := a.Debug(); !errors.Is(err, ErrUnknown) {
		t.Fatal(err)
	}
}

func TestEmulationFailures(t *testing.T) {
	c := newFake()
	a := New(c, c)

	c.regs.RIP, c.bytes = 0x500, []byte{0xCC, 0x90}
	if err := a.EmulationFailed(); err != nil {
		t.Fatal(err)
	}
	if e := c.events.Exception; c.regs.RIP != 0x501 || e.Injected != 1 || e.Nr != vectorBP || e.HasErrorCode != 0 {
		t.Errorf("INT3: RIP %#x, exception %+v", c.regs.RIP, e)
	}

	c.regs, c.bytes = kvm.Regs{RIP: 0x500}, []byte{0x9B}
	if err := a.EmulationFailed(); err != nil || c.regs.RIP != 0x501 {
		t.Errorf("FWAIT: RIP %#x, %v", c.regs.RIP, err)
	}
	c.regs, c.bytes = kvm.Regs{RIP: 0x500}, []byte{0x0F, 0x01, 0xCB}
	if err := a.EmulationFailed(); err != nil || c.regs.RIP != 0x503 || c.regs.RFlags&flagAC == 0 {
		t.Errorf("STAC: RIP %#x, RFLAGS %#x, %v", c.regs.RIP, c.regs.RFlags, err)
	}

	// Without the exit's bytes they are read from memory.
	c.regs, c.bytes = kvm.Regs{RIP: 0x600}, nil
	c.write(0x600, 0xCC)
	if err := a.EmulationFailed(); err != nil || c.regs.RIP != 0x601 {
		t.Errorf("INT3 in memory: RIP %#x, %v", c.regs.RIP, err)
	}

	c.regs, c.bytes = kvm.Regs{RIP: 0x500}, []byte{0x48, 0x0F, 0xC7, 0x0E} // CMPXCHG16B [RSI]
	err := a.EmulationFailed()
	if !errors.Is(err, ErrUnknown) || !strings.Contains(err.Error(), "48 0f c7 0e") || !strings.Contains(err.Error(), "0x500") {
		t.Errorf("an unknown instruction: %v", err)
	}
	if c.regs.RIP != 0x500 {
		t.Errorf("RIP %#x after an unknown instruction", c.regs.RIP)
	}
}

// Between its INT3 and its #BP a vCPU that is saved must perform the INT3 again,
// and at no other time.
func TestINT3Again(t *testing.T) {
	cpu := newFake()
	a := New(cpu, cpu)
	if a.INT3Again(0) || a.INT3Again(0x5001) {
		t.Error("again before there was any")
	}
	int3 := func() {
		t.Helper()
		cpu.bytes, cpu.regs.RIP = []byte{0xCC}, 0x5000
		if err := a.EmulationFailed(); err != nil {
			t.Fatal(err)
		}
	}
	int3()
	if !a.INT3Again(cpu.regs.RIP) {
		t.Error("an INT3 whose #BP is on its way is not performed again")
	}
	if a.INT3Again(0x6000) {
		t.Error("again in the handler")
	}
	a.Entered()
	if a.INT3Again(cpu.regs.RIP) {
		t.Error("again after the guest has run")
	}
	int3()
	if err := a.Reset(); err != nil {
		t.Fatal(err)
	}
	if a.INT3Again(cpu.regs.RIP) {
		t.Error("again after a reset")
	}
}

// A vCPU whose state was loaded has the breakpoint where the first one had it.
func TestRestoreArms(t *testing.T) {
	cpu, first := guestKernel(t, "\x0f\x01\xf8", "\x90")
	cpu.control, cpu.debug = 0, [8]uint64{}
	again := New(cpu, cpu)
	if err := again.Restore(); err != nil {
		t.Fatal(err)
	}
	if cpu.debug[0] != pfEntry || cpu.control == 0 || again.entry != first.entry || again.lstar != lstar || !again.swapsGS {
		t.Errorf("breakpoint at %#x, %+v", cpu.debug[0], again)
	}
	// One that has no SYSCALL entry yet has none.
	fresh := newFake()
	if err := New(fresh, fresh).Restore(); err != nil || fresh.control != 0 {
		t.Errorf("%v, debug control %#x", err, fresh.control)
	}
}

// POPCNT between all registers and widths, against the host's count.
func TestPOPCNT(t *testing.T) {
	c := newFake()
	a := New(c, c)
	rng := rand.New(rand.NewPCG(1, 2))
	all := func(r *kvm.Regs) [16]*uint64 {
		return [16]*uint64{
			&r.RAX, &r.RCX, &r.RDX, &r.RBX, &r.RSP, &r.RBP, &r.RSI, &r.RDI,
			&r.R8, &r.R9, &r.R10, &r.R11, &r.R12, &r.R13, &r.R14, &r.R15,
		}
	}
	for _, width := range []int{16, 32, 64} {
		for dst := range 16 {
			for src := range 16 {
				var code []byte
				if width == 16 {
					code = append(code, 0x66)
				}
				rex := byte(0x40 | dst>>3<<2 | src>>3)
				if width == 64 {
					rex |= 8
				}
				code = append(code, 0xF3, rex, 0x0F, 0xB8, byte(0xC0|dst&7<<3|src&7))
				c.regs = kvm.Regs{RIP: 0x700, RFlags: popcntFlags}
				for _, p := range all(&c.regs) {
					*p = rng.Uint64()
				}
				if rng.IntN(4) == 0 {
					*all(&c.regs)[src] = 0
				}
				from, before := *all(&c.regs)[src], *all(&c.regs)[dst]
				value := from & (1<<(width-1)<<1 - 1)
				want := uint64(bits.OnesCount64(value))
				if width == 16 {
					want |= before &^ 0xFFFF
				}
				c.bytes = code
				if err := a.EmulationFailed(); err != nil {
					t.Fatalf("% x: %v", code, err)
				}
				flags := uint64(0)
				if value == 0 {
					flags = flagZF
				}
				if got := *all(&c.regs)[dst]; got != want || c.regs.RFlags != flags || c.regs.RIP != 0x700+uint64(len(code)) {
					t.Fatalf("% x of %#x: %#x, want %#x; RFLAGS %#x; RIP %#x", code, from, got, want, c.regs.RFlags, c.regs.RIP)
				}
			}
		}
	}
}

func TestCmdline(t *testing.T) {
	got := Cmdline("root=/dev/vda mitigations=auto console=ttyS0")
	for _, want := range []string{"nokaslr", "noxsave", "clearcpuid="} {
		if !strings.Contains(got, want) {
			t.Errorf("%s is missing in %s", want, got)
		}
	}
	if strings.Contains(got, "mitigations=off") {
		t.Errorf("the user's mitigations= is overridden in %s", got)
	}
	if !strings.HasSuffix(got, "root=/dev/vda mitigations=auto console=ttyS0") {
		t.Errorf("the user's words do not come last in %s", got)
	}
}
