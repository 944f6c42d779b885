package qmp_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/gnomon-vmm/gnomon/qmp"
)

// jobStart are arguments that QEMU's blockdev-mirror and blockdev-backup have, too.
type jobStart struct {
	ID           *string `qmp:"job-id"`
	Device       string  `qmp:"device"`
	Target       string  `qmp:"target"`
	Sync         string  `qmp:"sync"`
	Speed        int64   `qmp:"speed,omitempty"`
	AutoFinalize *bool   `qmp:"auto-finalize"`
	AutoDismiss  *bool   `qmp:"auto-dismiss"`
}

func (a jobStart) options() qmp.JobOptions {
	off := func(b *bool) bool { return b != nil && !*b }
	return qmp.JobOptions{ManualFinalize: off(a.AutoFinalize), ManualDismiss: off(a.AutoDismiss)}
}

func (a jobStart) id() string {
	if a.ID == nil {
		return ""
	}
	return *a.ID
}

// work runs until the job is cancelled, stopping whenever it is paused.
func work(ctx context.Context, j *qmp.Job) error {
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for {
		if err := j.PausePoint(); err != nil {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
	}
}

func registerJobCommands(reg *qmp.Registry) {
	qmp.Register(reg, "blockdev-mirror", func(_ context.Context, s *qmp.Session, a jobStart) (qmp.Empty, error) {
		_, err := s.Server().Jobs().Start(a.id(), "mirror", a.options(), func(_ context.Context, j *qmp.Job) error {
			j.SetProgress(1<<30, 1<<30)
			if err := j.Ready(); err != nil {
				return err
			}
			_, err := j.WaitComplete()
			return err
		})
		return qmp.Empty{}, err
	})
	qmp.Register(reg, "blockdev-backup", func(_ context.Context, s *qmp.Session, a jobStart) (qmp.Empty, error) {
		_, err := s.Server().Jobs().Start(a.id(), "backup", a.options(), work)
		return qmp.Empty{}, err
	})
}

// jobPeer is a server with a job on it.
type jobPeer struct {
	*wire
	statuses []string // that events told of
}

// command runs a command and returns the text of its error, and what it returned.
func (p *jobPeer) command(s string) (desc string, value any) {
	p.t.Helper()
	p.send(s)
	for {
		var m struct {
			Event  string
			Data   struct{ Status string }
			Error  struct{ Class, Desc string }
			Return any
		}
		l := p.line()
		if err := json.Unmarshal([]byte(l), &m); err != nil {
			p.t.Fatal(err)
		}
		switch {
		case m.Event == "JOB_STATUS_CHANGE":
			p.statuses = append(p.statuses, m.Data.Status)
		case m.Event != "":
		case m.Error.Desc != "":
			return m.Error.Class + " " + m.Error.Desc, nil
		default:
			return "", m.Return
		}
	}
}

// await asks until the job is in the state wanted, "gone" for no job.
func (p *jobPeer) await(status string) {
	p.t.Helper()
	for {
		got := "gone"
		_, list := p.command(`{"execute": "query-jobs"}`)
		for _, j := range list.([]any) {
			got = j.(map[string]any)["status"].(string)
		}
		if got == status {
			return
		}
	}
}

// TestJobsLikeQEMU leads jobs of QEMU and of ours through the same lives, with every verb tried in every lasting state.
func TestJobsLikeQEMU(t *testing.T) {
	const args = `"job-id": "j", "device": "a", "target": "b", "sync": "full"`
	const manual = args + `, "auto-finalize": false, "auto-dismiss": false`
	mirror := func(args string) string { return `{"execute": "blockdev-mirror", "arguments": {` + args + `}}` }
	backup := func(args string) string {
		return `{"execute": "blockdev-backup", "arguments": {` + args + `, "speed": 1}}`
	}
	// Other than these, words are verbs; after = comes the state to wait for.
	for name, life := range map[string]struct {
		start string
		steps string
	}{
		"completed": {mirror(manual), "=ready finalize dismiss resume pause =standby pause finalize dismiss resume =ready complete " +
			"=pending pause resume complete dismiss finalize =concluded pause resume cancel complete finalize dismiss =gone cancel pause"},
		"completed in pause": {mirror(manual), "=ready pause =standby complete pause resume =pending finalize dismiss =gone"},
		"automatic":          {mirror(args), "=ready complete =gone dismiss"},
		"cancelled":          {backup(manual), "=running complete finalize dismiss resume pause =paused pause complete finalize dismiss cancel =concluded ERROR cancel dismiss =gone"},
		"cancelled at once":  {backup(args), "=running cancel =gone finalize"},
		"cancelled pending":  {mirror(manual), "=ready complete =pending cancel =concluded ERROR finalize dismiss =gone"},
		"cancelled in pause": {mirror(manual), "=ready pause =standby cancel =concluded ERROR dismiss =gone"},
		"resumed":            {backup(manual), "=running pause =paused resume =running resume cancel =concluded dismiss"},
		"bad ids":            {mirror(strings.Replace(args, `"j"`, `"1j"`, 1)), "=gone"},
		"taken id":           {backup(manual), "=running AGAIN cancel =concluded AGAIN dismiss =gone"},
	} {
		t.Run(name, func(t *testing.T) {
			lead := func(p *jobPeer) (answers []string) {
				desc, _ := p.command(life.start)
				answers = append(answers, desc)
				// QEMU pauses some jobs for a moment when they start.
				settled := false
				for _, word := range strings.Fields(life.steps) {
					switch {
					case word[0] == '=':
						p.await(word[1:])
						if !settled && word == "=running" {
							p.statuses = nil
						}
						settled = true
						continue
					case word == "AGAIN":
						desc, _ = p.command(mirror(`"job-id": "j", "device": "c", "target": "d", "sync": "full"`))
					case word == "ERROR":
						_, v := p.command(`{"execute": "query-jobs"}`)
						desc = fmt.Sprint(v.([]any)[0].(map[string]any)["error"])
					default:
						desc, _ = p.command(`{"execute": "job-` + word + `", "arguments": {"id": "j"}}`)
					}
					answers = append(answers, word+": "+desc)
				}
				p.command(`{"execute": "query-jobs"}`)
				return answers
			}
			qemu := &jobPeer{wire: negotiated(t, startQEMU(t))}
			for _, node := range []string{"a", "b", "c", "d"} {
				qemu.command(`{"execute": "blockdev-add", "arguments": {"driver": "null-co", "node-name": "` + node + `"}}`)
			}
			ours := &jobPeer{wire: negotiated(t, newMachine(t, registerJobCommands).path)}
			if d := cmp.Diff(lead(qemu), lead(ours)); d != "" {
				t.Errorf("-QEMU +us\n%s", d)
			}
			if d := cmp.Diff(qemu.statuses, ours.statuses); d != "" {
				t.Errorf("events: -QEMU +us\n%s", d)
			}
		})
	}
}

func TestJobFunctions(t *testing.T) {
	boom := errors.New("boom")
	more := fmt.Errorf("%w: but for this", qmp.ErrCanceled)
	for name, test := range map[string]struct {
		opts   qmp.JobOptions
		run    error
		prep   error
		cancel func(*qmp.Job) error
		want   string
		err    error
	}{
		"good":                {want: "run prepare commit"},
		"failing":             {run: boom, want: "run abort", err: boom},
		"cancelled by itself": {run: more, want: "run abort", err: more},
		"failing late":        {prep: boom, want: "run prepare abort", err: boom},
		"manual":              {opts: qmp.JobOptions{ManualFinalize: true}, cancel: (*qmp.Job).Finalize, want: "run prepare commit"},
		"cancelled at last":   {opts: qmp.JobOptions{ManualFinalize: true}, cancel: func(j *qmp.Job) error { return j.Cancel(false) }, want: "run abort", err: qmp.ErrCanceled},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t)
			var log []string
			note := func(s string) { log = append(log, s) }
			o := test.opts
			o.Prepare = func() error { note("prepare"); return test.prep }
			o.Commit = func() { note("commit") }
			o.Abort = func() { note("abort") }
			j, err := m.srv.Jobs().Start("j", "test", o, func(context.Context, *qmp.Job) error {
				note("run")
				return test.run
			})
			if err != nil {
				t.Fatal(err)
			}
			if test.cancel != nil {
				for j.Info().Status != qmp.JobPending {
				}
				if err := test.cancel(j); err != nil {
					t.Fatal(err)
				}
			}
			<-j.Done()
			if got := strings.Join(log, " "); got != test.want || !errors.Is(j.Err(), test.err) {
				t.Errorf("ran %q with %v, not %q with %v", got, j.Err(), test.want, test.err)
			}
		})
	}
}

