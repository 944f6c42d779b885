package kvm

// SyncRegs is the part of the run page that holds registers, so that they can
// be read and written with no ioctl (struct kvm_sync_regs).
type SyncRegs struct {
	Regs   Regs
	Sregs  Sregs
	Events VCPUEvents
}

// Parts of SyncRegs, for EnableSyncRegs and SetDirtyRegs.
const (
	SyncRegsGeneral = 1 << 0 // SyncRegs.Regs
	SyncRegsSpecial = 1 << 1 // SyncRegs.Sregs
	SyncRegsEvents  = 1 << 2 // SyncRegs.Events
)

// EnableSyncRegs chooses which parts of SyncRegs every exit fills in; KVM has
// those in Check(CapSyncRegs).
func (v *VCPU) EnableSyncRegs(set uint64) { v.run.validRegs = set }

// SyncRegs returns the run page's registers, valid until the next Run, and
// only in the parts that EnableSyncRegs chose.
func (v *VCPU) SyncRegs() *SyncRegs { return &v.run.sync }

// SetDirtyRegs chooses which parts of SyncRegs the next Run loads into the
// VCPU. Run clears the choice.
func (v *VCPU) SetDirtyRegs(mask uint64) { v.run.dirtyRegs = mask }

// ExitReason tells why Run last returned.
func (v *VCPU) ExitReason() Exit { return Exit(v.run.exitReason) }

// An IOExit is a port access that the guest waits for.
type IOExit struct {
	Write bool
	Size  uint8 // bytes an item: 1, 2 or 4
	Port  uint16
	Count uint32 // items: more than one for INS and OUTS
	// Data is in the run page, Size*Count bytes: what the guest wrote, or
	// where what it reads is to be put.
	Data []byte
}

type ioExit struct {
	direction uint8
	size      uint8
	port      uint16
	count     uint32
	offset    uint64
}

// IO returns the access of an ExitIO.
func (v *VCPU) IO() IOExit {
	io := exitAs[ioExit](v.run)
	exit := IOExit{Write: io.direction == 1, Size: io.size, Port: io.port, Count: io.count}
	length := uint64(io.size) * uint64(io.count)
	if io.offset <= uint64(len(v.shared)) && length <= uint64(len(v.shared))-io.offset {
		exit.Data = v.shared[io.offset : io.offset+length : io.offset+length]
	}
	return exit
}

// An MMIOExit is an access to guest physical memory that no slot has, or a
// write to a read-only one. For a read, the first Len bytes of Data are what
// the guest gets.
type MMIOExit struct {
	Addr    uint64
	Data    [8]byte
	Len     uint32
	IsWrite bool
	_       [3]byte
}

// MMIO returns the access of an ExitMMIO; it points into the run page.
func (v *VCPU) MMIO() *MMIOExit { return exitAs[MMIOExit](v.run) }

type internalErrorExit struct {
	suberror uint32
	ndata    uint32
	data     [16]uint64
}

// InternalError returns what an ExitInternalError says: InternalError* and
// words that depend on it, which lie in the run page.
func (v *VCPU) InternalError() (suberror uint32, data []uint64) {
	e := exitAs[internalErrorExit](v.run)
	return e.suberror, e.data[:min(int(e.ndata), len(e.data))]
}

type emulationFailureExit struct {
	suberror uint32
	ndata    uint32
	flags    uint64
	insnSize uint8
	insn     [15]byte
}

// EmulationBytes returns the bytes at the instruction that KVM could not
// emulate: 15, or fewer at the end of what the guest mapped. It is nil when the
// exit is not an InternalErrorEmulation that tells them. The bytes lie in the
// run page.
func (v *VCPU) EmulationBytes() []byte {
	const hasInsnBytes = 1 << 0
	e := exitAs[emulationFailureExit](v.run)
	if v.ExitReason() != ExitInternalError || e.suberror != InternalErrorEmulation ||
		e.ndata < 3 || e.flags&hasInsnBytes == 0 {
		return nil
	}
	return e.insn[:min(int(e.insnSize), len(e.insn))]
}

// A DebugExit tells what SetGuestDebug asked for (struct kvm_debug_exit_arch).
type DebugExit struct {
	Exception uint32 // 1 for #DB, 3 for #BP
	_         uint32
	PC        uint64 // linear address
	DR6       uint64
	DR7       uint64
}

// Debug returns what an ExitDebug tells.
func (v *VCPU) Debug() DebugExit { return *exitAs[DebugExit](v.run) }

// A SystemEvent is a SystemEvent* type and data that depends on it.
type SystemEvent struct {
	Type uint32
	Data []uint64 // in the run page
}

type systemEventExit struct {
	kind  uint32
	ndata uint32
	data  [16]uint64
}

// SystemEvent returns what an ExitSystemEvent tells.
func (v *VCPU) SystemEvent() SystemEvent {
	e := exitAs[systemEventExit](v.run)
	return SystemEvent{Type: e.kind, Data: e.data[:min(int(e.ndata), len(e.data))]}
}

// A FailEntry is why the hardware would not enter the guest.
type FailEntry struct {
	Reason uint64 // the hardware's code
	CPU    uint32 // of the host
	_      uint32
}

// FailEntry returns what an ExitFailEntry tells.
func (v *VCPU) FailEntry() FailEntry { return *exitAs[FailEntry](v.run) }

// A MemoryFault is a guest access that the host could not serve.
type MemoryFault struct {
	Flags uint64 // MemoryFaultPrivate
	GPA   uint64
	Size  uint64 // bytes
}

// MemoryFault returns what an ExitMemoryFault tells. Run returns EFAULT or
// EHWPOISON with that exit.
func (v *VCPU) MemoryFault() MemoryFault { return *exitAs[MemoryFault](v.run) }

// An MSRExit is an access to an MSR that EnableCap(CapX86UserSpaceMSR) passes
// to user space. A nonzero Error makes the access fault in the guest.
type MSRExit struct {
	Error  uint8
	_      [7]byte
	Reason uint32 // MSRExit*
	Index  uint32
	Data   uint64
}

// MSR returns the access of an ExitX86RDMSR or ExitX86WRMSR; it points into
// the run page, where Data for a read is to be put.
func (v *VCPU) MSR() *MSRExit { return exitAs[MSRExit](v.run) }
