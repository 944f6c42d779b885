package kvm

import hype "github.com/c35s/hype/kvm"

// Types shared with hype; each has the layout of its C struct.
type (
	// Regs are the general-purpose registers (struct kvm_regs).
	Regs = hype.Regs
	// Sregs are the segment, table and control registers (struct kvm_sregs).
	Sregs = hype.Sregs
	// Segment is one segment register with its hidden part (struct kvm_segment).
	Segment = hype.Segment
	// Dtable is GDTR or IDTR (struct kvm_dtable).
	Dtable = hype.Dtable
	// MSREntry is an MSR and its value (struct kvm_msr_entry).
	MSREntry = hype.MSREntry
	// FPU is the x87 and SSE state (struct kvm_fpu).
	FPU = hype.FPU
	// CPUIDEntry is one CPUID leaf or subleaf (struct kvm_cpuid_entry2).
	CPUIDEntry = hype.CPUIDEntry2
	// PITConfig chooses how the PIT is made (struct kvm_pit_config).
	PITConfig = hype.PITConfig
)

// Bits of CPUIDEntry.Flags.
const (
	CPUIDSignificantIndex = hype.CPUIDFlagSignificantIndex // Index tells the subleaf
	CPUIDStatefulFunc     = hype.CPUIDFlagStatefulFunc
	CPUIDStateReadNext    = hype.CPUIDFlagStateReadNext
)

// PITSpeakerDummy in PITConfig.Flags gives port 0x61 to the in-kernel PIT.
const PITSpeakerDummy = hype.PITSpeakerDummy

// Flags for SetMemory.
const (
	MemLogDirtyPages = hype.MemLogDirtyPages // writes are logged: DirtyLog, dirty ring
	MemReadonly      = hype.MemReadonly      // writes exit with ExitMMIO
	MemGuestMemFD    = 1 << 2
)

// ClockData is the guest's kvmclock (struct kvm_clock_data).
type ClockData struct {
	Clock    uint64 // nanoseconds the guest's clock shows
	Flags    uint32 // Clock* bits
	_        uint32
	Realtime uint64 // host CLOCK_REALTIME in nanoseconds when Clock was read, if ClockRealtime
	HostTSC  uint64 // host TSC when Clock was read, if ClockHostTSC
	_        [4]uint32
}

// Bits of ClockData.Flags. SetClock takes only ClockRealtime, which makes KVM
// add the time since Realtime to Clock.
const (
	ClockTSCStable = 1 << 1
	ClockRealtime  = 1 << 2
	ClockHostTSC   = 1 << 3
)

// MPState is what a VCPU is doing (struct kvm_mp_state).
type MPState uint32

// The states that x86 has.
const (
	MPRunnable      MPState = 0
	MPUninitialized MPState = 1 // an application processor that has seen no INIT
	MPInitReceived  MPState = 2
	MPHalted        MPState = 3
	MPSIPIReceived  MPState = 4
	MPAPResetHold   MPState = 9
)

// String returns the state's name.
func (s MPState) String() string {
	switch s {
	case MPRunnable:
		return "runnable"
	case MPUninitialized:
		return "uninitialized"
	case MPInitReceived:
		return "init-received"
	case MPHalted:
		return "halted"
	case MPSIPIReceived:
		return "sipi-received"
	case MPAPResetHold:
		return "ap-reset-hold"
	}
	return "unknown"
}

// Control bits of SetGuestDebug.
const (
	GuestDebugEnable     = 0x00000001
	GuestDebugSingleStep = 0x00000002
	GuestDebugUseSWBP    = 0x00010000 // INT3 exits
	GuestDebugUseHWBP    = 0x00020000 // dr[0:4] and dr[7] are set for the debugger
	GuestDebugInjectDB   = 0x00040000
	GuestDebugInjectBP   = 0x00080000
	GuestDebugBlockIRQ   = 0x00100000
)

// VCPUEvents are exceptions, interrupts and NMIs on their way into the guest
// (struct kvm_vcpu_events).
type VCPUEvents struct {
	Exception           ExceptionEvent
	Interrupt           InterruptEvent
	NMI                 NMIEvent
	SIPIVector          uint32
	Flags               uint32 // EventsValid* bits: which parts SetEvents takes
	SMI                 SMIEvent
	TripleFaultPending  uint8
	_                   [26]byte
	ExceptionHasPayload uint8
	ExceptionPayload    uint64
}

// ExceptionEvent is the exception part of VCPUEvents.
type ExceptionEvent struct {
	Injected, Nr, HasErrorCode, Pending uint8
	ErrorCode                           uint32
}

// InterruptEvent is the interrupt part of VCPUEvents. Shadow has Shadow* bits.
type InterruptEvent struct{ Injected, Nr, Soft, Shadow uint8 }

