package monitor

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync"

	"github.com/gnomon-vmm/gnomon/mm/pager"
	"github.com/gnomon-vmm/gnomon/qmp"
	"github.com/gnomon-vmm/gnomon/vmm/snapshot"
)

// checkpointMode is how a machine is saved.
type checkpointMode string

const (
	modeRunning checkpointMode = "running" // it is paused for a moment
	modeStop    checkpointMode = "stop"    // it stands still until the file is complete
)

// checkpointDisks is what becomes of disks that can be written.
type checkpointDisks string

const (
	disksKeep checkpointDisks = "keep" // they are the checkpoint's; the machine goes on in overlays
	disksCopy checkpointDisks = "copy" // they are copied beside the checkpoint; the machine stays in its own
	disksNone checkpointDisks = "none" // they are left to the user
)

// Values lists the ways for the schema.
func (checkpointDisks) Values() []string {
	return []string{string(disksKeep), string(disksCopy), string(disksNone)}
}

// Values lists the modes for the schema.
func (checkpointMode) Values() []string { return []string{string(modeRunning), string(modeStop)} }

type (
	checkpointArguments struct {
		JobID  string           `qmp:"job-id"`
		File   string           `qmp:"file"`
		Parent *string          `qmp:"parent"`
		Mode   *checkpointMode  `qmp:"mode"`
		Disks  *checkpointDisks `qmp:"disks"`
		// NoFlush has the job end when the file is complete, though not on disk yet.
		NoFlush *bool `qmp:"no-flush"`
		// DismissOnDisconnect has the job dismissed when it is concluded and who
		// started it has hung up: nobody else knows of it.
		DismissOnDisconnect *bool `qmp:"dismiss-on-disconnect"`
	}
	keptDisk struct {
		ID      string  `qmp:"id"`
		File    string  `qmp:"file"`
		Overlay *string `qmp:"overlay"` // in which the machine goes on
	}
	// checkpointData is the report of the last checkpoint that was completed.
	// Times are in nanoseconds, sizes in bytes.
	checkpointData struct {
		File           string     `qmp:"file"`
		ID             string     `qmp:"id"`
		Parent         *string    `qmp:"parent"`
		PreparedNS     int64      `qmp:"prepared-ns"`
		PauseNS        int64      `qmp:"pause-ns"`
		TotalNS        int64      `qmp:"total-ns"`
		Pages          int64      `qmp:"pages"`
		ZeroPages      int64      `qmp:"zero-pages"`
		DuplicatePages int64      `qmp:"duplicate-pages"`
		FaultPages     int64      `qmp:"fault-pages"`
		DevicePages    int64      `qmp:"device-pages"`
		FileBytes      int64      `qmp:"file-bytes"`
		Writes         int64      `qmp:"writes"`
		Disks          []keptDisk `qmp:"disks"`
	}
	// restoreData is how far the loading of a restored machine's memory is.
	restoreData struct {
		Complete        bool   `qmp:"complete"`
		GuestFaults     uint64 `qmp:"guest-faults"`
		DeviceFaults    uint64 `qmp:"device-faults"`
		DemandPages     uint64 `qmp:"demand-pages"`
		AheadPages      uint64 `qmp:"ahead-pages"`
		BackgroundPages uint64 `qmp:"background-pages"`
		ZeroPages       uint64 `qmp:"zero-pages"`
		CopyCalls       uint64 `qmp:"copy-calls"`
		BlockReads      uint64 `qmp:"block-reads"`
		BytesRead       uint64 `qmp:"bytes-read"`
		StalledNS       int64  `qmp:"stalled-ns"`
		UsedPages       *int64 `qmp:"used-pages"`   // of those installed for or around demands; absent: not known
		UnusedPages     *int64 `qmp:"unused-pages"` // likewise
	}
)

// checkpoints are the machine's saves.
type checkpoints struct {
	saver *snapshot.Saver
	pager *pager.Pager // nil: the machine was not restored

	mu   sync.Mutex
	last []*snapshot.Report // the newest last, up to keptReports; guarded by mu
}

func (mon *monitor) registerCheckpoint(reg *qmp.Registry) {
	c := &mon.checkpoints
	if c.saver != nil {
		qmp.Register(reg, "__org.gnomon_checkpoint", mon.checkpoint)
		mon.registerSnapshots(reg)
		qmp.Register(reg, "__org.gnomon_query-checkpoint", func(_ context.Context, _ *qmp.Session, a checkpointQuery) (checkpointData, error) {
			return c.report(a.File)
		})
	}
	if c.pager != nil {
		query(reg, "__org.gnomon_query-restore", c.restore)
	}
}

