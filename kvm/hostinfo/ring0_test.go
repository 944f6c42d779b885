package hostinfo_test

import (
	"os"
	"regexp"
	"testing"

	"github.com/gnomon-vmm/gnomon/kvm"
	"github.com/gnomon-vmm/gnomon/kvm/hostinfo"
)

func openKVM(t *testing.T) *kvm.System {
	t.Helper()
	sys, err := kvm.Open()
	if err != nil {
		t.Skipf("needs /dev/kvm: %v", err)
	}
	t.Cleanup(func() { sys.Close() })
	return sys
}

// Without VT-x and AMD-V in the processor's own words, KVM can only be PVM,
// which interprets ring 0; with them it is native.
func TestNativeRing0AgreesWithProcessor(t *testing.T) {
	sys := openKVM(t)
	native, err := hostinfo.NativeRing0(sys)
	if err != nil {
		t.Fatal(err)
	}
	cpuinfo, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		t.Fatal(err)
	}
	if want := regexp.MustCompile(`(?m)^flags\s*:.*\b(vmx|svm)\b`).Match(cpuinfo); native != want {
		t.Errorf("NativeRing0 = %v, vmx or svm in /proc/cpuinfo = %v", native, want)
	}
}
