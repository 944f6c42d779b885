package monitor

import (
	"context"
	"errors"
	"math"
	"sync"
	"time"

	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/qmp"
	"github.com/gnomon-vmm/gnomon/vmm"
)

// blockJobKind is the type of a job that works on a disk, of QEMU's
// qapi/job.json.
type blockJobKind string

const (
	jobBackup blockJobKind = "backup"
	jobCommit blockJobKind = "commit"
	jobMirror blockJobKind = "mirror"
	jobStream blockJobKind = "stream"
)

func (blockJobKind) Values() []string {
	return []string{string(jobBackup), string(jobCommit), string(jobMirror), string(jobStream)}
}

// blockWork is a job that works on a disk. A disk has one at a time.
type blockWork struct {
	mon  *monitor
	kind blockJobKind
	disk vmm.AttachedDisk
	job  *qmp.Job

	session *qmp.Session

	id                              string
	soft, autoFinalize, autoDismiss bool
	ctx                             context.Context // while it works

	// What the job does, and what it works with: see change. uninstall takes away
	// what install put in place; both get and return the disk's node, and are called
	// with bitmaps.mu held. finish has what work did take effect, when the job is
	// finalized: until then all is the disk's that was, and what install put in place
	// goes on. If any of them fails, or the job is cancelled, uninstall and abandon
	// follow.
	prepare   func() error
	install   func(current block.Node) (block.Node, error)
	uninstall func(current block.Node) block.Node
	work      func(context.Context) error
	finish    func() error
	abandon   func() error
	nodes     []*graphNode // which it uses
	onError   onError
	ignored   error // the first that was

	mu    sync.Mutex
	speed int64     // bytes a second, 0: no limit; guarded by mu
	since time.Time // what is counted since; guarded by mu
	spent int64     // bytes since then; guarded by mu
	woken chan struct{}
	// status is what the last error was, until the job is resumed after it; guarded by mu
	status deviceIOStatus
}

// blockJobs are the machine's, by the id of the disk and that of the job.
type blockJobs struct {
	mu     sync.Mutex
	byDisk map[string]*blockWork // guarded by mu

	starting map[string]bool // ids of jobs that a transaction is about to start; guarded by mu
}

type (
	// blockJobEvent is the data of BLOCK_JOB_COMPLETED, _CANCELLED and _READY.
	blockJobEvent struct {
		Type   blockJobKind `qmp:"type"`
		Device string       `qmp:"device"` // the job's id
		Len    int64        `qmp:"len"`
		Offset int64        `qmp:"offset"`
		Speed  int64        `qmp:"speed"`
	}
	blockJobCompleted struct {
		Type   blockJobKind `qmp:"type"`
		Device string       `qmp:"device"`
		Len    int64        `qmp:"len"`
		Offset int64        `qmp:"offset"`
		Speed  int64        `qmp:"speed"`
		Error  *string      `qmp:"error"`
	}
	blockJobPending struct {
		Type blockJobKind `qmp:"type"`
		ID   string       `qmp:"id"`
	}
	blockJobName struct {
		Device string `qmp:"device"`
	}
	blockJobCancelArguments struct {
		Device string `qmp:"device"`
		Force  *bool  `qmp:"force"`
	}
	blockJobSpeedArguments struct {
		Device string `qmp:"device"`
		Speed  int64  `qmp:"speed"`
	}
	blockJobID struct {
		ID string `qmp:"id"`
	}
)

func (mon *monitor) registerBlockJobs(reg *qmp.Registry) {
	qmp.RegisterEvent[blockJobCompleted](reg, "BLOCK_JOB_COMPLETED")
	qmp.RegisterEvent[blockJobEvent](reg, "BLOCK_JOB_CANCELLED")
	qmp.RegisterEvent[blockJobEvent](reg, "BLOCK_JOB_READY")
	qmp.RegisterEvent[blockJobPending](reg, "BLOCK_JOB_PENDING")
	query(reg, "query-block-jobs", mon.queryBlockJobs)
	verb := func(name string, tell func(*qmp.Job) error) {
		qmp.Register(reg, name, func(_ context.Context, _ *qmp.Session, a blockJobName) (e qmp.Empty, err error) {
			w, err := mon.findBlockJob(a.Device)
			if err != nil {
				return e, err
			}
			return e, tell(w.job)
		})
	}
	verb("block-job-pause", (*qmp.Job).Pause)
	verb("block-job-resume", (*qmp.Job).Resume)
	verb("block-job-complete", (*qmp.Job).Complete)
	byID := func(name string, tell func(*qmp.Job) error) {
		qmp.Register(reg, name, func(_ context.Context, s *qmp.Session, a blockJobID) (e qmp.Empty, err error) {
			j, err := s.Server().Jobs().Find(a.ID)
			if err != nil {
				return e, &qmp.Error{Class: qmp.DeviceNotActive, Desc: "Block job '" + a.ID + "' not found"}
			}
			return e, tell(j)
		})
	}
	byID("block-job-finalize", (*qmp.Job).Finalize)
	byID("block-job-dismiss", (*qmp.Job).Dismiss)
	qmp.Register(reg, "block-job-cancel", func(_ context.Context, _ *qmp.Session, a blockJobCancelArguments) (e qmp.Empty, err error) {
		w, err := mon.findBlockJob(a.Device)
		if err != nil {
			return e, err
		}
		return e, w.job.Cancel(a.Force != nil && *a.Force)
	})
	qmp.Register(reg, "block-job-set-speed", func(_ context.Context, _ *qmp.Session, a blockJobSpeedArguments) (e qmp.Empty, err error) {
		w, err := mon.findBlockJob(a.Device)
		if err != nil {
			return e, err
		}
		return e, w.setSpeed(a.Speed)
	})
}