// NMIEvent is the NMI part of VCPUEvents.
type NMIEvent struct{ Injected, Pending, Masked, _ uint8 }

// SMIEvent is the system management part of VCPUEvents.
type SMIEvent struct{ SMM, Pending, SMMInsideNMI, LatchedInit uint8 }

// Bits of VCPUEvents.Flags.
const (
	EventsValidNMIPending  = 0x01
	EventsValidSIPIVector  = 0x02
	EventsValidShadow      = 0x04
	EventsValidSMM         = 0x08
	EventsValidPayload     = 0x10
	EventsValidTripleFault = 0x20
)

// Bits of InterruptEvent.Shadow: the instruction before keeps interrupts out.
const (
	ShadowMovSS = 0x01
	ShadowSTI   = 0x02
)

// DebugRegs are the guest's own debug registers (struct kvm_debugregs).
type DebugRegs struct {
	DB    [4]uint64
	DR6   uint64
	DR7   uint64
	Flags uint64
	_     [9]uint64
}

// XCRS are the extended control registers (struct kvm_xcrs).
type XCRS struct {
	Count uint32
	Flags uint32
	XCR   [16]XCR
	_     [16]uint64
}

// XCR is one extended control register (struct kvm_xcr).
type XCR struct {
	Index uint32
	_     uint32
	Value uint64
}

// LAPIC is the local APIC's register page (struct kvm_lapic_state).
type LAPIC = [1024]byte

// Translation is the guest's page tables' answer for one address (struct
// kvm_translation).
type Translation struct {
	LinearAddress   uint64
	PhysicalAddress uint64
	Valid           bool
	Writable        bool
	UserMode        bool
	_               [5]byte
}

// PITState is the in-kernel 8254 (struct kvm_pit_state2).
type PITState struct {
	Channels [3]PITChannel
	Flags    uint32 // PIT* bits
	_        [9]uint32
}

// PITChannel is one counter of the PIT (struct kvm_pit_channel_state).
type PITChannel struct {
	Count         uint32 // may be 65536
	LatchedCount  uint16
	CountLatched  uint8
	StatusLatched uint8
	Status        uint8
	ReadState     uint8
	WriteState    uint8
	WriteLatch    uint8
	RWMode        uint8
	Mode          uint8
	BCD           uint8
	Gate          uint8
	CountLoadTime int64 // host nanoseconds
}

// Bits of PITState.Flags.
const (
	PITHPETLegacy    = 1 << 0
	PITSpeakerDataOn = 1 << 1
)

// IRQChip is the state of one in-kernel interrupt controller (struct
// kvm_irqchip): struct kvm_pic_state or kvm_ioapic_state, as ID says.
type IRQChip struct {
	ID    uint32
	_     uint32
	State [512]byte
}

// In-kernel interrupt controllers.
const (
	IRQChipPICMaster = 0 // 16 bytes of state
	IRQChipPICSlave  = 1 // 16 bytes of state
	IRQChipIOAPIC    = 2 // 216 bytes of state
)

// Structs that only the ioctls see.
type (
	userspaceMemoryRegion = hype.UserspaceMemoryRegion
	irqfdConfig           = hype.IRQFDConfig

	irqLevel struct {
		irq   uint32
		level uint32
	}
	msi struct {
		addressLo uint32
		addressHi uint32
		data      uint32
		_         uint32 // flags
		_         uint32 // device id
		_         [12]byte
	}
	ioEventFD struct {
		datamatch uint64
		addr      uint64
		length    uint32
		fd        int32
		flags     uint32
		_         [36]byte
	}
	enableCap struct {
		cap  uint32
		_    uint32 // flags
		args [4]uint64
		_    [64]byte
	}
	dirtyLog struct {
		slot   uint32
		_      uint32
		bitmap *uint64
	}
	clearDirtyLog struct {
		slot      uint32
		numPages  uint32
		firstPage uint64
		bitmap    *uint64
	}
	signalMask struct {
		length uint32
		set    [8]byte
	}
	guestDebug struct {
		control uint32
		_       uint32
		dr      [8]uint64
	}
	msrs struct {
		count   uint32
		_       uint32
		entries [maxMSRs]MSREntry
	}
	cpuid struct {
		count   uint32
		_       uint32
		entries [maxCPUIDEntries]CPUIDEntry
	}
)

const (
	maxMSRs         = 256 // KVM's MAX_IO_MSRS
	maxCPUIDEntries = 256 // KVM_MAX_CPUID_ENTRIES

	irqfdDeassign = 1 << 0
	irqfdResample = 1 << 1

	ioEventFDDatamatch = 1 << 0
	ioEventFDPIO       = 1 << 1
	ioEventFDDeassign  = 1 << 2

	routeIRQChip = 1
	routeMSI     = 2
)
