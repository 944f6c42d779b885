package vmm

import (
	"fmt"
	"sync"
	"time"

	"github.com/gnomon-vmm/gnomon/kvm"
	"github.com/gnomon-vmm/gnomon/vmm/device"
)

// clock is the machine's time: the host's monotonic clock without the pauses.
type clock struct {
	mu      sync.Mutex
	origin  time.Time     // guarded by mu: Now() was zero then, as far as pauses go
	stopped bool          // guarded by mu
	frozen  time.Duration // guarded by mu: Now() while stopped
}

func newClock() *clock { return &clock{origin: time.Now(), stopped: true} }

// Now is the machine's time since it was made.
func (c *clock) Now() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.stopped {
		return c.frozen
	}
	return time.Since(c.origin)
}

func (c *clock) stop() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.stopped {
		c.frozen, c.stopped = time.Since(c.origin), true
	}
}

func (c *clock) start() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.stopped {
		c.origin, c.stopped = time.Now().Add(-c.frozen), false
	}
}

func (c *clock) isStopped() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.stopped
}

// set makes Now() now while the clock is stopped.
func (c *clock) set(now time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.frozen = now
}

// saveKVMClock and startKVMClock keep the guest's clock from going on while
// the machine is stopped. Preconditions: ctl is held.
func (m *Machine) saveKVMClock() {
	if clock, err := m.vm.Clock(); err == nil {
		m.kvmClock, m.stopped = kvm.ClockData{Clock: clock.Clock}, time.Now()
	}
}

func (m *Machine) startKVMClock() error {
	if m.kvmClock.Clock == 0 {
		return nil // it has never run
	}
	if !m.clockBehind {
		return m.vm.SetClock(m.kvmClock)
	}
	away := m.sinceStopped()
	m.clock.set(m.clock.Now() + away)
	m.kvmClock.Clock += uint64(away)
	if err := m.vm.SetClock(m.kvmClock); err != nil {
		return err
	}
	m.clockBehind = false
	for _, c := range m.cpus {
		// So that the guest's watchdogs take the jump for a pause. It fails on
		// a vCPU that has no kvmclock.
		_ = c.NotifyPaused()
	}
	return nil
}

// sinceStopped is how long ago the machine stopped, by the host's wall clock.
func (m *Machine) sinceStopped() time.Duration {
	if m.stopped.IsZero() {
		return 0 // it has never run
	}
	return min(max(0, time.Now().Round(0).Sub(m.stopped)), maxClock)
}

// maxClock, 36 years, is more than any machine's clock shows, and twice that still fits.
const maxClock = 1 << 60 * time.Nanosecond

// restoreClocks sets the clocks to what they were.
func (m *Machine) restoreClocks(s machineState) error {
	if s.Clock < 0 || s.Clock > maxClock || s.KVMClock > uint64(maxClock) {
		return fmt.Errorf("a clock at %d and %d ns is out of range", s.Clock, s.KVMClock)
	}
	m.clock.set(s.Clock)
	m.kvmClock, m.stopped = kvm.ClockData{Clock: s.KVMClock}, s.Stopped
	m.clockBehind = m.cfg.Restore.ClockGoesOn
	// Now already, because KVM tells the guest the time of its boot by it when
	// the vCPUs' MSRs are restored.
	return m.vm.SetClock(m.kvmClock)
}

// restoreRTC has the RTC, which runs by the host's wall clock, go on where it
// stood if the guest's other clocks do.
func (m *Machine) restoreRTC(s device.RTCState) error {
	if !m.cfg.Restore.ClockGoesOn {
		s.OffsetSeconds -= int64(m.sinceStopped() / time.Second)
	}
	return m.rtc.Restore(s)
}
