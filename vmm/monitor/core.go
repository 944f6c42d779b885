package monitor

import (
	"bytes"
	"debug/elf"
	"encoding/binary"

	"github.com/gnomon-vmm/gnomon/kvm"
	"github.com/gnomon-vmm/gnomon/mm/guestmem"
	"github.com/gnomon-vmm/gnomon/vmm"
)

// segment is a stretch of RAM that a core file holds.
type segment struct{ gpa, size uint64 }

// segments returns what there is of RAM in the length bytes from begin on.
func segments(regions []*guestmem.Region, begin, length uint64) (all []segment, total uint64) {
	end := begin + length
	if end < begin {
		end = ^uint64(0)
	}
	for _, r := range regions {
		from, to := max(r.GPA, begin), min(r.End(), end)
		if from < to {
			all = append(all, segment{from, to - from})
			total += to - from
		}
	}
	return all, total
}

// coreHeader returns everything of a core file that comes before the memory,
// whose segments then follow in their order. As in QEMU's (docs/specs and
// target/i386/arch_dump.c) a vCPU is a thread, numbered from 1, with a note
// NT_PRSTATUS of struct elf_prstatus for debuggers and one from QEMU with what
// that leaves out. Addresses are guest-physical, as virtual addresses too.
func coreHeader(cpus []*vmm.CPUState, segments []segment) []byte {
	var notes []byte
	for i, c := range cpus {
		notes = appendNote(notes, "CORE", uint32(elf.NT_PRSTATUS), threadStatus(i+1, c))
	}
	for _, c := range cpus {
		notes = appendNote(notes, "QEMU", 0, qemuState(c))
	}

	const headerSize, progSize = 64, 56
	noteOffset := uint64(headerSize + progSize*(1+len(segments)))
	offset := (noteOffset + uint64(len(notes)) + guestmem.PageSize - 1) &^ (guestmem.PageSize - 1)

	header := elf.Header64{
		Type: uint16(elf.ET_CORE), Machine: uint16(elf.EM_X86_64), Version: uint32(elf.EV_CURRENT),
		Phoff: headerSize, Ehsize: headerSize, Phentsize: progSize, Phnum: uint16(1 + len(segments)),
	}
	copy(header.Ident[:], elf.ELFMAG)
	header.Ident[elf.EI_CLASS] = byte(elf.ELFCLASS64)
	header.Ident[elf.EI_DATA] = byte(elf.ELFDATA2LSB)
	header.Ident[elf.EI_VERSION] = byte(elf.EV_CURRENT)

	b := appendLE(make([]byte, 0, offset), header)
	b = appendLE(b, elf.Prog64{
		Type: uint32(elf.PT_NOTE), Off: noteOffset, Filesz: uint64(len(notes)), Memsz: uint64(len(notes)),
	})
	at := offset
	for _, s := range segments {
		b = appendLE(b, elf.Prog64{
			Type: uint32(elf.PT_LOAD), Off: at, Vaddr: s.gpa, Paddr: s.gpa, Filesz: s.size, Memsz: s.size,
		})
		at += s.size
	}
	b = append(b, notes...)
	return append(b, make([]byte, offset-uint64(len(b)))...)
}

// appendLE appends a struct of fixed size.
func appendLE(b []byte, v any) []byte {
	b, err := binary.Append(b, binary.LittleEndian, v)
	if err != nil {
		panic(err) // v has no fixed size: a mistake in this file
	}
	return b
}

func appendNote(b []byte, name string, kind uint32, desc []byte) []byte {
	padded := append([]byte(name), make([]byte, 8-len(name))...)
	b = appendLE(b, [3]uint32{uint32(len(name) + 1), uint32(len(desc)), kind})
	b = append(b, padded...)
	b = append(b, desc...)
	return append(b, bytes.Repeat([]byte{0}, -len(desc)&3)...)
}

// userRegs is x86-64's struct user_regs_struct.
type userRegs struct {
	R15, R14, R13, R12, RBP, RBX, R11, R10, R9, R8, RAX, RCX, RDX, RSI, RDI uint64
	OrigRAX, RIP, CS, RFlags, RSP, SS, FSBase, GSBase, DS, ES, FS, GS       uint64
}

