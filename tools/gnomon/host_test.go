package main

import (
	"bytes"
	"encoding/json"
	"slices"
	"strings"
	"testing"

	"github.com/gnomon-vmm/gnomon/kvm"
	"github.com/gnomon-vmm/gnomon/kvm/hostinfo"
)

func runHost(t *testing.T, args ...string) string {
	t.Helper()
	var out bytes.Buffer
	cmd := newHostCommand()
	cmd.SetOut(&out)
	cmd.SetArgs(args)
	if err := cmd.Execute(); err != nil {
		t.Fatal(err)
	}
	return out.String()
}

// jsonPaths lists the keys of a JSON value; [] stands for a list's elements.
func jsonPaths(prefix string, value any, paths map[string]bool) {
	switch v := value.(type) {
	case map[string]any:
		for key, inner := range v {
			paths[prefix+"."+key] = inner != nil
			jsonPaths(prefix+"."+key, inner, paths)
		}
	case []any:
		for _, inner := range v {
			jsonPaths(prefix+"[]", inner, paths)
		}
	}
}

// Programs read this: a key that disappears breaks them.
func TestHostJSONShape(t *testing.T) {
	var report any
	if err := json.Unmarshal([]byte(runHost(t, "--output", "json")), &report); err != nil {
		t.Fatal(err)
	}
	paths := make(map[string]bool)
	jsonPaths("", report, paths)
	for _, want := range []string{
		".usable", ".uid", ".kernel",
		".kvm", ".kvm.kind", ".kvm.error", ".kvm.modules", ".kvm.api_version", ".kvm.native_ring0", ".kvm.vcpus",
		".kvm.max_vcpus", ".kvm.memory_slots", ".kvm.tsc_khz", ".kvm.capabilities",
		".cpu", ".cpu.model", ".cpu.count", ".cpu.vt_x", ".cpu.amd_v", ".cpu.hypervisor", ".cpu.constant_tsc", ".cpu.clocksource",
		".memory", ".memory.total", ".memory.available", ".memory.huge_pages", ".memory.thp", ".memory.thp_on_shared",
		".userfaultfd", ".userfaultfd.by", ".userfaultfd.error", ".userfaultfd.features", ".userfaultfd.mask", ".userfaultfd.unprivileged",
		".devices", ".devices[].path", ".devices[].usable", ".devices[].error", ".devices[].use",
		".missing",
	} {
		if !paths[want] {
			t.Errorf("%s is gone, or null", want)
		}
	}
}

func TestHostText(t *testing.T) {
	text := runHost(t)
	for _, want := range []string{"Virtualisation", "userfaultfd", "/dev/net/tun", "Memory"} {
		if !strings.Contains(text, want) {
			t.Errorf("nothing about %s in\n%s", want, text)
		}
	}
}

// The text of a host with nothing, as of any other, has a line for each fact
// and no verb of fmt gone wrong.
func TestHostTextOfBareHost(t *testing.T) {
	var out bytes.Buffer
	err := printHost(&out, hostinfo.Report{
		KVM:         hostinfo.KVM{Kind: hostinfo.KindNone, Error: "no such device"},
		Userfaultfd: hostinfo.Userfaultfd{Error: "not permitted"},
		Missing:     []hostinfo.Missing{{What: "KVM", Cost: "virtual machines cannot run"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	text := out.String()
	for _, want := range []string{"cannot run here", "no such device", "none as root: not permitted", "cost: virtual machines"} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is not in\n%s", want, text)
		}
	}
	if strings.Contains(text, "%!") || strings.Contains(text, "remedy: \n") {
		t.Error(text)
	}
}

// Who may not use KVM is told that, not that there is none.
func TestHostTextWithoutPermission(t *testing.T) {
	var out bytes.Buffer
	err := printHost(&out, hostinfo.Report{
		KVM: hostinfo.KVM{Kind: hostinfo.KindNone, Error: kvm.ErrPermission.Error() + ": open /dev/kvm: permission denied: be root"},
	})
	if err != nil {
		t.Fatal(err)
	}
	headline, _, _ := strings.Cut(out.String(), "\n")
	if !strings.Contains(headline, "no permission for /dev/kvm") || strings.Contains(out.String(), "cannot run here") {
		t.Error(out.String())
	}
}

func TestHostRefusesUnknownOutput(t *testing.T) {
	cmd := newHostCommand()
	cmd.SetArgs([]string{"--output", "yaml"})
	cmd.SilenceErrors, cmd.SilenceUsage = true, true
	if err := cmd.Execute(); err == nil {
		t.Error("--output yaml was accepted")
	}
}

func TestKindsHaveWords(t *testing.T) {
	kinds := []hostinfo.Kind{hostinfo.KindNone, hostinfo.KindVTx, hostinfo.KindAMDV, hostinfo.KindPVM, hostinfo.KindOther}
	if i := slices.IndexFunc(kinds, func(k hostinfo.Kind) bool { return kindInWords[k] == "" }); i >= 0 {
		t.Errorf("no words for %s", kinds[i])
	}
}
