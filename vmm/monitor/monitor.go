// Package monitor is a machine's QMP commands and events, by the names and
// with the meanings of QEMU 7.2 (qapi/*.json). Where it differs:
//
//   - pmemsave and memsave check the whole range before they create a file,
//     and refuse what is not RAM; QEMU writes zeroes or leaves a partial file.
//   - dump-guest-memory writes only ELF, always 64-bit x86, and without paging;
//     with detach it is a job too, "dump-guest-memory", that job-cancel ends.
//   - query-cpus, which QEMU dropped in 6.0, is there for older clients.
//   - Commands on disks and nodes take the arguments that have a meaning here, and
//     refuse the others by name; a disk has one job at a time, a node one user.
//   - __org.gnomon_checkpoint saves the machine, and __ORG.GNOMON_FAILED tells
//     that it cannot go on.
//   - __org.gnomon_disk-changes tells what changed on a disk with changes=on since
//     an application's last backup; -list, -reset and -forget go with it.
//   - __ORG.GNOMON_DEVICE_BROKEN tells that the guest's driver broke a virtio
//     device, which then waits for its reset.
//
// A machine that has ended is not brought back by cont or system_reset.
package monitor

import (
	"context"
	"sync"

	"github.com/gnomon-vmm/gnomon/mm/pager"
	"github.com/gnomon-vmm/gnomon/qmp"
	"github.com/gnomon-vmm/gnomon/vmm"
	"github.com/gnomon-vmm/gnomon/vmm/snapshot"
)

// version is the QEMU whose commands clients may expect.
var version = qmp.Version{Major: 7, Minor: 2, Package: "gnomon"}

// monitor holds what the commands of one machine work on.
type monitor struct {
	m      *vmm.Machine
	server *qmp.Server

	checkpoints checkpoints
	blockJobs   blockJobs
	bitmaps     dirtyBitmaps
	graph       graph
	exports     exports
	plugging    sync.Mutex // held while a disk is plugged in: one at a time

	mu   sync.Mutex
	dump dumpState // guarded by mu
}

// Option adds to what Listen serves.
type Option func(*monitor)

// WithSaver has the machine saved by commands; the saver is the machine's only one.
func WithSaver(s *snapshot.Saver) Option { return func(m *monitor) { m.checkpoints.saver = s } }

// WithPager tells how the memory of a restored machine is loaded.
func WithPager(p *pager.Pager) Option { return func(m *monitor) { m.checkpoints.pager = p } }

// Listen serves the machine's QMP on the given addresses (unix:PATH,
// tcp:HOST:PORT) until the server is closed, which must come before the
// machine's Close.
func Listen(m *vmm.Machine, addresses []string, options ...Option) (*qmp.Server, error) {
	mon := &monitor{
		m: m, dump: dumpState{Status: dumpNone}, blockJobs: blockJobs{byDisk: map[string]*blockWork{}, starting: map[string]bool{}}, bitmaps: dirtyBitmaps{byDisk: map[string][]*dirtyBitmap{}},
		graph: graph{byName: map[string]*graphNode{}},
	}
	for _, o := range options {
		o(mon)
	}
	reg := qmp.NewRegistry()
	mon.registerControl(reg)
	mon.registerInfo(reg)
	mon.registerCPUs(reg)
	mon.registerPCI(reg)
	mon.registerBlock(reg)
	mon.registerBlockJobs(reg)
	mon.registerBlockOperations(reg)
	mon.registerBitmaps(reg)
	mon.registerBlockdev(reg)
	mon.registerOverlays(reg)
	mon.registerCopies(reg)
	mon.registerCreate(reg)
	mon.registerStream(reg)
	mon.registerTransaction(reg)
	mon.registerExports(reg)
	mon.registerChanges(reg)
	mon.registerThrottling(reg)
	mon.registerDevices(reg)
	mon.registerHotplug(reg)
	mon.registerStats(reg)
	mon.registerMemory(reg)
	mon.registerDump(reg)
	mon.registerCheckpoint(reg)
	registerEvents(reg)
	mon.server = qmp.NewServer(reg, version)
	m.Observe(mon.tell)
	mon.loadBitmaps()
	m.OnUnplug(mon.unplugged)
	m.AtClose(mon.closeExports)
	m.AtClose(mon.storeBitmaps)
	m.AtClose(mon.closeNodes)
	for _, a := range addresses {
		if err := mon.server.Listen(a); err != nil {
			mon.server.Close()
			return nil, err
		}
	}
	return mon.server, nil
}

// query registers a command without arguments that cannot fail.
func query[R any](reg *qmp.Registry, name string, f func() R) {
	qmp.Register(reg, name, func(context.Context, *qmp.Session, qmp.Empty) (R, error) { return f(), nil })
}

// action registers a command without arguments or result.
func action(reg *qmp.Registry, name string, f func() error) {
	qmp.Register(reg, name, func(context.Context, *qmp.Session, qmp.Empty) (qmp.Empty, error) {
		return qmp.Empty{}, f()
	})
}
