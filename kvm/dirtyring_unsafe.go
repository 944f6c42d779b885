package kvm

import "unsafe"

// dirtyGFNs looks at a mapping as ring entries.
func dirtyGFNs(mapping []byte) []dirtyGFN {
	return unsafe.Slice((*dirtyGFN)(unsafe.Pointer(&mapping[0])), len(mapping)/DirtyRingEntrySize)
}
