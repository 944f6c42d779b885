package vmm

import (
	"encoding/binary"
	"errors"
	"testing"

	"github.com/gnomon-vmm/gnomon/kvm"
	"github.com/gnomon-vmm/gnomon/tests/guest/probe"
	"github.com/gnomon-vmm/gnomon/vmm/boot"
)

func newMachine(t *testing.T, cfg Config) *Machine {
	t.Helper()
	cfg.Memory = 8 << 20
	if cfg.Restore == nil {
		elf, err := probe.Path()
		if err != nil {
			t.Fatal(err)
		}
		if cfg.Kernel, err = boot.OpenKernel(elf); err != nil {
			t.Fatal(err)
		}
	}
	m, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	return m
}

func saved(t *testing.T, m *Machine) []Section {
	t.Helper()
	sections, err := m.SaveState()
	if err != nil {
		t.Fatal(err)
	}
	return sections
}

// deadline reads the vCPU's TSC and by how much its timer's deadline is ahead.
func (c *vcpu) deadline(t *testing.T) (left int64) {
	t.Helper()
	m := []kvm.MSREntry{{Index: msrTSCDeadline}, {Index: msrTSC}}
	if n, err := c.GetMSRs(m); err != nil || n != len(m) {
		t.Fatalf("read %d MSRs: %v", n, err)
	}
	if m[0].Data == 0 {
		t.Fatal("the timer has no deadline")
	}
	return int64(m[0].Data - m[1].Data)
}

// The local APIC's timer goes off after the time that was left, whatever the
// TSC is where the machine is restored.
func TestRestoredDeadline(t *testing.T) {
	const left = 1 << 44 // hours
	m := newMachine(t, Config{})
	c := m.cpus[0]
	var lapic kvm.LAPIC
	if err := c.GetLAPIC(&lapic); err != nil {
		t.Fatal(err)
	}
	binary.LittleEndian.PutUint32(lapic[0xF0:], 0x1FF)       // enabled
	binary.LittleEndian.PutUint32(lapic[0x320:], 2<<17|0x40) // the timer by TSC deadline
	if err := c.SetLAPIC(&lapic); err != nil {
		t.Fatal(err)
	}
	now := []kvm.MSREntry{{Index: msrTSC}}
	if _, err := c.GetMSRs(now); err != nil {
		t.Fatal(err)
	}
	if n, err := c.SetMSRs([]kvm.MSREntry{{Index: msrTSCDeadline, Data: now[0].Data + left}}); err != nil || n != 1 {
		t.Fatalf("set the deadline: %v", err)
	}
	sections := saved(t, m)
	before := c.deadline(t)
	again := newMachine(t, Config{Restore: &Restore{Sections: sections}})
	if after := again.cpus[0].deadline(t); after <= before-left/2 || after > left {
		t.Errorf("%d cycles were left and %d are", before, after)
	}
}

// What is about to happen to the whole machine is not lost: it is waited for.
func TestNoStateAmidAReset(t *testing.T) {
	m := newMachine(t, Config{})
	m.gate.hold(holdRequest)
	if _, err := m.SaveState(); !errors.Is(err, ErrState) {
		t.Errorf("state with a reset under way: %v", err)
	}
	m.gate.release(holdRequest)
	saved(t, m)
}

// A guest with virtual machines of its own is not saved without them.
func TestNoStateOfNestedMachines(t *testing.T) {
	m := newMachine(t, Config{})
	c := m.cpus[0]
	var s kvm.Sregs
	if err := c.GetSregs(&s); err != nil {
		t.Fatal(err)
	}
	s.EFER |= eferSVME
	if err := c.SetSregs(&s); err != nil {
		s.EFER &^= eferSVME
		s.CR4 |= cr4VMXE
		if err := c.SetSregs(&s); err != nil {
			t.Skip("this host offers guests no virtualisation")
		}
	}
	if _, err := m.SaveState(); !errors.Is(err, ErrState) {
		t.Errorf("state with virtualisation on: %v", err)
	}
}
