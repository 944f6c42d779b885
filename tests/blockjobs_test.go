package tests

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/gnomon-vmm/gnomon/qmp/client"
	"github.com/gnomon-vmm/gnomon/tests/guest/probe"
)

// blockJob is a job on a disk, by the events that QEMU's clients wait for.
type blockJob struct {
	p      *process
	events <-chan client.Event
}

// await returns the next event of the job id with one of the names.
func (j blockJob) await(ctx context.Context, t *testing.T, id string, names ...string) client.Event {
	t.Helper()
	for {
		select {
		case e, ok := <-j.events:
			if !ok {
				t.Fatalf("the machine ended: %v\n%s", j.p.err, &j.p.log)
			}
			for _, name := range names {
				if e.Event == name && e.Data["device"] == id {
					return e
				}
			}
		case <-ctx.Done():
			t.Fatalf("waiting for %v: %v", names, ctx.Err())
		}
	}
}

// completed waits for a job's end, which must be a good one.
func (j blockJob) completed(ctx context.Context, t *testing.T, id string) {
	t.Helper()
	e := j.await(ctx, t, id, "BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED")
	if e.Event != "BLOCK_JOB_COMPLETED" || e.Data["error"] != nil || e.Data["offset"] != e.Data["len"] {
		t.Fatalf("%+v", e)
	}
}

