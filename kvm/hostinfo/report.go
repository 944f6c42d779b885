package hostinfo

// Report is what a host offers. Its JSON form is stable: fields may be added,
// not renamed or removed, and lists are never null.
type Report struct {
	Usable      bool        `json:"usable"` // whether virtual machines can run here, by this user
	UID         int         `json:"uid"`    // the user that asked: others may be offered less
	Kernel      string      `json:"kernel"` // release of Linux
	KVM         KVM         `json:"kvm"`
	CPU         CPU         `json:"cpu"`
	Memory      Memory      `json:"memory"`
	Userfaultfd Userfaultfd `json:"userfaultfd"`
	Devices     []Device    `json:"devices"`
	Missing     []Missing   `json:"missing"` // most important first
}

// Kind is how KVM runs guests.
type Kind string

// The kinds.
const (
	KindNone Kind = "none"  // there is no usable KVM
	KindVTx  Kind = "vt-x"  // Intel VT-x: guest kernels run natively
	KindAMDV Kind = "amd-v" // AMD-V: guest kernels run natively
	KindPVM  Kind = "pvm"   // no hardware virtualisation: guest kernels are interpreted
	// KindOther runs guest kernels natively by means unknown here.
	KindOther Kind = "other"
)

// KVM is what /dev/kvm offers.
type KVM struct {
	Kind         Kind         `json:"kind"`
	Error        string       `json:"error"` // why it cannot be used; empty when it can
	Modules      []string     `json:"modules"`
	APIVersion   int          `json:"api_version"`
	NativeRing0  bool         `json:"native_ring0"` // whether guest kernels run on the processor
	VCPUs        int          `json:"vcpus"`        // recommended maximum for a machine
	MaxVCPUs     int          `json:"max_vcpus"`
	MemorySlots  int          `json:"memory_slots"`
	TSCKHz       uint32       `json:"tsc_khz"` // of a guest
	Capabilities []Capability `json:"capabilities"`
}

// Capability is a capability of KVM that matters here.
type Capability struct {
	Name  string `json:"name"`
	Value int    `json:"value"` // as KVM_CHECK_EXTENSION says; 0 when absent
	Use   string `json:"use"`   // what it is for
}

// CPU is what the host's processors are.
type CPU struct {
	Model       string `json:"model"`
	Count       int    `json:"count"`        // that this process may use
	VTx         bool   `json:"vt_x"`         // whether the processor shows VT-x
	AMDV        bool   `json:"amd_v"`        // whether the processor shows AMD-V
	Hypervisor  bool   `json:"hypervisor"`   // whether this host is itself a virtual machine
	ConstantTSC bool   `json:"constant_tsc"` // the TSC counts at one rate, asleep or not
	Clocksource string `json:"clocksource"`
}

// Memory is the host's memory, in bytes.
type Memory struct {
	Total       uint64      `json:"total"`
	Available   uint64      `json:"available"`
	HugePages   []HugePages `json:"huge_pages"`    // sizes that the host has
	THP         string      `json:"thp"`           // transparent huge pages: always, madvise, never
	THPOnShared string      `json:"thp_on_shared"` // the same for shared memory
}

// HugePages are pages of one size that were set aside.
type HugePages struct {
	Size  uint64 `json:"size"` // bytes of a page
	Total uint64 `json:"total"`
	Free  uint64 `json:"free"`
}

// Userfaultfd is what this user can do with page faults.
type Userfaultfd struct {
	// By is how this user gets a descriptor that serves KVM's faults too:
	// device (/dev/userfaultfd), syscall, or empty when there is none.
	By       string   `json:"by"`
	Error    string   `json:"error"` // why there is none; empty when there is
	Features []string `json:"features"`
	Mask     uint64   `json:"mask"` // the features as UFFDIO_API tells them
	// Unprivileged is sysctl vm.unprivileged_userfaultfd: whether every user
	// may get one by system call.
	Unprivileged bool `json:"unprivileged"`
}

// Device is a device file that machines may use.
type Device struct {
	Path   string `json:"path"`
	Usable bool   `json:"usable"` // by this user
	Error  string `json:"error"`  // why not; empty when it is
	Use    string `json:"use"`
}

// Missing is something that the host lacks.
type Missing struct {
	What   string `json:"what"`
	Cost   string `json:"cost"`   // what the user cannot have, or pays
	Remedy string `json:"remedy"` // what to do about it; empty when there is nothing
	Needed bool   `json:"needed"` // machines cannot run without it
}
