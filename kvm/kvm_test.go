package kvm_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/kvm"
	"github.com/gnomon-vmm/gnomon/kvm/internal/tinyguest"
)

func TestOpenSaysWhatIsWrong(t *testing.T) {
	dir := t.TempDir()
	notDevice := filepath.Join(dir, "file")
	if err := os.WriteFile(notDevice, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		path string
		want []error
	}{
		{filepath.Join(dir, "missing"), []error{kvm.ErrNoKVM, fs.ErrNotExist}},
		{"/dev/null", []error{kvm.ErrNoKVM, unix.ENOTTY}},
		{notDevice, []error{kvm.ErrNoKVM, unix.ENOTTY}},
		{dir, []error{kvm.ErrNoKVM, unix.EISDIR}},
	} {
		sys, err := kvm.OpenPath(c.path)
		if sys != nil || err == nil {
			t.Errorf("%s opened as KVM", c.path)
			continue
		}
		for _, want := range c.want {
			if !errors.Is(err, want) {
				t.Errorf("%s: %v, not %v", c.path, err, want)
			}
		}
		if strings.Contains(err.Error(), "\n") || !strings.Contains(err.Error(), c.path) {
			t.Errorf("%q is not one line about %s", err, c.path)
		}
	}
}

func TestCheck(t *testing.T) {
	sys := openKVM(t)
	if n := sys.Check(kvm.CapNrVCPUs); n < 1 {
		t.Errorf("room for %d VCPUs", n)
	}
	if n := sys.Check(kvm.Cap(0x7fff)); n != 0 {
		t.Errorf("a capability that does not exist is there: %d", n)
	}
	guest := newGuest(t, tinyguest.Config{Code: loop})
	if got, want := guest.VM.Check(kvm.CapNrMemslots), sys.Check(kvm.CapNrMemslots); got != want {
		t.Errorf("%d memory slots for the VM, %d for the system", got, want)
	}
	if err := guest.VM.EnableCap(kvm.Cap(0x7fff)); !errors.Is(err, unix.EINVAL) {
		t.Errorf("enable a capability that does not exist: %v", err)
	}
	if err := guest.VM.EnableCap(kvm.CapSplitIRQChip, 1, 2, 3, 4, 5); !errors.Is(err, unix.E2BIG) {
		t.Errorf("five arguments: %v", err)
	}
}

func TestNames(t *testing.T) {
	for got, want := range map[string]string{
		kvm.CapIRQChip.String():       "KVM_CAP_IRQCHIP",
		kvm.CapGuestMemFD.String():    "KVM_CAP_GUEST_MEMFD",
		kvm.ExitMemoryFault.String():  "KVM_EXIT_MEMORY_FAULT",
		kvm.ExitHLT.String():          "KVM_EXIT_HLT",
		kvm.Exit(999).String():        "Exit(999)",
		kvm.MPHalted.String():         "halted",
		kvm.MPState(77).String():      "unknown",
		kvm.StatLogHistogram.String(): "log2-histogram",
		kvm.StatSeconds.String():      "seconds",
	} {
		if got != want {
			t.Errorf("%q, not %q", got, want)
		}
	}
}

func TestCloseTwice(t *testing.T) {
	guest, err := tinyguest.New(openKVM(t), tinyguest.Config{Code: loop})
	if err != nil {
		t.Fatal(err)
	}
	vm, vcpu := guest.VM, guest.VCPU
	if err := guest.Close(); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(vcpu.Close(), vm.Close()); err != nil {
		t.Errorf("second close: %v", err)
	}
	if _, err := vm.CreateVCPU(0); !errors.Is(err, unix.EBADF) {
		t.Errorf("a VCPU for a closed VM: %v", err)
	}
}
