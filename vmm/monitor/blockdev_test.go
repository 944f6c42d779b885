package monitor_test

import (
	"fmt"
	"net"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/gnomon-vmm/gnomon/disk"
	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/nbd"
	"github.com/gnomon-vmm/gnomon/vmm"
)

// qemuImg runs qemu-img, which must succeed.
func qemuImg(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "qemu-img", args...).CombinedOutput()
	if err != nil {
		t.Fatalf("qemu-img %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// clean checks an image with qemu-img.
func clean(t *testing.T, path string) {
	t.Helper()
	if out := qemuImg(t, "check", path); !strings.Contains(out, "No errors were found") {
		t.Errorf("%s: %s", path, out)
	}
}

// withDisks is a machine whose guest spins, with the given images for disks.
func withDisks(t *testing.T, guest string, images ...string) *ours {
	t.Helper()
	return start(t, guest, func(c *vmm.Config) {
		for _, path := range images {
			c.Disks = append(c.Disks, vmm.Disk{Node: openDisk(t, path)})
		}
	})
}

func openDisk(t *testing.T, path string) block.Node {
	t.Helper()
	n, err := disk.Open(path, disk.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

type m = map[string]any

// nodes are the nodes by name, as "driver file ro".
func (p peer) nodes(t *testing.T) map[string]string {
	t.Helper()
	var list []struct {
		NodeName string `json:"node-name"`
		Drv      string
		File     string
		RO       bool
		Backing  string `json:"backing_file"`
	}
	p.do(t, "query-named-block-nodes", m{"flat": true}, &list)
	all := map[string]string{}
	for _, n := range list {
		text := n.Drv + " " + filepath.Base(n.File)
		if n.RO {
			text += " ro"
		}
		if n.Backing != "" {
			text += " on " + filepath.Base(n.Backing)
		}
		all[n.NodeName] = text
	}
	return all
}

func wantNodes(t *testing.T, p peer, want map[string]string) {
	t.Helper()
	got := p.nodes(t)
	for name, text := range want {
		if got[name] != text {
			t.Errorf("node %s is %q, want %q", name, got[name], text)
		}
	}
	if len(got) != len(want) {
		t.Errorf("nodes %v, want %v", got, want)
	}
}

func TestBlockdevAddAndDelete(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	qemuImg(t, "create", "-q", "-f", "raw", at("disk.img"), "1M")
	qemuImg(t, "create", "-q", "-f", "raw", at("a.img"), "1M")
	qemuImg(t, "create", "-q", "-f", "raw", at("b.img"), "1M")
	qemuImg(t, "create", "-q", "-f", "qcow2", at("base.qcow2"), "1M")
	qemuImg(t, "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", at("top.qcow2"))
	o := withDisks(t, "spin", at("disk.img"))
	disk0 := map[string]string{"#disk0": "raw disk.img"}

	o.do(t, "blockdev-add", m{"driver": "file", "node-name": "f0", "filename": at("a.img")}, nil)
	if _, err := disk.Open(at("a.img"), disk.Options{}); err == nil {
		t.Error("the file of a node can be opened by others")
	}
	o.do(t, "blockdev-add", m{"driver": "raw", "node-name": "r0", "file": "f0"}, nil)
	o.do(t, "blockdev-add", m{"driver": "file", "node-name": "f1", "filename": at("top.qcow2")}, nil)
	o.do(t, "blockdev-add", m{"driver": "qcow2", "node-name": "q1", "file": "f1", "backing": m{
		"driver": "qcow2", "node-name": "b1", "file": m{"driver": "file", "node-name": "f2", "filename": at("base.qcow2")},
	}}, nil)
	o.do(t, "blockdev-add", m{"driver": "null-co", "node-name": "n0", "size": 4096}, nil)
	wantNodes(t, o.peer, map[string]string{
		"#disk0": "raw disk.img", "f0": "file a.img", "r0": "raw a.img", "f1": "file top.qcow2", "q1": "qcow2 top.qcow2 on base.qcow2",
		"b1": "qcow2 base.qcow2 ro", "f2": "file base.qcow2 ro", "n0": "null-co null-co:",
	})
	for _, refusal := range []struct {
		command, text string
		args          m
	}{
		{"blockdev-add", "'node-name' must be specified for the root node", m{"driver": "null-co"}},
		{"blockdev-add", "Duplicate nodes with node-name='r0'", m{"driver": "null-co", "node-name": "r0"}},
		{"blockdev-add", "Invalid node-name: '1x'", m{"driver": "null-co", "node-name": "1x"}},
		{"blockdev-add", "Invalid node-name: '#x'", m{"driver": "null-co", "node-name": "#x"}},
		{"blockdev-add", "node-name=disk0 is conflicting with a device id", m{"driver": "null-co", "node-name": "disk0"}},
		{"blockdev-add", "Node name too long", m{"driver": "null-co", "node-name": strings.Repeat("n", 32)}},
		{"blockdev-add", "Parameter 'filename' is missing", m{"driver": "file", "node-name": "x"}},
		{"blockdev-add", "Parameter 'driver' does not accept value 'vhdx'", m{"driver": "vhdx", "node-name": "x"}},
		{"blockdev-add", "Block device f0 is in use", m{"driver": "raw", "node-name": "x", "file": "f0"}},
		{"blockdev-add", "Cannot find device='no' nor node-name='no'", m{"driver": "raw", "node-name": "x", "file": "no"}},
		{"blockdev-add", "Cannot find device='#disk0' nor node-name='#disk0'", m{"driver": "raw", "node-name": "x", "file": "#disk0"}},
		{"blockdev-add", "is in use by another process", m{"driver": "file", "node-name": "x", "filename": at("disk.img")}},
		{"blockdev-add", "in a file here", m{"driver": "qcow2", "node-name": "x", "file": "n0"}},
		{"blockdev-add", "bad qcow2 header", m{"driver": "qcow2", "node-name": "x", "file": m{"driver": "file", "filename": at("b.img")}}},
		{"blockdev-del", "Failed to find node with node-name='no'", m{"node-name": "no"}},
		{"blockdev-del", "Block device f0 is in use", m{"node-name": "f0"}},
		{"blockdev-del", "Block device b1 is in use", m{"node-name": "b1"}},
		{"blockdev-del", "Failed to find node with node-name='#disk0'", m{"node-name": "#disk0"}},
	} {
		if got := o.refuse(t, refusal.command, refusal.args); !strings.Contains(got.Desc, refusal.text) {
			t.Errorf("%s %v: %q, want %q", refusal.command, refusal.args, got.Desc, refusal.text)
		}
	}
	if n := len(o.nodes(t)); n != 8 {
		t.Errorf("refused commands left %d nodes: %v", n, o.nodes(t))
	}
	for _, name := range []string{"r0", "f0", "q1", "n0"} {
		o.do(t, "blockdev-del", m{"node-name": name}, nil)
	}
	// The file is a node again.
	wantNodes(t, o.peer, map[string]string{"#disk0": "raw disk.img", "f1": "file top.qcow2"})
	o.do(t, "blockdev-del", m{"node-name": "f1"}, nil)
	wantNodes(t, o.peer, disk0)
	for _, name := range []string{"a.img", "b.img", "top.qcow2", "base.qcow2"} {
		openDisk(t, at(name)).Close() // nobody has it
	}
	for i := 0; ; i++ {
		err := o.Execute(t.Context(), "blockdev-add", m{"driver": "null-co", "node-name": fmt.Sprint("n", i)}, nil)
		if err != nil {
			if i != 256 || !strings.Contains(err.Error(), "256 nodes") {
				t.Errorf("after %d nodes: %v", i, err)
			}
			break
		}
	}
}

// A node over NBD, and what is wrong with servers.
func TestBlockdevNBD(t *testing.T) {
	path := filepath.Join(socketDir(t), "n")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	s := nbd.NewServer(nbd.ServerOptions{})
	if err := s.Add(nbd.Export{Name: "x", Node: openImage(t, 1<<20)}); err != nil {
		t.Fatal(err)
	}
	go s.Serve(l)
	t.Cleanup(func() { s.Close() })
	o := start(t, "spin", nil)
	server := m{"type": "unix", "path": path}
	o.do(t, "blockdev-add", m{"driver": "raw", "node-name": "r", "read-only": true, "file": m{"driver": "nbd", "node-name": "n", "server": server, "export": "x"}}, nil)
	if nodes := o.nodes(t); len(nodes) != 2 || !strings.HasPrefix(nodes["r"], "raw x?socket=") || !strings.HasPrefix(nodes["n"], "nbd x?socket=") {
		t.Errorf("nodes %v", nodes)
	}
	o.refuse(t, "blockdev-add", m{"driver": "nbd", "node-name": "y", "server": server, "export": "y"})
	o.refuse(t, "blockdev-add", m{"driver": "nbd", "node-name": "y", "server": m{"type": "inet", "host": "192.0.2.1", "port": "10809"}})
	o.do(t, "blockdev-del", m{"node-name": "r"}, nil)
	wantNodes(t, o.peer, map[string]string{})
}

func TestBlockdevReopen(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	for _, name := range []string{"a", "b", "top"} {
		qemuImg(t, "create", "-q", "-f", "qcow2", at(name), "1M")
	}
	o := start(t, "spin", nil)
	image := func(name string, readOnly bool, more m) m {
		all := m{"driver": "qcow2", "node-name": name, "read-only": readOnly, "file": m{"driver": "file", "filename": at(name)}}
		for k, v := range more {
			all[k] = v
		}
		return all
	}
	reopen := func(options ...m) m { return m{"options": options} }
	o.do(t, "blockdev-add", image("a", true, nil), nil)
	o.do(t, "blockdev-add", image("b", true, nil), nil)
	o.do(t, "blockdev-add", image("top", false, m{"backing": "a"}), nil)
	o.do(t, "blockdev-reopen", reopen(image("b", false, nil)), nil)
	wantNodes(t, o.peer, map[string]string{"a": "qcow2 a ro", "b": "qcow2 b", "top": "qcow2 top on a"})
	// All, or none.
	if err := o.refuse(t, "blockdev-reopen", reopen(image("b", true, nil), image("top", false, m{"backing": "no"}))); !strings.Contains(err.Desc, "Cannot find") {
		t.Error(err)
	}
	o.do(t, "blockdev-reopen", reopen(image("b", true, nil), image("top", false, m{"backing": "b"})), nil)
	wantNodes(t, o.peer, map[string]string{"a": "qcow2 a ro", "b": "qcow2 b ro", "top": "qcow2 top on b"})
	o.do(t, "blockdev-reopen", reopen(image("top", true, m{"backing": nil})), nil)
	wantNodes(t, o.peer, map[string]string{"a": "qcow2 a ro", "b": "qcow2 b ro", "top": "qcow2 top ro"})
	for text, options := range map[string]m{
		"node-name not specified":   {"driver": "null-co"},
		"Failed to find node":       image("no", true, nil),
		"Cannot change the option ": {"driver": "null-co", "node-name": "a"},
		"would create a cycle":      image("a", true, m{"backing": "a"}),
	} {
		if err := o.refuse(t, "blockdev-reopen", reopen(options)); !strings.Contains(err.Desc, text) {
			t.Errorf("%v: %q, want %q", options, err.Desc, text)
		}
	}
	// What cannot be opened in the other way stays as it was.
	other := openReadOnly(t, at("a"))
	o.refuse(t, "blockdev-reopen", reopen(image("a", false, nil)))
	wantNodes(t, o.peer, map[string]string{"a": "qcow2 a ro", "b": "qcow2 b ro", "top": "qcow2 top ro"})
	other.Close()
	o.do(t, "blockdev-del", m{"node-name": "a"}, nil)
}

func openReadOnly(t *testing.T, path string) block.Node {
	t.Helper()
	n, err := disk.Open(path, disk.Options{Format: "qcow2", ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	return n
}
