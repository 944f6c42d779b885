package kvm_test

import (
	"testing"

	"github.com/gnomon-vmm/gnomon/kvm"
	"github.com/gnomon-vmm/gnomon/kvm/internal/tinyguest"
)

func TestStats(t *testing.T) {
	guest := newGuest(t, tinyguest.Config{Mode: tinyguest.Ring3, Code: []byte{0xe6, 0x80, 0xeb, 0xfc}})
	if guest.VM.Check(kvm.CapBinaryStatsFD) == 0 {
		t.Skip("needs KVM_CAP_BINARY_STATS_FD")
	}
	exits := func() uint64 {
		t.Helper()
		stats, err := guest.VCPU.Stats()
		if err != nil {
			t.Fatal(err)
		}
		histograms := 0
		var count uint64
		for _, s := range stats {
			if s.Name == "exits" {
				count = s.Value[0]
			}
			if s.Type == kvm.StatLogHistogram && len(s.Value) > 1 && s.Unit == kvm.StatSeconds && s.Exponent == -9 {
				histograms++
			}
		}
		if histograms == 0 {
			t.Errorf("no histogram of nanoseconds among %d statistics", len(stats))
		}
		return count
	}
	runToOut(t, guest, 0x80)
	before := exits()
	for range 10 {
		runToOut(t, guest, 0x80)
	}
	if after := exits(); after < before+10 {
		t.Errorf("%d exits after %d and ten more", after, before)
	}
	stats, err := guest.VM.Stats()
	if err != nil || len(stats) < 3 {
		t.Errorf("VM: %d statistics, %v", len(stats), err)
	}
}
