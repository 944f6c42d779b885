package kvm

import "fmt"

const (
	msrFilterWrite  = 1 << 1 // the range is about writes
	msrFilterRanges = 16     // KVM_MSR_FILTER_MAX_RANGES
)

// Structs of KVM_X86_SET_MSR_FILTER.
type (
	msrFilterRange struct {
		flags  uint32
		count  uint32
		base   uint32
		bitmap *byte // a bit for each MSR: 1 allows, 0 denies
	}
	msrFilter struct {
		_      uint32 // flags; 0: MSRs in no range are allowed
		ranges [msrFilterRanges]msrFilterRange
	}
)

// ExitOnMSRWrite makes the guest's writes to up to 16 MSRs exit with
// ExitX86WRMSR instead of taking effect, and only those: it replaces what an
// earlier call chose. SetMSRs still writes them. It needs CapX86UserSpaceMSR
// and CapX86MSRFilter.
func (vm *VM) ExitOnMSRWrite(indices ...uint32) error {
	if len(indices) > msrFilterRanges {
		return fmt.Errorf("KVM_X86_SET_MSR_FILTER: %w: %d", ErrTooMany, len(indices))
	}
	if err := vm.EnableCap(CapX86UserSpaceMSR, MSRExitFilter); err != nil {
		return err
	}
	var deny [8]byte // the kernel reads whole words
	var filter msrFilter
	for i, index := range indices {
		filter.ranges[i] = msrFilterRange{flags: msrFilterWrite, count: 1, base: index, bitmap: &deny[0]}
	}
	_, errno := ioctlPtr(vm.fd, nrSetMSRFilter, &filter)
	return result("KVM_X86_SET_MSR_FILTER", errno)
}