// checkpoint starts the job that saves the machine. The job is dismissed by
// whoever started it, as QEMU's snapshot-save is.
func (mon *monitor) checkpoint(session context.Context, s *qmp.Session, a checkpointArguments) (e qmp.Empty, err error) {
	o := snapshot.SaveOptions{Stop: a.Mode != nil && *a.Mode == modeStop, NoFlush: a.NoFlush != nil && *a.NoFlush}
	if a.Disks != nil {
		o.Disks = map[checkpointDisks]snapshot.Disks{disksKeep: snapshot.KeepDisks, disksCopy: snapshot.CopyDisks, disksNone: snapshot.LeaveDisks}[*a.Disks]
	}
	if a.Parent != nil {
		o.Parent = *a.Parent
	}
	for name, path := range map[string]string{"file": a.File, "parent": o.Parent} {
		if path != "" && !filepath.IsAbs(path) {
			return e, qmp.Errorf("Parameter '%s' expects an absolute path", name)
		}
	}
	if a.File == "" {
		return e, qmp.Errorf("Parameter 'file' expects an absolute path")
	}
	job, err := s.Server().Jobs().Start(a.JobID, "checkpoint", qmp.JobOptions{ManualDismiss: true}, func(ctx context.Context, j *qmp.Job) error {
		o.Progress = j.SetProgress
		return mon.checkpoints.save(ctx, a.File, o)
	})
	if err == nil && a.DismissOnDisconnect != nil && *a.DismissOnDisconnect {
		go func() {
			<-session.Done()
			<-job.Done()
			_ = job.Dismiss() // an error means that it was dismissed
		}()
	}
	return e, err
}

// save saves the machine and keeps the report.
func (c *checkpoints) save(ctx context.Context, file string, o snapshot.SaveOptions) error {
	r, err := c.saver.Save(ctx, file, o)
	var switched *snapshot.SwitchedError
	if errors.As(err, &switched) && errors.Is(err, context.Canceled) {
		return fmt.Errorf("%w%s", qmp.ErrCanceled, switched.GoesOn())
	}
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.last = append(c.last[max(0, len(c.last)+1-keptReports):], r)
	if ctx.Err() != nil {
		return fmt.Errorf("%w: but %s was complete by then", qmp.ErrCanceled, file)
	}
	return nil
}

// keptReports is how many reports are kept for those who ask for theirs.
const keptReports = 64

type checkpointQuery struct {
	File *string `qmp:"file"` // of the save that is asked for; absent: the last
}

func (c *checkpoints) report(file *string) (checkpointData, error) {
	var r *snapshot.Report
	c.mu.Lock()
	for _, x := range c.last {
		if file == nil || x.File == *file {
			r = x
		}
	}
	c.mu.Unlock()
	if r == nil {
		return checkpointData{}, qmp.Errorf("No checkpoint was taken of this machine")
	}
	d := checkpointData{
		File: r.File, ID: r.ID.String(),
		PreparedNS: r.Prepared.Nanoseconds(), PauseNS: r.Pause.Nanoseconds(), TotalNS: r.Total.Nanoseconds(),
		Pages: r.Written.Pages, ZeroPages: r.Written.ZeroPages, DuplicatePages: r.Written.DuplicatePages,
		FaultPages: int64(r.Memory.CopiedByFault), DevicePages: int64(r.Memory.CopiedByTouch),
		FileBytes: r.Written.Bytes, Writes: r.Written.Writes,
	}
	for _, disk := range r.Disks {
		kept := keptDisk{ID: disk.ID, File: disk.File}
		if disk.Overlay != "" {
			kept.Overlay = &disk.Overlay
		}
		d.Disks = append(d.Disks, kept)
	}
	if r.Parent != "" {
		d.Parent = &r.Parent
	}
	return d, nil
}

func (c *checkpoints) restore() restoreData {
	s := c.pager.Stats()
	d := restoreData{
		Complete: s.Complete, GuestFaults: s.GuestFaults, DeviceFaults: s.DeviceFaults,
		DemandPages: s.DemandPages, AheadPages: s.AheadPages, BackgroundPages: s.BackgroundPages, ZeroPages: s.ZeroPages,
		CopyCalls: s.CopyCalls, BlockReads: s.BlockReads, BytesRead: s.BytesRead, StalledNS: s.Stalled.Nanoseconds(),
	}
	if used, unused, err := c.pager.Usage(); err == nil {
		a, b := int64(used), int64(unused)
		d.UsedPages, d.UnusedPages = &a, &b
	}
	return d
}
