package monitor_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func action(kind string, data m) m { return m{"type": kind, "data": data} }

func transaction(actions ...m) m { return m{"actions": actions} }

// state is what a failed transaction must leave as it was.
func (p peer) state(t *testing.T, dir string) map[string]any {
	t.Helper()
	var blocks, nodes, jobs any
	p.do(t, "query-block", nil, &blocks)
	p.do(t, "query-named-block-nodes", nil, &nodes)
	p.do(t, "query-jobs", nil, &jobs)
	var names []string
	files, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		names = append(names, f.Name())
	}
	for _, v := range []any{blocks, nodes} {
		withoutActualSize(v)
	}
	return m{"blocks": blocks, "nodes": nodes, "jobs": jobs, "files": names}
}

// withoutActualSize leaves out what flushing changes.
func withoutActualSize(v any) {
	switch v := v.(type) {
	case []any:
		for _, e := range v {
			withoutActualSize(e)
		}
	case map[string]any:
		delete(v, "actual-size")
		for _, e := range v {
			withoutActualSize(e)
		}
	}
}

type bitmapInfo struct {
	Name         string
	Count        int64
	Recording    bool
	Busy         bool
	Persistent   bool
	Inconsistent bool
}

// bitmaps are those of a disk, by name.
func (p peer) bitmaps(t *testing.T, disk int) map[string]bitmapInfo {
	t.Helper()
	var list []struct {
		Inserted struct {
			Bitmaps []bitmapInfo `json:"dirty-bitmaps"`
		}
	}
	p.do(t, "query-block", nil, &list)
	all := map[string]bitmapInfo{}
	for _, b := range list[disk].Inserted.Bitmaps {
		all[b.Name] = b
	}
	return all
}

func TestTransaction(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	qemuImg(t, "create", "-q", "-f", "raw", at("a.img"), "8M")
	qemuImg(t, "create", "-q", "-f", "qcow2", at("b.qcow2"), "8M")
	o := withDisks(t, "spin", at("a.img"), at("b.qcow2"))
	a, b := newHistory(t, o, 0), newHistory(t, o, 1)
	o.create(t, "over", at("over.qcow2"), nil)
	o.create(t, "target", at("target.qcow2"), nil)
	for _, name := range []string{"x", "y"} {
		o.do(t, "block-dirty-bitmap-add", m{"node": "disk1", "name": name}, nil)
	}
	a.write(t, 20)
	b.write(t, 20)
	o.do(t, "block-dirty-bitmap-disable", m{"node": "disk1", "name": "y"}, nil)

	all := []m{
		action("blockdev-snapshot-sync", m{"device": "disk0", "snapshot-file": at("a1.qcow2"), "snapshot-node-name": "a1"}),
		action("blockdev-snapshot", m{"node": "disk1", "overlay": "over"}),
		action("block-dirty-bitmap-add", m{"node": "disk0", "name": "new"}),
		action("block-dirty-bitmap-add", m{"node": "disk1", "name": "kept", "persistent": true}),
		action("block-dirty-bitmap-merge", m{"node": "disk0", "target": "new", "bitmaps": []any{m{"node": "disk1", "name": "y"}}}),
		action("block-dirty-bitmap-clear", m{"node": "disk1", "name": "x"}),
		action("block-dirty-bitmap-enable", m{"node": "disk1", "name": "y"}),
		action("block-dirty-bitmap-remove", m{"node": "disk1", "name": "y"}),
		action("drive-backup", m{"job-id": "ja", "device": "disk0", "target": at("ja.qcow2"), "format": "qcow2", "sync": "full", "speed": 1}),
		action("blockdev-backup", m{"job-id": "jb", "device": "disk1", "target": "target", "sync": "full", "speed": 1}),
	}
	before := o.state(t, dir)
	for text, last := range map[string]m{
		"Transaction aborted using Abort action": action("abort", m{}),
		"Dirty bitmap 'y' not found":             action("block-dirty-bitmap-clear", m{"node": "disk1", "name": "y"}),
		"Job ID 'jb' already in use":             action("drive-backup", m{"job-id": "jb", "device": "disk0", "target": at("no"), "sync": "full"}),
		"is busy: block device is in use":        action("blockdev-snapshot", m{"node": "disk0", "overlay": "target"}),
		"Bitmap already exists: kept":            action("block-dirty-bitmap-add", m{"node": "disk1", "name": "kept"}),
		"Cannot find device='no'":                action("block-dirty-bitmap-add", m{"node": "no", "name": "x"}),
	} {
		// Wherever the one that fails comes among the others.
		for _, place := range []int{len(all), len(all) - 1, 5} {
			if place < len(all) && !strings.Contains(text, "Abort") {
				continue
			}
			actions := append(append(append([]m{}, all[:place]...), last), all[place:]...)
			if err := o.refuse(t, "transaction", transaction(actions...)); !strings.Contains(err.Desc, text) {
				t.Errorf("%q, want %q", err.Desc, text)
			}
			if d := cmp.Diff(before, o.state(t, dir)); d != "" {
				t.Fatalf("%s: -before +after\n%s", text, d)
			}
		}
	}
	a.check(t)
	b.check(t)
	drainEvents(o.peer)

	o.do(t, "transaction", transaction(all...), nil)
	modelA, modelB := append([]byte(nil), a.model...), append([]byte(nil), b.model...)
	a.write(t, 20)
	b.write(t, 20)
	bitmaps := o.bitmaps(t, 1)
	if len(bitmaps) != 2 || bitmaps["x"].Count == 0 || !bitmaps["kept"].Persistent || bitmaps["x"].Count != bitmaps["kept"].Count {
		t.Errorf("bitmaps %+v", bitmaps)
	}
	if n := o.bitmaps(t, 0)["new"].Count; n == 0 {
		t.Error("nothing was merged")
	}
	for _, job := range []string{"ja", "jb"} {
		o.do(t, "block-job-set-speed", m{"device": job, "speed": 0}, nil)
		o.completed(t, job)
	}
	a.check(t)
	b.check(t)
	imageHolds(t, at("ja.qcow2"), modelA)
	o.do(t, "blockdev-del", m{"node-name": "target"}, nil)
	o.do(t, "blockdev-del", m{"node-name": "target-file"}, nil)
	imageHolds(t, at("target.qcow2"), modelB)
	o.do(t, "transaction", transaction([]m{}...), nil)
	many := make([]m, 257)
	for i := range many {
		many[i] = action("abort", m{})
	}
	if err := o.refuse(t, "transaction", transaction(many...)); !strings.Contains(err.Desc, "at most 256 actions") {
		t.Error(err)
	}
}

