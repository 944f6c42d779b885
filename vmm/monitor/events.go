package monitor

import (
	"errors"
	"syscall"
	"time"

	"github.com/gnomon-vmm/gnomon/qmp"
	"github.com/gnomon-vmm/gnomon/vmm"
	"github.com/gnomon-vmm/gnomon/vmm/virtio"
)

// deviceBrokenEvent is ours, by the rule for downstream names of QEMU's
// docs/devel/qapi-code-gen.
const (
	deviceBrokenEvent = "__ORG.GNOMON_DEVICE_BROKEN"
	failedEvent       = "__ORG.GNOMON_FAILED"
)

// ioErrorInterval is the least time between two BLOCK_IO_ERROR of the same of a device:
// a guest can have as many requests fail as it makes.
const ioErrorInterval = 250 * time.Millisecond

// shutdownCause is ShutdownCause of QEMU's qapi/run-state.json.
type shutdownCause string

func (shutdownCause) Values() []string {
	return []string{
		"host-qmp-quit", "host-qmp-system-reset", "host-signal", "guest-shutdown", "guest-reset", "guest-panic",
	}
}

// panicAction is GuestPanicAction of QEMU's qapi/run-state.json.
type panicAction string

func (panicAction) Values() []string { return []string{"pause", "poweroff", "run"} }

// ioOperation and errorAction are IoOperationType and BlockErrorAction of
// QEMU's qapi/block-core.json.
type (
	ioOperation string
	errorAction string
)

func (ioOperation) Values() []string { return []string{"read", "write"} }
func (errorAction) Values() []string { return []string{"ignore", "report", "stop"} }

type (
	causeData struct {
		Guest  bool          `qmp:"guest"`
		Reason shutdownCause `qmp:"reason"`
	}
	panicData struct {
		Action panicAction `qmp:"action"`
	}
	balloonData struct {
		Actual uint64 `qmp:"actual"`
	}
	ioErrorData struct {
		Device    string      `qmp:"device"`
		NodeName  *string     `qmp:"node-name"`
		Operation ioOperation `qmp:"operation"`
		Action    errorAction `qmp:"action"`
		NoSpace   *bool       `qmp:"nospace"`
		Reason    string      `qmp:"reason"`
	}
	failedData struct {
		Error string `qmp:"error"`
	}
	deviceBrokenData struct {
		Device string `qmp:"device"`
		Error  string `qmp:"error"`
	}
)

func registerEvents(reg *qmp.Registry) {
	qmp.RegisterEvent[qmp.Empty](reg, "STOP")
	qmp.RegisterEvent[qmp.Empty](reg, "RESUME")
	qmp.RegisterEvent[qmp.Empty](reg, "POWERDOWN")
	qmp.RegisterEvent[causeData](reg, "SHUTDOWN")
	qmp.RegisterEvent[causeData](reg, "RESET")
	qmp.RegisterEvent[panicData](reg, "GUEST_PANICKED")
	qmp.RegisterEvent[panicData](reg, "GUEST_CRASHLOADED")
	qmp.RegisterEvent[balloonData](reg, "BALLOON_CHANGE", qmp.RateLimit(time.Second))
	qmp.RegisterEvent[ioErrorData](reg, "BLOCK_IO_ERROR", qmp.RateLimitBy(ioErrorInterval, func(data any) (string, bool) {
		e := data.(ioErrorData)
		// After one that stops the machine no more come than are under way, until cont.
		return e.Device + " " + string(e.Operation) + " " + string(e.Action), e.Action != "stop"
	}))
	qmp.RegisterEvent[deviceBrokenData](reg, deviceBrokenEvent)
	qmp.RegisterEvent[failedData](reg, failedEvent)
}

// tell sends the machine's events to the clients. It is an observer of the
// machine, which must not wait: Emit does not.
func (mon *monitor) tell(e vmm.Event) {
	switch e := e.(type) {
	case vmm.Stopped:
		mon.emit("STOP", nil)
	case vmm.Resumed:
		mon.emit("RESUME", nil)
	case vmm.PoweredDown:
		mon.emit("POWERDOWN", nil)
	case vmm.Shutdown:
		mon.emit("SHUTDOWN", causeData{Guest: e.Guest, Reason: shutdownCause(e.Reason)})
	case vmm.Reset:
		mon.emit("RESET", causeData{Guest: e.Guest, Reason: shutdownCause(e.Reason)})
	case vmm.Panicked:
		if e.CrashLoaded {
			mon.emit("GUEST_CRASHLOADED", panicData{"run"})
		} else {
			mon.emit("GUEST_PANICKED", panicData{"poweroff"})
		}
	case vmm.BalloonChanged:
		mon.emit("BALLOON_CHANGE", balloonData{e.Actual})
	case vmm.BlockIOError:
		mon.emit("BLOCK_IO_ERROR", mon.ioError(e))
	case vmm.Unplugged:
		mon.emit("DEVICE_DELETED", deviceDeletedData{Device: &e.Device, Path: devicePath(e.Device)})
	case vmm.Failed:
		mon.emit(failedEvent, failedData{e.Err.Error()})
	case vmm.DeviceBroken:
		mon.emit(deviceBrokenEvent, deviceBrokenData{Device: e.Device, Error: e.Err.Error()})
	}
}

func (mon *monitor) ioError(e vmm.BlockIOError) ioErrorData {
	node, full := madeUpName(e.Device, 0), errors.Is(e.Err, syscall.ENOSPC)
	for _, d := range mon.m.Disks() {
		if d.ID == e.Device {
			node = mon.topName(d)
		}
	}
	d := ioErrorData{
		Device: e.Device, NodeName: &node, Operation: "write", Action: errorAction(e.Action), NoSpace: &full, Reason: e.Err.Error(),
	}
	if e.Operation == string(virtio.BlkRead) {
		d.Operation = "read"
	}
	return d
}

// emit sends an event that registerEvents or registerDump has registered with
// the very type of data, so that it cannot fail.
func (mon *monitor) emit(name string, data any) { _ = mon.server.Emit(name, data) }
