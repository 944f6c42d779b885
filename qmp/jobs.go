package qmp

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"syscall"
)

// maxJobs bounds the jobs that exist at once, concluded ones that nobody dismissed included.
const maxJobs = 1024

// JobStatus is the state of a job, as QEMU's qapi/job.json has it.
type JobStatus string

// The states of a job.
const (
	JobUndefined JobStatus = "undefined"
	JobCreated   JobStatus = "created"
	JobRunning   JobStatus = "running"
	JobPaused    JobStatus = "paused"
	JobReady     JobStatus = "ready"
	JobStandby   JobStatus = "standby" // ready and paused
	JobWaiting   JobStatus = "waiting" // the work is done
	JobPending   JobStatus = "pending" // to be finalized
	JobAborting  JobStatus = "aborting"
	JobConcluded JobStatus = "concluded"
	JobNull      JobStatus = "null" // dismissed: it exists no more
)

// Values makes JobStatus an enumeration.
func (JobStatus) Values() []string {
	return []string{
		"undefined", "created", "running", "paused", "ready", "standby", "waiting", "pending", "aborting", "concluded", "null",
	}
}

// jobTransitions are the states that each state may be followed by: the table of QEMU's job.c. A job that aborts for
// a second reason stays aborting.
var jobTransitions = map[JobStatus][]JobStatus{
	JobUndefined: {JobCreated},
	JobCreated:   {JobRunning, JobAborting, JobNull},
	JobRunning:   {JobPaused, JobReady, JobWaiting, JobAborting},
	JobPaused:    {JobRunning},
	JobReady:     {JobStandby, JobWaiting, JobAborting},
	JobStandby:   {JobReady},
	JobWaiting:   {JobPending, JobAborting},
	JobPending:   {JobAborting, JobConcluded},
	JobAborting:  {JobAborting, JobConcluded},
	JobConcluded: {JobNull},
}

// jobVerb is something that a client can tell a job to do.
type jobVerb string

const (
	verbCancel   jobVerb = "cancel"
	verbPause    jobVerb = "pause"
	verbResume   jobVerb = "resume"
	verbComplete jobVerb = "complete"
	verbFinalize jobVerb = "finalize"
	verbDismiss  jobVerb = "dismiss"
)

// jobVerbs are the states in which each verb is allowed.
var jobVerbs = map[jobVerb][]JobStatus{
	verbCancel:   {JobCreated, JobRunning, JobPaused, JobReady, JobStandby, JobWaiting, JobPending},
	verbPause:    {JobCreated, JobRunning, JobPaused, JobReady, JobStandby},
	verbResume:   {JobCreated, JobRunning, JobPaused, JobReady, JobStandby},
	verbComplete: {JobReady, JobStandby},
	verbFinalize: {JobPending},
	verbDismiss:  {JobConcluded},
}

// JobOptions are how a job ends, and what it does then.
type JobOptions struct {
	// ManualFinalize keeps the job pending until job-finalize; ManualDismiss keeps it concluded until job-dismiss.
	ManualFinalize, ManualDismiss bool
	// SoftCancel tells that a job that is ready can be cancelled without being undone, as QEMU's mirror jobs can: see
	// Job.WaitComplete. Without it every cancellation is forced.
	SoftCancel bool
	// Pending runs when a job with ManualFinalize has become pending. It must neither wait nor ask the job anything.
	Pending func()
	// Prepare runs when a job that did its work is finalized, and makes that take effect: until then the job can be cancelled.
	// An error aborts it. Then either Commit or Abort runs, which must undo what can be undone; Abort also runs when the
	// work fails or is cancelled. Each may be nil.
	Prepare func() error
	Commit  func()
	Abort   func()
}

// Jobs are the background operations of a server.
type Jobs struct {
	ctx    context.Context
	notify func(id string, status JobStatus) // called with mu held, so that events are in order
	wg     sync.WaitGroup

	mu     sync.Mutex
	jobs   []*Job // guarded by mu; newest first
	closed bool   // guarded by mu; no more are to be started
}

// Job is one operation. Its methods may be called by anyone.
type Job struct {
	id, kind string
	opts     JobOptions
	owner    *Jobs
	ctx      context.Context
	cancel   context.CancelFunc
	concl    chan struct{} // closed when concluded
	told     chan struct{} // closed when told to complete or soft-cancelled

	// All guarded by owner.mu.
	status         JobStatus
	current, total int64
	userPaused     bool
	cancelled      bool // forced: the outcome is to be undone
	softCancelled  bool
	completing     bool
	finalizing     bool          // finalize is running, without the lock
	changed        chan struct{} // closed and replaced when something that the job may wait for changes
	err            error
}

