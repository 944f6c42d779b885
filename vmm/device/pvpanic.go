package device

// PVPanic is QEMU's ISA pvpanic device, one byte at PortPVPanic: it reads as
// the events it supports, and a panicking guest writes which one it is
// (QEMU, docs/specs/pvpanic).
type PVPanic struct{ platform Platform }

// NewPVPanic returns the device.
func NewPVPanic(platform Platform) PVPanic { return PVPanic{platform} }

// Map puts the device at its port.
func (v PVPanic) Map(ports *Bus) error { return ports.Map(PortPVPanic, 1, v) }

// Read reads the supported events.
func (v PVPanic) Read(_ uint64, p []byte) {
	for i := range p {
		p[i] = byte(GuestPanicked | GuestCrashLoaded)
	}
}

// Write takes the guest's event; of several, the one it dies of.
func (v PVPanic) Write(_ uint64, p []byte) {
	for _, b := range p {
		switch kind := PanicKind(b); {
		case kind&GuestPanicked != 0:
			v.platform.Panicked(GuestPanicked)
		case kind&GuestCrashLoaded != 0:
			v.platform.Panicked(GuestCrashLoaded)
		}
	}
}
