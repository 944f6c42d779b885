package boot

import "github.com/gnomon-vmm/gnomon/vmm/device"

// Where this package puts things, as guest-physical addresses. All of it lies
// in the first MiB, which is RAM throughout although the guest is told that the
// legacy hole is not. What lies below the hole is the guest's to overwrite once
// it has read it.
const (
	GDTAddr         = 0x1000
	StartInfoAddr   = 0x6000 // hvm_start_info, its module list and memory map
	ZeroPageAddr    = 0x7000 // boot_params
	PageTablesAddr  = 0x9000 // PML4, PDPT and four page directories
	CommandLineAddr = 0x2_0000
	CommandLineSize = 0x1_0000 // terminating NUL included

	// The guest is told that this area is reserved, so it stays as it is.
	ACPIAddr         = 0xE_0000 // RSDP first, then the tables
	ACPISize         = 0xF000
	GenerationIDAddr = ACPIAddr + ACPISize // 16 bytes; nothing else in its page
	GenerationIDSize = 16

	legacyHoleStart = 0xA_0000
	legacyHoleEnd   = 0x10_0000
	lowRAMLimit     = device.LowRAMEnd
)