// drainEvents forgets the events that have come.
func drainEvents(p peer) {
	for {
		select {
		case <-p.events:
		default:
			return
		}
	}
}

func TestBitmapMerge(t *testing.T) {
	o := withDisks(t, "spin", image(t, 1<<20))
	root := o.m.Disks()[0].Root
	page := [][]byte{make([]byte, 4096)}
	for i, granularity := range []int{4096, 65536, 4096} {
		o.do(t, "block-dirty-bitmap-add", m{"node": "disk0", "name": fmt.Sprint("b", i), "granularity": granularity}, nil)
		if err := root.Writev(page, int64(i)*128<<10); err != nil {
			t.Fatal(err)
		}
		o.do(t, "block-dirty-bitmap-disable", m{"node": "disk0", "name": fmt.Sprint("b", i)}, nil)
	}
	merge := func(target string, from ...any) m { return m{"node": "disk0", "target": target, "bitmaps": from} }
	o.do(t, "block-dirty-bitmap-merge", merge("b0", "b1", m{"node": "disk0", "name": "b2"}), nil)
	if n := o.bitmaps(t, 0)["b0"].Count; n != 4096+65536+4096 {
		t.Errorf("%d bytes are dirty", n)
	}
	for text, args := range map[string]m{
		"Dirty bitmap 'no' not found": merge("b0", "b1", "no"),
		"Dirty bitmap 'nn' not found": merge("nn", "b1"),
	} {
		if err := o.refuse(t, "block-dirty-bitmap-merge", args); err.Desc != text {
			t.Errorf("%q, want %q", err.Desc, text)
		}
	}
	if err := o.refuse(t, "block-dirty-bitmap-add", m{"node": "disk0", "name": "p", "persistent": true}); !strings.Contains(err.Desc, "Cannot store dirty bitmap") {
		t.Error(err)
	}
}

