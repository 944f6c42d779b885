package kvm

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"sort"
	"strconv"
	"strings"
	"testing"
)

// cLayout is a Go type beside the C struct whose bytes it is.
type cLayout struct {
	goType any
	cName  string            // empty for a part of struct kvm_run
	fields map[string]string // Go field path -> C member path
	// flexible: the C struct ends in an array without a length, so sizes differ.
	flexible bool
}

var layouts = []cLayout{
	{goType: Regs{}, cName: "struct kvm_regs", fields: map[string]string{
		"RAX": "rax", "RBX": "rbx", "RCX": "rcx", "RDX": "rdx", "RSI": "rsi", "RDI": "rdi", "RSP": "rsp", "RBP": "rbp",
		"R8": "r8", "R9": "r9", "R10": "r10", "R11": "r11", "R12": "r12", "R13": "r13", "R14": "r14", "R15": "r15",
		"RIP": "rip", "RFlags": "rflags",
	}},
	{goType: Sregs{}, cName: "struct kvm_sregs", fields: map[string]string{
		"CS": "cs", "DS": "ds", "ES": "es", "FS": "fs", "GS": "gs", "SS": "ss", "TR": "tr", "LDT": "ldt",
		"GDT": "gdt", "IDT": "idt", "CR0": "cr0", "CR2": "cr2", "CR3": "cr3", "CR4": "cr4", "CR8": "cr8",
		"EFER": "efer", "APICBase": "apic_base", "InterruptBitmap": "interrupt_bitmap",
	}},
	{goType: Segment{}, cName: "struct kvm_segment", fields: map[string]string{
		"Base": "base", "Limit": "limit", "Selector": "selector", "Type": "type", "Present": "present", "DPL": "dpl",
		"DB": "db", "S": "s", "L": "l", "G": "g", "Avl": "avl", "Unusable": "unusable",
	}},
	{goType: Dtable{}, cName: "struct kvm_dtable", fields: map[string]string{"Base": "base", "Limit": "limit"}},
	{goType: MSREntry{}, cName: "struct kvm_msr_entry", fields: map[string]string{"Index": "index", "Data": "data"}},
	{goType: msrs{}, cName: "struct kvm_msrs", flexible: true, fields: map[string]string{"count": "nmsrs", "entries": "entries"}},
	{goType: FPU{}, cName: "struct kvm_fpu", fields: map[string]string{
		"FPR": "fpr", "FCW": "fcw", "FSW": "fsw", "FTWX": "ftwx", "LastOpcode": "last_opcode", "LastIP": "last_ip",
		"LastDP": "last_dp", "XMM": "xmm", "MXCSR": "mxcsr",
	}},
	{goType: CPUIDEntry{}, cName: "struct kvm_cpuid_entry2", fields: map[string]string{
		"Function": "function", "Index": "index", "Flags": "flags", "EAX": "eax", "EBX": "ebx", "ECX": "ecx", "EDX": "edx",
	}},
	{goType: cpuid{}, cName: "struct kvm_cpuid2", flexible: true, fields: map[string]string{"count": "nent", "entries": "entries"}},
	{goType: PITConfig{}, cName: "struct kvm_pit_config", fields: map[string]string{"Flags": "flags"}},
	{goType: ClockData{}, cName: "struct kvm_clock_data", fields: map[string]string{
		"Clock": "clock", "Flags": "flags", "Realtime": "realtime", "HostTSC": "host_tsc",
	}},
	{goType: MPState(0), cName: "struct kvm_mp_state"},
	{goType: VCPUEvents{}, cName: "struct kvm_vcpu_events", fields: map[string]string{
		"Exception.Injected": "exception.injected", "Exception.Nr": "exception.nr",
		"Exception.HasErrorCode": "exception.has_error_code", "Exception.Pending": "exception.pending",
		"Exception.ErrorCode": "exception.error_code",
		"Interrupt.Injected":  "interrupt.injected", "Interrupt.Nr": "interrupt.nr", "Interrupt.Soft": "interrupt.soft",
		"Interrupt.Shadow": "interrupt.shadow",
		"NMI.Injected":     "nmi.injected", "NMI.Pending": "nmi.pending", "NMI.Masked": "nmi.masked",
		"SIPIVector": "sipi_vector", "Flags": "flags",
		"SMI.SMM": "smi.smm", "SMI.Pending": "smi.pending", "SMI.SMMInsideNMI": "smi.smm_inside_nmi",
		"SMI.LatchedInit": "smi.latched_init", "TripleFaultPending": "triple_fault.pending",
		"ExceptionHasPayload": "exception_has_payload", "ExceptionPayload": "exception_payload",
	}},
	{goType: DebugRegs{}, cName: "struct kvm_debugregs", fields: map[string]string{
		"DB": "db", "DR6": "dr6", "DR7": "dr7", "Flags": "flags",
	}},
	{goType: XCRS{}, cName: "struct kvm_xcrs", fields: map[string]string{"Count": "nr_xcrs", "Flags": "flags", "XCR": "xcrs"}},
	{goType: XCR{}, cName: "struct kvm_xcr", fields: map[string]string{"Index": "xcr", "Value": "value"}},
	{goType: LAPIC{}, cName: "struct kvm_lapic_state"},
	{goType: Translation{}, cName: "struct kvm_translation", fields: map[string]string{
		"LinearAddress": "linear_address", "PhysicalAddress": "physical_address", "Valid": "valid",
		"Writable": "writeable", "UserMode": "usermode",
	}},
	{goType: PITState{}, cName: "struct kvm_pit_state2", fields: map[string]string{"Channels": "channels", "Flags": "flags"}},
	{goType: PITChannel{}, cName: "struct kvm_pit_channel_state", fields: map[string]string{
		"Count": "count", "LatchedCount": "latched_count", "CountLatched": "count_latched", "StatusLatched": "status_latched",
		"Status": "status", "ReadState": "read_state", "WriteState": "write_state", "WriteLatch": "write_latch",
		"RWMode": "rw_mode", "Mode": "mode", "BCD": "bcd", "Gate": "gate", "CountLoadTime": "count_load_time",
	}},
	{goType: IRQChip{}, cName: "struct kvm_irqchip", fields: map[string]string{"ID": "chip_id", "State": "chip"}},
	{goType: userspaceMemoryRegion{}, cName: "struct kvm_userspace_memory_region", fields: map[string]string{
		"Slot": "slot", "Flags": "flags", "GuestPhysAddr": "guest_phys_addr", "MemorySize": "memory_size",
		"UserspaceAddr": "userspace_addr",
	}},
	{goType: irqfdConfig{}, cName: "struct kvm_irqfd", fields: map[string]string{
		"Fd": "fd", "GSI": "gsi", "Flags": "flags", "ResampleFD": "resamplefd",
	}},
	{goType: irqLevel{}, cName: "struct kvm_irq_level", fields: map[string]string{"irq": "irq", "level": "level"}},
	{goType: msi{}, cName: "struct kvm_msi", fields: map[string]string{
		"addressLo": "address_lo", "addressHi": "address_hi", "data": "data",
	}},
	{goType: ioEventFD{}, cName: "struct kvm_ioeventfd", fields: map[string]string{
		"datamatch": "datamatch", "addr": "addr", "length": "len", "fd": "fd", "flags": "flags",
	}},
	{goType: enableCap{}, cName: "struct kvm_enable_cap", fields: map[string]string{"cap": "cap", "args": "args"}},
	{goType: dirtyLog{}, cName: "struct kvm_dirty_log", fields: map[string]string{"slot": "slot", "bitmap": "dirty_bitmap"}},
	{goType: clearDirtyLog{}, cName: "struct kvm_clear_dirty_log", fields: map[string]string{
		"slot": "slot", "numPages": "num_pages", "firstPage": "first_page", "bitmap": "dirty_bitmap",
	}},
	{goType: signalMask{}, cName: "struct kvm_signal_mask", flexible: true, fields: map[string]string{"length": "len", "set": "sigset"}},
	{goType: guestDebug{}, cName: "struct kvm_guest_debug", fields: map[string]string{"control": "control", "dr": "arch.debugreg"}},
	{goType: msrFilter{}, cName: "struct kvm_msr_filter", fields: map[string]string{"ranges": "ranges"}},
	{goType: msrFilterRange{}, cName: "struct kvm_msr_filter_range", fields: map[string]string{
		"flags": "flags", "count": "nmsrs", "base": "base", "bitmap": "bitmap",
	}},
	{goType: dirtyGFN{}, cName: "struct kvm_dirty_gfn", fields: map[string]string{"flags": "flags", "slot": "slot", "offset": "offset"}},
	{goType: statsHeader{}, cName: "struct kvm_stats_header", fields: map[string]string{
		"Flags": "flags", "NameSize": "name_size", "Count": "num_desc", "IDOffset": "id_offset",
		"DescOffset": "desc_offset", "DataOffset": "data_offset",
	}},
	{goType: statsDesc{}, cName: "struct kvm_stats_desc", fields: map[string]string{
		"Flags": "flags", "Exponent": "exponent", "Size": "size", "Offset": "offset", "BucketSize": "bucket_size",
	}},
	{goType: SyncRegs{}, cName: "struct kvm_sync_regs", fields: map[string]string{"Regs": "regs", "Sregs": "sregs", "Events": "events"}},
	{goType: DebugExit{}, cName: "struct kvm_debug_exit_arch", fields: map[string]string{
		"Exception": "exception", "PC": "pc", "DR6": "dr6", "DR7": "dr7",
	}},
	{goType: runPage{}, cName: "struct kvm_run", fields: map[string]string{
		"request": "request_interrupt_window", "exitReason": "exit_reason",
		"readyForInterruptInjection": "ready_for_interrupt_injection", "ifFlag": "if_flag", "flags": "flags", "cr8": "cr8",
		"apicBase": "apic_base", "exit": "hw", "validRegs": "kvm_valid_regs", "dirtyRegs": "kvm_dirty_regs", "sync": "s.regs",
	}},
	// Members of struct kvm_run's union, each at runPage.exit.
	{goType: ioExit{}, fields: map[string]string{
		"direction": "io.direction", "size": "io.size", "port": "io.port", "count": "io.count", "offset": "io.data_offset",
	}},
	{goType: MMIOExit{}, fields: map[string]string{
		"Addr": "mmio.phys_addr", "Data": "mmio.data", "Len": "mmio.len", "IsWrite": "mmio.is_write",
	}},
	{goType: internalErrorExit{}, fields: map[string]string{
		"suberror": "internal.suberror", "ndata": "internal.ndata", "data": "internal.data",
	}},
	{goType: emulationFailureExit{}, fields: map[string]string{
		"suberror": "emulation_failure.suberror", "ndata": "emulation_failure.ndata", "flags": "emulation_failure.flags",
		"insnSize": "emulation_failure.insn_size", "insn": "emulation_failure.insn_bytes",
	}},
	{goType: DebugExit{}, fields: map[string]string{"Exception": "debug.arch.exception"}},
	{goType: systemEventExit{}, fields: map[string]string{
		"kind": "system_event.type", "ndata": "system_event.ndata", "data": "system_event.data",
	}},
	{goType: FailEntry{}, fields: map[string]string{
		"Reason": "fail_entry.hardware_entry_failure_reason", "CPU": "fail_entry.cpu",
	}},
	{goType: MSRExit{}, fields: map[string]string{
		"Error": "msr.error", "Reason": "msr.reason", "Index": "msr.index", "Data": "msr.data",
	}},
}

