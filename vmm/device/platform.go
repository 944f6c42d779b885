package device

import (
	"errors"
	"time"
)

// ErrState is the stage of taking over a device's saved state.
var ErrState = errors.New("saved device state")

// Platform is the machine as its devices see it: what a guest asks of the
// machine as a whole. The calls come from the asking vCPU's thread, no device
// lock held; they must not block, and so only note what is to be done.
type Platform interface {
	// PowerOff: the guest entered the ACPI state S5.
	PowerOff()
	// Reset: the guest asked for a reset; why names the register it used.
	Reset(why string)
	// Panicked: the guest's kernel told of its panic through pvpanic.
	Panicked(kind PanicKind)
}

// PanicKind is what a panicking guest does next.
type PanicKind uint8

// What a guest tells by pvpanic, the bits of its port.
const (
	// GuestPanicked: the kernel has panicked and does nothing about it.
	GuestPanicked PanicKind = 1 << 0
	// GuestCrashLoaded: the kernel has panicked and its crash kernel takes over.
	GuestCrashLoaded PanicKind = 1 << 1
)

// Clock is the machine's monotonic time, which stands still while the machine
// is paused. Now may be called from any goroutine.
type Clock interface {
	Now() time.Duration
}