// A guest writes its disk and finds what it wrote, while snapshots of it are taken
// and deleted, it is backed up, and moved.
func TestBlockJobs(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	kernel, err := probe.Path()
	if err != nil {
		t.Fatal(err)
	}
	for _, format := range []string{"raw", "qcow2"} {
		t.Run(format, func(t *testing.T) {
			dir := t.TempDir()
			at := func(name string) string { return filepath.Join(dir, name) }
			img := at("disk." + format)
			qemuImg(ctx, t, "create", "-q", "-f", format, img, "32M")
			const words = "blk op=randwrite bs=4k qd=4 count=400000 seed=5 order=1; wait for=test; blk op=randread bs=4k qd=4 count=16384 seed=5 order=1 verify=1"
			p, serial := launch(t, "--kernel", kernel, "--append", words, "--memory", "64M", "--net", "none", "--disk", "file="+img)
			p.connect(ctx, t)
			j := blockJob{p, p.qmp.Subscribe(ctx)}
			file := func() string {
				var nodes []struct{ File string }
				p.do(ctx, t, "query-named-block-nodes", map[string]any{"flat": true}, &nodes)
				return nodes[0].File
			}
			snapshot := func(name string) {
				t.Helper()
				p.do(ctx, t, "blockdev-snapshot-sync", map[string]any{"device": "disk0", "snapshot-file": at(name), "format": "qcow2"}, nil)
				if file() != at(name) {
					t.Fatalf("the disk is %s", file())
				}
			}

			snapshot("one.qcow2")
			p.do(ctx, t, "drive-backup", map[string]any{"job-id": "full", "device": "disk0", "target": at("full.qcow2"), "format": "qcow2", "sync": "full", "speed": 1}, nil)
			if err := p.qmp.Execute(ctx, "block-commit", map[string]any{"device": "disk0"}, nil); err == nil || !strings.Contains(err.Error(), "is busy: block device is in use by block job: backup") {
				t.Errorf("a second job: %v", err)
			}
			p.do(ctx, t, "block-job-set-speed", map[string]any{"device": "full", "speed": 0}, nil)
			j.completed(ctx, t, "full")
			p.do(ctx, t, "drive-backup", map[string]any{"job-id": "top", "device": "disk0", "target": at("top.qcow2"), "format": "qcow2", "sync": "top"}, nil)
			j.completed(ctx, t, "top")
			snapshot("two.qcow2")

			// All of the chain goes into the base, while it is written.
			p.do(ctx, t, "block-commit", map[string]any{"device": "disk0"}, nil)
			j.await(ctx, t, "disk0", "BLOCK_JOB_READY")
			var jobs []struct {
				Type  string `json:"type"`
				Ready bool   `json:"ready"`
			}
			p.do(ctx, t, "query-block-jobs", nil, &jobs)
			if len(jobs) != 1 || jobs[0].Type != "commit" || !jobs[0].Ready {
				t.Errorf("jobs: %+v", jobs)
			}
			p.do(ctx, t, "block-job-complete", map[string]any{"device": "disk0"}, nil)
			j.completed(ctx, t, "disk0")
			if file() != img {
				t.Fatalf("the disk is %s", file())
			}

			// One that is cancelled leaves the overlay in use; so does one that is slow and killed.
			snapshot("three.qcow2")
			p.do(ctx, t, "block-commit", map[string]any{"job-id": "slow", "device": "disk0", "speed": 1}, nil)
			p.do(ctx, t, "block-job-cancel", map[string]any{"device": "slow", "force": true}, nil)
			j.await(ctx, t, "slow", "BLOCK_JOB_CANCELLED")
			if file() != at("three.qcow2") {
				t.Fatalf("the disk is %s", file())
			}

			p.do(ctx, t, "drive-mirror", map[string]any{"job-id": "move", "device": "disk0", "target": at("moved.qcow2"), "format": "qcow2", "sync": "full"}, nil)
			j.await(ctx, t, "move", "BLOCK_JOB_READY")
			p.do(ctx, t, "job-complete", map[string]any{"id": "move"}, nil)
			j.completed(ctx, t, "move")
			if file() != at("moved.qcow2") {
				t.Fatalf("the disk is %s", file())
			}
			// What changed since a backup, and only that, goes into an overlay of it.
			p.do(ctx, t, "stop", nil, nil)
			p.do(ctx, t, "block-dirty-bitmap-add", map[string]any{"node": "disk0", "name": "changes"}, nil)
			p.do(ctx, t, "drive-backup", map[string]any{"job-id": "zero", "device": "disk0", "target": at("inc0.qcow2"), "format": "qcow2", "sync": "full"}, nil)
			j.completed(ctx, t, "zero")
			p.do(ctx, t, "cont", nil, nil)
			for i := 1; i <= 3; i++ {
				name, base := fmt.Sprintf("inc%d.qcow2", i), fmt.Sprintf("inc%d.qcow2", i-1)
				qemuImg(ctx, t, "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", at(name))
				p.do(ctx, t, "stop", nil, nil)
				p.do(ctx, t, "drive-backup", map[string]any{
					"job-id": name, "device": "disk0", "target": at(name), "format": "qcow2", "sync": "incremental", "bitmap": "changes", "mode": "existing",
				}, nil)
				j.completed(ctx, t, name)
				p.do(ctx, t, "drive-backup", map[string]any{"job-id": "whole", "device": "disk0", "target": at("whole.qcow2"), "format": "qcow2", "sync": "full"}, nil)
				j.completed(ctx, t, "whole")
				p.do(ctx, t, "cont", nil, nil)
				qemuImg(ctx, t, "compare", at(name), at("whole.qcow2"))
				if err := os.Remove(at("whole.qcow2")); err != nil {
					t.Fatal(err)
				}
			}

			// A mirror that is cancelled when it is ready is a copy.
			p.do(ctx, t, "drive-mirror", map[string]any{"job-id": "copy", "device": "disk0", "target": at("copy.img"), "format": "raw", "sync": "full"}, nil)
			j.await(ctx, t, "copy", "BLOCK_JOB_READY")
			verified(t, serial)
			p.status(ctx, t)

			for _, name := range []string{"one.qcow2", "two.qcow2", "three.qcow2", "full.qcow2", "top.qcow2", "moved.qcow2"} {
				if out := qemuImg(ctx, t, "check", at(name)); !strings.Contains(out, "No errors were found") {
					t.Errorf("%s: %s", name, out)
				}
			}
			p, serial = launch(t, "--kernel", kernel, "--append", words[strings.Index(words, ";")+1:], "--memory", "64M", "--net", "none", "--disk", "file="+at("moved.qcow2"))
			verified(t, serial)
			if status := p.status(ctx, t); status != 0 {
				t.Error(fmt.Sprint("status ", status))
			}
		})
	}
}