// Directions of an ioctl, as asm-generic/ioctl.h has them.
const (
	none  = 0
	write = 1
	read  = 2
)

// ioctls has every request number and what it is made of. arg is the
// argument's type, and size its size where the type here is longer than the C
// struct, which ends in a flexible array.
var ioctls = []struct {
	name   string
	number uintptr
	dir    uintptr
	nr     uintptr
	arg    any
	size   uintptr
}{
	{name: "KVM_GET_MSR_INDEX_LIST", number: nrGetMSRIndexList, dir: read | write, nr: 0x02, size: 4},
	{name: "KVM_CREATE_VM", number: nrCreateVM, nr: 0x01},
	{name: "KVM_CHECK_EXTENSION", number: nrCheckExtension, nr: 0x03},
	{name: "KVM_CREATE_VCPU", number: nrCreateVCPU, nr: 0x41},
	{name: "KVM_GET_DIRTY_LOG", number: nrGetDirtyLog, dir: write, nr: 0x42, arg: dirtyLog{}},
	{name: "KVM_SET_USER_MEMORY_REGION", number: nrSetUserMemoryRegion, dir: write, nr: 0x46, arg: userspaceMemoryRegion{}},
	{name: "KVM_SET_TSS_ADDR", number: nrSetTSSAddr, nr: 0x47},
	{name: "KVM_SET_IDENTITY_MAP_ADDR", number: nrSetIdentityMapAddr, dir: write, nr: 0x48, arg: uint64(0)},
	{name: "KVM_CREATE_IRQCHIP", number: nrCreateIRQChip, nr: 0x60},
	{name: "KVM_IRQ_LINE", number: nrIRQLine, dir: write, nr: 0x61, arg: irqLevel{}},
	{name: "KVM_GET_IRQCHIP", number: nrGetIRQChip, dir: read | write, nr: 0x62, arg: IRQChip{}},
	{name: "KVM_SET_IRQCHIP", number: nrSetIRQChip, dir: read, nr: 0x63, arg: IRQChip{}},
	{name: "KVM_SET_GSI_ROUTING", number: nrSetGSIRouting, dir: write, nr: 0x6a, size: 8},
	{name: "KVM_IRQFD", number: nrIRQFD, dir: write, nr: 0x76, arg: irqfdConfig{}},
	{name: "KVM_CREATE_PIT2", number: nrCreatePIT2, dir: write, nr: 0x77, arg: PITConfig{}},
	{name: "KVM_IOEVENTFD", number: nrIOEventFD, dir: write, nr: 0x79, arg: ioEventFD{}},
	{name: "KVM_SET_CLOCK", number: nrSetClock, dir: write, nr: 0x7b, arg: ClockData{}},
	{name: "KVM_GET_CLOCK", number: nrGetClock, dir: read, nr: 0x7c, arg: ClockData{}},
	{name: "KVM_GET_PIT2", number: nrGetPIT2, dir: read, nr: 0x9f, arg: PITState{}},
	{name: "KVM_SET_PIT2", number: nrSetPIT2, dir: write, nr: 0xa0, arg: PITState{}},
	{name: "KVM_ENABLE_CAP", number: nrEnableCap, dir: write, nr: 0xa3, arg: enableCap{}},
	{name: "KVM_SIGNAL_MSI", number: nrSignalMSI, dir: write, nr: 0xa5, arg: msi{}},
	{name: "KVM_CLEAR_DIRTY_LOG", number: nrClearDirtyLog, dir: read | write, nr: 0xc0, arg: clearDirtyLog{}},
	{name: "KVM_X86_SET_MSR_FILTER", number: nrSetMSRFilter, dir: write, nr: 0xc6, arg: msrFilter{}},
	{name: "KVM_RESET_DIRTY_RINGS", number: nrResetDirtyRings, nr: 0xc7},
	{name: "KVM_GET_STATS_FD", number: nrGetStatsFD, nr: 0xce},
	{name: "KVM_RUN", number: nrRun, nr: 0x80},
	{name: "KVM_GET_REGS", number: nrGetRegs, dir: read, nr: 0x81, arg: Regs{}},
	{name: "KVM_SET_REGS", number: nrSetRegs, dir: write, nr: 0x82, arg: Regs{}},
	{name: "KVM_GET_SREGS", number: nrGetSregs, dir: read, nr: 0x83, arg: Sregs{}},
	{name: "KVM_SET_SREGS", number: nrSetSregs, dir: write, nr: 0x84, arg: Sregs{}},
	{name: "KVM_TRANSLATE", number: nrTranslate, dir: read | write, nr: 0x85, arg: Translation{}},
	{name: "KVM_INTERRUPT", number: nrInterrupt, dir: write, nr: 0x86, arg: uint32(0)},
	{name: "KVM_GET_MSRS", number: nrGetMSRs, dir: read | write, nr: 0x88, size: 8},
	{name: "KVM_SET_MSRS", number: nrSetMSRs, dir: write, nr: 0x89, size: 8},
	{name: "KVM_SET_SIGNAL_MASK", number: nrSetSignalMask, dir: write, nr: 0x8b, size: 4},
	{name: "KVM_GET_FPU", number: nrGetFPU, dir: read, nr: 0x8c, arg: FPU{}},
	{name: "KVM_SET_FPU", number: nrSetFPU, dir: write, nr: 0x8d, arg: FPU{}},
	{name: "KVM_GET_LAPIC", number: nrGetLAPIC, dir: read, nr: 0x8e, arg: LAPIC{}},
	{name: "KVM_SET_LAPIC", number: nrSetLAPIC, dir: write, nr: 0x8f, arg: LAPIC{}},
	{name: "KVM_SET_CPUID2", number: nrSetCPUID2, dir: write, nr: 0x90, size: 8},
	{name: "KVM_GET_CPUID2", number: nrGetCPUID2, dir: read | write, nr: 0x91, size: 8},
	{name: "KVM_GET_MP_STATE", number: nrGetMPState, dir: read, nr: 0x98, arg: MPState(0)},
	{name: "KVM_SET_MP_STATE", number: nrSetMPState, dir: write, nr: 0x99, arg: MPState(0)},
	{name: "KVM_NMI", number: nrNMI, nr: 0x9a},
	{name: "KVM_SET_GUEST_DEBUG", number: nrSetGuestDebug, dir: write, nr: 0x9b, arg: guestDebug{}},
	{name: "KVM_GET_VCPU_EVENTS", number: nrGetVCPUEvents, dir: read, nr: 0x9f, arg: VCPUEvents{}},
	{name: "KVM_SET_VCPU_EVENTS", number: nrSetVCPUEvents, dir: write, nr: 0xa0, arg: VCPUEvents{}},
	{name: "KVM_GET_DEBUGREGS", number: nrGetDebugRegs, dir: read, nr: 0xa1, arg: DebugRegs{}},
	{name: "KVM_SET_DEBUGREGS", number: nrSetDebugRegs, dir: write, nr: 0xa2, arg: DebugRegs{}},
	{name: "KVM_SET_TSC_KHZ", number: nrSetTSCKHz, nr: 0xa2},
	{name: "KVM_GET_TSC_KHZ", number: nrGetTSCKHz, nr: 0xa3},
	{name: "KVM_GET_XSAVE", number: nrGetXSave, dir: read, nr: 0xa4, size: legacyXSaveSize},
	{name: "KVM_SET_XSAVE", number: nrSetXSave, dir: write, nr: 0xa5, size: legacyXSaveSize},
	{name: "KVM_GET_XCRS", number: nrGetXCRS, dir: read, nr: 0xa6, arg: XCRS{}},
	{name: "KVM_SET_XCRS", number: nrSetXCRS, dir: write, nr: 0xa7, arg: XCRS{}},
	{name: "KVM_KVMCLOCK_CTRL", number: nrKVMClockCtrl, nr: 0xad},
	{name: "KVM_GET_XSAVE2", number: nrGetXSave2, dir: read, nr: 0xcf, size: legacyXSaveSize},
}

