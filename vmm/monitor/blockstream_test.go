package monitor_test

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/qcow2"
)

func TestBlockStream(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	qemuImg(t, "create", "-q", "-f", "raw", at("0.img"), "8M")
	o := withDisks(t, "spin", at("0.img"))
	h := newHistory(t, o, 0)
	h.write(t, 50)
	if err := o.refuse(t, "block-stream", m{"device": "disk0"}); !strings.Contains(err.Desc, "no backing file") {
		t.Error(err)
	}
	for i := 1; i <= 4; i++ {
		o.do(t, "blockdev-snapshot-sync", m{"device": "disk0", "snapshot-file": at(fmt.Sprintf("%d.qcow2", i)), "snapshot-node-name": fmt.Sprintf("n%d", i)}, nil)
		h.write(t, 50)
	}
	for text, args := range map[string]m{
		"nothing lies between":          {"device": "disk0", "base-node": "n3"},
		"Can't find 'x' in the backing": {"device": "disk0", "base": "x"},
		"streaming the entire chain":    {"device": "disk0", "backing-file": "x"},
	} {
		if err := o.refuse(t, "block-stream", args); !strings.Contains(err.Desc, text) {
			t.Errorf("%v: %q", args, err.Desc)
		}
	}
	// One that is cancelled leaves the chain.
	o.do(t, "block-stream", m{"job-id": "slow", "device": "disk0", "speed": 1}, nil)
	if err := o.refuse(t, "block-commit", m{"device": "disk0"}); !strings.Contains(err.Desc, "block device is in use by block job: stream") {
		t.Error(err)
	}
	o.do(t, "block-job-cancel", m{"device": "slow"}, nil)
	o.job(t, "slow", "BLOCK_JOB_CANCELLED")
	o.null(t, "slow")
	if n := len(o.nodes(t)); n != 5 {
		t.Errorf("%d nodes", n)
	}
	h.check(t)

	h.start(t)
	o.do(t, "block-stream", m{"device": "disk0", "base-node": "n2"}, nil)
	o.completed(t, "disk0")
	h.finish()
	wantNodes(t, o.peer, map[string]string{"n4": "qcow2 4.qcow2 on 2.qcow2", "n2": "qcow2 2.qcow2 ro on 1.qcow2", "n1": "qcow2 1.qcow2 ro on 0.img", "#disk0-backing3": "raw 0.img ro"})
	openDisk(t, at("3.qcow2")).Close() // nobody has it
	h.check(t)
	h.start(t)
	o.do(t, "block-stream", m{"device": "disk0"}, nil)
	o.completed(t, "disk0")
	h.finish()
	wantNodes(t, o.peer, map[string]string{"n4": "qcow2 4.qcow2"})
	h.write(t, 50)
	h.check(t)
	o.do(t, "quit", nil, nil)
	<-o.done
	o.m.Close()
	h.holds(t, at("4.qcow2"))
	if info := qemuImg(t, "info", at("4.qcow2")); strings.Contains(info, "backing") {
		t.Error(info)
	}
}

// unreadable fails reads while it is on.
type unreadable struct {
	block.Node
	on atomic.Bool
}

var errUnreadable = errors.New("bad sector")

func (u *unreadable) Readv(bufs [][]byte, off int64) error {
	if u.on.Load() {
		return errUnreadable
	}
	return u.Node.Readv(bufs, off)
}

func TestStreamErrors(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	qemuImg(t, "create", "-q", "-f", "qcow2", at("0.qcow2"), "8M")
	qemuImg(t, "create", "-q", "-f", "qcow2", "-b", "0.qcow2", "-F", "qcow2", at("1.qcow2"))
	o := withDisks(t, "spin", at("1.qcow2"))
	bad := &unreadable{}
	bad.on.Store(true)
	o.m.Disks()[0].Root.Drained(func(current block.Node) block.Node {
		top := current.(*qcow2.Node)
		bad.Node = top.Backing()
		top.SetBacking(bad)
		return current
	})
	stream := func(id, policy string) {
		o.do(t, "block-stream", m{"job-id": id, "device": "disk0", "on-error": policy}, nil)
	}
	failed := func(id, action string) {
		t.Helper()
		e := o.job(t, id, "BLOCK_JOB_ERROR")
		if e.Data["operation"] != "read" || e.Data["action"] != action {
			t.Errorf("%v", e.Data)
		}
	}
	for _, c := range [][2]string{{"report", "report"}, {"enospc", "report"}, {"ignore", "ignore"}} {
		stream("j", c[0])
		failed("j", c[1])
		if e := o.job(t, "j", "BLOCK_JOB_COMPLETED"); !strings.Contains(fmt.Sprint(e.Data["error"]), "bad sector") {
			t.Errorf("%v", e.Data)
		}
		o.null(t, "j")
	}
	stream("j", "stop")
	failed("j", "stop")
	for o.job(t, "j", "JOB_STATUS_CHANGE").Data["status"] != "paused" {
	}
	var jobs []struct {
		IOStatus string `json:"io-status"`
		Paused   bool
	}
	o.do(t, "query-block-jobs", nil, &jobs)
	if len(jobs) != 1 || jobs[0].IOStatus != "failed" || !jobs[0].Paused {
		t.Errorf("%+v", jobs)
	}
	bad.on.Store(false)
	o.do(t, "block-job-resume", m{"device": "j"}, nil)
	o.completed(t, "j")
	wantNodes(t, o.peer, map[string]string{"#disk0": "qcow2 1.qcow2"})
}
