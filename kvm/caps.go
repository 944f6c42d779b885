package kvm

import (
	hype "github.com/c35s/hype/kvm"
)

// Cap is a capability that System.Check and VM.Check ask about and EnableCap
// turns on.
type Cap hype.Cap

// The capabilities that Linux has on x86; api.rst tells what each means.
const (
	CapIRQChip                  = Cap(hype.CapIRQChip)
	CapHLT                      = Cap(hype.CapHLT)
	CapMMUShadowCacheControl    = Cap(hype.CapMMUShadowCacheControl)
	CapUserMemory               = Cap(hype.CapUserMemory)
	CapSetTSSAddr               = Cap(hype.CapSetTSSAddr)
	CapVAPIC                    = Cap(hype.CapVAPIC)
	CapExtCPUID                 = Cap(hype.CapExtCPUID)
	CapClockSource              = Cap(hype.CapClockSource)
	CapNrVCPUs                  = Cap(hype.CapNrVCPUs)
	CapNrMemslots               = Cap(hype.CapNrMemslots)
	CapPIT                      = Cap(hype.CapPIT)
	CapNopIODelay               = Cap(hype.CapNopIODelay)
	CapPVMMU                    = Cap(hype.CapPVMMU)
	CapMPState                  = Cap(hype.CapMPState)
	CapCoalescedMMIO            = Cap(hype.CapCoalescedMMIO)
	CapSyncMMU                  = Cap(hype.CapSyncMMU)
	CapIOMMU                    = Cap(hype.CapIOMMU)
	CapDestroyMemoryRegionWorks = Cap(hype.CapDestroyMemoryRegionWorks)
	CapUserNMI                  = Cap(hype.CapUserNMI)
	CapSetGuestDebug            = Cap(hype.CapSetGuestDebug)
	CapReinjectControl          = Cap(hype.CapReinjectControl)
	CapIRQRouting               = Cap(hype.CapIRQRouting)
	CapIRQInjectStatus          = Cap(hype.CapIRQInjectStatus)
	CapAssignDevIRQ             = Cap(hype.CapAssignDevIRQ)
	CapJoinMemoryRegionsWorks   = Cap(hype.CapJoinMemoryRegionsWorks)
	CapMCE                      = Cap(hype.CapMCE)
	CapIRQFD                    = Cap(hype.CapIRQFD)
	CapPIT2                     = Cap(hype.CapPIT2)
	CapSetBootCPUID             = Cap(hype.CapSetBootCPUID)
	CapPITState2                = Cap(hype.CapPITState2)
	CapIOEventFD                = Cap(hype.CapIOEventFD)
	CapSetIdentityMapAddr       = Cap(hype.CapSetIdentityMapAddr)
	CapXenHVM                   = Cap(hype.CapXenHVM)
	CapAdjustClock              = Cap(hype.CapAdjustClock)
	CapInternalErrorData        = Cap(hype.CapInternalErrorData)
	CapVCPUEvents               = Cap(hype.CapVCPUEvents)
	CapHyperV                   = Cap(hype.CapHyperV)
	CapHyperVVAPIC              = Cap(hype.CapHyperVVAPIC)
	CapHyperVSpin               = Cap(hype.CapHyperVSpin)
	CapPCISegment               = Cap(hype.CapPCISegment)
	CapIntrShadow               = Cap(hype.CapIntrShadow)
	CapDebugRegs                = Cap(hype.CapDebugRegs)
	CapX86RobustSingleStep      = Cap(hype.CapX86RobustSingleStep)
	CapEnableCap                = Cap(hype.CapEnableCap)
	CapXSave                    = Cap(hype.CapXSave)
	CapXCRS                     = Cap(hype.CapXCRS)
	CapAsyncPF                  = Cap(hype.CapAsyncPF)
	CapTSCControl               = Cap(hype.CapTSCControl)
	CapGetTSCKHz                = Cap(hype.CapGetTSCKHz)
	CapMaxVCPUs                 = Cap(hype.CapMaxVCPUs)
	CapTSCDeadlineTimer         = Cap(hype.CapTSCDeadlineTimer)
	CapSyncRegs                 = Cap(hype.CapSyncRegs)
	CapPCI23                    = Cap(hype.CapPCI23)
	CapKVMClockCtrl             = Cap(hype.CapKVMClockCtrl)
	CapSignalMSI                = Cap(hype.CapSignalMSI)
	CapReadonlyMem              = Cap(hype.CapReadonlyMem)
	CapIRQFDResample            = Cap(hype.CapIRQFDResample)
	CapDeviceCtrl               = Cap(hype.CapDeviceCtrl)
	CapExtEmulCPUID             = Cap(hype.CapExtEmulCPUID)
	CapHyperVTime               = Cap(hype.CapHyperVTime)
	CapIOAPICPolarityIgnored    = Cap(hype.CapIOAPICPolarityIgnored)
	CapEnableCapVM              = Cap(hype.CapEnableCapVM)
	CapIOEventFDNoLength        = Cap(hype.CapIOEventFDNoLength)
	CapVMAttributes             = Cap(hype.CapVMAttributes)
	CapCheckExtensionVM         = Cap(hype.CapCheckExtensionVM)
	CapDisableQuirks            = Cap(hype.CapDisableQuirks)
	CapX86SMM                   = Cap(hype.CapX86SMM)
	CapGuestDebugHWBPS          = Cap(hype.CapGuestDebugHWBPS)
	CapGuestDebugHWWPS          = Cap(hype.CapGuestDebugHWWPS)
	CapSplitIRQChip             = Cap(hype.CapSplitIRQChip)
	CapIOEventFDAnyLength       = Cap(hype.CapIOEventFDAnyLength)
	CapHyperVSYNIC              = Cap(hype.CapHyperVSYNIC)
	CapVCPUAttributes           = Cap(hype.CapVCPUAttributes)
	CapMaxVCPUID                = Cap(hype.CapMaxVCPUID)
	CapX2APICAPI                = Cap(hype.CapX2APICAPI)
	CapMSIDevid                 = Cap(hype.CapMSIDevid)
	CapImmediateExit            = Cap(hype.CapImmediateExit)
	CapX86DisableExits          = Cap(hype.CapX86DisableExits)
	CapHyperVSYNIC2             = Cap(hype.CapHyperVSYNIC2)
	CapHyperVVPIndex            = Cap(hype.CapHyperVVPIndex)
	CapGetMSRFeatures           = Cap(hype.CapGetMSRFeatures)
	CapHyperVEventFD            = Cap(hype.CapHyperVEventFD)
	CapHyperVTLBFlush           = Cap(hype.CapHyperVTLBFlush)
	CapNestedState              = Cap(hype.CapNestedState)
	CapMSRPlatformInfo          = Cap(hype.CapMSRPlatformInfo)
	CapHyperVSendIPI            = Cap(hype.CapHyperVSendIPI)
	CapCoalescedPIO             = Cap(hype.CapCoalescedPIO)
	CapHyperVEnlightenedVMCS    = Cap(hype.CapHyperVEnlightenedVMCS)
	CapExceptionPayload         = Cap(hype.CapExceptionPayload)
	CapManualDirtyLogProtect    = Cap(hype.CapManualDirtyLogProtect)
	CapHyperVCPUID              = Cap(hype.CapHyperVCPUID)
	CapManualDirtyLogProtect2   = Cap(hype.CapManualDirtyLogProtect2)
	CapPMUEventFilter           = Cap(hype.CapPMUEventFilter)
	CapHyperVDirectTLBFlush     = Cap(hype.CapHyperVDirectTLBFlush)
	CapHaltPoll                 = Cap(hype.CapHaltPoll)
	CapAsyncPFInt               = Cap(hype.CapAsyncPFInt)
	CapLastCPU                  = Cap(hype.CapLastCPU)
	CapSmallerMaxPhyAddr        = Cap(hype.CapSmallerMaxPhyAddr)
	CapStealTime                = Cap(hype.CapStealTime)
	CapX86UserSpaceMSR          = Cap(hype.CapX86UserSpaceMSR)
	CapX86MSRFilter             = Cap(hype.CapX86MSRFilter)
	CapEnforcePVFeatureCPUID    = Cap(hype.CapEnforcePVFeatureCPUID)
	CapSysHyperVCPUID           = Cap(hype.CapSysHyperVCPUID)
	CapDirtyLogRing             = Cap(hype.CapDirtyLogRing)
	CapX86BusLockExit           = Cap(hype.CapX86BusLockExit)
	CapSetGuestDebug2           = Cap(hype.CapSetGuestDebug2)
	CapSGXAttribute             = Cap(hype.CapSGXAttribute)
	CapVMCopyEncContextFrom     = Cap(hype.CapVMCopyEncContextFrom)
	CapPTPKVM                   = Cap(hype.CapPTPKVM)
	CapHyperVEnforceCPUID       = Cap(hype.CapHyperVEnforceCPUID)
	CapSRegs2                   = Cap(hype.CapSRegs2)
	CapExitHypercall            = Cap(hype.CapExitHypercall)
	CapBinaryStatsFD            = Cap(hype.CapBinaryStatsFD)
	CapExitOnEmulationFailure   = Cap(hype.CapExitOnEmulationFailure)
	CapVMMoveEncContextFrom     = Cap(hype.CapVMMoveEncContextFrom)
	CapVMGPABits                = Cap(hype.CapVMGPABits)
	CapXSave2                   = Cap(hype.CapXSave2)
	CapSysAttributes            = Cap(hype.CapSysAttributes)
	CapPMUCapability            = Cap(hype.CapPMUCapability)
	CapDisableQuirks2           = Cap(hype.CapDisableQuirks2)
	CapVMTSCControl             = Cap(hype.CapVMTSCControl)
	CapSystemEventData          = Cap(hype.CapSystemEventData)
	CapX86TripleFaultEvent      = Cap(hype.CapX86TripleFaultEvent)
	CapX86NotifyVMExit          = Cap(hype.CapX86NotifyVMExit)
	CapVMDisableNXHugePages     = Cap(hype.CapVMDisableNXHugePages)
	CapDirtyLogRingAcqRel       = Cap(hype.CapDirtyLogRingAcqRel)

	// Younger than hype.
	CapDirtyLogRingWithBitmap = Cap(225)
	CapPMUEventMaskedEvents   = Cap(226)
	CapUserMemory2            = Cap(231)
	CapMemoryFaultInfo        = Cap(232)
	CapMemoryAttributes       = Cap(233)
	CapGuestMemFD             = Cap(234)
	CapVMTypes                = Cap(235)
	CapPreFaultMemory         = Cap(236)
	CapX86APICBusCyclesNS     = Cap(237)
	CapX86GuestMode           = Cap(238)
	CapGuestMemFDFlags        = Cap(244)
)

var youngCaps = map[Cap]string{
	CapDirtyLogRingWithBitmap: "KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP",
	CapPMUEventMaskedEvents:   "KVM_CAP_PMU_EVENT_MASKED_EVENTS",
	CapUserMemory2:            "KVM_CAP_USER_MEMORY2",
	CapMemoryFaultInfo:        "KVM_CAP_MEMORY_FAULT_INFO",
	CapMemoryAttributes:       "KVM_CAP_MEMORY_ATTRIBUTES",
	CapGuestMemFD:             "KVM_CAP_GUEST_MEMFD",
	CapVMTypes:                "KVM_CAP_VM_TYPES",
	CapPreFaultMemory:         "KVM_CAP_PRE_FAULT_MEMORY",
	CapX86APICBusCyclesNS:     "KVM_CAP_X86_APIC_BUS_CYCLES_NS",
	CapX86GuestMode:           "KVM_CAP_X86_GUEST_MODE",
	CapGuestMemFDFlags:        "KVM_CAP_GUEST_MEMFD_FLAGS",
}

// String returns the kernel's name for the capability.
func (c Cap) String() string {
	if name, ok := youngCaps[c]; ok {
		return name
	}
	return hype.Cap(c).String()
}
