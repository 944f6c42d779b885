// Package memguest is a guest for the tests of mm: a virtual machine over a
// guestmem.Memory whose one vCPU writes or reads the pages that it is told to,
// in ring 3, at full speed on every host.
package memguest

import (
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/kvm"
	"github.com/gnomon-vmm/gnomon/mm/guestmem"
)

// Where things lie in guest memory.
const (
	pml4       = 0x1000
	pdpt       = 0x2000
	gdt        = 0x3000
	code       = 0x4000
	pds        = 0x8000 // one for each GiB
	mappedGiBs = 8

	// Free is the first address that is the test's; so much must be RAM.
	Free = pds + mappedGiBs*guestmem.PageSize
)

const (
	ring3SS = 0x18 | 3
	ring3CS = 0x20 | 3
)

// The program: store to or load from rcx places, rdx bytes apart, from rbx on.
var (
	storeLoop = []byte{
		0x48, 0x89, 0x03, // mov [rbx], rax
		0x48, 0x01, 0xd3, // add rbx, rdx
		0x48, 0xff, 0xc9, // dec rcx
		0x75, 0xf5, // jnz to the mov
		0xe6, 0x80, // out 0x80, al
	}
	loadLoop = []byte{
		0x48, 0x33, 0x03, // xor rax, [rbx]
		0x48, 0x01, 0xd3, // add rbx, rdx
		0x48, 0xff, 0xc9, // dec rcx
		0x75, 0xf5, // jnz to the xor
		0xe6, 0x80, // out 0x80, al
	}
)

const loadAt = code + 0x100

// Options adapt the guest.
type Options struct {
	// Prepare, if not nil, sets the VM up before it gets its vCPU.
	Prepare func(*kvm.VM) error
	// RingFull, if not nil, serves KVM_EXIT_DIRTY_RING_FULL.
	RingFull func() error
}

// Guest is a machine with one vCPU. One goroutine at a time may use it.
type Guest struct {
	VM   *kvm.VM
	VCPU *kvm.VCPU

	sys      *kvm.System
	ringFull func() error
	regs     kvm.Regs
}

// ErrNoKVM means that the host has no usable /dev/kvm.
var ErrNoKVM = errors.New("no KVM")

// New makes a guest over mem, region i in slot i, of which it uses the pages
// below Free. Its virtual addresses are its physical ones.
func New(mem *guestmem.Memory, o Options) (*Guest, error) {
	sys, err := kvm.Open()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNoKVM, err)
	}
	g := &Guest{sys: sys, ringFull: o.RingFull}
	if err := g.make(mem, o); err != nil {
		return nil, errors.Join(fmt.Errorf("memory guest: %w", err), g.Close())
	}
	return g, nil
}

func (g *Guest) make(mem *guestmem.Memory, o Options) (err error) {
	if g.VM, err = g.sys.CreateVM(); err != nil {
		return err
	}
	if g.VM.Check(kvm.CapSetTSSAddr) != 0 {
		if err := g.VM.SetTSSAddr(0xfffbd000); err != nil {
			return err
		}
	}
	for i, r := range mem.Regions() {
		if err := g.VM.SetMemory(uint32(i), 0, r.GPA, r.GuestBytes()); err != nil {
			return err
		}
	}
	if o.Prepare != nil {
		if err := o.Prepare(g.VM); err != nil {
			return err
		}
	}
	if g.VCPU, err = g.VM.CreateVCPU(0); err != nil {
		return err
	}
	cpuid, err := g.sys.SupportedCPUID()
	if err != nil {
		return err
	}
	if err := g.VCPU.SetCPUID(cpuid); err != nil {
		return err
	}
	if err := writeTables(mem); err != nil {
		return err
	}
	if err := errors.Join(mem.Write(code, storeLoop), mem.Write(loadAt, loadLoop)); err != nil {
		return err
	}
	return g.enter()
}

// writeTables puts page tables and segments into memory, with the accessed and
// dirty bits set already, so that nothing writes them later.
func writeTables(mem *guestmem.Memory) error {
	var errs []error
	put := func(at, value uint64) {
		errs = append(errs, mem.Write(at, binary.LittleEndian.AppendUint64(nil, value)))
	}
	const presentWritableUser, large = 0x67, 0x80
	put(pml4, pdpt|presentWritableUser)
	for gib := range uint64(mappedGiBs) {
		pd := pds + gib*guestmem.PageSize
		put(pdpt+8*gib, pd|presentWritableUser)
		for i := range uint64(512) {
			put(pd+8*i, gib<<30|i<<21|presentWritableUser|large)
		}
	}
	put(gdt+ring3SS&^3, 0x00cff3000000ffff)
	put(gdt+ring3CS&^3, 0x00affb000000ffff)
	return errors.Join(errs...)
}

