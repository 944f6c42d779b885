package monitor_test

import (
	"fmt"
	"os"
	"os/exec"
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

// withoutPrivilege runs a test again in a process that permissions of files hold for,
// and tells whether this is that process.
func withoutPrivilege(t *testing.T) bool {
	t.Helper()
	const mark = "GNOMON_TEST_WITHOUT_PRIVILEGE"
	if os.Geteuid() != 0 || os.Getenv(mark) != "" {
		return true
	}
	setpriv, err := exec.LookPath("setpriv")
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), setpriv, "--bounding-set=-dac_override,-dac_read_search", os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), mark+"=1")
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "--- PASS: "+t.Name()) {
		t.Errorf("%v\n%s", err, out)
	}
	return false
}

// A commit that fails when the disk is in the base already leaves the nodes their
// names: the base's is that of the disk, the overlay's leads nowhere.
func TestBlockCommitFailsInBase(t *testing.T) {
	if !withoutPrivilege(t) {
		return
	}
	dir, closed := t.TempDir(), t.TempDir()
	base, overlay := filepath.Join(dir, "base.qcow2"), filepath.Join(closed, "overlay.qcow2")
	qemuImg(t, "create", "-q", "-f", "qcow2", base, "8M")
	o := start(t, "spin", nil)
	o.do(t, "blockdev-add", m{"driver": "qcow2", "node-name": "b", "file": m{"driver": "file", "filename": base}}, nil)
	o.do(t, "device_add", m{"driver": "virtio-blk-pci", "id": "d", "drive": "b"}, nil)
	h := newHistory(t, o, 0)
	h.write(t, 50)
	o.do(t, "blockdev-snapshot-sync", m{"device": "d", "snapshot-file": overlay, "snapshot-node-name": "o"}, nil)
	h.write(t, 50)
	o.do(t, "block-commit", m{"device": "d"}, nil)
	o.job(t, "d", "BLOCK_JOB_READY")
	// Files can be made and renamed there, but what was renamed cannot be made durable.
	if err := os.Chmod(closed, 0o300); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Chmod(closed, 0o700) })
	o.do(t, "block-job-complete", m{"device": "d"}, nil)
	if e := o.job(t, "d", "BLOCK_JOB_COMPLETED"); e.Data["error"] == nil {
		t.Errorf("the job ended well: %v", e.Data)
	}
	o.null(t, "d")
	for range 10 { // of two names for one node either may be told
		wantNodes(t, o.peer, map[string]string{"b": "qcow2 base.qcow2"})
	}
	h.write(t, 50)
	h.check(t)
	// The names can be used.
	o.do(t, "blockdev-snapshot-sync", m{"node-name": "b", "snapshot-file": filepath.Join(dir, "next.qcow2"), "snapshot-node-name": "o"}, nil)
	wantNodes(t, o.peer, map[string]string{"o": "qcow2 next.qcow2 on base.qcow2", "b": "qcow2 base.qcow2 ro"})
	h.check(t)
}
