package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/schollz/progressbar/v3"
	"golang.org/x/term"

	"github.com/gnomon-vmm/gnomon/qmp/client"
)

// jobPoll is how often a job's progress is asked for.
const jobPoll = 100 * time.Millisecond

// jobInfo is an element of query-jobs.
type jobInfo struct {
	ID      string `json:"id"`
	Status  string `json:"status"`
	Current int64  `json:"current-progress"`
	Total   int64  `json:"total-progress"`
	Error   string `json:"error"`
}

// runJob starts a job by a QMP command that takes a job-id and leaves the job
// to be dismissed, shows its progress, and returns when it has ended. A job that
// becomes ready is told to complete. When ctx ends it cancels the job and waits
// for that.
func runJob(ctx context.Context, c *client.Client, label, id, command string, args map[string]any) error {
	args["job-id"] = id
	if err := c.Execute(context.WithoutCancel(ctx), command, args, nil); err != nil {
		return err
	}
	return awaitJob(ctx, c, label, id)
}

// awaitJob is the rest of runJob, of a job that has been started.
func awaitJob(ctx context.Context, c *client.Client, label, id string) error {
	background := context.WithoutCancel(ctx)
	bar := newProgress(label)
	defer bar.Finish()
	cancelled := ctx.Done()
	completing := false
	for tick := time.NewTicker(jobPoll); ; {
		info, err := findJob(background, c, id)
		if err != nil {
			tick.Stop()
			return err
		}
		bar.Set(info.Current, info.Total)
		if info.Status == "concluded" {
			tick.Stop()
			if err := c.Execute(background, "job-dismiss", map[string]any{"id": id}, nil); err != nil {
				return err
			}
			if rest, ok := strings.CutPrefix(info.Error, "Operation canceled"); ok && ctx.Err() != nil {
				return fmt.Errorf("%w%s", ctx.Err(), rest)
			}
			if info.Error != "" {
				return errors.New(info.Error)
			}
			return nil
		}
		if info.Status == "ready" && !completing && ctx.Err() == nil {
			completing = true
			if err := c.Execute(background, "job-complete", map[string]any{"id": id}, nil); err != nil {
				return err
			}
		}
		select {
		case <-tick.C:
		case <-c.Done():
		case <-cancelled:
			cancelled = nil
			// A job that has just ended cannot be cancelled any more.
			_ = c.Execute(background, "job-cancel", map[string]any{"id": id}, nil)
		}
	}
}

// endJob cancels a job, waits for that, and dismisses it. The error is of a job that has
// failed otherwise.
func endJob(ctx context.Context, c *client.Client, id string) error {
	ended, cancel := context.WithCancel(ctx)
	cancel() // a job whose context has ended is cancelled
	err := awaitJob(ended, c, "ending", id)
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

func findJob(ctx context.Context, c *client.Client, id string) (*jobInfo, error) {
	var jobs []jobInfo
	if err := c.Execute(ctx, "query-jobs", nil, &jobs); err != nil {
		return nil, err
	}
	for i := range jobs {
		if jobs[i].ID == id {
			return &jobs[i], nil
		}
	}
	return nil, fmt.Errorf("job %s: somebody else dismissed it; its outcome is not known", id)
}

// progress is a bar on standard error where that is a terminal.
type progress struct{ bar *progressbar.ProgressBar }

func newProgress(label string) *progress {
	if !term.IsTerminal(int(os.Stderr.Fd())) {
		return &progress{}
	}
	return &progress{newBar(os.Stderr, label)}
}

func newBar(w io.Writer, label string) *progressbar.ProgressBar {
	return progressbar.NewOptions64(-1,
		progressbar.OptionSetWriter(w), progressbar.OptionSetDescription(label), progressbar.OptionShowBytes(true),
		progressbar.OptionSetWidth(30), progressbar.OptionClearOnFinish(), progressbar.OptionThrottle(jobPoll))
}

// Set shows that current of total bytes are done; an unknown total is 0.
func (p *progress) Set(current, total int64) {
	if p.bar == nil || total <= 0 {
		return
	}
	if p.bar.GetMax64() != total {
		p.bar.ChangeMax64(total)
	}
	_ = p.bar.Set64(min(current, total))
}

// Finish takes the bar away.
func (p *progress) Finish() {
	if p.bar != nil {
		_ = p.bar.Finish()
	}
}
