// Package device holds the machine's plain devices and the buses that reach
// them: port I/O and MMIO dispatch, PCI with MSI-X, serial port, RTC, i8042,
// ACPI power management, generation id and pvpanic.
package device

// The machine's address map. Guest RAM lies below LowRAMEnd and from
// HighRAMBase up; the hole between holds PCI memory, ECAM and the APICs.
const (
	LowRAMEnd   = 0xC000_0000 // first GPA of the PCI hole
	HighRAMBase = 0x1_0000_0000

	PCIMMIOBase = 0xC000_0000 // 32-bit BARs are placed here
	PCIMMIOSize = 0x2000_0000
	ECAMBase    = 0xE000_0000 // PCI Express enhanced configuration space
	ECAMBuses   = 1
	ECAMSize    = ECAMBuses << 20

	IOAPICBase      = 0xFEC0_0000
	LAPICBase       = 0xFEE0_0000
	IdentityMapAddr = 0xFEFF_C000 // one page KVM uses on Intel hosts
	TSSAddr         = 0xFEFF_D000 // three pages KVM uses on Intel hosts
)

// I/O ports, each the first of its device.
const (
	PortI8042Data   = 0x60
	PortI8042Cmd    = 0x64
	PortRTC         = 0x70 // index; data at 0x71
	PortCOM1        = 0x3F8
	PortPVPanic     = 0x505
	PortPM1Event    = 0x600 // status, 2 bytes; enable, 2 bytes
	PortPM1Control  = 0x604 // 2 bytes
	PortPMTimer     = 0x608 // 4 bytes, 24-bit counter at 3.579545 MHz
	PortGPE0        = 0x620 // status, 2 bytes; enable, 2 bytes
	PortPCIAddress  = 0xCF8
	PortReset       = 0xCF9 // ACPI reset register
	PortPCIData     = 0xCFC
	PortPCIHotplug  = 0xAE00 // PCIHotplugPorts ports
	PortBIOSDebug   = 0x80   // POST codes and I/O delay: writes are ignored
	ResetValue      = 0x06
	GPEGenerationID = 0 // GPE0 bit raised when the generation id changed
	GPEPCIHotplug   = 1 // GPE0 bit raised when a PCI device came, or is to go
)

// GSIs on the in-kernel irqchip.
const (
	GSICOM1     = 4
	GSIRTC      = 8
	GSISCI      = 9  // ACPI, level triggered, active high
	GSIPCIFirst = 16 // PCI INTx: GSIPCIFirst + slot%GSIPCICount
	GSIPCICount = 8
)

// Lines and messages a device interrupts the guest with.
type (
	// A Line is a level-triggered or edge-triggered wire into the irqchip.
	// Set may be called from any goroutine.
	Line interface {
		Set(high bool)
	}
	// An MSISender delivers a message-signalled interrupt: what the guest
	// programmed into an MSI-X table entry. SignalMSI may be called from any
	// goroutine.
	MSISender interface {
		SignalMSI(addr uint64, data uint32) error
	}
)

// LineFunc makes a function a Line.
type LineFunc func(high bool)

// Set calls f.
func (f LineFunc) Set(high bool) { f(high) }

// Handler is what a device puts on a Bus. off counts from the start of the
// mapped range and len(p) is 1, 2, 4 or 8. Calls come from any vCPU's thread,
// several at a time: a device locks its own state. Handlers must not retain p
// and never panic: off and p are the guest's choice.
type Handler interface {
	Read(off uint64, p []byte)
	Write(off uint64, p []byte)
}
