package kvm_test

import (
	"sync/atomic"
	"unsafe"

	"github.com/gnomon-vmm/gnomon/kvm/internal/tinyguest"
)

// guestCount reads what the guest counts in its memory as it runs.
func guestCount(guest *tinyguest.Guest) uint32 {
	return atomic.LoadUint32((*uint32)(unsafe.Pointer(&guest.Memory[tinyguest.Data])))
}
