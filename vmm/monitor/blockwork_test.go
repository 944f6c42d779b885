package monitor_test

import (
	"bytes"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/qmp/client"
)

const diskSize = 8 << 20

// history writes a disk as a guest does, beside a model of what it holds.
type history struct {
	root  *block.Root
	rng   *rand.Rand
	model []byte
	stop  chan struct{}
	ended sync.WaitGroup
}

func newHistory(t *testing.T, o *ours, disk int) *history {
	root := o.m.Disks()[disk].Root
	h := &history{root: root, rng: rand.New(rand.NewPCG(1, uint64(disk))), model: make([]byte, root.Size())}
	if err := root.Readv([][]byte{h.model}, 0); err != nil {
		t.Fatal(err)
	}
	return h
}

// write makes n random writes, discards as zeroes.
func (h *history) write(t *testing.T, n int) {
	t.Helper()
	for range n {
		off, length := 512*h.rng.Int64N(int64(len(h.model))/512), 512*(1+h.rng.Int64N(64))
		length = min(length, int64(len(h.model))-off)
		p := h.model[off : off+length]
		var err error
		if h.rng.IntN(8) == 0 {
			clear(p)
			err = h.root.WriteZeroes(off, length, true)
		} else {
			value := byte(h.rng.Uint32())
			for i := range p {
				p[i] = value + byte(i/512)
			}
			err = h.root.Writev([][]byte{p}, off)
		}
		if err != nil {
			t.Error(err)
			return
		}
	}
}

// start writes until finish.
func (h *history) start(t *testing.T) {
	h.stop = make(chan struct{})
	h.ended.Add(1)
	go func() {
		defer h.ended.Done()
		for {
			select {
			case <-h.stop:
				return
			default:
				h.write(t, 1)
			}
		}
	}()
}

func (h *history) finish() {
	close(h.stop)
	h.ended.Wait()
}

// check compares the disk with the model.
func (h *history) check(t *testing.T) {
	t.Helper()
	got := make([]byte, len(h.model))
	if err := h.root.Readv([][]byte{got}, 0); err != nil {
		t.Fatal(err)
	}
	same(t, "the disk", got, h.model)
}

func same(t *testing.T, what string, got, want []byte) {
	t.Helper()
	if bytes.Equal(got, want) {
		return
	}
	for i := range want {
		if got[i] != want[i] {
			t.Fatalf("%s differs at %d: %#x, want %#x", what, i, got[i], want[i])
		}
	}
}

// holds checks an image that nobody uses: qemu-img finds it clean and equal.
func (h *history) holds(t *testing.T, path string) {
	t.Helper()
	imageHolds(t, path, h.model)
}

func imageHolds(t *testing.T, path string, model []byte) {
	t.Helper()
	raw := filepath.Join(t.TempDir(), "model")
	if err := os.WriteFile(raw, model, 0o600); err != nil {
		t.Fatal(err)
	}
	format := "raw"
	if strings.HasSuffix(path, ".qcow2") {
		format = "qcow2"
		clean(t, path)
	}
	qemuImg(t, "compare", "-U", "-f", format, "-F", "raw", path, raw)
}

// job waits for an event of a job.
func (p peer) job(t *testing.T, id string, names ...string) client.Event {
	t.Helper()
	for {
		e := p.next(t)
		for _, name := range names {
			if e.Event == name && (e.Data["device"] == id || e.Data["id"] == id) {
				return e
			}
		}
	}
}

// completed waits for a job's good end.
func (p peer) completed(t *testing.T, id string) {
	t.Helper()
	e := p.job(t, id, "BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED")
	if e.Event != "BLOCK_JOB_COMPLETED" || e.Data["error"] != nil || e.Data["offset"] != e.Data["len"] {
		t.Fatalf("%+v", e)
	}
	p.null(t, id)
}

// null waits until a job is no more.
func (p peer) null(t *testing.T, id string) {
	t.Helper()
	for {
		if e := p.job(t, id, "JOB_STATUS_CHANGE"); e.Data["status"] == "null" {
			return
		}
	}
}