// constants that are the kernel's, by the kernel's names. Capabilities and
// exit reasons are checked by their String methods.
var constants = map[string]uint64{
	"KVM_MEM_LOG_DIRTY_PAGES": MemLogDirtyPages, "KVM_MEM_READONLY": MemReadonly, "KVM_MEM_GUEST_MEMFD": MemGuestMemFD,
	"KVM_CLOCK_TSC_STABLE": ClockTSCStable, "KVM_CLOCK_REALTIME": ClockRealtime, "KVM_CLOCK_HOST_TSC": ClockHostTSC,
	"KVM_MP_STATE_RUNNABLE": uint64(MPRunnable), "KVM_MP_STATE_UNINITIALIZED": uint64(MPUninitialized),
	"KVM_MP_STATE_INIT_RECEIVED": uint64(MPInitReceived), "KVM_MP_STATE_HALTED": uint64(MPHalted),
	"KVM_MP_STATE_SIPI_RECEIVED": uint64(MPSIPIReceived), "KVM_MP_STATE_AP_RESET_HOLD": uint64(MPAPResetHold),
	"KVM_GUESTDBG_ENABLE": GuestDebugEnable, "KVM_GUESTDBG_SINGLESTEP": GuestDebugSingleStep,
	"KVM_GUESTDBG_USE_SW_BP": GuestDebugUseSWBP, "KVM_GUESTDBG_USE_HW_BP": GuestDebugUseHWBP,
	"KVM_GUESTDBG_INJECT_DB": GuestDebugInjectDB, "KVM_GUESTDBG_INJECT_BP": GuestDebugInjectBP,
	"KVM_GUESTDBG_BLOCKIRQ":           GuestDebugBlockIRQ,
	"KVM_VCPUEVENT_VALID_NMI_PENDING": EventsValidNMIPending, "KVM_VCPUEVENT_VALID_SIPI_VECTOR": EventsValidSIPIVector,
	"KVM_VCPUEVENT_VALID_SHADOW": EventsValidShadow, "KVM_VCPUEVENT_VALID_SMM": EventsValidSMM,
	"KVM_VCPUEVENT_VALID_PAYLOAD": EventsValidPayload, "KVM_VCPUEVENT_VALID_TRIPLE_FAULT": EventsValidTripleFault,
	"KVM_X86_SHADOW_INT_MOV_SS": ShadowMovSS, "KVM_X86_SHADOW_INT_STI": ShadowSTI,
	"KVM_IRQCHIP_PIC_MASTER": IRQChipPICMaster, "KVM_IRQCHIP_PIC_SLAVE": IRQChipPICSlave, "KVM_IRQCHIP_IOAPIC": IRQChipIOAPIC,
	"KVM_IOAPIC_NUM_PINS":       IOAPICPins,
	"KVM_PIT_FLAGS_HPET_LEGACY": PITHPETLegacy, "KVM_PIT_FLAGS_SPEAKER_DATA_ON": PITSpeakerDataOn,
	"KVM_PIT_SPEAKER_DUMMY": PITSpeakerDummy,
	"KVM_SYNC_X86_REGS":     SyncRegsGeneral, "KVM_SYNC_X86_SREGS": SyncRegsSpecial, "KVM_SYNC_X86_EVENTS": SyncRegsEvents,
	"KVM_IRQFD_FLAG_DEASSIGN": irqfdDeassign, "KVM_IRQFD_FLAG_RESAMPLE": irqfdResample,
	"KVM_IOEVENTFD_FLAG_DATAMATCH": ioEventFDDatamatch, "KVM_IOEVENTFD_FLAG_PIO": ioEventFDPIO,
	"KVM_IOEVENTFD_FLAG_DEASSIGN": ioEventFDDeassign,
	"KVM_IRQ_ROUTING_IRQCHIP":     routeIRQChip, "KVM_IRQ_ROUTING_MSI": routeMSI,
	"KVM_DIRTY_GFN_F_DIRTY": dirtyGFNDirty, "KVM_DIRTY_GFN_F_RESET": dirtyGFNReset,
	"KVM_DIRTY_LOG_PAGE_OFFSET":   dirtyRingPage,
	"KVM_MSR_EXIT_REASON_INVAL":   MSRExitInvalid,
	"KVM_MSR_EXIT_REASON_UNKNOWN": MSRExitUnknown, "KVM_MSR_EXIT_REASON_FILTER": MSRExitFilter,
	"KVM_MSR_FILTER_WRITE": msrFilterWrite, "KVM_MSR_FILTER_MAX_RANGES": msrFilterRanges,
	"KVM_MEMORY_EXIT_FLAG_PRIVATE": MemoryFaultPrivate,
	"KVM_INTERNAL_ERROR_EMULATION": InternalErrorEmulation, "KVM_INTERNAL_ERROR_SIMUL_EX": InternalErrorSimultaneous,
	"KVM_INTERNAL_ERROR_DELIVERY_EV":            InternalErrorDeliveryEvent,
	"KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON": InternalErrorUnexpectedExitReason,
	"KVM_SYSTEM_EVENT_SHUTDOWN":                 SystemEventShutdown, "KVM_SYSTEM_EVENT_RESET": SystemEventReset,
	"KVM_SYSTEM_EVENT_CRASH": SystemEventCrash, "KVM_SYSTEM_EVENT_WAKEUP": SystemEventWakeup,
	"KVM_SYSTEM_EVENT_SUSPEND": SystemEventSuspend, "KVM_SYSTEM_EVENT_SEV_TERM": SystemEventSEVTerminated,
	"KVM_SYSTEM_EVENT_TDX_FATAL": SystemEventTDXFatal,
	"KVM_STATS_TYPE_CUMULATIVE":  uint64(StatCumulative), "KVM_STATS_TYPE_INSTANT": uint64(StatInstant),
	"KVM_STATS_TYPE_PEAK": uint64(StatPeak), "KVM_STATS_TYPE_LINEAR_HIST": uint64(StatLinearHistogram),
	"KVM_STATS_TYPE_LOG_HIST": uint64(StatLogHistogram),
	"KVM_STATS_UNIT_NONE":     uint64(StatNoUnit) << 4, "KVM_STATS_UNIT_BYTES": uint64(StatBytes) << 4,
	"KVM_STATS_UNIT_SECONDS": uint64(StatSeconds) << 4, "KVM_STATS_UNIT_CYCLES": uint64(StatCycles) << 4,
	"KVM_STATS_UNIT_BOOLEAN": uint64(StatBoolean) << 4,
	"KVM_API_VERSION":        APIVersion,
}

