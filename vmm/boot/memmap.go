package boot

import (
	"slices"

	"github.com/gnomon-vmm/gnomon/mm/guestmem"
	"github.com/gnomon-vmm/gnomon/vmm/device"
)

// mapEntry is a stretch of guest-physical addresses as E820 and PVH tell it;
// both use the same kinds (ACPI 6.5, table 15.2).
type mapEntry struct {
	gpa, size uint64
	kind      uint32
}

const (
	mapRAM      = 1
	mapReserved = 2
)

// memoryMap tells the guest where its RAM is and what else not to touch, by
// ascending address. It has at most bpE820Max entries: should there ever be
// more regions of RAM, the highest stay unused.
func memoryMap(mem *guestmem.Memory) []mapEntry {
	entries := []mapEntry{
		{ACPIAddr, legacyHoleEnd - ACPIAddr, mapReserved},
		{device.ECAMBase, device.ECAMSize, mapReserved},
		// KVM's own pages on Intel hosts.
		{device.IdentityMapAddr, device.TSSAddr + 3*pageSize - device.IdentityMapAddr, mapReserved},
	}
	for _, r := range mem.Regions() {
		if len(entries)+2 > bpE820Max {
			break
		}
		if r.GPA < legacyHoleStart {
			entries = append(entries, mapEntry{r.GPA, min(r.End(), legacyHoleStart) - r.GPA, mapRAM})
		}
		if start := max(r.GPA, legacyHoleEnd); r.End() > start {
			entries = append(entries, mapEntry{start, r.End() - start, mapRAM})
		}
	}
	slices.SortFunc(entries, func(a, b mapEntry) int {
		if a.gpa < b.gpa {
			return -1
		}
		return 1
	})
	return entries
}
