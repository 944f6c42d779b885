package kvm

import hype "github.com/c35s/hype/kvm"

// Exit is why Run came back: kvm_run.exit_reason.
type Exit hype.Exit

// The exit reasons that x86 has.
const (
	ExitUnknown       = Exit(hype.ExitUnknown)
	ExitException     = Exit(hype.ExitException)
	ExitIO            = Exit(hype.ExitIO)
	ExitHypercall     = Exit(hype.ExitHypercall)
	ExitDebug         = Exit(hype.ExitDebug)
	ExitHLT           = Exit(hype.ExitHLT)
	ExitMMIO          = Exit(hype.ExitMMIO)
	ExitIRQWindowOpen = Exit(hype.ExitIRQWindowOpen)
	ExitShutdown      = Exit(hype.ExitShutdown)
	ExitFailEntry     = Exit(hype.ExitFailEntry)
	ExitIntr          = Exit(hype.ExitIntr)
	ExitSetTPR        = Exit(hype.ExitSetTPR)
	ExitTPRAccess     = Exit(hype.ExitTPRAccess)
	ExitNMI           = Exit(hype.ExitNMI)
	ExitInternalError = Exit(hype.ExitInternalError)
	ExitWatchdog      = Exit(hype.ExitWatchdog)
	ExitSystemEvent   = Exit(hype.ExitSystemEvent)
	ExitIOAPICEOI     = Exit(hype.ExitIOAPICEOI)
	ExitHyperV        = Exit(hype.ExitHyperV)
	ExitX86RDMSR      = Exit(hype.ExitX86RDMSR)
	ExitX86WRMSR      = Exit(hype.ExitX86WRMSR)
	ExitDirtyRingFull = Exit(hype.ExitDirtyRingFull)
	ExitAPResetHold   = Exit(hype.ExitAPResetHold)
	ExitX86BusLock    = Exit(hype.ExitX86BusLock)
	ExitXen           = Exit(hype.ExitXen)
	ExitNotify        = Exit(hype.ExitNotify)
	ExitMemoryFault   = Exit(39) // younger than hype
	ExitTDX           = Exit(40) // younger than hype
)

// String returns the kernel's name for the exit reason.
func (e Exit) String() string {
	switch e {
	case ExitMemoryFault:
		return "KVM_EXIT_MEMORY_FAULT"
	case ExitTDX:
		return "KVM_EXIT_TDX"
	}
	return hype.Exit(e).String()
}

// Suberrors of ExitInternalError.
const (
	InternalErrorEmulation            = 1 // the instruction emulator does not know an instruction
	InternalErrorSimultaneous         = 2 // exceptions that cannot happen together did
	InternalErrorDeliveryEvent        = 3 // an exit while an event was delivered
	InternalErrorUnexpectedExitReason = 4
)

// Types of ExitSystemEvent.
const (
	SystemEventShutdown      = 1
	SystemEventReset         = 2
	SystemEventCrash         = 3
	SystemEventWakeup        = 4
	SystemEventSuspend       = 5
	SystemEventSEVTerminated = 6
	SystemEventTDXFatal      = 7
)

// MemoryFaultPrivate is set in MemoryFault.Flags when the guest asked for
// private memory.
const MemoryFaultPrivate = 1 << 3

// Why an MSR access came to user space: bits of MSRExit.Reason, and what
// EnableCap(CapX86UserSpaceMSR) takes.
const (
	MSRExitInvalid = 1 << 0 // the access is one the guest may not make
	MSRExitUnknown = 1 << 1 // KVM does not know the MSR
	MSRExitFilter  = 1 << 2 // the MSR filter refused it
)
