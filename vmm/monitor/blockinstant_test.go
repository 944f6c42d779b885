package monitor_test

import (
	"bytes"
	"path/filepath"
	"strings"
	"testing"
)

// A disk as it was at an instant, and what changed before it, are served by what QEMU's
// backup programs use, while the disk is written.
func TestInstant(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	qemuImg(t, "create", "-q", "-f", "qcow2", at("disk.qcow2"), "8M")
	qemuImg(t, "create", "-q", "-f", "qcow2", at("scratch.qcow2"), "8M")
	qemuImg(t, "create", "-q", "-f", "qcow2", at("small.qcow2"), "4M")
	o := withDisks(t, "spin", at("disk.qcow2"))
	h := newHistory(t, o, 0)
	socket := filepath.Join(socketDir(t), "n")
	node := func(name, file, backing string) m {
		return m{"driver": "qcow2", "node-name": name, "file": m{"driver": "file", "filename": at(file)}, "backing": backing}
	}
	h.write(t, 30)
	if err := o.refuse(t, "blockdev-add", node("s", "small.qcow2", "#disk0")); !strings.Contains(err.Desc, "4194304 bytes, and the disk 8388608") {
		t.Error(err)
	}
	o.do(t, "blockdev-add", node("s", "scratch.qcow2", "#disk0"), nil)
	o.do(t, "blockdev-add", m{"driver": "qcow2", "node-name": "plain", "file": m{"driver": "file", "filename": at("small.qcow2")}}, nil)
	for text, args := range map[string]m{
		"'plain' is none":         {"job-id": "j", "device": "disk0", "target": "plain", "sync": "none"},
		"by blockdev-backup":      {"job-id": "j", "device": "disk0", "target": at("x.qcow2"), "sync": "none"},
		"Block node is read-only": {"job-id": "j", "device": "disk0", "target": "s", "sync": "full"},
	} {
		command := "blockdev-backup"
		if strings.HasSuffix(args["target"].(string), ".qcow2") {
			command = "drive-backup"
		}
		if err := o.refuse(t, command, args); !strings.Contains(err.Desc, text) {
			t.Errorf("%q, want %q", err.Desc, text)
		}
	}
	o.do(t, "block-dirty-bitmap-add", m{"node": "disk0", "name": "before"}, nil)
	h.write(t, 30)
	o.do(t, "transaction", m{"actions": []m{
		{"type": "block-dirty-bitmap-add", "data": m{"node": "disk0", "name": "changed", "disabled": true}},
		{"type": "block-dirty-bitmap-merge", "data": m{"node": "disk0", "target": "changed", "bitmaps": []string{"before"}}},
		{"type": "blockdev-backup", "data": m{"job-id": "instant", "device": "disk0", "target": "s", "sync": "none"}},
	}}, nil)
	then := bytes.Clone(h.model)
	h.write(t, 30)
	o.do(t, "nbd-server-start", m{"addr": m{"type": "unix", "data": m{"path": socket}}}, nil)
	add := m{"id": "pull", "type": "nbd", "node-name": "s", "name": "pull", "bitmaps": []any{m{"node": "#disk0", "name": "changed"}}}
	if err := o.refuse(t, "block-export-add", m{"id": "pull", "type": "nbd", "node-name": "s", "writable": true}); err.Desc != "Block node is read-only" {
		t.Error(err)
	}
	o.do(t, "block-export-add", add, nil)
	h.write(t, 30)
	uri := "nbd+unix:///pull?socket=" + socket
	qemuImg(t, "convert", "-f", "raw", "-O", "raw", uri, at("pulled"))
	imageHolds(t, at("pulled"), then)
	dirty := qemuImg(t, "map", "--output=json", "--image-opts", "driver=nbd,server.type=unix,server.path="+socket+",export=pull,x-dirty-bitmap=qemu:dirty-bitmap:changed")
	if !strings.Contains(dirty, `"data": false`) || !strings.Contains(dirty, `"data": true`) {
		t.Error(dirty)
	}
	if err := o.refuse(t, "blockdev-del", m{"node-name": "s"}); !strings.Contains(err.Desc, "busy") {
		t.Error(err)
	}

	// What is served after the instant's end is nothing.
	o.do(t, "block-job-cancel", m{"device": "instant"}, nil)
	o.job(t, "instant", "BLOCK_JOB_CANCELLED")
	if bytes.Equal(then, h.model) {
		t.Error("nothing was written")
	}
	o.do(t, "nbd-server-stop", nil, nil)
	o.do(t, "blockdev-del", m{"node-name": "s"}, nil)
	if err := o.refuse(t, "blockdev-add", node("s", "scratch.qcow2", "#disk0")); !strings.Contains(err.Desc, "not empty") {
		t.Error(err)
	}
	h.write(t, 30)
}
