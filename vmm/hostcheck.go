package vmm

import (
	"encoding/binary"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"

	"github.com/gnomon-vmm/gnomon/kvm"
)

// featureWord is a CPUID register that is a set of features, and the names that
// Linux has for its bits; "" where it has none.
type featureWord struct {
	function, index uint32
	register        func(*kvm.CPUIDEntry) uint32
	name            string // of the register
	bits            string // 32 names, separated by spaces, - for none
}

func eax(e *kvm.CPUIDEntry) uint32 { return e.EAX }
func ebx(e *kvm.CPUIDEntry) uint32 { return e.EBX }
func ecx(e *kvm.CPUIDEntry) uint32 { return e.ECX }
func edx(e *kvm.CPUIDEntry) uint32 { return e.EDX }

// featureWords are the features that a guest may have seen and use (Intel SDM
// volume 2, CPUID; AMD APM volume 3, appendix E; KVM's cpuid.rst).
var featureWords = []featureWord{
	{0x1, 0, ecx, "1.ECX", "pni pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm - pcid dca sse4_1 sse4_2 x2apic movbe popcnt tsc_deadline_timer aes xsave osxsave avx f16c rdrand hypervisor"},
	{0x1, 0, edx, "1.EDX", "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn clflush - dts acpi mmx fxsr sse sse2 ss ht tm ia64 pbe"},
	{0x7, 0, ebx, "7.0.EBX", "fsgsbase tsc_adjust sgx bmi1 hle avx2 - smep bmi2 erms invpcid rtm cqm - mpx rdt_a avx512f avx512dq rdseed adx smap avx512ifma - clflushopt clwb intel_pt avx512pf avx512er avx512cd sha_ni avx512bw avx512vl"},
	{0x7, 0, ecx, "7.0.ECX", "- avx512vbmi umip pku ospke waitpkg avx512_vbmi2 - gfni vaes vpclmulqdq avx512_vnni avx512_bitalg tme avx512_vpopcntdq - la57 - - - - - rdpid - - cldemote - movdiri movdir64b enqcmd - -"},
	{0x7, 0, edx, "7.0.EDX", "- - avx512_4vnniw avx512_4fmaps fsrm - - - avx512_vp2intersect - md_clear - - - serialize - tsxldtrk - pconfig arch_lbr - - amx_bf16 avx512_fp16 amx_tile amx_int8 spec_ctrl stibp flush_l1d arch_capabilities core_capabilities ssbd"},
	{0x7, 1, eax, "7.1.EAX", "- - - - avx_vnni avx512_bf16 - cmpccxadd - - fzrm fsrs fsrc - - - - - - - - amx_fp16 - avx_ifma - - lam - - - - -"},
	{0xD, 1, eax, "0xd.1.EAX", "xsaveopt xsavec xgetbv1 xsaves xfd - - - - - - - - - - - - - - - - - - - - - - - - - - -"},
	{0x8000_0001, 0, ecx, "0x80000001.ECX", "lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop skinit wdt - lwp fma4 tce - nodeid_msr - tbm topoext perfctr_core perfctr_nb - bpext ptsc perfctr_llc mwaitx - -"},
	{0x8000_0001, 0, edx, "0x80000001.EDX", "- - - - - - - - - - - syscall - - - - - - - mp nx - mmxext - - fxsr_opt pdpe1gb rdtscp - lm 3dnowext 3dnow"},
	{0x4000_0001, 0, eax, "KVM's features", "kvmclock kvm_nopiodelay kvm_mmu kvmclock2 kvm_asyncpf kvm_steal_time kvm_pv_eoi kvm_pv_unhalt - kvm_pv_tlb_flush kvm_asyncpf_vmexit kvm_pv_ipi kvm_poll_control kvm_pv_sched_yield kvm_asyncpf_int kvm_msi_ext_dest_id kvm_hc_map_gpa_range kvm_migration_control - - - - - - kvmclock_stable - - - - - - -"},
}

// setByTheMachine are bits of leaf 1 that cpuidFor and the guest's own registers
// decide, not the host.
var setByTheMachine = map[string]uint32{
	"1.ECX":   featureTSCDeadline | featureHypervisor | 1<<27, // OSXSAVE follows CR4
	"1.EDX":   featureHTT,
	"7.0.ECX": 1 << 4, // OSPKE follows CR4
}

// hostState is what a guest was shown of the host it was saved on.
type hostState struct {
	Assisted bool             // ring 0 was interpreted (vmm/assist)
	TSCKHz   int              // rate of the time stamp counter
	CPUID    []kvm.CPUIDEntry // what cpuidFor made the vCPUs' tables of
	// Native are the CPU's own features, by Linux's names, where the guest sees
	// those whatever its CPUID tables say: with Assisted.
	Native []string `json:",omitempty"`
}

func (m *Machine) hostState() hostState {
	s := hostState{Assisted: m.assisted, TSCKHz: m.tscKHz, CPUID: m.cpuid}
	switch {
	case m.saved != nil:
		s.Native = m.saved.Host.Native // what it is shown here besides is not to be relied on
	case m.assisted:
		s.Native = nativeFeatures()
	}
	return s
}

