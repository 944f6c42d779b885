package vmm

import (
	"context"
	"fmt"
	"slices"
	"sync"

	"github.com/gnomon-vmm/gnomon/kvm"
	"github.com/gnomon-vmm/gnomon/vmm/device"
)

// Exit tells why Run returned.
type Exit string

// Why a machine ended.
const (
	ExitPowerOff Exit = "power-off" // the guest powered itself off
	ExitReset    Exit = "reset"     // the guest reset itself and NoReboot is set
	ExitPanic    Exit = "panic"     // the guest's kernel panicked
	ExitQuit     Exit = "quit"      // Quit, or Run's context ended
)

// requests are what must happen to the whole machine. vCPU threads and other
// goroutines make them without waiting; Run carries out the gravest.
type requests struct {
	mu      sync.Mutex
	pending request       // guarded by mu
	wake    chan struct{} // capacity 1
}

type request struct {
	kind   requestKind
	guest  bool
	reason string // QEMU's ShutdownCause
	err    error  // of requestFail
}

// requestKind, the later the graver.
type requestKind int

const (
	requestNone requestKind = iota
	requestReset
	requestPanic
	requestPowerOff
	requestQuit
	requestFail
)

// request asks Run to act. The vCPUs stand still until it has.
func (m *Machine) request(r request) {
	m.requests.mu.Lock()
	if r.kind > m.requests.pending.kind {
		m.requests.pending = r
	}
	m.requests.mu.Unlock()
	m.gate.hold(holdRequest)
	select {
	case m.requests.wake <- struct{}{}:
	default:
	}
}

func (m *Machine) takeRequest() request {
	m.requests.mu.Lock()
	defer m.requests.mu.Unlock()
	r := m.requests.pending
	m.requests.pending = request{}
	return r
}

// PowerOff is what the guest's ACPI power-off does.
func (m *Machine) PowerOff() {
	m.request(request{kind: requestPowerOff, guest: true, reason: "guest-shutdown"})
}

// Reset resets the machine, as a guest does; why goes to the log.
func (m *Machine) Reset(why string) {
	m.cfg.Log("guest reset: %s", why)
	m.request(request{kind: requestReset, guest: true, reason: "guest-reset"})
}

// SystemReset resets the machine from outside, as its reset button does.
func (m *Machine) SystemReset() {
	m.request(request{kind: requestReset, reason: "host-qmp-system-reset"})
}

// Quit ends the machine at once; the guest is not asked.
func (m *Machine) Quit() {
	m.request(request{kind: requestQuit, reason: "host-qmp-quit"})
}

// Fail ends the machine with an error: it cannot go on, and Run returns err.
func (m *Machine) Fail(err error) { m.request(request{kind: requestFail, err: err}) }

// PressPowerButton presses the ACPI power button; what follows is the guest's choice.
func (m *Machine) PressPowerButton() {
	m.power.PressPowerButton()
	m.events.emit(PoweredDown{})
}

// Status tells what the machine does.
func (m *Machine) Status() Status {
	m.stateMu.Lock()
	defer m.stateMu.Unlock()
	return m.status
}

func (m *Machine) setStatus(s Status) {
	m.stateMu.Lock()
	m.status = s
	m.stateMu.Unlock()
}

// Run runs the machine until the guest or somebody else ends it, and tells
// which. It may be called once. When ctx ends the machine quits.
func (m *Machine) Run(ctx context.Context) (Exit, error) {
	m.ctl.Lock()
	if m.started || m.closed {
		m.ctl.Unlock()
		return "", fmt.Errorf("%w: it can be run only once, before Close", ErrState)
	}
	m.started = true
	defer close(m.ended)
	m.connect()
	for _, c := range m.cpus {
		m.threads.Add(1)
		go func() {
			defer m.threads.Done()
			if err := c.run(); err != nil {
				m.request(request{kind: requestFail, err: err})
				m.gate.leave()
			}
		}()
	}
	var err error
	if !m.startPaused {
		err = m.resume()
	}
	m.ctl.Unlock()
	if err != nil {
		return "", err
	}

	for {
		select {
		case <-ctx.Done():
			m.request(request{kind: requestQuit, reason: "host-signal"})
			<-m.requests.wake
		case <-m.requests.wake:
		}
		r := m.takeRequest()
		switch {
		case r.kind == requestNone:
		case r.kind == requestReset && !m.cfg.NoReboot && m.cfg.Kernel != nil:
			if err := m.reset(r); err != nil {
				m.end(StatusInternalError)
				return "", fmt.Errorf("%w: reset: %w", ErrRun, err)
			}
		case r.kind == requestFail:
			m.end(StatusInternalError)
			m.events.emit(Failed{r.err})
			return "", r.err
		default:
			return m.finish(r), nil
		}
	}
}

// finish ends the machine for r and names the exit.
func (m *Machine) finish(r request) Exit {
	exit, status := ExitQuit, StatusShutdown
	switch r.kind {
	case requestPowerOff:
		exit = ExitPowerOff
	case requestReset:
		exit = ExitReset
	case requestPanic:
		exit, status = ExitPanic, StatusGuestPanicked
	}
	m.end(status)
	m.events.emit(Shutdown{Guest: r.guest, Reason: r.reason})
	return exit
}

// end stops the vCPUs and devices for good.
func (m *Machine) end(s Status) {
	m.ctl.Lock()
	defer m.ctl.Unlock()
	m.hurryDisks(true)
	m.gate.hold(holdControl)
	m.gate.wait()
	m.stopDevices()
	m.setStatus(s)
}

