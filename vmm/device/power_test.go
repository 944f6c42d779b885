package device

import (
	"errors"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// acpi is a guest's view of a Power.
type acpi struct {
	ports
	sci   *wire
	clock *handClock
	asked *requests
	dev   *Power
}

func newACPI(t testing.TB) *acpi {
	a := &acpi{sci: &wire{}, clock: &handClock{}, asked: &requests{}}
	a.dev = NewPower(a.sci, a.clock, a.asked)
	a.ports = newPorts(t, a.dev.Map)
	t.Cleanup(a.dev.Close)
	return a
}

func TestPowerButton(t *testing.T) {
	a := newACPI(t)
	a.dev.PressPowerButton()
	if a.sci.level() {
		t.Error("SCI without the event being enabled")
	}
	a.out16(PortPM1Event+2, pm1PowerButton|pm1Global)
	if !a.sci.level() || a.in16(PortPM1Event) != pm1PowerButton {
		t.Error("no SCI once the event is enabled")
	}
	a.out16(PortPM1Event, pm1Timer|pm1Global) // clears others
	if !a.sci.level() {
		t.Error("the button's status was cleared by other bits")
	}
	a.out16(PortPM1Event, pm1PowerButton)
	if a.sci.level() || a.in16(PortPM1Event) != 0 {
		t.Error("writing 1 did not clear the status")
	}
	if got := a.asked.take(); got != nil {
		t.Errorf("guest asked for %q", got)
	}
}

func TestPowerGenerationEvent(t *testing.T) {
	a := newACPI(t)
	a.out16(PortGPE0+2, 1<<GPEGenerationID)
	a.dev.NotifyGeneration()
	if !a.sci.level() || a.in16(PortGPE0) != 1<<GPEGenerationID {
		t.Error("no SCI for a new generation")
	}
	a.out(PortGPE0, 1<<GPEGenerationID) // ACPICA writes GPE registers byte by byte
	if a.sci.level() || a.in16(PortGPE0) != 0 || a.in16(PortGPE0+2) != 1<<GPEGenerationID {
		t.Error("writing 1 did not clear just the status")
	}
}

func TestPowerOff(t *testing.T) {
	for name, write := range map[string]func(a *acpi){
		"as Linux does": func(a *acpi) {
			control := a.in16(PortPM1Control)
			a.out16(PortPM1Control, control|SleepTypeS5<<10)
			if a.asked.take() != nil {
				t.Error("powered off without SLP_EN")
			}
			a.out16(PortPM1Control, control|SleepTypeS5<<10|1<<13)
		},
		"by its high byte": func(a *acpi) { a.out(PortPM1Control+1, SleepTypeS5<<2|1<<5) },
		"in 4 bytes":       func(a *acpi) { a.Write(PortPM1Control, []byte{0, SleepTypeS5<<2 | 1<<5, 0, 0}) },
	} {
		a := newACPI(t)
		write(a)
		if got := a.asked.take(); !slices.Equal(got, []string{"power off"}) {
			t.Errorf("%s: guest asked for %q", name, got)
		}
		if v := a.in16(PortPM1Control); v&(1<<13) != 0 || v&1 == 0 {
			t.Errorf("%s: PM1 control reads as %#x: SLP_EN must read as 0 and SCI_EN as 1", name, v)
		}
	}
	a := newACPI(t)
	a.out16(PortPM1Control, 3<<10|1<<13)
	if got := a.asked.take(); got != nil || a.in16(PortPM1Event)&pm1Wake == 0 {
		t.Errorf("another sleep state: asked for %q, PM1 status %#x; want awake at once", got, a.in16(PortPM1Event))
	}
}

func TestPMTimer(t *testing.T) {
	a := newACPI(t)
	for _, step := range []struct {
		at    time.Duration
		ticks uint32
	}{
		{0, 0},
		{time.Second, 3_579_545},
		{time.Second + 280*time.Nanosecond, 3_579_546},
		{10 * time.Second, 35_795_450 % (1 << 24)},
		{1000 * time.Hour, uint32(3_579_545 * 3_600_000 % (1 << 24))},
		{1<<63 - 1, uint32(33_015_475_257_663_328 % (1 << 24))}, // 292 years
	} {
		a.clock.now = step.at
		got := a.in32(PortPMTimer)
		if got != step.ticks {
			t.Errorf("after %v the timer is %d, want %d", step.at, got, step.ticks)
		}
	}
}

func TestPMTimerStatus(t *testing.T) {
	a := newACPI(t)
	const half = (1 << 23) * time.Second / PMTimerHz
	a.clock.advance(half - time.Microsecond)
	if a.in16(PortPM1Event)&pm1Timer != 0 {
		t.Error("timer status set before its top bit changed")
	}
	a.clock.advance(2 * time.Microsecond)
	if a.in16(PortPM1Event)&pm1Timer == 0 {
		t.Error("timer status not set when its top bit changed")
	}
	a.out16(PortPM1Event, pm1Timer)
	if a.in16(PortPM1Event)&pm1Timer != 0 {
		t.Error("timer status not cleared")
	}
	a.clock.advance(half) // clearing must not lose a change that comes with it
	a.out16(PortPM1Event, pm1PowerButton)
	if a.in16(PortPM1Event)&pm1Timer == 0 {
		t.Error("timer status lost")
	}
	a.clock.advance(2 * half) // what came before the write is cleared by it
	a.out16(PortPM1Event, pm1Timer)
	if a.in16(PortPM1Event)&pm1Timer != 0 {
		t.Error("timer status came back after it was cleared")
	}
}

// sinceClock runs with (fake) time until it is frozen.
type sinceClock struct {
	start  time.Time
	frozen atomic.Int64 // 0: it runs
}

func (c *sinceClock) Now() time.Duration {
	if at := c.frozen.Load(); at != 0 {
		return time.Duration(at)
	}
	return time.Since(c.start)
}

func TestPMTimerInterrupt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sci, clock := &wire{}, &sinceClock{start: time.Now()}
		dev := NewPower(sci, clock, &requests{})
		defer dev.Close()
		p := newPorts(t, dev.Map)
		p.out16(PortPM1Event+2, pm1Timer)
		for n := 1; n <= 5; n++ {
			time.Sleep(2344 * time.Millisecond) // a half is 2.3435 s
			synctest.Wait()
			if sci.rose() != n || !sci.level() {
				t.Fatalf("%d interrupts after %d halves", sci.rose(), n)
			}
			p.out16(PortPM1Event, pm1Timer)
		}
		clock.frozen.Store(int64(clock.Now()))
		time.Sleep(time.Minute)
		synctest.Wait()
		if sci.rose() != 5 {
			t.Error("timer interrupts while the machine's clock is frozen")
		}
	})
}