func newJobs(ctx context.Context, notify func(string, JobStatus)) *Jobs {
	return &Jobs{ctx: ctx, notify: notify}
}

// close cancels every job, those that are waiting to be finalized included, and returns when none is running.
func (js *Jobs) close() {
	js.mu.Lock()
	js.closed = true
	all := slices.Clone(js.jobs)
	js.mu.Unlock()
	for _, j := range all {
		// Refused by those that are over, or will be soon.
		_ = j.Cancel(true)
	}
	js.wg.Wait()
}

// ErrCanceled is the error of a job that was cancelled. Its function can return an error that wraps it, to say more.
var ErrCanceled error = canceledError{}

type canceledError struct{}

// Error returns the text that clients of QEMU know.
func (canceledError) Error() string { return "Operation canceled" }

// Start runs fn as a job of the given type. Its context ends when the job is cancelled or the server closes; fn should call
// PausePoint wherever it can stop for a while. A nil result means that the work is done. The error of Start is one to answer
// a client with: a bad id, one that is taken, or too many jobs; or it is ErrClosed.
func (js *Jobs) Start(id, kind string, opts JobOptions, fn func(context.Context, *Job) error) (*Job, error) {
	js.mu.Lock()
	defer js.mu.Unlock()
	switch {
	case id == "":
		return nil, Errorf("An explicit job ID is required")
	case !wellFormedID(id):
		return nil, Errorf("Invalid job ID '%s'", id)
	case js.findLocked(id) != nil:
		return nil, Errorf("Job ID '%s' already in use", id)
	case js.closed:
		return nil, ErrClosed
	case len(js.jobs) >= maxJobs:
		return nil, Errorf("Too many jobs")
	}
	j := &Job{
		id: id, kind: kind, opts: opts, owner: js, status: JobUndefined,
		concl: make(chan struct{}), told: make(chan struct{}), changed: make(chan struct{}),
	}
	j.ctx, j.cancel = context.WithCancel(js.ctx)
	js.jobs = slices.Insert(js.jobs, 0, j)
	j.setLocked(JobCreated)
	j.setLocked(JobRunning)
	js.wg.Add(1)
	go func() {
		defer js.wg.Done()
		err := j.PausePoint()
		if err == nil {
			err = fn(j.ctx, j)
		}
		j.ended(err)
	}()
	return j, nil
}

// wellFormedID tells whether id begins with a letter and goes on with letters, digits, '-', '.' and '_'.
func wellFormedID(id string) bool {
	for i := range len(id) {
		c := id[i]
		letter := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z'
		if !letter && (i == 0 || !(c >= '0' && c <= '9' || c == '-' || c == '.' || c == '_')) {
			return false
		}
	}
	return id != ""
}

// Find returns the job with the id. The error is QEMU's.
func (js *Jobs) Find(id string) (*Job, error) {
	js.mu.Lock()
	defer js.mu.Unlock()
	if j := js.findLocked(id); j != nil {
		return j, nil
	}
	return nil, Errorf("Job not found")
}

func (js *Jobs) findLocked(id string) *Job {
	for _, j := range js.jobs {
		if j.id == id {
			return j
		}
	}
	return nil
}

// JobInfo is what query-jobs tells about a job. Progress has the unit that the job likes; it may grow at both ends.
type JobInfo struct {
	ID              string    `qmp:"id"`
	Type            string    `qmp:"type"`
	Status          JobStatus `qmp:"status"`
	CurrentProgress int64     `qmp:"current-progress"`
	TotalProgress   int64     `qmp:"total-progress"`
	Error           *string   `qmp:"error"`
}

// Query returns all jobs, the newest first.
func (js *Jobs) Query() []JobInfo {
	js.mu.Lock()
	defer js.mu.Unlock()
	var out []JobInfo
	for _, j := range js.jobs {
		out = append(out, j.infoLocked())
	}
	return out
}

func (j *Job) infoLocked() JobInfo {
	info := JobInfo{ID: j.id, Type: j.kind, Status: j.status, CurrentProgress: j.current, TotalProgress: j.total}
	if j.err != nil {
		text := j.err.Error()
		info.Error = &text
	}
	return info
}

