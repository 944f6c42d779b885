package kvm

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// Errors of VCPU calls that are refused before the kernel sees them.
var (
	ErrTooMany   = errors.New("too many entries")
	ErrXSaveSize = errors.New("XSAVE image is too small")
)

// A VCPU is one virtual CPU. Run and the register calls belong to one thread;
// RequestExit may be called from any. No call may follow Close.
type VCPU struct {
	ID        int
	fd        int
	shared    []byte   // the mapping that Run shares with the kernel
	run       *runPage // its beginning
	ring      dirtyRing
	xsaveSize int
}

// FD returns the VCPU's descriptor, which stays owned by the VCPU.
func (v *VCPU) FD() int { return v.fd }

// Close unmaps what the VCPU shares with the kernel and closes its
// descriptor. A second Close does nothing.
func (v *VCPU) Close() error {
	if v.fd < 0 {
		return nil
	}
	err := errors.Join(unix.Munmap(v.shared), v.ring.unmap())
	v.shared, v.run = nil, nil
	return errors.Join(err, closeFD(&v.fd))
}

// Run runs the guest until it needs something; ExitReason says what. It
// returns the bare errno: EINTR when a signal or RequestExit ended it, EAGAIN
// when the VCPU waits to be started, EFAULT when the host cannot serve a guest
// access.
func (v *VCPU) Run() error {
	_, errno := ioctl(v.fd, nrRun, 0)
	return errnoOrNil(errno)
}

// RequestExit makes this and every later Run return EINTR at once, until it is
// called with false. A Run that is inside the guest needs a signal to its
// thread as well.
func (v *VCPU) RequestExit(on bool) { v.run.requestExit(on) }

// EnableCap turns on a capability of the VCPU (KVM_ENABLE_CAP).
func (v *VCPU) EnableCap(c Cap, args ...uint64) error { return enableCapOn(v.fd, c, args) }

// GetRegs reads the general-purpose registers.
func (v *VCPU) GetRegs(regs *Regs) error {
	_, errno := ioctlPtr(v.fd, nrGetRegs, regs)
	return result("KVM_GET_REGS", errno)
}

// SetRegs writes the general-purpose registers. It drops an exception that is
// pending.
func (v *VCPU) SetRegs(regs *Regs) error {
	_, errno := ioctlPtr(v.fd, nrSetRegs, regs)
	return result("KVM_SET_REGS", errno)
}

// GetSregs reads the segment, table and control registers.
func (v *VCPU) GetSregs(sregs *Sregs) error {
	_, errno := ioctlPtr(v.fd, nrGetSregs, sregs)
	return result("KVM_GET_SREGS", errno)
}

// SetSregs writes the segment, table and control registers.
func (v *VCPU) SetSregs(sregs *Sregs) error {
	_, errno := ioctlPtr(v.fd, nrSetSregs, sregs)
	return result("KVM_SET_SREGS", errno)
}

// GetFPU reads the x87 and SSE registers.
func (v *VCPU) GetFPU(fpu *FPU) error {
	_, errno := ioctlPtr(v.fd, nrGetFPU, fpu)
	return result("KVM_GET_FPU", errno)
}

// SetFPU writes the x87 and SSE registers.
func (v *VCPU) SetFPU(fpu *FPU) error {
	_, errno := ioctlPtr(v.fd, nrSetFPU, fpu)
	return result("KVM_SET_FPU", errno)
}

// GetMSRs reads the MSRs that the entries name, in place, up to the first that
// cannot be read, and returns how many it read. It takes at most 256.
func (v *VCPU) GetMSRs(entries []MSREntry) (int, error) {
	var list msrs
	if len(entries) > len(list.entries) {
		return 0, fmt.Errorf("KVM_GET_MSRS: %w: %d", ErrTooMany, len(entries))
	}
	list.count = uint32(copy(list.entries[:], entries))
	n, errno := ioctlPtr(v.fd, nrGetMSRs, &list)
	if errno != 0 {
		return 0, opError("KVM_GET_MSRS", errno)
	}
	return copy(entries[:n], list.entries[:n]), nil
}

// SetMSRs writes MSRs up to the first that cannot be written, and returns how
// many it wrote. It takes at most 256.
func (v *VCPU) SetMSRs(entries []MSREntry) (int, error) {
	var list msrs
	if len(entries) > len(list.entries) {
		return 0, fmt.Errorf("KVM_SET_MSRS: %w: %d", ErrTooMany, len(entries))
	}
	list.count = uint32(copy(list.entries[:], entries))
	n, errno := ioctlPtr(v.fd, nrSetMSRs, &list)
	if errno != 0 {
		return 0, opError("KVM_SET_MSRS", errno)
	}
	return n, nil
}