// Bitmaps that are persistent are there when the disk is used again, in whatever
// image it ended, and qemu-img reads them.
func TestPersistentBitmaps(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	qemuImg(t, "create", "-q", "-f", "qcow2", at("disk.qcow2"), "8M")
	page := [][]byte{make([]byte, 4096)}
	end := func(o *ours) {
		o.do(t, "quit", nil, nil)
		<-o.done
		if err := o.m.Close(); err != nil {
			t.Error(err)
		}
	}
	o := withDisks(t, "spin", at("disk.qcow2"))
	o.do(t, "block-dirty-bitmap-add", m{"node": "disk0", "name": "keep", "persistent": true, "granularity": 4096}, nil)
	o.do(t, "block-dirty-bitmap-add", m{"node": "disk0", "name": "off", "persistent": true, "disabled": true}, nil)
	o.do(t, "block-dirty-bitmap-add", m{"node": "disk0", "name": "lost"}, nil)
	if err := o.m.Disks()[0].Root.Writev(page, 0); err != nil {
		t.Fatal(err)
	}
	end(o)
	info := qemuImg(t, "info", at("disk.qcow2"))
	if !strings.Contains(info, "name: keep") || !strings.Contains(info, "name: off") || strings.Contains(info, "name: lost") || strings.Contains(info, "in-use") {
		t.Error(info)
	}
	clean(t, at("disk.qcow2"))

	// A snapshot, and the disk ends in the overlay.
	o = withDisks(t, "spin", at("disk.qcow2"))
	want := map[string]bitmapInfo{"keep": {Name: "keep", Count: 4096, Recording: true, Persistent: true}, "off": {Name: "off", Persistent: true}}
	if d := cmp.Diff(want, o.bitmaps(t, 0)); d != "" {
		t.Errorf("-want +got\n%s", d)
	}
	o.do(t, "blockdev-snapshot-sync", m{"device": "disk0", "snapshot-file": at("over.qcow2")}, nil)
	if err := o.m.Disks()[0].Root.Writev(page, 1<<20); err != nil {
		t.Fatal(err)
	}
	o.do(t, "block-dirty-bitmap-remove", m{"node": "disk0", "name": "off"}, nil)
	end(o)
	if info := qemuImg(t, "info", at("over.qcow2")); !strings.Contains(info, "name: keep") || strings.Contains(info, "name: off") {
		t.Error(info)
	}
	clean(t, at("over.qcow2"))
	clean(t, at("disk.qcow2"))

	// It goes back into the base, whose own bitmap is an old one.
	o = withDisks(t, "spin", at("over.qcow2"))
	if n := o.bitmaps(t, 0)["keep"].Count; n != 8192 {
		t.Errorf("%d bytes are dirty", n)
	}
	o.do(t, "block-dirty-bitmap-clear", m{"node": "disk0", "name": "keep"}, nil)
	o.do(t, "block-commit", m{"device": "disk0"}, nil)
	o.job(t, "disk0", "BLOCK_JOB_READY")
	o.do(t, "block-job-complete", m{"device": "disk0"}, nil)
	o.completed(t, "disk0")
	if err := o.m.Disks()[0].Root.Writev(page, 2<<20); err != nil {
		t.Fatal(err)
	}
	end(o)
	clean(t, at("disk.qcow2"))
	o = withDisks(t, "spin", at("disk.qcow2"))
	if n := o.bitmaps(t, 0)["keep"].Count; n != 4096 {
		t.Errorf("%d bytes are dirty", n)
	}
}

// A bitmap that a machine left in use is not used.
func TestInconsistentBitmap(t *testing.T) {
	dir := t.TempDir()
	path, copied := filepath.Join(dir, "disk.qcow2"), filepath.Join(dir, "copy.qcow2")
	qemuImg(t, "create", "-q", "-f", "qcow2", path, "8M")
	qemuImg(t, "bitmap", "--add", path, "b")
	d := openDisk(t, path)
	if err := d.Writev([][]byte{make([]byte, 4096)}, 0); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(path) // as after a crash
	if err != nil {
		t.Fatal(err)
	}
	d.Close()
	if err := os.WriteFile(copied, data, 0o600); err != nil {
		t.Fatal(err)
	}
	o := withDisks(t, "spin", copied)
	if b := o.bitmaps(t, 0)["b"]; !b.Inconsistent || !b.Persistent || b.Recording {
		t.Errorf("%+v", b)
	}
	if err := o.refuse(t, "block-dirty-bitmap-clear", m{"node": "disk0", "name": "b"}); !strings.Contains(err.Desc, "inconsistent") {
		t.Error(err)
	}
	o.do(t, "block-dirty-bitmap-remove", m{"node": "disk0", "name": "b"}, nil)
	o.do(t, "quit", nil, nil)
	<-o.done
	o.m.Close()
	if info := qemuImg(t, "info", copied); strings.Contains(info, "bitmaps") {
		t.Error(info)
	}
}
