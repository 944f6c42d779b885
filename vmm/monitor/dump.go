package monitor

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/gnomon-vmm/gnomon/qmp"
	"github.com/gnomon-vmm/gnomon/vmm"
)

// dumpJob is the id and the type of the job that a detached dump is.
const dumpJob = "dump-guest-memory"

// dumpFormat is DumpGuestMemoryFormat of QEMU's qapi/dump.json, dumpStatus its DumpStatus.
type (
	dumpFormat string
	dumpStatus string
)

const (
	formatELF dumpFormat = "elf"

	dumpNone      dumpStatus = "none"
	dumpActive    dumpStatus = "active"
	dumpCompleted dumpStatus = "completed"
	dumpFailed    dumpStatus = "failed"
)

func (dumpFormat) Values() []string {
	return []string{string(formatELF), "kdump-zlib", "kdump-lzo", "kdump-snappy", "win-dmp"}
}

func (dumpStatus) Values() []string {
	return []string{string(dumpNone), string(dumpActive), string(dumpCompleted), string(dumpFailed)}
}

type (
	dumpArguments struct {
		Paging   bool        `qmp:"paging"`
		Protocol string      `qmp:"protocol"`
		Detach   *bool       `qmp:"detach"`
		Begin    *int64      `qmp:"begin"`
		Length   *int64      `qmp:"length"`
		Format   *dumpFormat `qmp:"format"`
	}
	// dumpState is DumpQueryResult; completed and total are bytes of memory.
	dumpState struct {
		Status    dumpStatus `qmp:"status"`
		Completed uint64     `qmp:"completed"`
		Total     uint64     `qmp:"total"`
	}
	dumpCapability struct {
		Formats []dumpFormat `qmp:"formats"`
	}
	dumpCompletedData struct {
		Result dumpState `qmp:"result"`
		Error  *string   `qmp:"error"`
	}
)

func (mon *monitor) registerDump(reg *qmp.Registry) {
	qmp.Register(reg, "dump-guest-memory", mon.dumpGuestMemory)
	query(reg, "query-dump", mon.dumpProgress)
	query(reg, "query-dump-guest-memory-capability", func() dumpCapability {
		return dumpCapability{[]dumpFormat{formatELF}}
	})
	qmp.RegisterEvent[dumpCompletedData](reg, "DUMP_COMPLETED")
}

func (mon *monitor) dumpProgress() dumpState {
	mon.mu.Lock()
	defer mon.mu.Unlock()
	return mon.dump
}

// dumping tells whether a dump is under way.
func (mon *monitor) dumping() bool { return mon.dumpProgress().Status == dumpActive }

// check refuses what cannot be done, before anything is.
func (a *dumpArguments) check() error {
	switch {
	case a.Format != nil && *a.Format != formatELF:
		return qmp.Errorf("%s is not available: the format can be elf", *a.Format)
	case a.Paging:
		return qmp.Errorf("Parameter 'paging' expects false: only guest-physical memory can be dumped")
	case a.Begin != nil && a.Length == nil:
		return qmp.Errorf("Parameter 'length' is missing")
	case a.Begin == nil && a.Length != nil:
		return qmp.Errorf("Parameter 'begin' is missing")
	case a.Length != nil && *a.Length == 0:
		return qmp.Errorf("Invalid parameter 'length'")
	case a.Begin != nil && (*a.Begin < 0 || *a.Length < 0):
		return errNothingToDump
	}
	return nil
}

var errNothingToDump = qmp.Errorf("dump: no guest memory to dump")

// dumpGuestMemory writes an ELF core file while the machine is stopped, and
// lets a machine that ran go on. With detach it goes on by itself as a job.
func (mon *monitor) dumpGuestMemory(ctx context.Context, s *qmp.Session, a dumpArguments) (e qmp.Empty, err error) {
	if mon.dumping() {
		return e, errDumping
	}
	if err := a.check(); err != nil {
		return e, err
	}
	begin, length := uint64(0), ^uint64(0)
	if a.Begin != nil {
		begin, length = uint64(*a.Begin), uint64(*a.Length)
	}
	d := &dump{mon: mon}
	d.segments, d.total = segments(mon.m.Memory().Regions(), begin, length)
	if d.total == 0 {
		return e, errNothingToDump
	}
	if d.out, err = openProtocol(s, a.Protocol); err != nil {
		return e, err
	}
	if err := d.start(ctx); err != nil {
		d.end(err)
		return e, err
	}
	if a.Detach == nil || !*a.Detach {
		err := d.write(ctx, func(uint64) error { return nil })
		d.end(err)
		return e, err
	}
	_, err = s.Server().Jobs().Start(dumpJob, dumpJob, qmp.JobOptions{
		Commit: func() { d.end(nil) },
		Abort:  func() { d.end(d.failure()) },
	}, d.run)
	if err != nil {
		d.end(err)
	}
	return e, err
}

