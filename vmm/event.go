package vmm

import "sync"

// Status is what a machine does, in QEMU's words (RunState).
type Status string

// Statuses of a machine.
const (
	StatusPrelaunch     Status = "prelaunch" // not yet started
	StatusRunning       Status = "running"
	StatusPaused        Status = "paused"
	StatusIOError       Status = "io-error" // a disk's request failed, and waits for Resume
	StatusShutdown      Status = "shutdown" // the guest powered off, or quit
	StatusGuestPanicked Status = "guest-panicked"
	StatusInternalError Status = "internal-error"
)

// Event is something that happened to a machine. It is one of the types
// below, which are QEMU's events of the same names.
type Event interface{ event() }

type (
	// Stopped: the vCPUs and devices stand still.
	Stopped struct{}
	// Resumed: they run again.
	Resumed struct{}
	// Shutdown: the machine ends.
	Shutdown struct {
		Guest  bool   // the guest asked for it
		Reason string // QEMU's ShutdownCause
	}
	// Reset: the machine was reset.
	Reset struct {
		Guest  bool
		Reason string
	}
	// Failed: the machine cannot go on, and Run returns Err.
	Failed struct{ Err error }
	// PoweredDown: the ACPI power button was pressed.
	PoweredDown struct{}
	// Panicked: the guest's kernel told of its panic through pvpanic.
	Panicked struct{ CrashLoaded bool }
	// BalloonChanged: the guest's memory, by its balloon.
	BalloonChanged struct{ Actual uint64 } // bytes
	// DeviceBroken: the driver broke the rules and the device waits for a reset.
	DeviceBroken struct {
		Device string
		Err    error
	}
	// Unplugged: the guest let go of a disk that was plugged in, and it is gone.
	Unplugged struct{ Device string }
	// BlockIOError: a disk's request failed on the host.
	BlockIOError struct {
		Device    string
		Operation string // "read" or "write"
		Action    string // what became of it: "report", "ignore" or "stop"
		Err       error
	}
)

func (Stopped) event()        {}
func (Resumed) event()        {}
func (Shutdown) event()       {}
func (Reset) event()          {}
func (PoweredDown) event()    {}
func (Failed) event()         {}
func (Panicked) event()       {}
func (BalloonChanged) event() {}
func (DeviceBroken) event()   {}
func (Unplugged) event()      {}
func (BlockIOError) event()   {}

// events hands events to observers.
type events struct {
	mu        sync.Mutex
	observers []func(Event) // guarded by mu
}

// Observe has f called with each event from now on. f may be called from any
// goroutine, several at a time, a vCPU's included: it must neither block nor
// call the machine back.
func (m *Machine) Observe(f func(Event)) {
	m.events.mu.Lock()
	defer m.events.mu.Unlock()
	m.events.observers = append(m.events.observers[:len(m.events.observers):len(m.events.observers)], f)
}

func (e *events) emit(ev Event) {
	e.mu.Lock()
	observers := e.observers
	e.mu.Unlock()
	for _, f := range observers {
		f(ev)
	}
}
