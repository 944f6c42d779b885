package monitor

import (
	"github.com/gnomon-vmm/gnomon/qmp"
	"github.com/gnomon-vmm/gnomon/vmm"
)

// runState is RunState of QEMU's qapi/run-state.json.
type runState string

func (runState) Values() []string {
	return []string{
		string(vmm.StatusPrelaunch), string(vmm.StatusRunning), string(vmm.StatusPaused), string(vmm.StatusIOError),
		string(vmm.StatusShutdown), string(vmm.StatusGuestPanicked), string(vmm.StatusInternalError),
	}
}

type statusInfo struct {
	Status     runState `qmp:"status"`
	Singlestep bool     `qmp:"singlestep"`
	Running    bool     `qmp:"running"`
}

// registerControl adds what starts, stops and ends the machine.
func (mon *monitor) registerControl(reg *qmp.Registry) {
	query(reg, "query-status", func() statusInfo {
		s := mon.m.Status()
		return statusInfo{Status: runState(s), Running: s == vmm.StatusRunning}
	})
	action(reg, "stop", mon.stop)
	action(reg, "cont", mon.cont)
	action(reg, "system_powerdown", func() error {
		mon.m.PressPowerButton()
		return nil
	})
	action(reg, "system_reset", mon.reset)
	action(reg, "quit", func() error {
		mon.m.Quit()
		return nil
	})
	action(reg, "inject-nmi", mon.m.InjectNMI)
}

var errDumping = qmp.Errorf("There is a dump in process, please wait.")

func (mon *monitor) stop() error {
	if mon.dumping() {
		return errDumping
	}
	return mon.m.Pause()
}

// ended tells whether s is a state that the machine does not leave.
func ended(s vmm.Status) bool {
	return s == vmm.StatusShutdown || s == vmm.StatusGuestPanicked || s == vmm.StatusInternalError
}

func (mon *monitor) cont() error {
	if mon.dumping() {
		return errDumping
	}
	if ended(mon.m.Status()) {
		return qmp.Errorf("Resetting the Virtual Machine is required")
	}
	return mon.m.Resume()
}

func (mon *monitor) reset() error {
	if s := mon.m.Status(); ended(s) {
		return qmp.Errorf("The machine has ended (%s): it cannot be reset, only started anew", s)
	}
	mon.m.SystemReset()
	return nil
}
