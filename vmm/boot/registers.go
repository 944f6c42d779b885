package boot

import (
	"encoding/binary"

	"github.com/gnomon-vmm/gnomon/kvm"
	"github.com/gnomon-vmm/gnomon/vmm/device"
)

// Control register and EFER bits. Intel SDM volume 3, sections 2.2.1 and 2.5.
const (
	cr0PE = 1 << 0
	cr0ET = 1 << 4
	cr0NE = 1 << 5
	cr0PG = 1 << 31

	cr4PAE = 1 << 5

	eferLME = 1 << 8
	eferLMA = 1 << 10

	apicBSP    = 1 << 8
	apicEnable = 1 << 11

	rflagsFixed = 1 << 1

	pagePresent  = 1 << 0
	pageWritable = 1 << 1
	pageLarge    = 1 << 7
)

// Selectors that the Linux boot protocol asks for.
const (
	bootCS = 0x10
	bootDS = 0x18
)

// Flat descriptors for bootCS.
const (
	longModeCode      = 0x00AF_9B00_0000_FFFF
	protectedModeCode = 0x00CF_9B00_0000_FFFF
	flatData          = 0x00CF_9300_0000_FFFF
)

// gdt has null, null, code and data descriptors.
func gdt(code uint64) []byte {
	var b []byte
	for _, d := range []uint64{0, 0, code, flatData} {
		b = binary.LittleEndian.AppendUint64(b, d)
	}
	return b
}

const (
	identityMapped  = 4 << 30 // bytes
	largePage       = 2 << 20
	entriesPerTable = 512
)

// identityMap builds page tables at PageTablesAddr that map the first 4 GiB to
// themselves in pages of 2 MiB.
func identityMap() []byte {
	const directories = identityMapped / largePage / entriesPerTable
	p := make([]byte, (2+directories)*pageSize)
	put := func(table, i int, entry uint64) {
		binary.LittleEndian.PutUint64(p[table*pageSize+i*8:], entry)
	}
	at := func(table int) uint64 { return PageTablesAddr + uint64(table)*pageSize }
	put(0, 0, at(1)|pagePresent|pageWritable)
	for d := range directories {
		put(1, d, at(2+d)|pagePresent|pageWritable)
	}
	for i := range identityMapped / largePage {
		put(2+i/entriesPerTable, i%entriesPerTable, uint64(i)*largePage|pagePresent|pageWritable|pageLarge)
	}
	return p
}

// Registers spells out e as the boot processor's complete register state:
// interrupts off, flat segments, the local APIC enabled.
func (e Entry) Registers() (kvm.Regs, kvm.Sregs) {
	regs := kvm.Regs{RIP: e.RIP, RSI: e.RSI, RBX: e.RBX, RFlags: rflagsFixed}

	code := kvm.Segment{Selector: bootCS, Limit: 0xFFFF_FFFF, Type: 0xB, Present: 1, S: 1, G: 1}
	data := kvm.Segment{Selector: bootDS, Limit: 0xFFFF_FFFF, Type: 0x3, Present: 1, S: 1, G: 1, DB: 1}
	sregs := kvm.Sregs{
		DS: data, ES: data, FS: data, GS: data, SS: data,
		TR:       kvm.Segment{Limit: 0x67, Type: 0xB, Present: 1}, // busy TSS
		LDT:      kvm.Segment{Type: 0x2, Unusable: 1},
		GDT:      kvm.Dtable{Base: GDTAddr, Limit: 4*8 - 1},
		CR0:      cr0PE | cr0ET | cr0NE,
		APICBase: device.LAPICBase | apicEnable | apicBSP,
	}
	switch e.Protocol {
	case Linux64:
		code.L = 1
		sregs.CR0 |= cr0PG
		sregs.CR3 = PageTablesAddr
		sregs.CR4 = cr4PAE
		sregs.EFER = eferLME | eferLMA
	default:
		code.DB = 1
	}
	sregs.CS = code
	return regs, sregs
}
