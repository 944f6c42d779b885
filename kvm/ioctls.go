package kvm

// The request numbers of the ioctls made here; a test recomputes each from
// its direction, its number and the size of its argument.
const (
	nrGetMSRIndexList     = 0xc004ae02
	nrCreateVM            = 0xae01
	nrCheckExtension      = 0xae03
	nrCreateVCPU          = 0xae41
	nrGetDirtyLog         = 0x4010ae42
	nrSetUserMemoryRegion = 0x4020ae46
	nrSetTSSAddr          = 0xae47
	nrSetIdentityMapAddr  = 0x4008ae48
	nrCreateIRQChip       = 0xae60
	nrIRQLine             = 0x4008ae61
	nrGetIRQChip          = 0xc208ae62
	nrSetIRQChip          = 0x8208ae63
	nrSetGSIRouting       = 0x4008ae6a
	nrIRQFD               = 0x4020ae76
	nrCreatePIT2          = 0x4040ae77
	nrIOEventFD           = 0x4040ae79
	nrSetClock            = 0x4030ae7b
	nrGetClock            = 0x8030ae7c
	nrGetPIT2             = 0x8070ae9f
	nrSetPIT2             = 0x4070aea0
	nrEnableCap           = 0x4068aea3
	nrSignalMSI           = 0x4020aea5
	nrClearDirtyLog       = 0xc018aec0
	nrSetMSRFilter        = 0x4188aec6
	nrResetDirtyRings     = 0xaec7
	nrGetStatsFD          = 0xaece
	nrRun                 = 0xae80
	nrGetRegs             = 0x8090ae81
	nrSetRegs             = 0x4090ae82
	nrGetSregs            = 0x8138ae83
	nrSetSregs            = 0x4138ae84
	nrTranslate           = 0xc018ae85
	nrInterrupt           = 0x4004ae86
	nrGetMSRs             = 0xc008ae88
	nrSetMSRs             = 0x4008ae89
	nrSetSignalMask       = 0x4004ae8b
	nrGetFPU              = 0x81a0ae8c
	nrSetFPU              = 0x41a0ae8d
	nrGetLAPIC            = 0x8400ae8e
	nrSetLAPIC            = 0x4400ae8f
	nrSetCPUID2           = 0x4008ae90
	nrGetCPUID2           = 0xc008ae91
	nrGetMPState          = 0x8004ae98
	nrSetMPState          = 0x4004ae99
	nrNMI                 = 0xae9a
	nrSetGuestDebug       = 0x4048ae9b
	nrGetVCPUEvents       = 0x8040ae9f
	nrSetVCPUEvents       = 0x4040aea0
	nrGetDebugRegs        = 0x8080aea1
	nrSetDebugRegs        = 0x4080aea2
	nrSetTSCKHz           = 0xaea2
	nrGetTSCKHz           = 0xaea3
	nrGetXSave            = 0x9000aea4
	nrSetXSave            = 0x5000aea5
	nrGetXCRS             = 0x8188aea6
	nrSetXCRS             = 0x4188aea7
	nrKVMClockCtrl        = 0xaead
	nrGetXSave2           = 0x9000aecf
)