func TestIoctlNumbers(t *testing.T) {
	for _, c := range ioctls {
		size := c.size
		if c.arg != nil {
			size = reflect.TypeOf(c.arg).Size()
		}
		const kvmIO = 0xae
		if want := c.dir<<30 | size<<16 | kvmIO<<8 | c.nr; c.number != want {
			t.Errorf("%s = %#x, its parts make %#x", c.name, c.number, want)
		}
	}
}

// TestAgainstHeaders has the C compiler print what linux/kvm.h says, and
// compares. What the installed header is too old to know goes unchecked.
func TestAgainstHeaders(t *testing.T) {
	compiler, err := exec.LookPath("gcc")
	if err != nil {
		t.Skip("needs gcc and the kernel headers")
	}
	want := make(map[string]uint64)
	var source strings.Builder
	source.WriteString("#include <stdio.h>\n#include <stddef.h>\n#include <linux/kvm.h>\nint main(void) {\n")
	// One line a fact: an expression, and what it is here.
	fact := func(expression string, value uint64) {
		want[expression] = value
		fmt.Fprintf(&source, "printf(\"%%s\\t%%llu\\n\", %q, (unsigned long long)(%s));\n", expression, expression)
	}
	named := func(name string, value uint64) {
		fmt.Fprintf(&source, "#if defined(%s)\n", name)
		fact(name, value)
		source.WriteString("#endif\n")
	}
	for _, l := range layouts {
		goType := reflect.TypeOf(l.goType)
		cName, base := l.cName, uint64(0)
		if cName == "" {
			cName, base = "struct kvm_run", uint64(offset(t, reflect.TypeOf(runPage{}), "exit"))
		} else if !l.flexible {
			fact(fmt.Sprintf("sizeof(%s)", cName), uint64(goType.Size()))
		}
		covered := make(map[string]bool)
		for goField, cField := range l.fields {
			top, _, _ := strings.Cut(goField, ".")
			covered[top] = true
			fact(fmt.Sprintf("offsetof(%s, %s)", cName, cField), base+uint64(offset(t, goType, goField)))
		}
		if goType.Kind() == reflect.Struct && l.cName != "" {
			for i := range goType.NumField() {
				if name := goType.Field(i).Name; name != "_" && !covered[name] {
					t.Errorf("%v.%s is compared with nothing", goType, name)
				}
			}
		}
	}
	for _, c := range ioctls {
		fact(c.name, uint64(c.number))
	}
	for name, value := range constants {
		switch {
		case strings.HasPrefix(name, "KVM_STATS_"), strings.HasPrefix(name, "KVM_DIRTY_"):
			fact(name, value)
		default:
			named(name, value)
		}
	}
	for i := range 400 {
		if name := Cap(i).String(); strings.HasPrefix(name, "KVM_") {
			named(name, uint64(i))
		}
		if name := Exit(i).String(); strings.HasPrefix(name, "KVM_") {
			named(name, uint64(i))
		}
	}
	// immediate_exit is one byte of the word that RequestExit changes.
	fact("offsetof(struct kvm_run, immediate_exit) * 8", 8)
	source.WriteString("return 0;\n}\n")

	got := runC(t, compiler, source.String())
	if len(got) < len(layouts)+len(ioctls) {
		t.Fatalf("the C program told only %d facts", len(got))
	}
	expressions := make([]string, 0, len(got))
	for expression := range got {
		expressions = append(expressions, expression)
	}
	sort.Strings(expressions)
	for _, expression := range expressions {
		if got[expression] != want[expression] {
			t.Errorf("%s is %#x in C, %#x here", expression, got[expression], want[expression])
		}
	}
}