// checkHost refuses a host that lacks what the saved guest was shown.
func (m *Machine) checkHost(s *hostState) error {
	switch {
	case s.Assisted && !m.assisted:
		return fmt.Errorf("%w: it was saved on a host that interprets ring 0 (PVM), and its kernel was started to suit that; this host runs ring 0 natively: restore it on a PVM host", ErrRestore)
	case !s.Assisted && m.assisted:
		return fmt.Errorf("%w: it was saved on a host with VT-x or AMD-V, which this host lacks: restore it on one that has it", ErrRestore)
	}
	if was, is := vendor(s.CPUID), vendor(m.cpuid); was != is {
		return fmt.Errorf("%w: its guest was shown a CPU by %q; this host's is by %q: restore it on one of the first kind", ErrRestore, was, is)
	}
	if was, is := physicalBits(s.CPUID), physicalBits(m.cpuid); was > is {
		return fmt.Errorf("%w: its guest was shown physical addresses of %d bits; this host has %d: restore it on one with as many", ErrRestore, was, is)
	}
	missing := missingFeatures(s.CPUID, m.cpuid)
	if s.Assisted {
		here := nativeFeatures()
		for _, name := range s.Native {
			if !slices.Contains(here, name) && !slices.Contains(missing, name) {
				missing = append(missing, name)
			}
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("%w: its guest was shown CPU features that this host lacks: %s: restore it on a host that has them", ErrRestore, strings.Join(missing, ", "))
	}
	return nil
}

// missingFeatures names what saved has and host has not.
func missingFeatures(saved, host []kvm.CPUIDEntry) (missing []string) {
	for _, w := range featureWords {
		lost := w.of(saved) &^ w.of(host) &^ setByTheMachine[w.name]
		for bit, name := range strings.Fields(w.bits) {
			if lost&(1<<bit) == 0 {
				continue
			}
			if name == "-" {
				name = fmt.Sprintf("CPUID.%s bit %d", w.name, bit)
			}
			missing = append(missing, name)
		}
	}
	return missing
}

func (w *featureWord) of(table []kvm.CPUIDEntry) uint32 {
	if e := entry(table, w.function, w.index); e != nil {
		return w.register(e)
	}
	return 0
}

func entry(table []kvm.CPUIDEntry, function, index uint32) *kvm.CPUIDEntry {
	for i := range table {
		if e := &table[i]; e.Function == function && e.Index == index {
			return e
		}
	}
	return nil
}

// vendor is the CPU maker's twelve letters.
func vendor(table []kvm.CPUIDEntry) string {
	e := entry(table, 0, 0)
	if e == nil {
		return ""
	}
	var name []byte
	for _, word := range [...]uint32{e.EBX, e.EDX, e.ECX} {
		name = binary.LittleEndian.AppendUint32(name, word)
	}
	return string(name)
}

// physicalBits is the width of guest-physical addresses.
func physicalBits(table []kvm.CPUIDEntry) int {
	if e := entry(table, 0x8000_0008, 0); e != nil {
		return int(e.EAX & 0xFF)
	}
	return 0
}

// nativeFeatures are the host CPU's features that PVM shows in CPUID leaves 1
// and 7, by Linux's names; none where the host does not tell. It is asked once: it takes
// about a millisecond, and longer the more processors there are.
var nativeFeatures = sync.OnceValue(func() []string {
	info, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return nil
	}
	var flags []string
	for line := range strings.Lines(string(info)) {
		if key, value, _ := strings.Cut(line, ":"); strings.TrimSpace(key) == "flags" {
			flags = strings.Fields(value)
			break
		}
	}
	var names []string
	for _, w := range featureWords {
		if w.function != 0x1 && w.function != 0x7 {
			continue
		}
		for name := range strings.FieldsSeq(w.bits) {
			if slices.Contains(flags, name) {
				names = append(names, name)
			}
		}
	}
	return names
})

// tscTolerance is by how many parts in a million a host's time stamp counter may
// differ from what a guest measured: a guest's timers then go wrong by as much.
const tscTolerance = 1000

// setTSCRate gives a new vCPU the rate of the TSC that the guest knows, and
// notes which that is.
func (m *Machine) setTSCRate(c *kvm.VCPU) error {
	khz, err := c.TSCKHz()
	if err != nil {
		return nil // it is not told
	}
	m.tscKHz = int(khz)
	if m.saved == nil || m.saved.Host.TSCKHz == 0 || m.saved.Host.TSCKHz == m.tscKHz {
		return nil
	}
	want := m.saved.Host.TSCKHz
	off := max(want, m.tscKHz) - min(want, m.tscKHz)
	m.tscKHz = want
	// PVM says yes and changes nothing.
	if want > 0 && want <= 1<<31 && !m.assisted && c.SetTSCKHz(uint32(want)) == nil {
		return nil
	}
	if off > int(khz)/(1_000_000/tscTolerance) {
		return fmt.Errorf("%w: its guest's time stamp counter ran at %d kHz; this host's runs at %d kHz and cannot be scaled: restore it on a host with the same", ErrRestore, want, khz)
	}
	return nil
}