// ID returns the job's id.
func (j *Job) ID() string { return j.id }

// Info returns what query-jobs tells about the job.
func (j *Job) Info() JobInfo {
	j.owner.mu.Lock()
	defer j.owner.mu.Unlock()
	return j.infoLocked()
}

// SetProgress tells how much is done and how much there is to do in all.
func (j *Job) SetProgress(current, total int64) {
	j.owner.mu.Lock()
	defer j.owner.mu.Unlock()
	j.current, j.total = current, total
}

// AddProgress tells that n more is done.
func (j *Job) AddProgress(n int64) {
	j.owner.mu.Lock()
	defer j.owner.mu.Unlock()
	j.current += n
}

// setLocked changes the status and tells the clients. A transition that the table does not have is a mistake in this file.
func (j *Job) setLocked(to JobStatus) {
	if !slices.Contains(jobTransitions[j.status], to) {
		panic(fmt.Sprintf("qmp: job %s cannot go from %s to %s", j.id, j.status, to))
	}
	if j.status != to {
		j.status = to
		j.owner.notify(j.id, to)
	}
}

func (j *Job) changedLocked() {
	close(j.changed)
	j.changed = make(chan struct{})
}

// PausePoint is where a job stops while it is paused: it returns when the job is to go on, or ErrCanceled when it is to end.
// Called by the job's function.
func (j *Job) PausePoint() error {
	j.owner.mu.Lock()
	defer j.owner.mu.Unlock()
	return j.pauseLocked()
}

func (j *Job) pauseLocked() error {
	if j.userPaused && j.canceledLocked() == nil {
		before, stopped := j.status, JobPaused
		if before == JobReady {
			stopped = JobStandby
		}
		j.setLocked(stopped)
		for j.userPaused && j.canceledLocked() == nil {
			j.waitLocked()
		}
		j.setLocked(before)
	}
	return j.canceledLocked()
}

// waitLocked gives up the lock until something changes or the job is cancelled.
func (j *Job) waitLocked() {
	changed := j.changed
	j.owner.mu.Unlock()
	select {
	case <-changed:
	case <-j.ctx.Done():
	}
	j.owner.mu.Lock()
}

func (j *Job) canceledLocked() error {
	if j.cancelled || j.ctx.Err() != nil {
		return ErrCanceled
	}
	return nil
}

// Ready tells that the job has reached a state that it can be completed from. Called by the job's function, once.
func (j *Job) Ready() error {
	j.owner.mu.Lock()
	defer j.owner.mu.Unlock()
	if err := j.canceledLocked(); err != nil {
		return err
	}
	j.setLocked(JobReady)
	return nil
}

// CompletionRequested returns a channel that is closed when the job is told to complete, or soft-cancelled: WaitComplete then
// returns at once. It is for jobs that go on working while they are ready.
func (j *Job) CompletionRequested() <-chan struct{} { return j.told }

// WaitComplete waits until a job that is ready is told to complete. complete is false if it was soft-cancelled: the job is
// to end well, but without doing what completion stands for. Called by the job's function.
func (j *Job) WaitComplete() (complete bool, err error) {
	j.owner.mu.Lock()
	defer j.owner.mu.Unlock()
	for {
		if err := j.pauseLocked(); err != nil {
			return false, err
		}
		if j.completing || j.softCancelled {
			return j.completing, nil
		}
		j.waitLocked()
	}
}

// Done returns a channel that is closed when the job has concluded.
func (j *Job) Done() <-chan struct{} { return j.concl }

// Err returns why the job failed, once it has.
func (j *Job) Err() error {
	j.owner.mu.Lock()
	defer j.owner.mu.Unlock()
	return j.err
}

// ended takes over when the job's function has returned.
func (j *Job) ended(err error) {
	j.owner.mu.Lock()
	defer j.owner.mu.Unlock()
	if canceled := j.canceledLocked(); canceled != nil && !errors.Is(err, ErrCanceled) {
		err = canceled
	}
	if err != nil {
		j.concludeLocked(err)
		return
	}
	j.setLocked(JobWaiting)
	j.setLocked(JobPending)
	switch {
	case !j.opts.ManualFinalize:
		j.finalizeLocked()
	case j.opts.Pending != nil:
		j.opts.Pending()
	}
}