// offset returns where a field lies; path may go through embedded structs.
func offset(t *testing.T, goType reflect.Type, path string) uintptr {
	t.Helper()
	var at uintptr
	for _, name := range strings.Split(path, ".") {
		field, ok := goType.FieldByName(name)
		if !ok {
			t.Fatalf("%v has no field %s", goType, name)
		}
		at += field.Offset
		goType = field.Type
	}
	return at
}

// runC compiles and runs a program that prints lines of name, tab, number.
func runC(t *testing.T, compiler, source string) map[string]uint64 {
	t.Helper()
	dir := t.TempDir()
	file, program := filepath.Join(dir, "facts.c"), filepath.Join(dir, "facts")
	if err := os.WriteFile(file, []byte(source), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(compiler, "-O0", "-o", program, file).CombinedOutput(); err != nil {
		if bytes.Contains(out, []byte("linux/kvm.h: No such file")) {
			t.Skip("needs the kernel headers (linux-libc-dev)")
		}
		t.Fatalf("gcc: %v\n%s", err, out)
	}
	out, err := exec.Command(program).Output()
	if err != nil {
		t.Fatal(err)
	}
	facts := make(map[string]uint64)
	for _, line := range strings.Split(strings.TrimSpace(string(out)), "\n") {
		name, text, _ := strings.Cut(line, "\t")
		value, err := strconv.ParseUint(text, 10, 64)
		if err != nil {
			t.Fatalf("line %q: %v", line, err)
		}
		facts[name] = value
	}
	return facts
}