// enter puts the vCPU into ring 3.
func (g *Guest) enter() error {
	var sregs kvm.Sregs
	if err := g.VCPU.GetSregs(&sregs); err != nil {
		return err
	}
	flat := func(selector uint16, kind, long uint8) kvm.Segment {
		return kvm.Segment{
			Limit: 0xffffffff, Selector: selector, Type: kind, Present: 1,
			DPL: uint8(selector & 3), DB: 1 - long, S: 1, L: long, G: 1,
		}
	}
	cs, ss := flat(ring3CS, 0xb, 1), flat(ring3SS, 0x3, 0)
	sregs.CS, sregs.SS, sregs.DS, sregs.ES, sregs.FS, sregs.GS = cs, ss, ss, ss, ss, ss
	sregs.TR = kvm.Segment{Limit: 0x67, Type: 0xb, Present: 1}
	sregs.GDT.Base, sregs.GDT.Limit = gdt, 0x27
	sregs.CR0 = 0x80010033 // PG WP NE ET MP PE
	sregs.CR3 = pml4
	sregs.CR4 = 0x620  // OSXMMEXCPT OSFXSR PAE
	sregs.EFER = 0x500 // LMA LME
	return g.VCPU.SetSregs(&sregs)
}

// Store has the guest write value, 8 bytes, to count addresses, stride apart,
// from gpa on. It returns when all are written.
func (g *Guest) Store(gpa, count, stride, value uint64) error {
	g.regs.RAX = value
	return g.run(code, gpa, count, stride)
}

// Load has the guest read count addresses, and returns the XOR of all.
func (g *Guest) Load(gpa, count, stride uint64) (uint64, error) {
	g.regs.RAX = 0
	if err := g.run(loadAt, gpa, count, stride); err != nil {
		return 0, err
	}
	err := g.VCPU.GetRegs(&g.regs)
	return g.regs.RAX, err
}

func (g *Guest) run(at, gpa, count, stride uint64) error {
	if count == 0 {
		return nil
	}
	g.regs.RIP, g.regs.RBX, g.regs.RCX, g.regs.RDX = at, gpa, count, stride
	g.regs.RFlags = 0x3002 // IOPL 3
	if err := g.VCPU.SetRegs(&g.regs); err != nil {
		return err
	}
	for {
		err := g.VCPU.Run()
		if err == unix.EINTR || err == unix.EAGAIN {
			continue
		}
		if err != nil {
			return fmt.Errorf("KVM_RUN: %w", err)
		}
		switch exit := g.VCPU.ExitReason(); {
		case exit == kvm.ExitIO:
			return g.finishOut()
		case exit == kvm.ExitDirtyRingFull && g.ringFull != nil:
			if err := g.ringFull(); err != nil {
				return err
			}
		default:
			suberror, data := g.VCPU.InternalError()
			return fmt.Errorf("exit %v; if internal error: %d %#x", exit, suberror, data)
		}
	}
}

// finishOut lets KVM complete the OUT, so that registers set next hold.
func (g *Guest) finishOut() error {
	g.VCPU.RequestExit(true)
	defer g.VCPU.RequestExit(false)
	for {
		switch err := g.VCPU.Run(); {
		case err == unix.EINTR:
			return nil
		case err != nil:
			return fmt.Errorf("KVM_RUN: %w", err)
		case g.VCPU.ExitReason() == kvm.ExitDirtyRingFull && g.ringFull != nil:
			if err := g.ringFull(); err != nil {
				return err
			}
		default:
			return fmt.Errorf("exit %v instead of the rest of an OUT", g.VCPU.ExitReason())
		}
	}
}

// Close frees the guest, not its memory.
func (g *Guest) Close() error {
	var errs []error
	if g.VCPU != nil {
		errs = append(errs, g.VCPU.Close())
	}
	if g.VM != nil {
		errs = append(errs, g.VM.Close())
	}
	return errors.Join(append(errs, g.sys.Close())...)
}