func TestPowerSaveAndRestore(t *testing.T) {
	a := newACPI(t)
	a.clock.advance(time.Hour)
	a.out16(PortPM1Event+2, pm1PowerButton)
	a.out16(PortGPE0+2, 0x8001)
	a.dev.PressPowerButton()
	state := throughJSON(t, a.dev.State())

	back := newACPI(t)
	if err := back.dev.Restore(state); !errors.Is(err, ErrState) {
		t.Errorf("timer ahead of the clock: %v, want ErrState", err)
	}
	back.clock.now = time.Hour
	if err := back.dev.Restore(state); err != nil {
		t.Fatal(err)
	}
	if !back.sci.level() || back.in16(PortPM1Event+2) != pm1PowerButton || back.in16(PortGPE0+2) != 0x8001 {
		t.Error("registers or SCI were not restored")
	}
	back.dev.Reset()
	if back.sci.level() || back.in16(PortPM1Event+2) != 0 || back.in16(PortPM1Control) != 1 {
		t.Error("reset left something enabled")
	}
}

func TestResetPort(t *testing.T) {
	asked := &requests{}
	p := newPorts(t, func(b *Bus) error { return b.Map(PortReset, 1, NewResetPort(asked)) })
	p.out(PortReset, 0x02) // Linux: first the kind, then ResetValue
	if got := asked.take(); got != nil {
		t.Errorf("0x02 asked for %q", got)
	}
	p.out(PortReset, ResetValue)
	if got := asked.take(); len(got) != 1 {
		t.Errorf("%#x asked for %q", ResetValue, got)
	}
	if v := p.in(PortReset); v != 0 {
		t.Errorf("reads as %#x", v)
	}
}

func TestPVPanic(t *testing.T) {
	asked := &requests{}
	p := newPorts(t, NewPVPanic(asked).Map)
	if v := p.in(PortPVPanic); v != 3 {
		t.Errorf("supported events are %#x, want 3", v)
	}
	for v, want := range map[uint8][]string{0: nil, 1: {"panicked: 1"}, 2: {"panicked: 2"}, 3: {"panicked: 1"}, 0xFC: nil} {
		p.out(PortPVPanic, v)
		if got := asked.take(); !slices.Equal(got, want) {
			t.Errorf("%#x: %q, want %q", v, got, want)
		}
	}
}
