package vmm

import (
	"testing"

	"github.com/gnomon-vmm/gnomon/kvm"
)

// Every vCPU sees one socket of single-threaded cores, its own APIC id, and no
// TSC that would outrank kvmclock.
func TestCPUID(t *testing.T) {
	supported := []kvm.CPUIDEntry{
		{Function: leafFeatures, EBX: 0xFF_FF_08_00, EDX: featureHTT},
		{Function: leafCache, Index: 0, Flags: kvm.CPUIDSignificantIndex, EAX: 0xFC00_4121},
		{Function: leafTopology, Index: 0, EBX: 99},
		{Function: leafKVMMax, EAX: 0x4000_0001},
		{Function: leafAPM, EDX: 1<<8 | 1},
	}
	find := func(table []kvm.CPUIDEntry, function, index uint32) kvm.CPUIDEntry {
		t.Helper()
		var found []kvm.CPUIDEntry
		for _, e := range table {
			if e.Function == function && e.Index == index {
				found = append(found, e)
			}
		}
		if len(found) != 1 {
			t.Fatalf("leaf %#x.%d is there %d times", function, index, len(found))
		}
		return found[0]
	}
	for _, cpus := range []int{1, 2, 3, 64} {
		for id := range cpus {
			table := cpuidFor(supported, id, cpus, 2_300_000)
			f := find(table, leafFeatures, 0)
			if f.EBX != 0x0800|uint32(cpus)<<16|uint32(id)<<24 {
				t.Errorf("%d of %d: leaf 1 EBX %#x", id, cpus, f.EBX)
			}
			if f.ECX&featureHypervisor == 0 || f.ECX&featureTSCDeadline == 0 || f.EDX&featureHTT != 0 != (cpus > 1) {
				t.Errorf("%d of %d: leaf 1 %+v", id, cpus, f)
			}
			// APIC ids of all cores fit the width that the topology leaf tells.
			core := find(table, leafTopology, 1)
			if core.EBX != uint32(cpus) || 1<<core.EAX < cpus || core.EDX != uint32(id) {
				t.Errorf("%d of %d: leaf 0xB %+v", id, cpus, core)
			}
			if thread := find(table, leafTopology, 0); thread.EAX != 0 || thread.EBX != 1 {
				t.Errorf("%d of %d: leaf 0xB %+v", id, cpus, thread)
			}
			if cache := find(table, leafCache, 0); int(cache.EAX>>26)+1 < cpus || cache.EAX>>14&0xFFF != 0 {
				t.Errorf("%d of %d: leaf 4 %+v", id, cpus, cache)
			}
			if apm := find(table, leafAPM, 0); apm.EDX != 1 {
				t.Errorf("%d of %d: leaf 0x80000007 %+v", id, cpus, apm)
			}
			if timing := find(table, leafTiming, 0); timing.EAX != 2_300_000 || find(table, leafKVMMax, 0).EAX != leafTiming {
				t.Errorf("%d of %d: timing %+v", id, cpus, timing)
			}
		}
	}
}
