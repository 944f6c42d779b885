package boot

import (
	"encoding/binary"

	"github.com/gnomon-vmm/gnomon/mm/guestmem"
)

// Layout of struct hvm_start_info and what it points to
// (xen/include/public/arch-x86/hvm/start_info.h).
const (
	startInfoMagic   = 0x336E_C578
	startInfoVersion = 1
	startInfoSize    = 56
	moduleSize       = 32
	mapEntrySize     = 24
)

// startInfo builds the start info with its module list and memory map behind
// it, to lie at StartInfoAddr. At most 56+32+128*24 bytes, so it ends before
// ZeroPageAddr.
func startInfo(mem *guestmem.Memory, cfg Config, initrd guestmem.Range) []byte {
	le := binary.LittleEndian
	entries := memoryMap(mem)
	p := make([]byte, startInfoSize+moduleSize+len(entries)*mapEntrySize)
	const modules, memmap = startInfoSize, startInfoSize + moduleSize

	le.PutUint32(p[0:], startInfoMagic)
	le.PutUint32(p[4:], startInfoVersion)
	if initrd.Size > 0 {
		le.PutUint32(p[12:], 1)
		le.PutUint64(p[16:], StartInfoAddr+modules)
		le.PutUint64(p[modules:], initrd.GPA)
		le.PutUint64(p[modules+8:], initrd.Size)
	}
	le.PutUint64(p[24:], CommandLineAddr)
	le.PutUint64(p[32:], cfg.RSDP)
	le.PutUint64(p[40:], StartInfoAddr+memmap)
	le.PutUint32(p[48:], uint32(len(entries)))
	for i, m := range entries {
		b := p[memmap+i*mapEntrySize:]
		le.PutUint64(b, m.gpa)
		le.PutUint64(b[8:], m.size)
		le.PutUint32(b[16:], m.kind)
	}
	return p
}
