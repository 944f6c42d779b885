package hostinfo

import (
	"fmt"
	"slices"

	"github.com/gnomon-vmm/gnomon/kvm"
)

// judge fills in Missing and Usable from the rest of the report.
func (r *Report) judge() {
	r.Missing = []Missing{}
	r.judgeKVM()
	r.judgeUserfaultfd()
	r.judgeMemory()
	for _, d := range r.Devices {
		if d.Path == "/dev/net/tun" && !d.Usable {
			r.miss(Missing{
				What: "tap networking", Cost: "--net tap= does not work; --net user does, without it",
				Remedy: fmt.Sprintf("%s: %s (modprobe tun, or run as root)", d.Path, d.Error),
			})
		}
	}
	if r.KVM.Kind != KindNone && !r.CPU.ConstantTSC {
		r.miss(Missing{What: "a TSC of constant rate", Cost: "guests cannot use it as their clock, and read time more slowly"})
	}
	r.Usable = r.KVM.Kind != KindNone && !slices.ContainsFunc(r.Missing, func(m Missing) bool { return m.Needed })
}

func (r *Report) miss(m Missing) { r.Missing = append(r.Missing, m) }

func (r *Report) judgeKVM() {
	if r.KVM.Kind == KindNone {
		m := Missing{What: "KVM", Cost: "virtual machines cannot run", Remedy: r.KVM.Error, Needed: true}
		if !r.CPU.VTx && !r.CPU.AMDV && len(r.KVM.Modules) == 0 {
			m.Remedy += "; the processor shows neither VT-x nor AMD-V: enable it in the firmware, or nested " +
				"virtualisation if this host is a virtual machine, or load kvm_pvm"
		}
		r.miss(m)
		return
	}
	if !r.KVM.NativeRing0 {
		remedy := "a host whose processor shows VT-x or AMD-V"
		if r.CPU.Hypervisor {
			remedy += "; this one is a virtual machine: enable nested virtualisation for it"
		}
		r.miss(Missing{
			What: "hardware virtualisation",
			Cost: "guest programs run at full speed, but guest kernels are interpreted, hundreds of times slower: " +
				"a trimmed Linux boots in tens of seconds and a distribution's in minutes; " +
				"debuggers see guest kernels only",
			Remedy: remedy,
		})
	}
	for _, c := range capabilities {
		i := slices.IndexFunc(r.KVM.Capabilities, func(have Capability) bool { return "KVM_CAP_"+have.Name == c.cap.String() })
		if i >= 0 && r.KVM.Capabilities[i].Value != 0 {
			continue
		}
		m := Missing{What: c.use, Cost: c.without, Remedy: "a newer kernel: " + c.cap.String(), Needed: c.needed}
		switch {
		case c.needed:
			m.Cost = "virtual machines cannot run"
		case c.without == "":
			continue
		case c.cap == kvm.CapTSCControl:
			m.Remedy = "a processor that scales the TSC, where KVM is VT-x or AMD-V"
		}
		r.miss(m)
	}
}

func (r *Report) judgeUserfaultfd() {
	u := r.Userfaultfd
	if u.By == "" {
		r.miss(Missing{
			What:   "userfaultfd",
			Cost:   "a checkpoint is read whole before its machine runs, and saving one stops it",
			Remedy: fmt.Sprintf("%s: give this user %s, or set sysctl vm.unprivileged_userfaultfd=1, or run as root", u.Error, uffdDevice),
		})
		return
	}
	for _, need := range []struct{ feature, what, cost string }{
		{"missing-shmem", "userfaultfd on shared memory", "a checkpoint is read whole before its machine runs"},
		{"wp-hugetlbfs-shmem", "userfaultfd write protection of shared memory", "checkpoints of a running machine use KVM's dirty log"},
		{"minor-shmem", "userfaultfd minor faults", "machines cannot share a template's pages as they fault"},
	} {
		if !slices.Contains(u.Features, need.feature) {
			r.miss(Missing{What: need.what, Cost: need.cost, Remedy: "a newer kernel"})
		}
	}
}

func (r *Report) judgeMemory() {
	reserved := slices.ContainsFunc(r.Memory.HugePages, func(h HugePages) bool { return h.Free > 0 })
	transparent := r.Memory.THPOnShared != "" && r.Memory.THPOnShared != "never" && r.Memory.THPOnShared != "deny"
	if r.KVM.NativeRing0 && !reserved && !transparent {
		r.miss(Missing{
			What: "huge pages", Cost: "guests that use much memory run some percent slower",
			Remedy: "reserve some (sysctl vm.nr_hugepages), or write advise to " +
				"/sys/kernel/mm/transparent_hugepage/shmem_enabled",
		})
	}
}