// create makes an image by blockdev-create and adds it as a node.
func (p peer) create(t *testing.T, name, path string, more m) {
	t.Helper()
	jobs := []m{{"driver": "file", "filename": path, "size": 0}, {"driver": "qcow2", "file": name + "-file", "size": diskSize}}
	for k, v := range more {
		jobs[1][k] = v
	}
	for i, options := range jobs {
		p.do(t, "blockdev-create", m{"job-id": "create", "options": options}, nil)
		for p.job(t, "create", "JOB_STATUS_CHANGE").Data["status"] != "concluded" {
		}
		var list []struct {
			ID, Status string
			Error      *string
		}
		p.do(t, "query-jobs", nil, &list)
		for _, j := range list {
			if j.ID == "create" && j.Error != nil {
				t.Fatalf("create %v: %s", options, *j.Error)
			}
		}
		p.do(t, "job-dismiss", m{"id": "create"}, nil)
		if i == 0 {
			p.do(t, "blockdev-add", m{"driver": "file", "node-name": name + "-file", "filename": path}, nil)
		}
	}
	p.do(t, "blockdev-add", m{"driver": "qcow2", "node-name": name, "file": name + "-file", "backing": nil}, nil)
}

// Images are made, become overlays, and their nodes keep their names when the chain
// is shortened.
func TestBlockdevSnapshot(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	qemuImg(t, "create", "-q", "-f", "raw", at("disk.img"), "8M")
	o := withDisks(t, "spin", at("disk.img"))
	h := newHistory(t, o, 0)
	h.write(t, 50)
	o.create(t, "one", at("one.qcow2"), m{"backing-file": at("disk.img"), "backing-fmt": "raw", "cluster-size": 4096})
	o.do(t, "blockdev-snapshot", m{"node": "#disk0", "overlay": "one"}, nil)
	before := append([]byte(nil), h.model...)
	h.write(t, 50)
	wantNodes(t, o.peer, map[string]string{"one": "qcow2 one.qcow2 on disk.img", "#disk0-backing1": "raw disk.img ro", "one-file": "file one.qcow2"})
	imageHolds(t, at("disk.img"), before)
	for text, args := range map[string]m{
		"already in use":     {"node": "disk0", "overlay": "one"},
		"Cannot find device": {"node": "disk0", "overlay": "two"},
	} {
		if err := o.refuse(t, "blockdev-snapshot", args); !strings.Contains(err.Desc, text) {
			t.Errorf("%v: %q", args, err.Desc)
		}
	}
	if err := o.refuse(t, "blockdev-del", m{"node-name": "one"}); err.Desc != "Node one is in use" {
		t.Error(err)
	}
	o.do(t, "blockdev-snapshot-sync", m{"device": "disk0", "snapshot-file": at("two.qcow2"), "snapshot-node-name": "two"}, nil)
	h.write(t, 50)
	wantNodes(t, o.peer, map[string]string{
		"two": "qcow2 two.qcow2 on one.qcow2", "one": "qcow2 one.qcow2 ro on disk.img", "#disk0-backing2": "raw disk.img ro", "one-file": "file one.qcow2",
	})
	if err := o.refuse(t, "blockdev-del", m{"node-name": "two"}); err.Desc != "Node two is in use" {
		t.Error(err)
	}
	o.do(t, "block-commit", m{"device": "disk0", "base-node": "one"}, nil)
	o.job(t, "disk0", "BLOCK_JOB_READY")
	o.do(t, "block-job-complete", m{"device": "disk0"}, nil)
	o.completed(t, "disk0")
	h.write(t, 50)
	h.check(t)
	wantNodes(t, o.peer, map[string]string{"one": "qcow2 one.qcow2 on disk.img", "#disk0-backing1": "raw disk.img ro", "one-file": "file one.qcow2"})
	o.do(t, "quit", nil, nil)
	<-o.done
	if err := o.m.Close(); err != nil {
		t.Error(err)
	}
	h.holds(t, at("one.qcow2"))
	h.holds(t, at("two.qcow2"))
}