// SetCPUID sets what the CPUID instruction tells the guest.
func (v *VCPU) SetCPUID(entries []CPUIDEntry) error {
	var list cpuid
	if len(entries) > len(list.entries) {
		return fmt.Errorf("KVM_SET_CPUID2: %w: %d", ErrTooMany, len(entries))
	}
	list.count = uint32(copy(list.entries[:], entries))
	_, errno := ioctlPtr(v.fd, nrSetCPUID2, &list)
	return result("KVM_SET_CPUID2", errno)
}

// CPUID returns what SetCPUID set, as KVM keeps it.
func (v *VCPU) CPUID() ([]CPUIDEntry, error) {
	var list cpuid
	list.count = uint32(len(list.entries))
	if _, errno := ioctlPtr(v.fd, nrGetCPUID2, &list); errno != 0 {
		return nil, opError("KVM_GET_CPUID2", errno)
	}
	return append([]CPUIDEntry(nil), list.entries[:min(int(list.count), len(list.entries))]...), nil
}

// legacyXSaveSize is the size of struct kvm_xsave before it could grow.
const legacyXSaveSize = 4096

// XSaveSize is how many bytes GetXSave fills in.
func (v *VCPU) XSaveSize() int { return v.xsaveSize }

// XSave reads all extended state as an XSAVE image of XSaveSize bytes.
func (v *VCPU) XSave() ([]byte, error) {
	image := make([]byte, v.xsaveSize)
	if err := v.GetXSave(image); err != nil {
		return nil, err
	}
	return image, nil
}

// GetXSave reads all extended state into an image of at least XSaveSize bytes.
func (v *VCPU) GetXSave(image []byte) error {
	if len(image) < v.xsaveSize {
		return fmt.Errorf("KVM_GET_XSAVE2: %w: %d bytes, not %d", ErrXSaveSize, len(image), v.xsaveSize)
	}
	if v.xsaveSize == legacyXSaveSize {
		_, errno := ioctlPtr(v.fd, nrGetXSave, &image[0])
		return result("KVM_GET_XSAVE", errno)
	}
	_, errno := ioctlPtr(v.fd, nrGetXSave2, &image[0])
	return result("KVM_GET_XSAVE2", errno)
}

// SetXSave writes all extended state from an image of at least XSaveSize
// bytes.
func (v *VCPU) SetXSave(image []byte) error {
	if len(image) < v.xsaveSize {
		return fmt.Errorf("KVM_SET_XSAVE: %w: %d bytes, not %d", ErrXSaveSize, len(image), v.xsaveSize)
	}
	_, errno := ioctlPtr(v.fd, nrSetXSave, &image[0])
	return result("KVM_SET_XSAVE", errno)
}

// GetXCRS reads the extended control registers.
func (v *VCPU) GetXCRS(xcrs *XCRS) error {
	_, errno := ioctlPtr(v.fd, nrGetXCRS, xcrs)
	return result("KVM_GET_XCRS", errno)
}

// SetXCRS writes the extended control registers.
func (v *VCPU) SetXCRS(xcrs *XCRS) error {
	_, errno := ioctlPtr(v.fd, nrSetXCRS, xcrs)
	return result("KVM_SET_XCRS", errno)
}

// GetEvents reads events on their way into the guest.
func (v *VCPU) GetEvents(events *VCPUEvents) error {
	_, errno := ioctlPtr(v.fd, nrGetVCPUEvents, events)
	return result("KVM_GET_VCPU_EVENTS", errno)
}

// SetEvents replaces the events on their way into the guest; events.Flags says
// which optional parts count.
func (v *VCPU) SetEvents(events *VCPUEvents) error {
	_, errno := ioctlPtr(v.fd, nrSetVCPUEvents, events)
	return result("KVM_SET_VCPU_EVENTS", errno)
}

// GetDebugRegs reads the guest's debug registers.
func (v *VCPU) GetDebugRegs(regs *DebugRegs) error {
	_, errno := ioctlPtr(v.fd, nrGetDebugRegs, regs)
	return result("KVM_GET_DEBUGREGS", errno)
}

