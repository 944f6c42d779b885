// Package tinyguest makes virtual machines that run a few bytes of machine
// code: to find out what a host does, and to test package kvm.
package tinyguest

import (
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/kvm"
)

// Mode is how the guest's processor starts.
type Mode int

// The modes.
const (
	Real  Mode = iota // 16-bit real mode, all segments at 0
	Ring0             // 64-bit mode in ring 0
	Ring3             // 64-bit mode in ring 3 that may do port I/O
)

// Where things lie in guest memory. In the 64-bit modes the first GiB is
// mapped to itself, for ring 3 too.
const (
	pml4  = 0x1000
	pdpt  = 0x2000
	pd    = 0x3000
	gdt   = 0x4000
	idt   = 0x5000 // 256 gates; in real mode the vectors lie at 0
	Code  = 0x6000 // Config.Code; a page
	stack = 0x8000 // the stack ends here
	Data  = 0x8000 // free from here on

	minMemory = 0x9000
)

// Selectors of the segments in the guest's GDT.
const (
	Ring0CS = 0x08
	Ring0SS = 0x10
	Ring3SS = 0x18 | 3
	Ring3CS = 0x20 | 3
)

// Config says what the guest is.
type Config struct {
	Mode     Mode
	Code     []byte           // at most a page, entered at its first byte
	Memory   int              // bytes in slot 0, from address 0; the least that works if 0
	MemFlags uint32           // of slot 0
	Gates    map[uint8]uint64 // where interrupt and exception handlers begin
	// Prepare, if not nil, sets the VM up before it gets its VCPU.
	Prepare func(*kvm.VM) error
}

// Guest is a VM with one VCPU.
type Guest struct {
	VM     *kvm.VM
	VCPU   *kvm.VCPU
	Memory []byte // what slot 0 shows
}

// New makes a guest that is ready to run.
func New(sys *kvm.System, config Config) (*Guest, error) {
	if config.Memory == 0 {
		config.Memory = minMemory
	}
	if config.Memory < minMemory || len(config.Code) > 0x1000 {
		return nil, fmt.Errorf("tiny guest: %d bytes of code in %#x of memory do not fit", len(config.Code), config.Memory)
	}
	g := &Guest{}
	if err := g.make(sys, config); err != nil {
		return nil, errors.Join(fmt.Errorf("tiny guest: %w", err), g.Close())
	}
	return g, nil
}

func (g *Guest) make(sys *kvm.System, config Config) (err error) {
	if g.Memory, err = unix.Mmap(-1, 0, config.Memory, unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_SHARED|unix.MAP_ANONYMOUS); err != nil {
		return fmt.Errorf("memory: %w", err)
	}
	if g.VM, err = sys.CreateVM(); err != nil {
		return err
	}
	// Intel hosts need these.
	if g.VM.Check(kvm.CapSetTSSAddr) != 0 {
		if err = g.VM.SetTSSAddr(0xfffbd000); err != nil {
			return err
		}
	}
	if err = g.VM.SetMemory(0, config.MemFlags, 0, g.Memory); err != nil {
		return err
	}
	if config.Prepare != nil {
		if err = config.Prepare(g.VM); err != nil {
			return err
		}
	}
	if g.VCPU, err = g.VM.CreateVCPU(0); err != nil {
		return err
	}
	cpuid, err := sys.SupportedCPUID()
	if err != nil {
		return err
	}
	if err = g.VCPU.SetCPUID(cpuid); err != nil {
		return err
	}
	copy(g.Memory[Code:], config.Code)
	if config.Mode == Real {
		for vector, handler := range config.Gates {
			binary.LittleEndian.PutUint32(g.Memory[4*int(vector):], uint32(handler))
		}
	} else {
		g.writeTables(config.Gates)
	}
	return g.Reset(config.Mode)
}

// writeTables puts page tables, segments and interrupt gates into memory.
func (g *Guest) writeTables(gates map[uint8]uint64) {
	put := func(at int, value uint64) { binary.LittleEndian.PutUint64(g.Memory[at:], value) }
	const presentWritableUser, large = 0x67, 0x80 // accessed and dirty already, so that nothing writes the tables
	put(pml4, pdpt|presentWritableUser)
	put(pdpt, pd|presentWritableUser)
	for i := 0; i < 512; i++ {
		put(pd+8*i, uint64(i)<<21|presentWritableUser|large)
	}
	put(gdt+Ring0CS, 0x00af9b000000ffff)
	put(gdt+Ring0SS, 0x00cf93000000ffff)
	put(gdt+Ring3SS&^3, 0x00cff3000000ffff)
	put(gdt+Ring3CS&^3, 0x00affb000000ffff)
	for vector, handler := range gates {
		const interruptGate = 0x8e00
		put(idt+16*int(vector), handler&0xffff|Ring0CS<<16|interruptGate<<32|handler>>16<<48)
		put(idt+16*int(vector)+8, handler>>32)
	}
}

// Reset puts the VCPU at the first byte of the code.
func (g *Guest) Reset(mode Mode) error {
	var sregs kvm.Sregs
	if err := g.VCPU.GetSregs(&sregs); err != nil {
		return err
	}
	regs := kvm.Regs{RIP: Code, RSP: stack, RFlags: 0x2}
	if mode == Real {
		sregs.CS.Base, sregs.CS.Selector = 0, 0
		regs.RSP = stack - 0x1000 + 0xff0 // below 64 KiB, as the code is
	} else {
		flat := func(selector uint16, kind, long uint8) kvm.Segment {
			return kvm.Segment{
				Limit: 0xffffffff, Selector: selector, Type: kind, Present: 1,
				DPL: uint8(selector & 3), DB: 1 - long, S: 1, L: long, G: 1,
			}
		}
		const codeType, dataType = 0xb, 0x3
		cs, ss := flat(Ring0CS, codeType, 1), flat(Ring0SS, dataType, 0)
		if mode == Ring3 {
			cs, ss = flat(Ring3CS, codeType, 1), flat(Ring3SS, dataType, 0)
			regs.RFlags |= 0x3000 // IOPL 3
		}
		sregs.CS, sregs.SS, sregs.DS, sregs.ES, sregs.FS, sregs.GS = cs, ss, ss, ss, ss, ss
		sregs.TR = kvm.Segment{Limit: 0x67, Type: 0xb, Present: 1}
		sregs.GDT.Base, sregs.GDT.Limit = gdt, 0x27
		sregs.IDT.Base, sregs.IDT.Limit = idt, 0xfff
		sregs.CR0 = 0x80010033 // PG WP NE ET MP PE
		sregs.CR3 = pml4
		sregs.CR4 = 0x620  // OSXMMEXCPT OSFXSR PAE
		sregs.EFER = 0x500 // LMA LME
	}
	if err := g.VCPU.SetSregs(&sregs); err != nil {
		return err
	}
	return g.VCPU.SetRegs(&regs)
}

// Run runs the guest until it exits; signals do not count.
func (g *Guest) Run() (kvm.Exit, error) {
	for {
		err := g.VCPU.Run()
		if err == unix.EINTR || err == unix.EAGAIN {
			continue
		}
		return g.VCPU.ExitReason(), err
	}
}

// Close frees the guest.
func (g *Guest) Close() error {
	var errs []error
	if g.VCPU != nil {
		errs = append(errs, g.VCPU.Close())
	}
	if g.VM != nil {
		errs = append(errs, g.VM.Close())
	}
	if g.Memory != nil {
		errs = append(errs, unix.Munmap(g.Memory))
	}
	*g = Guest{}
	return errors.Join(errs...)
}