// finalizeLocked makes the work take effect. It gives up the lock while the job's own functions run; nobody can cancel the
// job any more then, since it would be told that what has taken effect has not.
func (j *Job) finalizeLocked() {
	j.finalizing = true
	var err error
	if j.opts.Prepare != nil {
		j.owner.mu.Unlock()
		err = j.opts.Prepare()
		j.owner.mu.Lock()
	}
	j.concludeLocked(err)
}

// concludeLocked ends the job, well or not.
func (j *Job) concludeLocked(err error) {
	j.finalizing = true
	last := j.opts.Commit
	if err != nil {
		last = j.opts.Abort
		if !errors.Is(err, ErrCanceled) && (errors.Is(err, context.Canceled) || errors.Is(err, syscall.ECANCELED)) {
			err = ErrCanceled
		}
		j.err = err
		j.setLocked(JobAborting)
	}
	if last != nil {
		j.owner.mu.Unlock()
		last()
		j.owner.mu.Lock()
	}
	j.finalizing = false
	j.setLocked(JobConcluded)
	j.cancel()
	close(j.concl)
	if !j.opts.ManualDismiss {
		j.dismissLocked()
	}
}

func (j *Job) dismissLocked() {
	j.setLocked(JobNull)
	j.owner.jobs = slices.DeleteFunc(j.owner.jobs, func(o *Job) bool { return o == j })
}

// verbLocked checks that the job can be told v now.
func (j *Job) verbLocked(v jobVerb) error {
	if !slices.Contains(jobVerbs[v], j.status) {
		return Errorf("Job '%s' in state '%s' cannot accept command verb '%s'", j.id, j.status, v)
	}
	return nil
}

// Pause makes the job stop at its next PausePoint.
func (j *Job) Pause() error {
	j.owner.mu.Lock()
	defer j.owner.mu.Unlock()
	if err := j.verbLocked(verbPause); err != nil {
		return err
	}
	if j.userPaused {
		return Errorf("Job is already paused")
	}
	j.userPaused = true
	j.changedLocked()
	return nil
}

// Resume lets a job go on that Pause stopped.
func (j *Job) Resume() error {
	j.owner.mu.Lock()
	defer j.owner.mu.Unlock()
	if !j.userPaused {
		return Errorf("Can't resume a job that was not paused")
	}
	if err := j.verbLocked(verbResume); err != nil {
		return err
	}
	j.userPaused = false
	j.changedLocked()
	return nil
}

// tellLocked sets one of the two ways that a ready job may be told to end.
func (j *Job) tellLocked(how *bool) {
	if !j.completing && !j.softCancelled {
		close(j.told)
	}
	*how = true
	j.changedLocked()
}

// Cancel ends the job. With force, or if it is not ready or not made for anything else, what it did is undone; without, it
// ends as it is. A paused job goes on in order to end.
func (j *Job) Cancel(force bool) error {
	j.owner.mu.Lock()
	defer j.owner.mu.Unlock()
	if err := j.verbLocked(verbCancel); err != nil {
		return err
	}
	if j.finalizing {
		return Errorf("Job '%s' is being finalized and cannot be cancelled any more", j.id)
	}
	ready := j.status == JobReady || j.status == JobStandby
	j.userPaused = false
	if !force && ready && j.opts.SoftCancel {
		j.tellLocked(&j.softCancelled)
		return nil
	}
	j.cancelled = true
	j.cancel()
	j.changedLocked()
	if j.status == JobPending {
		j.concludeLocked(ErrCanceled)
	}
	return nil
}

// Complete tells a job that is ready to do what it is for, once it is not paused.
func (j *Job) Complete() error {
	j.owner.mu.Lock()
	defer j.owner.mu.Unlock()
	if err := j.verbLocked(verbComplete); err != nil {
		return err
	}
	if j.cancelled || j.softCancelled {
		return Errorf("The active block job '%s' cannot be completed", j.id)
	}
	j.tellLocked(&j.completing)
	return nil
}

// Finalize makes a pending job take effect.
func (j *Job) Finalize() error {
	j.owner.mu.Lock()
	defer j.owner.mu.Unlock()
	if err := j.verbLocked(verbFinalize); err != nil {
		return err
	}
	if !j.finalizing {
		j.finalizeLocked()
	}
	return nil
}

// Dismiss forgets a concluded job.
func (j *Job) Dismiss() error {
	j.owner.mu.Lock()
	defer j.owner.mu.Unlock()
	if err := j.verbLocked(verbDismiss); err != nil {
		return err
	}
	j.dismissLocked()
	return nil
}