// findBlockJob finds a job by what the older commands call its device.
func (mon *monitor) findBlockJob(id string) (*blockWork, error) {
	mon.blockJobs.mu.Lock()
	defer mon.blockJobs.mu.Unlock()
	for _, w := range mon.blockJobs.byDisk {
		if w.job != nil && w.job.ID() == id {
			return w, nil
		}
	}
	return nil, &qmp.Error{Class: qmp.DeviceNotActive, Desc: "Block job '" + id + "' not found"}
}

func (mon *monitor) queryBlockJobs() []blockJob {
	mon.blockJobs.mu.Lock()
	defer mon.blockJobs.mu.Unlock()
	var all []blockJob
	for _, d := range mon.m.Disks() {
		w := mon.blockJobs.byDisk[d.ID]
		if w == nil || w.job == nil {
			continue
		}
		i := w.job.Info()
		w.mu.Lock()
		speed, status := w.speed, w.status
		w.mu.Unlock()
		all = append(all, blockJob{
			Type: string(w.kind), Device: i.ID, Len: i.TotalProgress, Offset: i.CurrentProgress,
			Busy: i.Status == qmp.JobRunning, Paused: i.Status == qmp.JobPaused || i.Status == qmp.JobStandby,
			Speed: speed, IOStatus: status, Ready: i.Status == qmp.JobReady || i.Status == qmp.JobStandby, Status: i.Status,
			AutoFinalize: w.autoFinalize, AutoDismiss: w.autoDismiss, Error: i.Error,
		})
	}
	return all
}

// blockJobOptions are the arguments that such jobs have in common.
type blockJobOptions struct {
	id                        *string
	speed                     *int64
	autoFinalize, autoDismiss *bool
}

func orTrue(b *bool) bool { return b == nil || *b }

// newBlockWork is a job that its change will start.
func (mon *monitor) newBlockWork(s *qmp.Session, kind blockJobKind, d vmm.AttachedDisk, o blockJobOptions, soft bool) (*blockWork, error) {
	w := &blockWork{
		mon: mon, kind: kind, disk: d, session: s, soft: soft, autoFinalize: orTrue(o.autoFinalize), autoDismiss: orTrue(o.autoDismiss),
		id: d.ID, status: "ok", woken: make(chan struct{}, 1), // QEMU's older commands need no id
	}
	if o.id != nil {
		w.id = *o.id
	}
	if o.speed != nil {
		if err := w.setSpeed(*o.speed); err != nil {
			return nil, err
		}
	}
	if !wellFormed(w.id) {
		return nil, qmp.Errorf("Invalid job ID '%s'", w.id)
	}
	return w, nil
}

// change is what starts the job.
func (w *blockWork) change() *change {
	return &change{
		disk: w.disk, claim: "block job: " + string(w.kind),
		prepare: w.begin, abandon: w.end, apply: w.install,
		revert: func(current block.Node) block.Node { return w.uninstall(current) },
		done:   w.start,
	}
}

// begin checks what could keep the job from starting.
func (w *blockWork) begin() error {
	jobs := w.session.Server().Jobs()
	if _, err := jobs.Find(w.id); err == nil || w.mon.blockJobs.starting[w.id] {
		return qmp.Errorf("Job ID '%s' already in use", w.id)
	}
	if w.mon.blockJobs.byDisk[w.disk.ID] != nil {
		return w.mon.notBusyLocked(w.disk)
	}
	if w.prepare != nil {
		if err := w.prepare(); err != nil {
			return err
		}
	}
	w.mon.blockJobs.starting[w.id] = true
	w.mon.blockJobs.byDisk[w.disk.ID] = w
	return nil
}

// end takes back what begin did.
func (w *blockWork) end() error {
	delete(w.mon.blockJobs.starting, w.id)
	delete(w.mon.blockJobs.byDisk, w.disk.ID)
	return w.letGo()
}

// letGo gives up what the job worked with.
func (w *blockWork) letGo() (err error) {
	if w.abandon != nil {
		err = w.abandon()
	}
	w.dropNodes()
	return err
}

func (w *blockWork) dropNodes() {
	for _, e := range w.nodes {
		w.mon.drop(e, w.user())
	}
}

