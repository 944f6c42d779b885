package hostinfo

import (
	"encoding/json"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/fstest"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/kvm"
)

// asNobody is set in the environment of the copy of the test that runs as a
// user without rights, and prints its report.
const asNobody = "HOSTINFO_TEST_AS_NOBODY"

func TestMain(m *testing.M) {
	if os.Getenv(asNobody) != "" {
		if err := json.NewEncoder(os.Stdout).Encode(Probe()); err != nil {
			panic(err)
		}
		return
	}
	os.Exit(m.Run())
}

func TestProbeAgreesWithHost(t *testing.T) {
	sys, err := kvm.Open()
	if err != nil {
		t.Skipf("needs /dev/kvm: %v", err)
	}
	defer sys.Close()
	r := Probe()
	if r.KVM.Error != "" || r.KVM.Kind == KindNone || !r.Usable {
		t.Fatalf("KVM opens, but the report says %+v", r.KVM)
	}
	if r.KVM.MemorySlots != sys.Check(kvm.CapNrMemslots) || r.KVM.TSCKHz == 0 || len(r.KVM.Capabilities) != len(capabilities) {
		t.Errorf("%+v", r.KVM)
	}
	// What the processor and the modules say, without asking a guest.
	hardware := (r.CPU.VTx && slices.Contains(r.KVM.Modules, "kvm_intel")) ||
		(r.CPU.AMDV && slices.Contains(r.KVM.Modules, "kvm_amd"))
	if r.KVM.NativeRing0 != hardware || (r.KVM.Kind == KindPVM) == hardware {
		t.Errorf("native ring 0: %v, kind %v; flags and modules say %v", r.KVM.NativeRing0, r.KVM.Kind, hardware)
	}
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		t.Fatal(err)
	}
	if total := uint64(info.Totalram) * uint64(info.Unit); r.Memory.Total != total {
		t.Errorf("%d bytes of memory, sysinfo says %d", r.Memory.Total, total)
	}
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil || r.Kernel != unix.ByteSliceToString(name.Release[:]) {
		t.Errorf("kernel %q, uname says %q (%v)", r.Kernel, name.Release, err)
	}
}

// A user who may not use /dev/kvm is told so, and what to do.
func TestProbeWithoutRights(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to run as somebody else")
	}
	device, err := os.Stat(kvm.DevicePath)
	if err != nil || device.Mode().Perm()&0o006 != 0 {
		t.Skipf("needs a %s that not everybody may use", kvm.DevicePath)
	}
	// The test binary lies where nobody may not look: run it from an open
	// descriptor.
	self, err := os.Open("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	defer self.Close()
	cmd := exec.Command("/proc/self/fd/3")
	cmd.ExtraFiles = []*os.File{self}
	cmd.Dir = "/"
	cmd.Env = []string{asNobody + "=1"}
	const nobody = 65534
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	var r Report
	if err := json.Unmarshal(out, &r); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if r.Usable || r.UID != nobody || r.KVM.Kind != KindNone || !strings.Contains(r.KVM.Error, "no permission") {
		t.Errorf("usable %v as %d: %+v", r.Usable, r.UID, r.KVM)
	}
	if len(r.Missing) == 0 || r.Missing[0].What != "KVM" || !r.Missing[0].Needed || !strings.Contains(r.Missing[0].Remedy, "group") {
		t.Errorf("missing: %+v", r.Missing)
	}
}

