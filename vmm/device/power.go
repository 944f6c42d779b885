package device

import (
	"encoding/binary"
	"fmt"
	"math/bits"
	"sync"
	"time"
)

// PMTimerHz is the frequency of the ACPI power management timer (ACPI 6.4,
// section 4.8.3.3).
const PMTimerHz = 3_579_545

// SleepTypeS5 is the SLP_TYP value that powers off; the DSDT's \_S5 says so.
const SleepTypeS5 = 5

// powerPorts are the ports from PortPM1Event to the end of the GPE0 block.
const powerPorts = PortGPE0 + 4 - PortPM1Event

// PM1 bits (ACPI 6.4, tables 4.11 to 4.13); status and enable are alike.
const (
	pm1Timer       = 1 << 0
	pm1Global      = 1 << 5
	pm1PowerButton = 1 << 8
	pm1SleepButton = 1 << 9
	pm1RTC         = 1 << 10
	pm1Wake        = 1 << 15

	pm1StatusBits = pm1Timer | pm1Global | pm1PowerButton | pm1SleepButton | pm1RTC | pm1Wake
	pm1EnableBits = pm1Timer | pm1Global | pm1PowerButton | pm1SleepButton | pm1RTC

	pm1SCIEnable    = 1 << 0
	pm1BusMaster    = 1 << 1
	pm1SleepType    = 7 << 10
	pm1SleepTypeBit = 10
	pm1SleepEnable  = 1 << 13

	pmTimerMask = 1<<24 - 1
	pmTimerHalf = 1 << 23 // ticks between two changes of the timer's top bit
)

// Power is the ACPI fixed hardware: PM1 event and control blocks, PM timer and
// GPE0 block (ACPI 6.4, section 4.8). The machine is always in ACPI mode:
// there is no SMI command port and SCI_EN reads as 1. Of the sleeping states
// only S5 is there; a guest that tries another is awake at once.
type Power struct {
	sci      Line
	clock    Clock
	platform Platform

	mu    sync.Mutex
	s     PowerState  // guarded by mu
	line  bool        // guarded by mu: level of sci
	timer *time.Timer // guarded by mu: the PM timer's interrupt, while enabled
}

// PowerState is what of a Power survives a checkpoint, beside its clock.
type PowerState struct {
	PM1Status, PM1Enable uint16
	PM1Control           uint16
	GPE0Status           uint16
	GPE0Enable           uint16
	// TimerHalves counts changes of the timer's top bit seen so far.
	TimerHalves uint64
}

// NewPower returns the fixed hardware; it interrupts by sci, and its timer
// runs by clock.
func NewPower(sci Line, clock Clock, platform Platform) *Power {
	p := &Power{sci: sci, clock: clock, platform: platform}
	p.Reset()
	return p
}

// Map puts the registers at their ports.
func (p *Power) Map(ports *Bus) error { return ports.Map(PortPM1Event, powerPorts, p) }

// Reset brings the registers to power-on state. The timer runs on.
func (p *Power) Reset() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.s = PowerState{PM1Control: pm1SCIEnable, TimerHalves: p.ticks() / pmTimerHalf}
	p.update()
}

// Close stops the timer.
func (p *Power) Close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.s.PM1Enable = 0
	p.update()
}

// PressPowerButton presses the power button: Linux then shuts down.
func (p *Power) PressPowerButton() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.s.PM1Status |= pm1PowerButton
	p.update()
}

// NotifyGeneration tells the guest that its generation id has changed.
func (p *Power) NotifyGeneration() { p.raise(GPEGenerationID) }

// NotifyPCI tells the guest that a PCI device has come, or is to go.
func (p *Power) NotifyPCI() { p.raise(GPEPCIHotplug) }

func (p *Power) raise(event int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.s.GPE0Status |= 1 << event
	p.update()
}

// State returns what must survive a checkpoint.
func (p *Power) State() PowerState {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.s
}

// Restore takes over saved state, after the clock was set to what it was, and
// drives the SCI accordingly.
func (p *Power) Restore(s PowerState) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if halves := p.ticks() / pmTimerHalf; s.TimerHalves > halves {
		return fmt.Errorf("%w: ACPI power management: its timer is ahead of the machine's clock", ErrState)
	}
	s.PM1Status &= pm1StatusBits
	s.PM1Enable &= pm1EnableBits
	s.PM1Control = s.PM1Control&(pm1BusMaster|pm1SleepType) | pm1SCIEnable
	p.s = s
	p.update()
	p.sci.Set(p.line) // whatever it was before
	return nil
}

// ticks is the timer at full width.
func (p *Power) ticks() uint64 {
	hi, lo := bits.Mul64(uint64(max(p.clock.Now(), 0)), PMTimerHz)
	q, _ := bits.Div64(hi, lo, uint64(time.Second)) // hi < PMTimerHz/2 < 1e9
	return q
}