// threadStatus is x86-64's struct elf_prstatus.
func threadStatus(thread int, c *vmm.CPUState) []byte {
	r, s := &c.Regs, &c.Sregs
	return appendLE(nil, struct {
		_       [32]byte // signals
		PID     uint32
		_       [76]byte // further ids, times
		Regs    userRegs
		FPValid uint32
		_       uint32
	}{PID: uint32(thread), Regs: userRegs{
		R15: r.R15, R14: r.R14, R13: r.R13, R12: r.R12, RBP: r.RBP, RBX: r.RBX, R11: r.R11, R10: r.R10,
		R9: r.R9, R8: r.R8, RAX: r.RAX, RCX: r.RCX, RDX: r.RDX, RSI: r.RSI, RDI: r.RDI,
		RIP: r.RIP, CS: uint64(s.CS.Selector), RFlags: r.RFlags, RSP: r.RSP, SS: uint64(s.SS.Selector),
		FSBase: s.FS.Base, GSBase: s.GS.Base,
		DS: uint64(s.DS.Selector), ES: uint64(s.ES.Selector), FS: uint64(s.FS.Selector), GS: uint64(s.GS.Selector),
	}})
}

// coreSegment is QEMU's QEMUCPUSegment.
type coreSegment struct {
	Selector, Limit, Flags uint32
	_                      uint32
	Base                   uint64
}

// coreState is QEMU's QEMUCPUState, version 1.
type coreState struct {
	Version, Size                             uint32
	RAX, RBX, RCX, RDX, RSI, RDI, RSP, RBP    uint64
	R8, R9, R10, R11, R12, R13, R14, R15      uint64
	RIP, RFlags                               uint64
	CS, DS, ES, FS, GS, SS, LDT, TR, GDT, IDT coreSegment
	CR                                        [5]uint64
	KernelGSBase                              uint64
}

func qemuState(c *vmm.CPUState) []byte {
	r, s := &c.Regs, &c.Sregs
	state := coreState{
		Version: 1,
		RAX:     r.RAX, RBX: r.RBX, RCX: r.RCX, RDX: r.RDX, RSI: r.RSI, RDI: r.RDI, RSP: r.RSP, RBP: r.RBP,
		R8: r.R8, R9: r.R9, R10: r.R10, R11: r.R11, R12: r.R12, R13: r.R13, R14: r.R14, R15: r.R15,
		RIP: r.RIP, RFlags: r.RFlags,
		CS: saved(s.CS), DS: saved(s.DS), ES: saved(s.ES), FS: saved(s.FS), GS: saved(s.GS), SS: saved(s.SS),
		LDT: saved(s.LDT), TR: saved(s.TR),
		GDT: coreSegment{Limit: uint32(s.GDT.Limit), Base: s.GDT.Base},
		IDT: coreSegment{Limit: uint32(s.IDT.Limit), Base: s.IDT.Base},
		CR:  [5]uint64{0: s.CR0, 2: s.CR2, 3: s.CR3, 4: s.CR4},
	}
	state.Size = uint32(binary.Size(state))
	for _, m := range c.MSRs {
		if m.Index == msrKernelGSBase {
			state.KernelGSBase = m.Data
		}
	}
	return appendLE(nil, state)
}

const msrKernelGSBase = 0xC000_0102

// saved has a segment's attributes where its descriptor's second word has them
// (Intel SDM volume 3, 3.4.5).
func saved(s kvm.Segment) coreSegment {
	flags := uint32(s.Type)<<8 | uint32(s.S)<<12 | uint32(s.DPL)<<13 | uint32(s.Present)<<15 |
		uint32(s.Avl)<<20 | uint32(s.L)<<21 | uint32(s.DB)<<22 | uint32(s.G)<<23
	return coreSegment{Selector: uint32(s.Selector), Limit: s.Limit, Flags: flags, Base: s.Base}
}
