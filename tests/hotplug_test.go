package tests

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/gnomon-vmm/gnomon/qmp/client"
	"github.com/gnomon-vmm/gnomon/tests/guest/probe"
	"github.com/gnomon-vmm/gnomon/tests/guest/wire"
)

// plugIn adds a node of an image and plugs it in as a disk.
func (p *process) plugIn(ctx context.Context, t *testing.T, id, format, path string) {
	t.Helper()
	p.do(ctx, t, "blockdev-add", map[string]any{"driver": format, "node-name": "node-" + id, "file": map[string]any{"driver": "file", "filename": path}}, nil)
	p.do(ctx, t, "device_add", map[string]any{"driver": "virtio-blk-pci", "id": id, "drive": "node-" + id, "serial": "serial-" + id}, nil)
}

// unplugged waits until a disk has gone.
func unplugged(ctx context.Context, t *testing.T, events <-chan client.Event, id string) {
	t.Helper()
	for {
		select {
		case e, ok := <-events:
			if !ok {
				t.Fatalf("the QMP session ended before %s was unplugged", id)
			}
			if e.Event == "DEVICE_DELETED" && e.Data["device"] == id {
				return
			}
		case <-ctx.Done():
			t.Fatalf("%s was not unplugged: %v", id, ctx.Err())
		}
	}
}

// Linux finds a disk that is plugged in, uses it, and lets go of it: when it is asked,
// and on its own account.
func testHotPlug(ctx context.Context, t *testing.T, m *linux) {
	events := m.qmp.Subscribe(ctx)
	for turn, ask := range []bool{true, false} {
		image := filepath.Join(m.dir, "hot.qcow2")
		qemuImg(ctx, t, "create", "-q", "-f", "qcow2", image, "64M")
		m.plugIn(ctx, t, "hot", "qcow2", image)
		for {
			serial, err := m.agent.GetFile(ctx, "/sys/block/vdc/serial")
			if err == nil && string(bytes.TrimSpace(serial)) == "serial-hot" {
				// It can be opened a moment later.
				if _, err = m.agent.Read(ctx, wire.ReadArgs{Path: "/dev/vdc", Size: 4096}); err == nil {
					break
				}
			}
			if ctx.Err() != nil {
				t.Fatalf("the guest does not see the disk: serial %q, %v", serial, err)
			}
		}
		const offset = 3 << 20
		seed := uint64(77 + turn)
		wrote, err := m.agent.Write(ctx, wire.WriteArgs{Path: "/dev/vdc", Seed: seed, Offset: offset, Size: m.bytes, Sync: true})
		if err != nil {
			t.Fatal(err)
		}
		if err := m.agent.DropCaches(ctx); err != nil {
			t.Fatal(err)
		}
		read, err := m.agent.Read(ctx, wire.ReadArgs{Path: "/dev/vdc", Offset: offset, Size: m.bytes})
		if want := wire.PatternSum(seed, m.bytes); err != nil || wrote != want || read != want {
			t.Errorf("wrote %+v, read %+v, %v, want %+v", wrote, read, err, want)
		}
		if m.qmp.Execute(ctx, "blockdev-del", map[string]any{"node-name": "node-hot"}, nil) == nil {
			t.Fatal("the node of a disk in use was deleted")
		}
		if ask {
			m.do(ctx, t, "device_del", map[string]any{"id": "hot"}, nil)
		} else if _, err := m.agent.Run(ctx, "sh", "-c", "echo 0 > /sys/bus/pci/slots/24/power"); err != nil {
			t.Fatal(err)
		}
		unplugged(ctx, t, events, "hot")
		for _, gone := range []string{"/sys/block/vdc/serial", "/sys/bus/pci/devices/0000:00:18.0/vendor"} {
			if _, err := m.agent.GetFile(ctx, gone); err == nil {
				t.Errorf("the guest still has %s", gone)
			}
		}
		if _, err := m.agent.Run(ctx, "test", "!", "-e", "/dev/vdc"); err != nil {
			t.Errorf("the guest still has /dev/vdc: %v", err)
		}
		m.do(ctx, t, "blockdev-del", map[string]any{"node-name": "node-hot"}, nil)

		raw := filepath.Join(m.dir, "hot.raw")
		qemuImg(ctx, t, "check", "-q", image)
		qemuImg(ctx, t, "convert", "-O", "raw", image, raw)
		got, err := os.ReadFile(raw)
		if err != nil {
			t.Fatal(err)
		}
		want := make([]byte, m.bytes)
		wire.Pattern(want, seed, 0)
		if !bytes.Equal(got[offset:offset+m.bytes], want) {
			t.Error("the image does not hold what the guest wrote")
		}
	}
}

// disks are the ids of a machine's disks, and what their images are called.
func (p *process) disks(ctx context.Context, t *testing.T) (ids []string, files map[string]string) {
	t.Helper()
	var all []struct {
		Device   string
		Inserted struct{ File string }
	}
	p.do(ctx, t, "query-block", nil, &all)
	files = map[string]string{}
	for _, b := range all {
		ids, files[b.Device] = append(ids, b.Device), b.Inserted.File
	}
	return ids, files
}

// A machine is saved and restored with the disks that were plugged in, and without
// those that have gone; and so is that which was restored.
func TestRestoreWithPluggedDisks(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	kernel, err := probe.Path()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	image(t, at("a.img"), 1<<20)
	image(t, at("c.img"), 1<<20)
	image(t, at("d.img"), 1<<20)
	qemuImg(ctx, t, "create", "-q", "-f", "qcow2", at("b.qcow2"), "1M")

	p, _ := launch(t, "--kernel", kernel, "--append", "spin", "--memory", "16M", "--net", "none", "--disk", "file="+at("a.img")+",cache=unsafe")
	p.connect(ctx, t)
	p.plugIn(ctx, t, "one", "qcow2", at("b.qcow2"))
	save := func(file string) {
		t.Helper()
		command(ctx, t, "checkpoint", p.name, "--to", at(file))
		p.do(ctx, t, "quit", nil, nil)
		p.status(ctx, t)
	}
	restore := func(file string, want ...string) map[string]string {
		t.Helper()
		p, _ = launchCommand(t, "restore", at(file), "--name", strings.ReplaceAll(file, ".", "-"))
		p.name = strings.ReplaceAll(file, ".", "-")
		p.connect(ctx, t)
		ids, files := p.disks(ctx, t)
		if !slices.Equal(ids, want) {
			t.Fatalf("%s: disks %v, want %v", file, ids, want)
		}
		return files
	}
	p.plugIn(ctx, t, "gone", "raw", at("d.img"))
	events := p.qmp.Subscribe(ctx)
	p.do(ctx, t, "device_del", map[string]any{"id": "gone"}, nil)
	p.do(ctx, t, "system_reset", nil, nil) // the guest knows nothing of slots
	unplugged(ctx, t, events, "gone")
	save("first")
	if files := restore("first", "disk0", "one"); !strings.HasPrefix(files["one"], at("first.")) {
		t.Errorf("the restored disk is in %s", files["one"])
	}
	p.plugIn(ctx, t, "two", "raw", at("c.img"))
	save("second")
	restore("second", "disk0", "one", "two")
	p.do(ctx, t, "quit", nil, nil)
	p.status(ctx, t)
	if err := exec.CommandContext(ctx, "qemu-img", "check", "-q", at("b.qcow2")).Run(); err != nil {
		t.Errorf("qemu-img check: %v", err)
	}
}