// openProtocol opens what a dump's protocol names: file:PATH, where PATH may
// be /dev/fdset/N, or fd:NAME for a descriptor that came with getfd.
func openProtocol(s *qmp.Session, protocol string) (*outFile, error) {
	kind, name, _ := strings.Cut(protocol, ":")
	switch kind + ":" {
	case "fd:":
		f, err := s.TakeFD(name)
		if err != nil {
			return nil, err
		}
		return &outFile{f: f}, nil
	case "file:":
		set, ok := strings.CutPrefix(name, "/dev/fdset/")
		if !ok {
			return create(name)
		}
		id, err := strconv.ParseInt(set, 10, 64)
		if err != nil {
			return nil, qmp.Errorf("Could not open '%s': no number of a descriptor set", name)
		}
		f, release, err := s.Server().FDSets().Open(id, os.O_WRONLY)
		if err != nil {
			return nil, qmp.Errorf("Could not open '%s': %s", name, err)
		}
		return &outFile{f: f, done: release}, nil
	}
	return nil, qmp.Errorf("Invalid parameter 'protocol'")
}

// dump is a core file on its way.
type dump struct {
	mon      *monitor
	segments []segment
	total    uint64
	out      *outFile
	ram      *ram
	header   []byte
	resume   func() error // nil: the machine was not stopped
	err      error        // of run; read when that has returned
}

// start stops the machine and takes what is needed of its state.
func (d *dump) start(ctx context.Context) error {
	m := d.mon.m
	var err error
	if d.resume, err = m.Suspend(); err != nil {
		return err
	}
	d.mon.mu.Lock()
	d.mon.dump = dumpState{Status: dumpActive, Total: d.total}
	d.mon.mu.Unlock()

	if d.ram, err = d.mon.openRAM(ctx); err != nil {
		return err
	}
	return m.Stopped(func() error {
		var cpus []*vmm.CPUState
		for _, c := range m.CPUs() {
			state, err := m.CPUState(c.Index)
			if err != nil {
				return fmt.Errorf("vCPU %d: %w", c.Index, err)
			}
			cpus = append(cpus, state)
		}
		d.header = coreHeader(cpus, d.segments)
		return nil
	})
}

// run is write as a job.
func (d *dump) run(ctx context.Context, j *qmp.Job) error {
	j.SetProgress(0, int64(d.total))
	d.err = d.write(ctx, func(n uint64) error {
		j.AddProgress(int64(n))
		return j.PausePoint()
	})
	return d.err
}

// failure is why a job was aborted.
func (d *dump) failure() error {
	if d.err != nil {
		return d.err
	}
	return qmp.ErrCanceled
}

func (d *dump) write(ctx context.Context, progress func(n uint64) error) error {
	defer d.out.interruptible(ctx)()
	if err := d.out.write(d.header); err != nil {
		return err
	}
	for _, s := range d.segments {
		if err := d.ram.copyTo(ctx, d.out, s.gpa, s.size, func(n uint64) error {
			d.mon.mu.Lock()
			d.mon.dump.Completed += n
			d.mon.mu.Unlock()
			return progress(n)
		}); err != nil {
			return err
		}
	}
	return d.out.complete()
}

// end tells how the dump ended, removes the file if it did not end well, and
// lets the machine go on.
func (d *dump) end(err error) {
	if d.ram != nil {
		d.ram.close()
	}
	data := dumpCompletedData{}
	status := dumpCompleted
	if err != nil {
		d.out.abandon()
		text := err.Error()
		data.Error, status = &text, dumpFailed
	}
	d.mon.mu.Lock()
	d.mon.dump.Status = status
	data.Result = d.mon.dump
	d.mon.mu.Unlock()
	d.mon.emit("DUMP_COMPLETED", data)
	if d.resume != nil {
		// It fails when the machine has been closed, or ended meanwhile.
		_ = d.resume()
	}
}