// user is how the nodes that the job uses name it.
func (w *blockWork) user() string { return "block job: " + string(w.kind) + " " + w.id }

// start starts the job. What it works with is in place.
func (w *blockWork) start() (err error) {
	started := make(chan struct{})
	done := false
	w.job, err = w.session.Server().Jobs().Start(w.id, string(w.kind), qmp.JobOptions{
		ManualFinalize: !w.autoFinalize, ManualDismiss: !w.autoDismiss, SoftCancel: w.soft,
		Pending: func() { w.mon.emit("BLOCK_JOB_PENDING", blockJobPending{w.kind, w.id}) },
		Prepare: func() (err error) {
			if w.finish != nil {
				err = w.finish()
			}
			done = err == nil
			return err
		},
		Commit: func() { w.free(); w.tellEnd(nil) },
		Abort: func() {
			<-started
			err := w.job.Err()
			if !done {
				err = errors.Join(err, w.undo())
			}
			w.free()
			w.tellEnd(err)
		},
	}, func(ctx context.Context, _ *qmp.Job) error {
		<-started
		w.ctx = ctx
		return w.work(ctx)
	})
	delete(w.mon.blockJobs.starting, w.id)
	if err != nil {
		err = errors.Join(err, w.undoLocked())
		delete(w.mon.blockJobs.byDisk, w.disk.ID)
		return err
	}
	close(started)
	return nil
}

// undo takes away what the work, which has failed, worked with.
func (w *blockWork) undo() error {
	w.mon.bitmaps.mu.Lock()
	defer w.mon.bitmaps.mu.Unlock()
	return w.undoLocked()
}

// undoLocked is undo with bitmaps.mu held.
func (w *blockWork) undoLocked() error {
	if w.uninstall != nil {
		w.disk.Root.Drained(func(current block.Node) block.Node { return w.uninstall(current) })
	}
	return w.letGo()
}

// free lets others change the disk.
func (w *blockWork) free() {
	w.dropNodes()
	w.mon.blockJobs.mu.Lock()
	defer w.mon.blockJobs.mu.Unlock()
	delete(w.mon.blockJobs.byDisk, w.disk.ID)
	w.disk.Root.Release()
}

// claim claims a disk, with QEMU's error.
func (mon *monitor) claim(d vmm.AttachedDisk, by string) error {
	if err := d.Root.Claim(by); err != nil {
		return qmp.Errorf("Node '%s' is busy: %v", mon.topName(d), err)
	}
	return nil
}

// event is the job's data now.
func (w *blockWork) event() blockJobEvent {
	i := w.job.Info()
	w.mu.Lock()
	defer w.mu.Unlock()
	return blockJobEvent{Type: w.kind, Device: i.ID, Len: i.TotalProgress, Offset: i.CurrentProgress, Speed: w.speed}
}

func (w *blockWork) tellEnd(err error) {
	e := w.event()
	if errors.Is(err, qmp.ErrCanceled) {
		w.mon.emit("BLOCK_JOB_CANCELLED", e)
		return
	}
	done := blockJobCompleted{Type: e.Type, Device: e.Device, Len: e.Len, Offset: e.Offset, Speed: e.Speed}
	if err != nil {
		text := err.Error()
		done.Error = &text
	}
	w.mon.emit("BLOCK_JOB_COMPLETED", done)
}

// ready makes the job ready and waits until it is to end; complete tells how.
func (w *blockWork) ready() (complete bool, err error) {
	if err := w.job.Ready(); err != nil {
		return false, err
	}
	w.mon.emit("BLOCK_JOB_READY", w.event())
	return w.job.WaitComplete()
}

func (w *blockWork) setSpeed(speed int64) error {
	if speed < 0 {
		return qmp.Errorf("Parameter 'speed' expects a non-negative value")
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.speed, w.since, w.spent = speed, time.Now(), 0
	select {
	case w.woken <- struct{}{}:
	default:
	}
	return nil
}

// pace is called between two steps of the work: it waits while the job is paused,
// or is faster than it may be.
func (w *blockWork) pace() error {
	for {
		if err := w.job.PausePoint(); err != nil {
			return err
		}
		w.mu.Lock()
		var wait time.Duration
		if w.speed > 0 {
			due := float64(w.spent) / float64(w.speed) * float64(time.Second)
			wait = time.Duration(min(due, math.MaxInt64/2)) - time.Since(w.since)
		}
		w.mu.Unlock()
		if wait <= 0 {
			return nil
		}
		select {
		case <-w.ctx.Done():
			return qmp.ErrCanceled
		case <-w.woken:
		case <-time.After(min(wait, 100*time.Millisecond)):
		}
	}
}

// progress tells how far the work is; what was done since counts for the speed.
func (w *blockWork) progress(done, total int64) {
	before := w.job.Info().CurrentProgress
	w.mu.Lock()
	w.spent += max(0, done-before)
	w.mu.Unlock()
	w.job.SetProgress(done, total)
}
