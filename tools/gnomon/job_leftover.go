package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync/atomic"

	"github.com/spf13/cobra"

	"github.com/gnomon-vmm/gnomon/qmp/client"
)

// A command that is killed leaves its job on the machine, where it keeps the disk busy
// until somebody ends it. So jobs are named after the process that waits for them, and
// the next command takes back those whose process is no more.

// process is a process as jobs are named after it: its id, in which namespace of ids,
// and when it began, in the kernel's ticks, since ids are used again.
type process struct {
	pid                    int
	namespace, beganAtTick uint64
}

var jobsNamed atomic.Uint64

// nameJob is a name for a job of this process, unlike all others.
func nameJob(label string) (string, error) {
	p, err := findProcess(os.Getpid())
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%s-%d-%d-%d-%d", label, p.pid, p.beganAtTick, p.namespace, jobsNamed.Add(1)), nil
}

// jobOf is the process that a job is named after, if it is named so.
func jobOf(id string) (p process, ok bool) {
	for _, label := range []string{"consolidate", "backup"} {
		var n uint64
		rest, found := strings.CutPrefix(id, label+"-")
		if !found {
			continue
		}
		if got, err := fmt.Sscanf(rest, "%d-%d-%d-%d", &p.pid, &p.beganAtTick, &p.namespace, &n); err == nil && got == 4 {
			return p, p.pid > 0
		}
	}
	return p, false
}

// findProcess finds a process of our namespace. The error is os.ErrNotExist when there
// is none.
func findProcess(pid int) (p process, err error) {
	p.pid = pid
	name, err := os.Readlink("/proc/self/ns/pid")
	if err != nil {
		return p, err
	}
	if _, err := fmt.Sscanf(name, "pid:[%d]", &p.namespace); err != nil {
		return p, fmt.Errorf("namespace %q: %w", name, err)
	}
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return p, err
	}
	// Field 22 of proc(5), the 20th behind the command's name, which may have blanks.
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	if len(fields) < 20 {
		return p, fmt.Errorf("/proc/%d/stat has %d fields", pid, len(fields))
	}
	if fields[0] == "Z" || fields[0] == "X" { // it has ended, and nobody has asked how
		return p, os.ErrNotExist
	}
	if _, err := fmt.Sscan(fields[19], &p.beganAtTick); err != nil {
		return p, fmt.Errorf("/proc/%d/stat: %w", pid, err)
	}
	return p, nil
}

// gone tells that a process of our namespace has ended. Of others that is not known.
func (p process) gone() bool {
	us, err := findProcess(os.Getpid())
	if err != nil || us.namespace != p.namespace {
		return false
	}
	now, err := findProcess(p.pid)
	return errors.Is(err, os.ErrNotExist) || err == nil && now.beganAtTick != p.beganAtTick
}

// takeBackJobs ends the jobs of commands that were killed, and tells whether there were
// some: what they have not completed is undone.
func takeBackJobs(ctx context.Context, c *client.Client) (left bool, err error) {
	var jobs []jobInfo
	if err := c.Execute(ctx, "query-jobs", nil, &jobs); err != nil {
		return false, err
	}
	for _, j := range jobs {
		p, ok := jobOf(j.ID)
		if !ok || !p.gone() {
			continue
		}
		left = true
		_ = endJob(ctx, c, j.ID) // it may have failed, or somebody else takes it back at the same time
		report("took back job %s, which a gnomon that was killed had left on the machine", j.ID)
	}
	return left, nil
}

// changingDisk is onDisk for what a job that was left would keep from the disk.
func changingDisk(do func(cmd *cobra.Command, c *client.Client, d *attachedDisk) error) func(*cobra.Command, []string) error {
	return onDisk(func(cmd *cobra.Command, c *client.Client, d *attachedDisk) error {
		left, err := takeBackJobs(context.WithoutCancel(cmd.Context()), c)
		if err == nil && left {
			d, err = d.again(cmd.Context(), c)
		}
		if err != nil {
			return err
		}
		return do(cmd, c, d)
	})
}
