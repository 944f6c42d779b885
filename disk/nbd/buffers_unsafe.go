package nbd

import "unsafe"

// toHugePage is how far a huge page begins behind b.
func toHugePage(b []byte) int {
	return int(-uintptr(unsafe.Pointer(unsafe.SliceData(b))) & (chunkSize - 1))
}
