package monitor_test

import (
	"maps"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/gnomon-vmm/gnomon/qmp"
	"github.com/gnomon-vmm/gnomon/vmm"
)

// added adds a raw node of 1 MiB.
func (p peer) added(t *testing.T, name string) string {
	t.Helper()
	path := image(t, 1<<20)
	p.do(t, "blockdev-add", map[string]any{"driver": "raw", "node-name": name, "file": map[string]any{"driver": "file", "filename": path}}, nil)
	return path
}

// plug plugs in a disk.
func (p peer) plug(t *testing.T, id, drive string) {
	t.Helper()
	p.do(t, "device_add", map[string]any{"driver": "virtio-blk-pci", "id": id, "drive": drive, "serial": "of-" + id}, nil)
}

// deleted waits until a device has gone, and returns what else happened.
func (p peer) deleted(t *testing.T, id string) (others []string) {
	t.Helper()
	for {
		e := p.next(t)
		if e.Event == "DEVICE_DELETED" && e.Data["device"] == id {
			if e.Data["path"] != "/machine/peripheral/"+id {
				t.Errorf("event %v", e.Data)
			}
			return others
		}
		others = append(others, e.Event)
	}
}

// nodeOfDisk is the name of the node that a device has in query-block, or "".
func (p peer) nodeOfDisk(t *testing.T, id string) string {
	t.Helper()
	var all []struct {
		Qdev     string
		Inserted struct {
			Node string `json:"node-name"`
		}
	}
	p.do(t, "query-block", nil, &all)
	for _, b := range all {
		if b.Qdev == "/machine/peripheral/"+id || b.Qdev == "/machine/peripheral/"+id+"/virtio-backend" {
			return b.Inserted.Node
		}
	}
	return ""
}

// onPCI tells whether a device is on the PCI bus, as query-pci shows it.
func (p peer) onPCI(t *testing.T, id string) bool {
	t.Helper()
	var buses []struct {
		Devices []struct {
			QdevID string `json:"qdev_id"`
			Class  struct{ Desc string }
		}
	}
	p.do(t, "query-pci", nil, &buses)
	for _, d := range buses[0].Devices {
		if d.QdevID == id {
			return true
		}
	}
	return false
}

// TestHotplug plugs and unplugs disks, ours beside QEMU's: the same commands, the same
// refusals, the same events. The guest lets go of the disk when it is reset.
func TestHotplug(t *testing.T) {
	q := startQEMU(t, "pc", "spin", "-device", "virtio-rng-pci,id=rng0")
	q.do(t, "cont", nil, nil)
	q.event(t, "RESUME")
	o := start(t, "spin", nil)
	refusals := map[string]map[string]qmp.Error{}
	for name, p := range map[string]peer{"gnomon": o.peer, "QEMU": q} {
		refused := map[string]qmp.Error{}
		refusals[name] = refused
		path := p.added(t, "n0")
		p.added(t, "n1")
		refuse := func(what, command string, args map[string]any) {
			t.Helper()
			refused[what] = p.refuse(t, command, args)
		}
		disk := func(over map[string]any) map[string]any {
			args := map[string]any{"driver": "virtio-blk-pci", "id": "hot0", "drive": "n0"}
			for k, v := range over {
				if args[k] = v; v == nil {
					delete(args, k)
				}
			}
			return args
		}
		refuse("unknown driver", "device_add", disk(map[string]any{"driver": "nonsense"}))
		refuse("no driver", "device_add", disk(map[string]any{"driver": nil}))
		refuse("unknown bus", "device_add", disk(map[string]any{"bus": "nowhere"}))
		refuse("no drive", "device_add", disk(map[string]any{"drive": nil}))
		refuse("unknown drive", "device_add", disk(map[string]any{"drive": "n9"}))
		refuse("bad id", "device_add", disk(map[string]any{"id": "0bad/"}))
		refuse("unknown policy", "device_add", disk(map[string]any{"werror": "panic"}))
		refuse("unknown option", "device_add", disk(map[string]any{"colour": "red"}))
		refuse("no device", "device_del", map[string]any{"id": "hot0"})
		refuse("no path", "device_del", map[string]any{"id": "/machine/peripheral/hot0"})
		if p.nodeOfDisk(t, "hot0") != "" || p.onPCI(t, "hot0") {
			t.Errorf("%s: a disk is there that was refused", name)
		}

		p.plug(t, "hot0", "n0")
		if n := p.nodeOfDisk(t, "hot0"); n != "n0" || !p.onPCI(t, "hot0") {
			t.Errorf("%s: the disk's node is %q", name, n)
		}
		refuse("id in use", "device_add", disk(map[string]any{"drive": "n1"}))
		refuse("drive in use", "device_add", disk(map[string]any{"id": "hot1"}))
		refuse("node in use", "blockdev-del", map[string]any{"node-name": "n0"})

		p.do(t, "device_del", map[string]any{"id": "/machine/peripheral/hot0"}, nil)
		p.do(t, "device_del", map[string]any{"id": "hot0"}, nil) // again, for a guest that missed it
		refuse("node in use still", "blockdev-del", map[string]any{"node-name": "n0"})
		p.do(t, "system_reset", nil, nil)
		p.deleted(t, "hot0")
		if n := p.nodeOfDisk(t, "hot0"); n != "" || p.onPCI(t, "hot0") {
			t.Errorf("%s: the disk is still there, with node %q", name, n)
		}
		refuse("has gone", "device_del", map[string]any{"id": "hot0"})

		// The node is as it was: another disk can have it.
		p.plug(t, "again", "n0")
		p.do(t, "device_del", map[string]any{"id": "again"}, nil)
		p.do(t, "system_reset", nil, nil)
		p.deleted(t, "again")
		p.do(t, "blockdev-del", map[string]any{"node-name": "n0"}, nil)
		if err := os.Remove(path); err != nil {
			t.Error(err)
		}
	}
	ours, theirs := refusals["gnomon"], refusals["QEMU"]
	// Those that name what only one of them has.
	own := []string{"unknown driver", "unknown policy", "unknown option", "drive in use", "bad id"}
	for _, what := range slices.Sorted(maps.Keys(ours)) {
		if ours[what].Class != theirs[what].Class || !slices.Contains(own, what) && ours[what].Desc != theirs[what].Desc {
			t.Errorf("%s: %+v\nQEMU: %+v", what, ours[what], theirs[what])
		}
	}
	if e := o.refuse(t, "device_del", map[string]any{"id": "rng0"}); e.Desc != "Bus 'pcie.0' does not support hotplugging" {
		t.Errorf("unplug a device that stays: %+v", e)
	}
	fixed := startQEMU(t, "q35", "spin", "-device", "virtio-rng-pci,id=rng0")
	if e, want := o.refuse(t, "device_del", map[string]any{"id": "rng0"}), fixed.refuse(t, "device_del", map[string]any{"id": "rng0"}); e != want {
		t.Errorf("unplug a device that stays: %+v, QEMU: %+v", e, want)
	}
}