// TestSoftCancel ends a job that is ready without completing it, and without an error.
func TestSoftCancel(t *testing.T) {
	m := newMachine(t)
	completed := make(chan bool, 1)
	ready := make(chan struct{})
	j, err := m.srv.Jobs().Start("j", "test", qmp.JobOptions{SoftCancel: true}, func(_ context.Context, j *qmp.Job) error {
		if err := j.Ready(); err != nil {
			return err
		}
		close(ready)
		complete, err := j.WaitComplete()
		completed <- complete
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	<-ready
	select {
	case <-j.CompletionRequested():
		t.Error("told to complete by nobody")
	default:
	}
	if err := j.Cancel(false); err != nil {
		t.Fatal(err)
	}
	<-j.CompletionRequested()
	<-j.Done()
	if <-completed || j.Err() != nil {
		t.Errorf("ended with %v", j.Err())
	}
}

// TestJobStates tells jobs random things at random times: whatever they do is in QEMU's table of transitions, and all end.
func TestJobStates(t *testing.T) {
	// The table of QEMU's job.c, written down a second time.
	next := map[string]string{
		"": "created", "created": "running aborting null", "running": "paused ready waiting aborting", "paused": "running",
		"ready": "standby waiting aborting", "standby": "ready", "waiting": "pending aborting", "pending": "aborting concluded",
		"aborting": "concluded", "concluded": "null",
	}
	m := newMachine(t)
	w := negotiated(t, m.path)
	n := 0
	rapid.Check(t, func(rt *rapid.T) {
		n++
		id := fmt.Sprintf("j%d", n)
		opts := qmp.JobOptions{
			ManualFinalize: rapid.Bool().Draw(rt, "finalize"), ManualDismiss: rapid.Bool().Draw(rt, "dismiss"),
			SoftCancel: rapid.Bool().Draw(rt, "soft"),
		}
		shape := rapid.SampledFrom([]string{"ready", "work", "fail", "steps"}).Draw(rt, "shape")
		j, err := m.srv.Jobs().Start(id, "test", opts, func(ctx context.Context, j *qmp.Job) error {
			switch shape {
			case "ready":
				if err := j.Ready(); err != nil {
					return err
				}
				_, err := j.WaitComplete()
				return err
			case "work":
				return work(ctx, j)
			case "fail":
				return errors.Join(j.PausePoint(), errors.New("failed"))
			default:
				for range 10 {
					j.AddProgress(1)
					if err := j.PausePoint(); err != nil {
						return err
					}
				}
				return nil
			}
		})
		if err != nil {
			rt.Fatal(err)
		}
		verbs := map[string]func() error{
			"pause": j.Pause, "resume": j.Resume, "complete": j.Complete, "finalize": j.Finalize, "dismiss": j.Dismiss,
			"cancel": func() error { return j.Cancel(true) }, "soft": func() error { return j.Cancel(false) },
		}
		for _, v := range rapid.SliceOfN(rapid.SampledFrom(slices.Sorted(mapKeys(verbs))), 0, 12).Draw(rt, "verbs") {
			verbs[v]()
		}
		// Whatever it is doing, this ends it.
		j.Cancel(true)
		<-j.Done()
		j.Dismiss()
		if _, err := m.srv.Jobs().Find(id); err == nil {
			rt.Errorf("job %s outlived its end", id)
		}
		at := ""
		for at != "null" {
			var e struct{ Data struct{ ID, Status string } }
			if err := json.Unmarshal([]byte(w.line()), &e); err != nil {
				rt.Fatal(err)
			}
			if e.Data.ID != id || !slices.Contains(strings.Fields(next[at]), e.Data.Status) {
				rt.Fatalf("from %q to %+v", at, e.Data)
			}
			at = e.Data.Status
		}
	})
}

// TestCloseEndsJobs closes a server with jobs in several states: all are undone.
func TestCloseEndsJobs(t *testing.T) {
	m := newMachine(t)
	var jobs []*qmp.Job
	aborted := make(chan struct{}, 10)
	opts := qmp.JobOptions{ManualFinalize: true, ManualDismiss: true, Abort: func() { aborted <- struct{}{} }}
	for id, run := range map[string]func(context.Context, *qmp.Job) error{
		"working": work, "pending": func(context.Context, *qmp.Job) error { return nil },
		"ready": func(_ context.Context, j *qmp.Job) error {
			if err := j.Ready(); err != nil {
				return err
			}
			_, err := j.WaitComplete()
			return err
		},
	} {
		j, err := m.srv.Jobs().Start(id, "test", opts, run)
		if err != nil {
			t.Fatal(err)
		}
		jobs = append(jobs, j)
		for id == "pending" && j.Info().Status != qmp.JobPending {
		}
	}
	m.srv.Close()
	for _, j := range jobs {
		<-j.Done()
		<-aborted
		if !errors.Is(j.Err(), qmp.ErrCanceled) {
			t.Errorf("job %s ended with %v", j.ID(), j.Err())
		}
	}
	if _, err := m.srv.Jobs().Start("late", "test", qmp.JobOptions{}, work); !errors.Is(err, qmp.ErrClosed) {
		t.Errorf("a job after the end: %v", err)
	}
}
