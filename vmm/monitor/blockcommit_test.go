package monitor_test

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"
)

// Images in the middle of a chain go while the disk is written: below the disk's own
// image, and further down.
func TestBlockCommitMiddle(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	qemuImg(t, "create", "-q", "-f", "qcow2", at("0.qcow2"), "8M")
	o := withDisks(t, "spin", at("0.qcow2"))
	h := newHistory(t, o, 0)
	h.write(t, 50)
	for i := 1; i <= 6; i++ {
		o.do(t, "blockdev-snapshot-sync", m{"device": "disk0", "snapshot-file": at(fmt.Sprintf("%d.qcow2", i)), "snapshot-node-name": fmt.Sprintf("n%d", i)}, nil)
		h.write(t, 50)
	}
	for text, args := range map[string]m{
		"cannot commit an image into itself":  {"top-node": "n3", "base-node": "n3"},
		"does not lie behind":                 {"top-node": "n3", "base-node": "n4"},
		"Can't find 'x' in the backing":       {"top": "x"},
		"'base-node' and 'base' are mutually": {"base-node": "n3", "base": "x"},
		"'top-node' and 'top' are mutually":   {"top-node": "n3", "top": "x"},
		"but 'top' is the active layer":       {"backing-file": "x"},
		"node-name='n9'":                      {"top-node": "n9"},
	} {
		args["device"] = "disk0"
		if err := o.refuse(t, "block-commit", args); !strings.Contains(err.Desc, text) {
			t.Errorf("%v: %q", args, err.Desc)
		}
	}
	all := map[string]string{
		"n6": "qcow2 6.qcow2 on 5.qcow2", "n5": "qcow2 5.qcow2 ro on 4.qcow2", "n4": "qcow2 4.qcow2 ro on 3.qcow2",
		"n3": "qcow2 3.qcow2 ro on 2.qcow2", "n2": "qcow2 2.qcow2 ro on 1.qcow2", "n1": "qcow2 1.qcow2 ro on 0.qcow2", "#disk0-backing6": "qcow2 0.qcow2 ro",
	}
	// One that is cancelled leaves the chain.
	o.do(t, "block-commit", m{"job-id": "slow", "device": "disk0", "top-node": "n4", "base-node": "n2", "speed": 1}, nil)
	if err := o.refuse(t, "block-stream", m{"device": "disk0"}); !strings.Contains(err.Desc, "block device is in use by block job: commit") {
		t.Error(err)
	}
	o.do(t, "block-job-cancel", m{"device": "slow"}, nil)
	o.job(t, "slow", "BLOCK_JOB_CANCELLED")
	o.null(t, "slow")
	wantNodes(t, o.peer, all)
	h.check(t)

	// What lies on the images that go is the disk's own image, then another one.
	h.start(t)
	o.do(t, "block-commit", m{"device": "disk0", "top-node": "n5", "base": at("3.qcow2")}, nil)
	o.completed(t, "disk0")
	all["n6"] = "qcow2 6.qcow2 on 3.qcow2"
	delete(all, "n5")
	delete(all, "n4")
	all["#disk0-backing4"] = all["#disk0-backing6"]
	delete(all, "#disk0-backing6")
	wantNodes(t, o.peer, all)
	openDisk(t, at("5.qcow2")).Close() // nobody has it
	o.do(t, "block-commit", m{"device": "disk0", "top-node": "n2", "base-node": "n1", "backing-file": "1.qcow2"}, nil)
	o.completed(t, "disk0")
	h.finish()
	all["n3"] = "qcow2 3.qcow2 ro on 1.qcow2"
	delete(all, "n2")
	all["#disk0-backing3"] = all["#disk0-backing4"]
	delete(all, "#disk0-backing4")
	wantNodes(t, o.peer, all)
	h.check(t)

	// The disk's own image does not go: QEMU calls this a commit of its backing file.
	h.start(t)
	o.do(t, "block-commit", m{"device": "disk0", "top": at("3.qcow2")}, nil)
	o.completed(t, "disk0")
	h.finish()
	wantNodes(t, o.peer, map[string]string{"n6": "qcow2 6.qcow2 on 0.qcow2", "#disk0-backing1": "qcow2 0.qcow2 ro"})
	h.write(t, 50)
	h.check(t)
	o.do(t, "quit", nil, nil)
	<-o.done
	o.m.Close()
	h.holds(t, at("6.qcow2"))
	clean(t, at("0.qcow2"))
}