// A disk's chain, bitmaps, exports and jobs when it is plugged in and when it goes.
func TestUnplugGivesTheNodesBack(t *testing.T) {
	o := start(t, "spin", nil)
	dir := t.TempDir()
	base, top := filepath.Join(dir, "base"), filepath.Join(dir, "top")
	qemuImg(t, "create", "-q", "-f", "qcow2", base, "1M")
	qemuImg(t, "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
	file := func(path string) map[string]any { return map[string]any{"driver": "file", "filename": path} }
	o.do(t, "blockdev-add", map[string]any{"driver": "qcow2", "node-name": "base", "read-only": true, "file": file(base)}, nil)
	o.do(t, "blockdev-add", map[string]any{"driver": "qcow2", "node-name": "top", "file": file(top), "backing": "base"}, nil)
	o.plug(t, "hot", "top")
	o.do(t, "block-dirty-bitmap-add", map[string]any{"node": "top", "name": "kept", "persistent": true}, nil)
	o.do(t, "block-dirty-bitmap-add", map[string]any{"node": "top", "name": "lost"}, nil)
	o.do(t, "nbd-server-start", map[string]any{"addr": map[string]any{"type": "unix", "data": map[string]any{"path": filepath.Join(socketDir(t), "n")}}}, nil)
	o.do(t, "block-export-add", map[string]any{"type": "nbd", "id": "e", "node-name": "top"}, nil)

	o.do(t, "device_del", map[string]any{"id": "hot"}, nil)
	o.do(t, "system_reset", nil, nil)
	o.deleted(t, "hot")
	for _, node := range []string{"top", "base"} {
		o.refuse(t, "blockdev-del", map[string]any{"node-name": node})
	}
	o.do(t, "block-export-del", map[string]any{"id": "e"}, nil)
	o.event(t, "BLOCK_EXPORT_DELETED")

	o.plug(t, "hot", "top")
	var all []struct {
		Inserted struct {
			Node    string `json:"node-name"`
			Bitmaps []struct {
				Name       string
				Persistent bool
			} `json:"dirty-bitmaps"`
		}
	}
	o.do(t, "query-block", nil, &all)
	if b := all[0].Inserted.Bitmaps; len(b) != 1 || b[0].Name != "kept" || !b[0].Persistent {
		t.Errorf("bitmaps after the disk was plugged in again: %+v", b)
	}

	// An overlay that nobody named goes with the disk; the nodes under it stay.
	overlay := filepath.Join(dir, "overlay")
	o.do(t, "blockdev-snapshot-sync", map[string]any{"node-name": "top", "snapshot-file": overlay}, nil)
	o.do(t, "device_del", map[string]any{"id": "hot"}, nil)
	o.do(t, "system_reset", nil, nil)
	o.deleted(t, "hot")
	var nodes []struct {
		Name string `json:"node-name"`
	}
	o.do(t, "query-named-block-nodes", nil, &nodes)
	if len(nodes) != 2 || nodes[0].Name != "base" || nodes[1].Name != "top" {
		t.Errorf("nodes %+v", nodes)
	}
	o.do(t, "blockdev-del", map[string]any{"node-name": "top"}, nil)
	o.do(t, "blockdev-del", map[string]any{"node-name": "base"}, nil)
	for _, path := range []string{base, top, overlay} {
		clean(t, path)
	}
}

// Eight disks fit beside those that the machine began with, and no ninth.
func TestHotplugSlots(t *testing.T) {
	o := start(t, "spin", func(c *vmm.Config) { c.Disks = []vmm.Disk{{Node: openImage(t, 1<<20)}} })
	var got []string
	for _, id := range []string{"a", "b", "c", "d", "e", "f", "g", "h"} {
		o.added(t, "node-"+id)
		o.plug(t, id, "node-"+id)
		got = append(got, o.nodeOfDisk(t, id))
	}
	if want := []string{"node-a", "node-b", "node-c", "node-d", "node-e", "node-f", "node-g", "node-h"}; !cmp.Equal(got, want) {
		t.Errorf("nodes %v", got)
	}
	o.added(t, "node-i")
	if e := o.refuse(t, "device_add", map[string]any{"driver": "virtio-blk-pci", "id": "i", "drive": "node-i"}); e.Desc != "PCI: no slot/function available for virtio-blk-pci, all in use or reserved" {
		t.Errorf("a ninth: %+v", e)
	}
	o.do(t, "blockdev-del", map[string]any{"node-name": "node-i"}, nil) // the refused command let go of it
}
