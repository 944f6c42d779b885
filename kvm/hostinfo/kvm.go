package hostinfo

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"github.com/gnomon-vmm/gnomon/kvm"
)

// reason says why something failed without naming the file again.
func reason(err error) string {
	var path *fs.PathError
	if errors.As(err, &path) {
		return path.Err.Error()
	}
	return err.Error()
}

// capabilities are those that matter here. Machines cannot run without those
// that are needed; without is what the lack of another costs.
var capabilities = []struct {
	cap     kvm.Cap
	needed  bool
	use     string
	without string
}{
	{kvm.CapUserMemory, true, "guest memory", ""},
	{kvm.CapIRQChip, true, "interrupt controllers in the kernel", ""},
	{kvm.CapIRQRouting, true, "message-signalled interrupts on eventfds", ""},
	{kvm.CapIRQFD, true, "interrupts raised by eventfd", ""},
	{kvm.CapIOEventFD, true, "virtqueue notifications without an exit to user space", ""},
	{kvm.CapSignalMSI, true, "message-signalled interrupts", ""},
	{kvm.CapImmediateExit, true, "pausing a vCPU without a race", ""},
	{kvm.CapMPState, true, "several vCPUs", ""},
	{kvm.CapVCPUEvents, true, "checkpoints: events on their way into a guest", ""},
	{kvm.CapXSave, true, "checkpoints: vector registers", ""},
	{kvm.CapXSave2, false, "checkpoints: vector registers of more than 4 KiB", "guests cannot have AMX"},
	{kvm.CapAdjustClock, true, "checkpoints: the guest's clock", ""},
	{kvm.CapReadonlyMem, false, "ROM", "no read-only guest memory"},
	{kvm.CapSyncRegs, false, "registers without a system call", "exits that look at registers cost more"},
	{kvm.CapSetGuestDebug, false, "breakpoints and single steps", "no debugging of guests"},
	{
		kvm.CapManualDirtyLogProtect2, false, "checkpoints: dirty pages cleared piece by piece",
		"checkpoints of a running machine stall it longer",
	},
	{
		kvm.CapDirtyLogRingAcqRel, false, "checkpoints: dirty pages told one by one",
		"frequent checkpoints scan the whole dirty bitmap",
	},
	{kvm.CapX86UserSpaceMSR, false, "MSR accesses in user space", "no help for kernels where KVM is PVM"},
	{kvm.CapX86MSRFilter, false, "MSR accesses in user space, chosen by MSR", "no help for kernels where KVM is PVM"},
	{
		kvm.CapExitOnEmulationFailure, false, "the bytes of instructions that KVM cannot emulate",
		"a guest that stops on one is harder to explain",
	},
	{kvm.CapBinaryStatsFD, false, "statistics", "query-stats is empty"},
	{kvm.CapTSCControl, false, "guests whose TSC counts at another rate", "checkpoints restore only on hosts with the same TSC rate"},
	{kvm.CapMemoryFaultInfo, false, "the address of a memory fault that the host cannot serve", ""},
	{kvm.CapGuestMemFD, false, "guest memory that the host does not map", ""},
	{kvm.CapMemoryAttributes, false, "private guest memory", ""},
	{kvm.CapPreFaultMemory, false, "guest memory mapped ahead of its first use", ""},
}

func probeKVM(host fs.FS, cpu CPU) KVM {
	report := KVM{Kind: KindNone, Modules: []string{}, Capabilities: []Capability{}}
	for _, module := range []string{"kvm_intel", "kvm_amd", "kvm_pvm"} {
		if _, err := fs.Stat(host, "sys/module/"+module); err == nil {
			report.Modules = append(report.Modules, module)
		}
	}
	sys, err := kvm.Open()
	if err != nil {
		report.Error = err.Error()
		return report
	}
	defer sys.Close()
	report.APIVersion = kvm.APIVersion
	report.VCPUs = sys.Check(kvm.CapNrVCPUs)
	report.MaxVCPUs = max(sys.Check(kvm.CapMaxVCPUs), report.VCPUs)
	report.MemorySlots = sys.Check(kvm.CapNrMemslots)
	for _, c := range capabilities {
		report.Capabilities = append(report.Capabilities, Capability{
			Name: strings.TrimPrefix(c.cap.String(), "KVM_CAP_"), Value: sys.Check(c.cap), Use: c.use,
		})
	}
	if report.TSCKHz, err = guestTSC(sys); err != nil {
		report.Error = err.Error()
		return report
	}
	if report.NativeRing0, err = NativeRing0(sys); err != nil {
		report.Error = err.Error()
		return report
	}
	report.Kind = kind(report.NativeRing0, cpu)
	return report
}

func kind(nativeRing0 bool, cpu CPU) Kind {
	switch {
	case !nativeRing0:
		return KindPVM
	case cpu.VTx:
		return KindVTx
	case cpu.AMDV:
		return KindAMDV
	}
	return KindOther
}

// guestTSC tells how fast a guest's TSC counts, in kHz.
func guestTSC(sys *kvm.System) (uint32, error) {
	vm, err := sys.CreateVM()
	if err != nil {
		return 0, fmt.Errorf("cannot make a virtual machine: %w", err)
	}
	defer vm.Close()
	vcpu, err := vm.CreateVCPU(0)
	if err != nil {
		return 0, fmt.Errorf("cannot make a virtual CPU: %w", err)
	}
	defer vcpu.Close()
	return vcpu.TSCKHz()
}
