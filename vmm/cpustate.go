package vmm

import (
	"errors"
	"fmt"

	"github.com/gnomon-vmm/gnomon/kvm"
)

// CPUState is all of a vCPU that must survive a checkpoint or that a reset
// goes back to.
type CPUState struct {
	Regs      kvm.Regs
	Sregs     kvm.Sregs
	XSave     []byte
	XCRS      kvm.XCRS
	MSRs      []kvm.MSREntry
	LAPIC     kvm.LAPIC
	Events    kvm.VCPUEvents
	DebugRegs kvm.DebugRegs
	MPState   kvm.MPState
}

// MSRs that count time. A reset leaves them alone, so that the vCPUs' clocks
// stay together.
const (
	msrTSC         = 0x10
	msrTSCAdjust   = 0x3B
	msrTSCDeadline = 0x6E0
)

// saveState reads the vCPU's state. Preconditions: it stands at the gate, or
// has not run yet.
func (c *vcpu) saveState() (*CPUState, error) {
	s := &CPUState{}
	var err error
	for _, part := range []struct {
		name string
		get  func() error
	}{
		{"registers", func() error { return c.GetRegs(&s.Regs) }},
		{"special registers", func() error { return c.GetSregs(&s.Sregs) }},
		{"XSAVE area", func() error { s.XSave, err = c.XSave(); return err }},
		{"XCRs", func() error { return c.GetXCRS(&s.XCRS) }},
		{"MSRs", func() error { s.MSRs, err = c.allMSRs(); return err }},
		{"local APIC", func() error { return c.GetLAPIC(&s.LAPIC) }},
		{"events", func() error { return c.GetEvents(&s.Events) }},
		{"debug registers", func() error { return c.GetDebugRegs(&s.DebugRegs) }},
		{"MP state", func() error { s.MPState, err = c.MPState(); return err }},
	} {
		if err := part.get(); err != nil {
			return nil, fmt.Errorf("read %s: %w", part.name, err)
		}
	}
	return s, nil
}

// allMSRs reads every MSR that KVM lists and this host can read.
func (c *vcpu) allMSRs() ([]kvm.MSREntry, error) {
	indices, err := c.m.sys.MSRIndexList()
	if err != nil {
		return nil, err
	}
	entries := make([]kvm.MSREntry, len(indices))
	for i, index := range indices {
		entries[i].Index = index
	}
	var got []kvm.MSREntry
	for len(entries) > 0 {
		n, err := c.GetMSRs(entries)
		if err != nil {
			return nil, err
		}
		got = append(got, entries[:n]...)
		if n < len(entries) {
			n++ // KVM lists it and cannot read it
		}
		entries = entries[n:]
	}
	return got, nil
}

// resetState takes the vCPU back to how KVM made it. Preconditions: it stands
// at the gate.
func (c *vcpu) resetState() error {
	s := *c.pristine
	s.MSRs = make([]kvm.MSREntry, 0, len(c.pristine.MSRs))
	for _, m := range c.pristine.MSRs {
		if m.Index != msrTSC && m.Index != msrTSCAdjust {
			s.MSRs = append(s.MSRs, m)
		}
	}
	if err := c.writeState(&s, c.setMSRs); err != nil {
		return err
	}
	if c.assist != nil {
		return c.assist.Reset()
	}
	return nil
}

// checkpointState is saveState for a vCPU that is to go on elsewhere.
func (c *vcpu) checkpointState() (*CPUState, error) {
	s, err := c.saveState()
	if err != nil {
		return nil, err
	}
	if s.Sregs.CR4&cr4VMXE != 0 || s.Sregs.EFER&eferSVME != 0 {
		return nil, fmt.Errorf("vCPU %d: the guest runs virtual machines of its own, whose state cannot be saved: unload its KVM first", c.id)
	}
	if c.assist != nil && c.assist.INT3Again(s.Regs.RIP) {
		s.Regs.RIP--
	}
	return s, nil
}

// Bits that turn on virtualisation in the guest.
const (
	cr4VMXE  = 1 << 13
	eferSVME = 1 << 12
)

