package virtio

import (
	"sync/atomic"
	"unsafe"
)

// Ring fields that the guest changes while we look are read and written here,
// with the memory order of x86: loads stay in order, stores stay in order, and
// only a store followed by a load needs a fence. On amd64 an atomic load is a
// plain MOV and an atomic store an XCHG, which is a full fence.
//
// The slices lie in page-aligned guest memory; bounds are checked.

// load16 reads the little-endian 16-bit field at off, whose address is even.
func load16(b []byte, off int) uint16 {
	_ = b[off+1]
	// Go has no 16-bit atomic load: take the aligned word around the field.
	// It never leaves the page.
	p := unsafe.Pointer(&b[off])
	odd := uintptr(p) & 2
	w := atomic.LoadUint32((*uint32)(unsafe.Add(p, -int(odd))))
	return uint16(w >> (8 * odd))
}

// store32 writes a little-endian 32-bit word at off, whose address is a multiple of 4, and
// orders it before every later load.
func store32(b []byte, off int, v uint32) {
	_ = b[off+3]
	atomic.StoreUint32((*uint32)(unsafe.Pointer(&b[off])), v)
}

// store16 writes a little-endian 16-bit field. A fence must follow where a
// later load depends on it.
func store16(b []byte, off int, v uint16) {
	_ = b[off+1]
	*(*uint16)(unsafe.Pointer(&b[off])) = v
}
