package vmm

import (
	"math/bits"

	"github.com/gnomon-vmm/gnomon/kvm"
)

// CPUID leaves and bits that the machine changes (Intel SDM volume 2, CPUID;
// KVM's in Documentation/virt/kvm/x86/cpuid.rst).
const (
	leafFeatures  = 0x1
	leafCache     = 0x4
	leafTopology  = 0xB
	leafTopology2 = 0x1F
	leafKVMMax    = 0x4000_0000
	leafTiming    = 0x4000_0010 // EAX: TSC kHz, EBX: APIC timer kHz
	leafAPM       = 0x8000_0007

	featureTSCDeadline  = 1 << 24 // leaf 1 ECX
	featureHypervisor   = 1 << 31 // leaf 1 ECX
	featureHTT          = 1 << 28 // leaf 1 EDX
	featureInvariantTSC = 1 << 8  // leaf 0x80000007 EDX

	apicTimerKHz = 1_000_000 // of KVM's local APIC
)

// cpuidFor makes vCPU id's CPUID table of what the host supports: one socket of
// cpus single-threaded cores.
//
// The TSC is not shown as invariant, so that guests take kvmclock, which
// stands still in a pause and survives a move to another host, as QEMU has it.
func cpuidFor(supported []kvm.CPUIDEntry, id, cpus, tscKHz int) []kvm.CPUIDEntry {
	coreBits := uint32(bits.Len(uint(cpus - 1)))
	table := make([]kvm.CPUIDEntry, 0, len(supported)+1)
	for _, e := range supported {
		switch e.Function {
		case leafFeatures:
			e.EBX = e.EBX&0x0000_FFFF | uint32(cpus)<<16 | uint32(id)<<24
			e.ECX |= featureTSCDeadline | featureHypervisor
			if cpus > 1 {
				e.EDX |= featureHTT
			} else {
				e.EDX &^= featureHTT
			}
		case leafCache:
			// Core ids reserved in the package; each core has its caches to itself.
			e.EAX = e.EAX&0x0000_3FFF | (1<<coreBits-1)<<26
		case leafTopology, leafTopology2:
			continue // made below
		case leafKVMMax:
			e.EAX = max(e.EAX, leafTiming)
		case leafTiming:
			continue
		case leafAPM:
			e.EDX &^= featureInvariantTSC
		}
		table = append(table, e)
	}
	// Level 0: threads of a core; level 1: cores of the package.
	table = append(table,
		kvm.CPUIDEntry{Function: leafTopology, Index: 0, Flags: kvm.CPUIDSignificantIndex, EBX: 1, ECX: 1 << 8, EDX: uint32(id)},
		kvm.CPUIDEntry{Function: leafTopology, Index: 1, Flags: kvm.CPUIDSignificantIndex, EAX: coreBits, EBX: uint32(cpus), ECX: 2<<8 | 1, EDX: uint32(id)},
		kvm.CPUIDEntry{Function: leafTopology, Index: 2, Flags: kvm.CPUIDSignificantIndex, ECX: 2, EDX: uint32(id)},
	)
	if tscKHz > 0 {
		table = append(table, kvm.CPUIDEntry{Function: leafTiming, EAX: uint32(tscKHz), EBX: apicTimerKHz})
	}
	return table
}