// restoreState has the vCPU go on as another was saved. Preconditions: it has
// not run yet.
func (c *vcpu) restoreState(s *CPUState) error {
	if s == nil {
		return errors.New("no state")
	}
	if err := c.fitXSave(s); err != nil {
		return err
	}
	if err := c.writeState(s, c.setEveryMSR); err != nil {
		return err
	}
	if err := c.restoreDeadline(s); err != nil {
		return err
	}
	if c.assist != nil {
		return c.assist.Restore()
	}
	return nil
}

// fitXSave makes the XSAVE area as large as this host's, which may have room for
// more; what the guest has in it must have room too.
func (c *vcpu) fitXSave(s *CPUState) error {
	size := c.XSaveSize()
	if len(s.XSave) < minXSave {
		return fmt.Errorf("XSAVE area of %d bytes", len(s.XSave))
	}
	for _, b := range s.XSave[min(size, len(s.XSave)):] {
		if b != 0 {
			return fmt.Errorf("XSAVE area of %d bytes, and this host has room for %d", len(s.XSave), size)
		}
	}
	area := make([]byte, size)
	copy(area, s.XSave)
	s.XSave = area
	return nil
}

// minXSave is the legacy region and the header (Intel SDM volume 1, section 13.4).
const minXSave = 576

// setEveryMSR writes MSRs, and refuses those that do not take their values.
func (c *vcpu) setEveryMSR(entries []kvm.MSREntry) error {
	for len(entries) > 0 {
		n, err := c.SetMSRs(entries)
		if err != nil {
			return err
		}
		if entries = entries[n:]; n > 0 {
			continue
		}
		is := [1]kvm.MSREntry{{Index: entries[0].Index}}
		if n, err := c.GetMSRs(is[:]); err != nil || n != 1 || is[0].Data != entries[0].Data {
			return fmt.Errorf("MSR %#x does not take the value %#x here", entries[0].Index, entries[0].Data)
		}
		entries = entries[1:]
	}
	return nil
}

// restoreDeadline sets the local APIC's timer to go off after the time that was
// left: where KVM cannot give the guest its old TSC, that is another value; and
// the MSR takes none before the local APIC is in that mode.
func (c *vcpu) restoreDeadline(s *CPUState) error {
	var then, deadline uint64
	for _, m := range s.MSRs {
		switch m.Index {
		case msrTSC:
			then = m.Data
		case msrTSCDeadline:
			deadline = m.Data
		}
	}
	if deadline == 0 {
		return nil
	}
	now := []kvm.MSREntry{{Index: msrTSC}}
	if _, err := c.GetMSRs(now); err != nil {
		return fmt.Errorf("read TSC: %w", err)
	}
	return c.setMSRs([]kvm.MSREntry{{Index: msrTSCDeadline, Data: max(deadline-then+now[0].Data, 1)}})
}

// writeState writes all of s, the MSRs by setMSRs. Preconditions: the vCPU stands
// at the gate, or has not run yet.
func (c *vcpu) writeState(s *CPUState, setMSRs func([]kvm.MSREntry) error) error {
	// The special registers come before the local APIC, whose base and mode
	// they hold; the MP state comes last, since the others may change it.
	for _, part := range []struct {
		name string
		set  func() error
	}{
		{"registers", func() error { return c.SetRegs(&s.Regs) }},
		{"XCRs", func() error { return c.SetXCRS(&s.XCRS) }},
		{"XSAVE area", func() error { return c.SetXSave(s.XSave) }},
		{"special registers", func() error { return c.SetSregs(&s.Sregs) }},
		{"MSRs", func() error { return setMSRs(s.MSRs) }},
		{"local APIC", func() error { return c.SetLAPIC(&s.LAPIC) }},
		{"debug registers", func() error { return c.SetDebugRegs(&s.DebugRegs) }},
		{"events", func() error { return c.SetEvents(&s.Events) }},
		{"MP state", func() error { return c.SetMPState(s.MPState) }},
	} {
		if err := part.set(); err != nil {
			return fmt.Errorf("vCPU %d: write %s: %w", c.id, part.name, err)
		}
	}
	return nil
}

// setMSRs writes MSRs, passing over those that KVM lists and lets nobody write.
func (c *vcpu) setMSRs(entries []kvm.MSREntry) error {
	for len(entries) > 0 {
		n, err := c.SetMSRs(entries)
		if err != nil {
			return err
		}
		if n < len(entries) {
			n++
		}
		entries = entries[n:]
	}
	return nil
}
