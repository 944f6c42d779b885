package monitor_test

import (
	"net"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/gnomon-vmm/gnomon/disk/nbd"
)

func TestExports(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	qemuImg(t, "create", "-q", "-f", "qcow2", at("disk.qcow2"), "8M")
	qemuImg(t, "create", "-q", "-f", "qcow2", at("node.qcow2"), "8M")
	o := withDisks(t, "spin", at("disk.qcow2"))
	h := newHistory(t, o, 0)
	socket := filepath.Join(socketDir(t), "n")
	for text, args := range map[string]m{
		"NBD server not running":  {"id": "x", "type": "nbd", "node-name": "disk0"},
		"Invalid block export id": {"id": "1", "type": "nbd", "node-name": "disk0"},
	} {
		if err := o.refuse(t, "block-export-add", args); err.Desc != text {
			t.Errorf("%q, want %q", err.Desc, text)
		}
	}
	o.refuse(t, "nbd-server-start", m{"addr": m{"type": "inet", "data": m{"host": "192.0.2.1", "port": "10809"}}})
	o.do(t, "nbd-server-start", m{"addr": m{"type": "unix", "data": m{"path": socket}}}, nil)
	if err := o.refuse(t, "nbd-server-start", m{"addr": m{"type": "unix", "data": m{"path": socket + "2"}}}); err.Desc != "NBD server already running" {
		t.Error(err)
	}
	o.do(t, "block-dirty-bitmap-add", m{"node": "disk0", "name": "b"}, nil)
	h.write(t, 50)
	add := m{"device": "disk0", "name": "guest", "bitmap": "b"}
	if err := o.refuse(t, "nbd-server-add", add); err.Desc != "Enabled bitmap 'b' incompatible with readonly export" {
		t.Error(err)
	}
	o.do(t, "block-dirty-bitmap-disable", m{"node": "disk0", "name": "b"}, nil)
	o.do(t, "nbd-server-add", add, nil)
	if err := o.refuse(t, "block-dirty-bitmap-remove", m{"node": "disk0", "name": "b"}); !strings.Contains(err.Desc, "currently in use") {
		t.Error(err)
	}
	o.do(t, "blockdev-add", m{"driver": "qcow2", "node-name": "n", "file": m{"driver": "file", "filename": at("node.qcow2")}}, nil)
	o.do(t, "block-export-add", m{"id": "e", "type": "nbd", "node-name": "n", "name": "node", "writable": true}, nil)
	for text, args := range map[string]m{
		"Block export id 'e' is already in use":          {"id": "e", "type": "nbd", "node-name": "disk0"},
		"NBD server already has export named 'node'":     {"id": "f", "type": "nbd", "node-name": "disk0", "name": "node"},
		"is written by the guest":                        {"id": "f", "type": "nbd", "node-name": "disk0", "writable": true},
		"Node 'n' is busy":                               {"id": "f", "type": "nbd", "node-name": "n", "name": "n2"},
		"Failed to find node with node-name='no'":        {"id": "f", "type": "nbd", "node-name": "no"},
		"Dirty bitmap 'no' not found":                    {"id": "f", "type": "nbd", "node-name": "disk0", "bitmaps": []string{"no"}},
		"Parameter 'type' does not accept value 'vduse'": {"id": "f", "type": "vduse", "node-name": "disk0"},
	} {
		if err := o.refuse(t, "block-export-add", args); !strings.Contains(err.Desc, text) {
			t.Errorf("%q, want %q", err.Desc, text)
		}
	}
	for command, args := range map[string]m{"blockdev-del": {"node-name": "n"}, "block_resize": {"device": "disk0", "size": 16 << 20}} {
		if err := o.refuse(t, command, args); !strings.Contains(err.Desc, "busy") {
			t.Error(command, err)
		}
	}
	var list []struct {
		ID, Type string
		Node     string `json:"node-name"`
	}
	o.do(t, "query-block-exports", nil, &list)
	if len(list) != 2 || list[0].ID != "guest" || list[0].Node != "#disk0" || list[1].ID != "e" || list[1].Type != "nbd" || list[1].Node != "n" {
		t.Errorf("%+v", list)
	}

	// QEMU's tools read and write them.
	uri := func(name string) string { return "nbd+unix:///" + name + "?socket=" + socket }
	model := filepath.Join(t.TempDir(), "model")
	qemuImg(t, "convert", "-f", "raw", "-O", "raw", uri("guest"), model)
	imageHolds(t, model, h.model)
	if out, err := exec.Command("qemu-io", "-f", "raw", "-c", "write -P 7 1M 1M", uri("node")).CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
	if out, _ := exec.Command("qemu-io", "-f", "raw", "-c", "write 0 512", uri("guest")).CombinedOutput(); !strings.Contains(string(out), "Permission denied") {
		t.Errorf("a write to what the guest writes: %s", out)
	}
	dirty := qemuImg(t, "map", "--output=json", "--image-opts", "driver=nbd,server.type=unix,server.path="+socket+",export=guest,x-dirty-bitmap=qemu:dirty-bitmap:b")
	if !strings.Contains(dirty, `"data": false`) { // how qemu-img shows what is dirty
		t.Error(dirty)
	}

	// One that has clients goes only hard.
	c, err := nbd.Dial(t.Context(), "unix:"+socket, "guest", nbd.ClientOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	drainEvents(o.peer)
	if err := o.refuse(t, "block-export-del", m{"id": "guest"}); err.Desc != "export 'guest' still in use" {
		t.Error(err)
	}
	o.do(t, "nbd-server-remove", m{"name": "guest", "mode": "hard"}, nil)
	if e := o.event(t, "BLOCK_EXPORT_DELETED"); e.Data["id"] != "guest" {
		t.Errorf("%v", e.Data)
	}
	if err := o.refuse(t, "block-export-del", m{"id": "guest"}); err.Desc != "Export 'guest' is not found" {
		t.Error(err)
	}
	o.do(t, "block-dirty-bitmap-remove", m{"node": "disk0", "name": "b"}, nil)
	o.do(t, "nbd-server-stop", nil, nil)
	if e := o.event(t, "BLOCK_EXPORT_DELETED"); e.Data["id"] != "e" {
		t.Errorf("%v", e.Data)
	}
	if err := o.refuse(t, "nbd-server-stop", nil); err.Desc != "NBD server not running" {
		t.Error(err)
	}
	o.do(t, "blockdev-del", m{"node-name": "n"}, nil)
	clean(t, at("node.qcow2"))

	// By TCP on this host; the machine's end ends it.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_, port, _ := net.SplitHostPort(l.Addr().String())
	l.Close()
	o.do(t, "nbd-server-start", m{"addr": m{"type": "inet", "data": m{"host": "127.0.0.1", "port": port}}, "max-connections": 2}, nil)
	o.do(t, "block-export-add", m{"id": "d", "type": "nbd", "node-name": "#disk0"}, nil)
	qemuImg(t, "convert", "-f", "raw", "-O", "raw", "nbd://127.0.0.1:"+port+"/%23disk0", model)
	imageHolds(t, model, h.model)
	o.do(t, "quit", nil, nil)
	<-o.done
	if err := o.m.Close(); err != nil {
		t.Error(err)
	}
	if _, err := net.Dial("tcp", "127.0.0.1:"+port); err == nil {
		t.Error("there is a server still")
	}
}