// Pause stops the vCPUs between two instructions and the devices between two
// requests. It returns when nothing of the guest moves any more, time included.
// Before Run it has Run leave the machine paused. A machine that is suspended
// stays paused when that has ended.
func (m *Machine) Pause() error { return m.PauseFor(nil) }

// PauseFor is Pause for good, where there is a reason: Resume fails with it.
func (m *Machine) PauseFor(reason error) error {
	m.ctl.Lock()
	defer m.ctl.Unlock()
	switch {
	case m.closed:
		return ErrClosed
	case m.Status() == StatusPrelaunch:
		m.startPaused = true
	}
	if m.pausedFor == nil {
		m.pausedFor = reason
	}
	m.goOn = false
	m.pause(StatusPaused)
	return nil
}

// pauseForIOError is Pause because of a request that waits for Resume.
func (m *Machine) pauseForIOError() {
	m.ctl.Lock()
	defer m.ctl.Unlock()
	waits := func(d AttachedDisk) bool { return d.Device.Stopped() != nil }
	if !m.closed && slices.ContainsFunc(m.disks, waits) { // or somebody has resumed it already
		m.goOn = false
		m.pause(StatusIOError)
	}
}

// pause is Pause for a machine that runs. Preconditions: m.ctl is held.
func (m *Machine) pause(s Status) {
	if m.Status() != StatusRunning {
		return
	}
	m.hurryDisks(true)
	m.gate.hold(holdUser)
	m.gate.wait()
	m.stopDevices()
	m.setStatus(s)
	m.events.emit(Stopped{})
}

// Suspend is Pause for an operation that needs the machine to stand still for a
// while. A machine that ran goes on when every Suspend has ended by a call of end,
// but what Pause and Resume ask for meanwhile is what becomes of it then.
func (m *Machine) Suspend() (end func() error, err error) {
	m.ctl.Lock()
	defer m.ctl.Unlock()
	if m.closed {
		return nil, ErrClosed
	}
	if m.suspended == 0 {
		m.goOn = m.Status() == StatusRunning
	}
	m.suspended++
	m.pause(StatusPaused)
	return sync.OnceValue(m.endSuspend), nil
}

func (m *Machine) endSuspend() error {
	m.ctl.Lock()
	defer m.ctl.Unlock()
	m.suspended--
	if m.suspended > 0 || !m.goOn {
		return nil
	}
	return m.resume()
}

// Resume goes on after Pause, or starts a machine that Run left paused; one that
// is suspended goes on when that has ended.
func (m *Machine) Resume() error {
	m.ctl.Lock()
	defer m.ctl.Unlock()
	return m.resume()
}

// resume is Resume. Preconditions: m.ctl is held.
func (m *Machine) resume() error {
	switch s := m.Status(); {
	case m.closed:
		return ErrClosed
	case s == StatusRunning:
		return nil
	case s != StatusPaused && s != StatusPrelaunch && s != StatusIOError:
		return fmt.Errorf("%w: it cannot go on from %q; reset or quit it", ErrState, s)
	case m.pausedFor != nil:
		return fmt.Errorf("%w: it cannot go on, quit it: %w", ErrState, m.pausedFor)
	case m.suspended > 0:
		m.goOn = true
		return nil
	}
	if err := m.startKVMClock(); err != nil {
		return err
	}
	if m.saved != nil && m.Status() == StatusPrelaunch {
		for _, n := range m.nets {
			n.Device.Announce() // the network may know the guest elsewhere
		}
	}
	m.setStatus(StatusRunning)
	m.events.emit(Resumed{}) // before what the devices tell
	m.letDevicesGo()
	m.gate.release(holdUser)
	m.finishEjects()
	return nil
}

// stopDevices and startDevices stop and start everything but the vCPUs, which
// stand still.
func (m *Machine) stopDevices() {
	for _, d := range m.virtio {
		d.Pause()
	}
	m.serial.Pause()
	m.rtc.Pause()
	if !m.clock.isStopped() {
		m.clock.stop()
		m.saveKVMClock()
	}
}

func (m *Machine) startDevices() error {
	if err := m.startKVMClock(); err != nil {
		return err
	}
	m.letDevicesGo()
	return nil
}

// letDevicesGo starts all but KVM's clock, which was started before it.
func (m *Machine) letDevicesGo() {
	m.clock.start()
	m.serial.Resume()
	m.rtc.Resume()
	m.hurryDisks(false)
	for _, d := range m.disks {
		d.Device.Retry()
	}
	for _, d := range m.virtio {
		d.Resume()
	}
}

// hurryDisks has no request of a disk wait for the disk's limits, so that the devices
// can come to stand still, or lets them wait again.
func (m *Machine) hurryDisks(on bool) {
	for _, d := range m.Disks() {
		d.Root.Hurry(on)
	}
}

// systemEvent serves KVM_EXIT_SYSTEM_EVENT: a guest's request that came to the
// machine by way of KVM.
func (m *Machine) systemEvent(e kvm.SystemEvent) {
	switch e.Type {
	case kvm.SystemEventShutdown:
		m.PowerOff()
	case kvm.SystemEventReset:
		m.Reset("KVM system event")
	case kvm.SystemEventCrash:
		m.Panicked(device.GuestPanicked)
	}
}
