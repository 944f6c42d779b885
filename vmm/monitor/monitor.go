// Package monitor is a machine's QMP commands and events, by QEMU's names and
// with QEMU's meanings.
package monitor

import (
	"context"

	"github.com/gnomon-vmm/gnomon/qmp"
	"github.com/gnomon-vmm/gnomon/vmm"
)

type monitor struct {
	m *vmm.Machine
}

// Listen serves the machine's QMP on the given addresses (unix:PATH,
// tcp:HOST:PORT) until the server is closed.
func Listen(m *vmm.Machine, addresses ...string) (*qmp.Server, error) {
	reg := qmp.NewRegistry()
	mon := &monitor{m: m}
	qmp.Register(reg, "quit", mon.quit)
	qmp.Register(reg, "stop", mon.stop)
	qmp.Register(reg, "cont", mon.cont)
	qmp.Register(reg, "system_powerdown", mon.powerdown)
	qmp.Register(reg, "system_reset", mon.reset)
	server := qmp.NewServer(reg, qmp.Version{})
	for _, a := range addresses {
		if err := server.Listen(a); err != nil {
			server.Close()
			return nil, err
		}
	}
	return server, nil
}

func (mon *monitor) quit(context.Context, *qmp.Session, qmp.Empty) (qmp.Empty, error) {
	mon.m.Quit()
	return qmp.Empty{}, nil
}

func (mon *monitor) stop(context.Context, *qmp.Session, qmp.Empty) (qmp.Empty, error) {
	return qmp.Empty{}, mon.m.Pause()
}

func (mon *monitor) cont(context.Context, *qmp.Session, qmp.Empty) (qmp.Empty, error) {
	return qmp.Empty{}, mon.m.Resume()
}

func (mon *monitor) powerdown(context.Context, *qmp.Session, qmp.Empty) (qmp.Empty, error) {
	mon.m.PressPowerButton()
	return qmp.Empty{}, nil
}

func (mon *monitor) reset(context.Context, *qmp.Session, qmp.Empty) (qmp.Empty, error) {
	mon.m.SystemReset()
	return qmp.Empty{}, nil
}