// SetDebugRegs writes the guest's debug registers.
func (v *VCPU) SetDebugRegs(regs *DebugRegs) error {
	_, errno := ioctlPtr(v.fd, nrSetDebugRegs, regs)
	return result("KVM_SET_DEBUGREGS", errno)
}

// MPState tells what the VCPU is doing.
func (v *VCPU) MPState() (MPState, error) {
	var state MPState
	_, errno := ioctlPtr(v.fd, nrGetMPState, &state)
	return state, result("KVM_GET_MP_STATE", errno)
}

// SetMPState says what the VCPU is to be doing.
func (v *VCPU) SetMPState(state MPState) error {
	_, errno := ioctlPtr(v.fd, nrSetMPState, &state)
	return result("KVM_SET_MP_STATE", errno)
}

// GetLAPIC reads the local APIC's registers.
func (v *VCPU) GetLAPIC(lapic *LAPIC) error {
	_, errno := ioctlPtr(v.fd, nrGetLAPIC, lapic)
	return result("KVM_GET_LAPIC", errno)
}

// SetLAPIC writes the local APIC's registers.
func (v *VCPU) SetLAPIC(lapic *LAPIC) error {
	_, errno := ioctlPtr(v.fd, nrSetLAPIC, lapic)
	return result("KVM_SET_LAPIC", errno)
}

// SetGuestDebug chooses what ends Run with ExitDebug: control has GuestDebug*
// bits, dr the debug registers for GuestDebugUseHWBP. A control of 0 ends it.
// Where KVM interprets ring 0 (PVM), nothing in ring 3 ends Run so.
func (v *VCPU) SetGuestDebug(control uint32, dr [8]uint64) error {
	request := guestDebug{control: control, dr: dr}
	_, errno := ioctlPtr(v.fd, nrSetGuestDebug, &request)
	return result("KVM_SET_GUEST_DEBUG", errno)
}

// NMI queues a non-maskable interrupt.
func (v *VCPU) NMI() error {
	_, errno := ioctl(v.fd, nrNMI, 0)
	return result("KVM_NMI", errno)
}

// Interrupt queues an external interrupt, where the VM has no in-kernel
// interrupt controller.
func (v *VCPU) Interrupt(vector uint32) error {
	_, errno := ioctlPtr(v.fd, nrInterrupt, &vector)
	return result("KVM_INTERRUPT", errno)
}

// SetSignalMask chooses which signals are blocked while Run is in the kernel:
// bit n-1 for signal n. ClearSignalMask leaves that to the thread's own mask.
func (v *VCPU) SetSignalMask(blocked uint64) error {
	request := signalMask{length: 8}
	for i := range request.set {
		request.set[i] = byte(blocked >> (8 * i))
	}
	_, errno := ioctlPtr(v.fd, nrSetSignalMask, &request)
	return result("KVM_SET_SIGNAL_MASK", errno)
}

// ClearSignalMask undoes SetSignalMask.
func (v *VCPU) ClearSignalMask() error {
	_, errno := ioctl(v.fd, nrSetSignalMask, 0)
	return result("KVM_SET_SIGNAL_MASK", errno)
}

// TSCKHz returns how fast the guest's TSC counts, in kHz.
func (v *VCPU) TSCKHz() (uint32, error) {
	n, errno := ioctl(v.fd, nrGetTSCKHz, 0)
	return uint32(n), result("KVM_GET_TSC_KHZ", errno)
}

// SetTSCKHz sets how fast the guest's TSC counts, in kHz. Rates other than the
// host's need CapTSCControl.
func (v *VCPU) SetTSCKHz(khz uint32) error {
	_, errno := ioctl(v.fd, nrSetTSCKHz, uintptr(khz))
	return result("KVM_SET_TSC_KHZ", errno)
}

// Translate asks the guest's page tables about a guest virtual address. An
// address that is not mapped is no error: see Translation.Valid.
func (v *VCPU) Translate(gva uint64) (Translation, error) {
	t := Translation{LinearAddress: gva}
	_, errno := ioctlPtr(v.fd, nrTranslate, &t)
	return t, result("KVM_TRANSLATE", errno)
}

// NotifyPaused tells a guest that uses kvmclock that it was stopped, so that
// its watchdogs make allowance.
func (v *VCPU) NotifyPaused() error {
	_, errno := ioctl(v.fd, nrKVMClockCtrl, 0)
	return result("KVM_KVMCLOCK_CTRL", errno)
}

// Stats reads the VCPU's statistics.
func (v *VCPU) Stats() ([]Stat, error) { return readStats(v.fd) }
