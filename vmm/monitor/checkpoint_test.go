package monitor_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/gnomon-vmm/gnomon/qmp/client"
	"github.com/gnomon-vmm/gnomon/vmm"
	"github.com/gnomon-vmm/gnomon/vmm/snapshot"
)

// ended waits for a job's end, with its status then, and returns its error.
func (p peer) ended(t *testing.T, id, status string) string {
	t.Helper()
	for {
		e := p.next(t)
		if e.Event == "JOB_STATUS_CHANGE" && e.Data["id"] == id && e.Data["status"] == status {
			break
		}
	}
	var jobs []struct{ ID, Error string }
	p.do(t, "query-jobs", nil, &jobs)
	for _, j := range jobs {
		if j.ID == id {
			return j.Error
		}
	}
	return ""
}

// A save's job stays until it is dismissed, or, if that is asked for, until who
// started it has hung up.
func TestCheckpointOfWhoIsGone(t *testing.T) {
	o := start(t, "spin", nil)
	dir := t.TempDir()
	save := func(c *client.Client, id string, dismiss bool) {
		t.Helper()
		args := map[string]any{"job-id": id, "file": filepath.Join(dir, id), "dismiss-on-disconnect": dismiss}
		if err := c.Execute(t.Context(), "__org.gnomon_checkpoint", args, nil); err != nil {
			t.Fatal(err)
		}
	}
	for _, id := range []string{"left", "gone"} {
		other := dial(t, o.path, nil)
		save(other.Client, id, id == "gone")
		other.Close()
	}
	save(o.Client, "mine", true)
	var jobs []struct{ ID, Status, Error string }
	for concluded, gone := 0, false; concluded < 3 || !gone; {
		e := o.next(t)
		if e.Event != "JOB_STATUS_CHANGE" {
			continue
		}
		switch e.Data["status"] {
		case "concluded":
			concluded++
		case "null":
			if e.Data["id"] != "gone" {
				t.Errorf("job %s was dismissed", e.Data["id"])
			}
			gone = true
		}
	}
	o.do(t, "query-jobs", nil, &jobs)
	if len(jobs) != 2 || jobs[0].ID != "mine" || jobs[1].ID != "left" || jobs[0].Error != "" || jobs[1].Error != "" {
		t.Errorf("jobs are %+v", jobs)
	}
	o.do(t, "job-dismiss", map[string]any{"id": "mine"}, nil)
	o.do(t, "quit", nil, nil)
}

// A save that is cancelled after the pause tells in which image the machine goes on.
func TestCancelledCheckpoint(t *testing.T) {
	o := start(t, "fill size=40M; spin", func(c *vmm.Config) { c.Disks = []vmm.Disk{{Node: openImage(t, 1<<20)}} })
	o.serial.waitFor(t, "probe: fill")
	dir := t.TempDir()
	for i := 0; ; i++ {
		id, file := fmt.Sprint("save", i), filepath.Join(dir, fmt.Sprint(i))
		before := o.m.Disks()[0].Node.Info().Filename
		o.do(t, "__org.gnomon_checkpoint", map[string]any{"job-id": id, "file": file}, nil)
		for o.m.Disks()[0].Node.Info().Filename == before {
			runtime.Gosched()
		}
		_ = o.Execute(t.Context(), "job-cancel", map[string]any{"id": id}, nil) // it may be too late
		text := o.ended(t, id, "concluded")
		current := o.m.Disks()[0].Node.Info().Filename
		if _, err := os.Stat(file); err == nil {
			if text != "" && text != "Operation canceled: but "+file+" was complete by then" {
				t.Errorf("a save that is complete: %q", text)
			}
			continue
		}
		if want := "Operation canceled: the machine goes on in new overlays: disk disk0 in " + current; text != want {
			t.Errorf("%q, want %q", text, want)
		}
		break
	}
	o.do(t, "quit", nil, nil)
}

// A disk has a checkpoint or a block job, not both.
func TestCheckpointsAndBlockJobsExcludeEachOther(t *testing.T) {
	o := start(t, "spin", func(c *vmm.Config) { c.Disks = []vmm.Disk{{Node: openImage(t, 4<<20)}} })
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }

	backup := map[string]any{"job-id": "backup", "device": "disk0", "target": at("backup"), "format": "raw", "sync": "full", "speed": 1}
	o.do(t, "drive-backup", backup, nil)
	before := o.m.Disks()[0].Node.Info().Filename
	for _, job := range []struct {
		id, command string
		args        map[string]any
	}{
		{"save", "__org.gnomon_checkpoint", map[string]any{"file": at("c")}},
		{"copy", "__org.gnomon_checkpoint", map[string]any{"file": at("c"), "disks": "copy"}},
		{"snapshot", "snapshot-save", map[string]any{"tag": "a", "vmstate": "#disk0", "devices": []string{"#disk0"}}},
	} {
		job.args["job-id"] = job.id
		o.do(t, job.command, job.args, nil)
		if text := o.ended(t, job.id, "concluded"); !strings.Contains(text, "disk disk0") || !strings.Contains(text, "in use by") || !strings.Contains(text, "backup") || strings.Contains(text, "\n") {
			t.Errorf("%s during a backup: %q", job.id, text)
		}
		o.do(t, "job-dismiss", map[string]any{"id": job.id}, nil)
	}
	if got := o.m.Disks()[0].Node.Info().Filename; got != before {
		t.Errorf("the disk is %s, was %s", got, before)
	}
	o.do(t, "block-job-cancel", map[string]any{"device": "backup"}, nil)
	o.ended(t, "backup", "null")

	// A save that stands where it tells of its progress.
	reached, goOn, saved := make(chan struct{}), make(chan struct{}), make(chan error)
	go func() {
		told := false
		_, err := snapshot.NewSaver(o.m, nil, nil).Save(context.Background(), at("c"), snapshot.SaveOptions{Progress: func(int64, int64) {
			if !told {
				told = true
				close(reached)
				<-goOn
			}
		}})
		saved <- err
	}()
	<-reached
	for command, args := range map[string]map[string]any{
		"drive-backup":           backup,
		"drive-mirror":           {"job-id": "mirror", "device": "disk0", "target": at("mirror"), "sync": "full"},
		"block-commit":           {"job-id": "commit", "device": "disk0"},
		"blockdev-snapshot-sync": {"device": "disk0", "snapshot-file": at("overlay")},
		"block_resize":           {"device": "disk0", "size": 8 << 20},
	} {
		if e := o.refuse(t, command, args); !strings.Contains(e.Desc, "is busy") || !strings.Contains(e.Desc, "checkpoint") || strings.Contains(e.Desc, "\n") {
			t.Errorf("%s during a save: %v", command, e)
		}
	}
	close(goOn)
	if err := <-saved; err != nil {
		t.Error(err)
	}
	for _, name := range []string{"mirror", "overlay"} {
		if _, err := os.Stat(at(name)); err == nil {
			t.Errorf("%s was made", name)
		}
	}
	o.do(t, "quit", nil, nil)
}