// Read reads the registers at any width. Ports between the blocks read as zero.
func (p *Power) Read(off uint64, data []byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.update() // the timer's status
	var regs [powerPorts]byte
	put16 := func(port int, v uint16) { binary.LittleEndian.PutUint16(regs[port-PortPM1Event:], v) }
	put16(PortPM1Event, p.s.PM1Status)
	put16(PortPM1Event+2, p.s.PM1Enable)
	put16(PortPM1Control, p.s.PM1Control)
	binary.LittleEndian.PutUint32(regs[PortPMTimer-PortPM1Event:], uint32(p.ticks()&pmTimerMask))
	put16(PortGPE0, p.s.GPE0Status)
	put16(PortGPE0+2, p.s.GPE0Enable)
	clear(data)
	if off < powerPorts {
		copy(data, regs[off:])
	}
}

// Write writes the registers at any width.
func (p *Power) Write(off uint64, data []byte) {
	p.mu.Lock()
	sleep := false
	for i, v := range data {
		sleep = p.write(off+uint64(i), v) || sleep
	}
	off5 := sleep && p.s.PM1Control&pm1SleepType>>pm1SleepTypeBit == SleepTypeS5
	if sleep && !off5 {
		p.s.PM1Status |= pm1Wake
	}
	p.update()
	p.mu.Unlock()
	if off5 {
		p.platform.PowerOff()
	}
}

// write writes one byte of the registers; it tells whether SLP_EN was in it.
func (p *Power) write(off uint64, v uint8) (sleep bool) {
	shift := off % 2 * 8
	byteMask := uint16(0xFF) << shift
	set := uint16(v) << shift
	replace := func(reg *uint16, writable uint16) {
		writable &= byteMask
		*reg = *reg&^writable | set&writable
	}
	switch off &^ 1 {
	case 0:
		p.update() // what happened before the write is cleared by it
		p.s.PM1Status &^= set
	case 2:
		replace(&p.s.PM1Enable, pm1EnableBits)
	case PortPM1Control - PortPM1Event:
		replace(&p.s.PM1Control, pm1BusMaster|pm1SleepType)
		return set&pm1SleepEnable != 0
	case PortGPE0 - PortPM1Event:
		p.s.GPE0Status &^= set
	case PortGPE0 + 2 - PortPM1Event:
		replace(&p.s.GPE0Enable, 0xFFFF)
	}
	return false
}

// update brings the timer's status and interrupt up to now and drives the SCI.
func (p *Power) update() {
	ticks := p.ticks()
	if halves := ticks / pmTimerHalf; halves != p.s.TimerHalves {
		p.s.TimerHalves = halves
		p.s.PM1Status |= pm1Timer
	}
	if level := p.s.PM1Status&p.s.PM1Enable != 0 || p.s.GPE0Status&p.s.GPE0Enable != 0; level != p.line {
		p.line = level
		p.sci.Set(level)
	}
	p.armTimer(ticks)
}

// armTimer has update called when the timer's interrupt is due, while it is
// enabled and not raised already.
func (p *Power) armTimer(ticks uint64) {
	if p.s.PM1Enable&pm1Timer == 0 || p.s.PM1Status&pm1Timer != 0 {
		if p.timer != nil {
			p.timer.Stop()
		}
		return
	}
	left := pmTimerHalf - ticks%pmTimerHalf
	// Not too short: a paused machine's clock comes no nearer.
	wait := max(time.Duration((left*uint64(time.Second)+PMTimerHz-1)/PMTimerHz), time.Millisecond)
	if p.timer == nil {
		p.timer = time.AfterFunc(wait, func() {
			p.mu.Lock()
			defer p.mu.Unlock()
			p.update()
		})
		return
	}
	p.timer.Reset(wait)
}

// ResetPort is the chipset's reset control register (Intel ICH9, section
// 13.7.5), one byte at PortReset, which the FADT names as the ACPI reset
// register: a write with RST_CPU set resets the machine. It holds nothing and
// reads as zero.
type ResetPort struct{ platform Platform }

// resetCPU does the reset; the other bits only choose its kind.
const resetCPU = 1 << 2

// NewResetPort returns the register.
func NewResetPort(platform Platform) ResetPort { return ResetPort{platform} }

// Read reads zero.
func (r ResetPort) Read(_ uint64, p []byte) { clear(p) }

// Write writes the register.
func (r ResetPort) Write(_ uint64, p []byte) {
	if len(p) > 0 && p[0]&resetCPU != 0 {
		r.platform.Reset("reset register 0xcf9")
	}
}