func TestBlockdevMirrorAndBackup(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	qemuImg(t, "create", "-q", "-f", "qcow2", at("disk.qcow2"), "8M")
	// What a target held before is overwritten.
	if err := os.WriteFile(at("full.img"), []byte(strings.Repeat("old ", diskSize/4)), 0o600); err != nil {
		t.Fatal(err)
	}
	o := withDisks(t, "spin", at("disk.qcow2"))
	h := newHistory(t, o, 0)
	h.write(t, 50)
	o.do(t, "blockdev-add", m{"driver": "raw", "node-name": "full", "file": m{"driver": "file", "filename": at("full.img")}}, nil)
	o.create(t, "copy", at("copy.qcow2"), nil)
	o.do(t, "blockdev-add", m{"driver": "null-co", "node-name": "small", "size": 4096}, nil)
	for text, args := range map[string]m{
		"Failed to find node":      {"device": "disk0", "target": "no", "sync": "full"},
		"the target has 4096":      {"device": "disk0", "target": "small", "sync": "full"},
		"Cannot find device='no'":  {"device": "no", "target": "full", "sync": "full"},
		"must provide a valid":     {"device": "disk0", "target": "full", "sync": "incremental"},
		"Invalid job ID '1'":       {"device": "disk0", "target": "full", "sync": "full", "job-id": "1"},
		"expects a non-negative":   {"device": "disk0", "target": "full", "sync": "full", "speed": -1},
		"Dirty bitmap 'b' not fou": {"device": "disk0", "target": "full", "sync": "bitmap", "bitmap": "b", "bitmap-mode": "never"},
	} {
		if err := o.refuse(t, "blockdev-backup", args); !strings.Contains(err.Desc, text) {
			t.Errorf("%v: %q, want %q", args, err.Desc, text)
		}
	}
	before := append([]byte(nil), h.model...)
	o.do(t, "blockdev-backup", m{"job-id": "b", "device": "disk0", "target": "full", "sync": "full", "speed": 1}, nil)
	if err := o.refuse(t, "blockdev-del", m{"node-name": "full"}); !strings.Contains(err.Desc, "is busy") {
		t.Error(err)
	}
	h.write(t, 50)
	o.do(t, "block-job-set-speed", m{"device": "b", "speed": 0}, nil)
	o.completed(t, "b")
	o.do(t, "blockdev-del", m{"node-name": "full"}, nil)
	imageHolds(t, at("full.img"), before)

	h.start(t)
	o.do(t, "blockdev-mirror", m{"job-id": "m", "device": "#disk0", "target": "copy", "sync": "full", "copy-mode": "write-blocking"}, nil)
	o.job(t, "m", "BLOCK_JOB_READY")
	o.do(t, "block-job-complete", m{"device": "m"}, nil)
	o.completed(t, "m")
	h.finish()
	wantNodes(t, o.peer, map[string]string{"copy": "qcow2 copy.qcow2", "copy-file": "file copy.qcow2", "small": "null-co null-co:"})
	h.write(t, 50)
	h.check(t)
	openDisk(t, at("disk.qcow2")).Close()
	// A node that a disk used stays one.
	o.do(t, "drive-mirror", m{"job-id": "m", "device": "disk0", "target": at("end.qcow2"), "format": "qcow2", "sync": "full"}, nil)
	o.job(t, "m", "BLOCK_JOB_READY")
	o.do(t, "block-job-complete", m{"device": "m"}, nil)
	o.completed(t, "m")
	wantNodes(t, o.peer, map[string]string{"#disk0": "qcow2 end.qcow2", "copy": "qcow2 copy.qcow2", "copy-file": "file copy.qcow2", "small": "null-co null-co:"})
	o.do(t, "blockdev-del", m{"node-name": "copy"}, nil)
	o.do(t, "blockdev-del", m{"node-name": "copy-file"}, nil)
	h.holds(t, at("copy.qcow2"))
	h.write(t, 50)
	o.do(t, "quit", nil, nil)
	<-o.done
	o.m.Close()
	h.holds(t, at("end.qcow2"))
}
