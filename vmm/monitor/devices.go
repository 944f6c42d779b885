package monitor

import (
	"context"

	"github.com/gnomon-vmm/gnomon/qmp"
)

type (
	balloonInfo struct {
		Actual uint64 `qmp:"actual"`
	}
	balloonArguments struct {
		Value int64 `qmp:"value"`
	}
	setLinkArguments struct {
		Name string `qmp:"name"`
		Up   bool   `qmp:"up"`
	}
)

var errNoBalloon = &qmp.Error{Class: qmp.DeviceNotActive, Desc: "No balloon device has been activated"}

// registerDevices adds what concerns the balloon and the network devices.
func (mon *monitor) registerDevices(reg *qmp.Registry) {
	qmp.Register(reg, "query-balloon", func(context.Context, *qmp.Session, qmp.Empty) (balloonInfo, error) {
		b := mon.m.Balloon()
		if b == nil {
			return balloonInfo{}, errNoBalloon
		}
		return balloonInfo{b.Actual()}, nil
	})
	qmp.Register(reg, "balloon", mon.balloon)
	qmp.Register(reg, "set_link", mon.setLink)
}

// balloon asks the guest to leave itself that many bytes; more than there are
// means all.
func (mon *monitor) balloon(_ context.Context, _ *qmp.Session, a balloonArguments) (qmp.Empty, error) {
	b := mon.m.Balloon()
	if b == nil {
		return qmp.Empty{}, errNoBalloon
	}
	if a.Value <= 0 {
		return qmp.Empty{}, qmp.Errorf("Parameter 'target' expects a size")
	}
	return qmp.Empty{}, b.SetTarget(min(uint64(a.Value), mon.m.Memory().Size()))
}

func (mon *monitor) setLink(_ context.Context, _ *qmp.Session, a setLinkArguments) (qmp.Empty, error) {
	for _, n := range mon.m.Nets() {
		if n.ID == a.Name {
			n.Device.SetLink(a.Up)
			return qmp.Empty{}, nil
		}
	}
	return qmp.Empty{}, &qmp.Error{Class: qmp.DeviceNotFound, Desc: "Device '" + a.Name + "' not found"}
}