func TestProbeCPU(t *testing.T) {
	host := fstest.MapFS{
		"proc/cpuinfo": {Data: []byte("processor\t: 0\nmodel name\t: Brand: X\nflags\t\t: fpu vmx constant_tsc nonstop_tsc\n\n" +
			"processor\t: 1\nmodel name\t: Other\nflags\t\t: svm hypervisor\n")},
		"sys/devices/system/clocksource/clocksource0/current_clocksource": {Data: []byte("tsc\n")},
	}
	got := probeCPU(host)
	got.Count = 0
	want := CPU{Model: "Brand: X", VTx: true, ConstantTSC: true, Clocksource: "tsc"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	got = probeCPU(fstest.MapFS{})
	got.Count = 0
	if got != (CPU{}) {
		t.Errorf("without /proc and /sys: %+v", got)
	}
}

func TestProbeMemory(t *testing.T) {
	host := fstest.MapFS{
		"proc/meminfo": {Data: []byte("MemTotal:       1024 kB\nMemFree:  1 kB\nMemAvailable:    512 kB\n")},
		"sys/kernel/mm/transparent_hugepage/enabled":                 {Data: []byte("always [madvise] never\n")},
		"sys/kernel/mm/transparent_hugepage/shmem_enabled":           {Data: []byte("always advise [deny]\n")},
		"sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages":      {Data: []byte("10\n")},
		"sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages":    {Data: []byte("4\n")},
		"sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages":   {Data: []byte("0\n")},
		"sys/kernel/mm/hugepages/hugepages-1048576kB/free_hugepages": {Data: []byte("garbage\n")},
		"sys/kernel/mm/hugepages/unrelated":                          {Data: nil},
	}
	want := Memory{
		Total: 1 << 20, Available: 1 << 19, THP: "madvise", THPOnShared: "deny",
		HugePages: []HugePages{{Size: 2 << 20, Total: 10, Free: 4}, {Size: 1 << 30}},
	}
	if diff := cmp.Diff(want, probeMemory(host)); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff(Memory{HugePages: []HugePages{}}, probeMemory(fstest.MapFS{})); diff != "" {
		t.Error(diff)
	}
}

func TestFeatureNames(t *testing.T) {
	got := featureNames(1<<0 | 1<<16 | 1<<40)
	if want := []string{"pagefault-flag-wp", "move", "bit-40"}; !slices.Equal(got, want) {
		t.Errorf("%q, not %q", got, want)
	}
}

// goodHost is a report of a host that lacks nothing.
func goodHost() Report {
	r := Report{
		KVM:         KVM{Kind: KindVTx, NativeRing0: true},
		CPU:         CPU{VTx: true, ConstantTSC: true},
		Memory:      Memory{HugePages: []HugePages{{Size: 2 << 20, Total: 1, Free: 1}}},
		Userfaultfd: Userfaultfd{By: "device", Features: featureNames(0x1ffff)},
		Devices:     []Device{{Path: "/dev/net/tun", Usable: true}},
	}
	for _, c := range capabilities {
		r.KVM.Capabilities = append(r.KVM.Capabilities, Capability{Name: strings.TrimPrefix(c.cap.String(), "KVM_CAP_"), Value: 1})
	}
	return r
}

func TestJudge(t *testing.T) {
	lack := func(c kvm.Cap) func(*Report) {
		return func(r *Report) {
			for i := range r.KVM.Capabilities {
				if "KVM_CAP_"+r.KVM.Capabilities[i].Name == c.String() {
					r.KVM.Capabilities[i].Value = 0
				}
			}
		}
	}
	for name, c := range map[string]struct {
		change func(*Report)
		usable bool
		want   []string
	}{
		"nothing is missing": {func(*Report) {}, true, nil},
		"no KVM": {func(r *Report) {
			r.KVM = KVM{Kind: KindNone, Error: "no device"}
		}, false, []string{"KVM"}},
		"PVM needs no huge pages to be told": {func(r *Report) {
			r.KVM.Kind, r.KVM.NativeRing0, r.Memory.HugePages = KindPVM, false, nil
		}, true, []string{"hardware virtualisation"}},
		"a needed capability":     {lack(kvm.CapIRQFD), false, []string{"interrupts raised by eventfd"}},
		"a useful capability":     {lack(kvm.CapBinaryStatsFD), true, []string{"statistics"}},
		"a capability for others": {lack(kvm.CapPreFaultMemory), true, nil},
		"no userfaultfd":          {func(r *Report) { r.Userfaultfd = Userfaultfd{Error: "x"} }, true, []string{"userfaultfd"}},
		"an old userfaultfd": {func(r *Report) {
			r.Userfaultfd.Features = featureNames(0x1fff &^ (1 << 10))
		}, true, []string{"userfaultfd minor faults"}},
		"no huge pages": {func(r *Report) { r.Memory.HugePages[0].Free = 0 }, true, []string{"huge pages"}},
		"transparent huge pages": {func(r *Report) {
			r.Memory.HugePages[0].Free, r.Memory.THPOnShared = 0, "advise"
		}, true, nil},
		"no tun":          {func(r *Report) { r.Devices[0] = Device{Path: "/dev/net/tun", Error: "x"} }, true, []string{"tap networking"}},
		"a wandering TSC": {func(r *Report) { r.CPU.ConstantTSC = false }, true, []string{"a TSC of constant rate"}},
	} {
		r := goodHost()
		c.change(&r)
		r.judge()
		var got []string
		for _, m := range r.Missing {
			got = append(got, m.What)
			if m.Cost == "" {
				t.Errorf("%s: %s costs nothing", name, m.What)
			}
		}
		if !slices.Equal(got, c.want) || r.Usable != c.usable {
			t.Errorf("%s: missing %q, usable %v; want %q, %v", name, got, r.Usable, c.want, c.usable)
		}
	}
}
