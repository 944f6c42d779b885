package monitor_test

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// pendingJob is a kind of job that is to be finalized by hand, on a disk in three
// images that lie one on another: base.qcow2, middle.qcow2 and disk.qcow2.
type pendingJob struct {
	command  string
	args     func(at func(string) string) m
	complete bool // told to, when it is ready
	soft     bool // cancelled, when it is ready
	// moved tells that finalizing changes what the disk's chain is.
	moved bool
}

var pendingJobs = map[string]pendingJob{
	"mirror": {"drive-mirror", func(at func(string) string) m {
		return m{"target": at("copy.qcow2"), "format": "qcow2", "sync": "full"}
	}, true, false, true},
	"left mirror": {"drive-mirror", func(at func(string) string) m {
		return m{"target": at("copy.qcow2"), "format": "qcow2", "sync": "full"}
	}, false, true, false},
	"commit":      {"block-commit", func(at func(string) string) m { return m{"base": at("base.qcow2")} }, true, false, true},
	"left commit": {"block-commit", func(at func(string) string) m { return m{"base": at("base.qcow2")} }, false, true, false},
	"commit in the middle": {"block-commit", func(at func(string) string) m {
		return m{"top": at("middle.qcow2"), "base": at("base.qcow2")}
	}, false, false, true},
	"stream": {"block-stream", func(func(string) string) m { return m{} }, false, false, true},
	"backup": {"drive-backup", func(at func(string) string) m {
		return m{"target": at("copy.qcow2"), "format": "qcow2", "sync": "full"}
	}, false, false, false},
}

// chainFiles are the names of the images that a disk lies in, the newest first.
func (p peer) chainFiles(t *testing.T) string {
	t.Helper()
	type image struct {
		Filename string
		Backing  *image `json:"backing-image"`
	}
	var blocks []struct{ Inserted struct{ Image image } }
	p.do(t, "query-block", nil, &blocks)
	var names []string
	for i := &blocks[0].Inserted.Image; i != nil; i = i.Backing {
		names = append(names, filepath.Base(i.Filename))
	}
	names = slices.Compact(names) // QEMU's filters are of the image that they lie on
	return strings.Join(names, " ")
}

// pend starts a job and waits until it is pending. It returns the events of it since
// it was ready, or since it began.
func (j pendingJob) pend(t *testing.T, p peer, at func(string) string) []happening {
	t.Helper()
	args := m{"job-id": "j", "device": "disk0", "auto-finalize": false, "auto-dismiss": false}
	for k, v := range j.args(at) {
		args[k] = v
	}
	p.do(t, j.command, args, nil)
	if j.complete || j.soft {
		p.job(t, "j", "BLOCK_JOB_READY")
	}
	switch {
	case j.complete:
		p.do(t, "job-complete", m{"id": "j"}, nil)
	case j.soft:
		p.do(t, "block-job-cancel", m{"device": "j"}, nil)
	}
	return p.jobEvents(t, "BLOCK_JOB_PENDING")
}

// jobEvents are the events of jobs up to one, without figures and without what QEMU
// does when it starts a job.
func (p peer) jobEvents(t *testing.T, last ...string) (all []happening) {
	t.Helper()
	for {
		e := p.next(t)
		status, _ := e.Data["status"].(string)
		if strings.Contains("created running paused ready", status) && status != "" {
			continue
		}
		for _, figure := range []string{"len", "offset"} {
			delete(e.Data, figure)
		}
		all = append(all, happening{e.Event, e.Data})
		for _, name := range last {
			if e.Event == name || status == name {
				return all
			}
		}
	}
}

// threeImages makes the disk of a pendingJob, with something in each of its images.
func threeImages(t *testing.T, dir string) func(string) string {
	t.Helper()
	at := func(name string) string { return filepath.Join(dir, name) }
	under := ""
	for i, name := range []string{"base.qcow2", "middle.qcow2", "disk.qcow2"} {
		args := []string{"create", "-q", "-f", "qcow2"}
		if under != "" {
			args = append(args, "-b", under, "-F", "qcow2")
		}
		qemuImg(t, append(args, at(name), "8M")...)
		d := openDisk(t, at(name))
		for k := range 3 {
			if err := d.Writev([][]byte{bytes.Repeat([]byte{byte(16*i + k + 1)}, 128<<10)}, int64(k*(i+1))<<20); err != nil {
				t.Fatal(err)
			}
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		under = at(name)
	}
	return at
}

// What QEMU has not done while a job is pending we have not done, and a job that is
// cancelled then has not been done.
func TestPendingLikeQEMU(t *testing.T) {
	for name, job := range pendingJobs {
		for _, end := range []string{"job-cancel", "job-finalize"} {
			t.Run(name+" "+end, func(t *testing.T) {
				type lived struct {
					Pending, Ended []happening
					Chains         []string
				}
				live := func(p peer, at func(string) string) (l lived) {
					l.Chains = append(l.Chains, p.chainFiles(t))
					l.Pending = job.pend(t, p, at)
					l.Chains = append(l.Chains, p.chainFiles(t))
					p.do(t, end, m{"id": "j"}, nil)
					l.Ended = p.jobEvents(t, "concluded")
					l.Chains = append(l.Chains, p.chainFiles(t))
					p.do(t, "job-dismiss", m{"id": "j"}, nil)
					return l
				}
				theirs, ours := threeImages(t, t.TempDir()), threeImages(t, t.TempDir())
				their := live(startQEMU(t, "q35", "spin", "-drive", "if=none,id=disk0,format=qcow2,file="+theirs("disk.qcow2"),
					"-device", "virtio-blk-pci,drive=disk0"), theirs)
				our := live(withDisks(t, "spin", ours("disk.qcow2")).peer, ours)
				if d := cmp.Diff(their, our); d != "" {
					t.Errorf("-QEMU +ours\n%s", d)
				}
				if their.Chains[0] != their.Chains[1] || (their.Chains[1] != their.Chains[2]) != (job.moved && end == "job-finalize") {
					t.Errorf("the test is not what it is meant to be: %q", their.Chains)
				}
			})
		}
	}
}

// A guest goes on writing while a job is pending, and whatever becomes of that, its disk
// is what it wrote, in the image that the machine names.
func TestWritesWhilePending(t *testing.T) {
	for name, job := range pendingJobs {
		for _, end := range []string{"job-cancel", "job-finalize", "quit"} {
			t.Run(name+" "+end, func(t *testing.T) {
				at := threeImages(t, t.TempDir())
				o := withDisks(t, "spin", at("disk.qcow2"))
				h := newHistory(t, o, 0)
				h.write(t, 20)
				instant := bytes.Clone(h.model)
				job.pend(t, o.peer, at)
				h.write(t, 100)
				if end == "quit" {
					end = ""
				} else {
					h.start(t)
					o.do(t, end, m{"id": "j"}, nil)
					o.jobEvents(t, "concluded")
					h.finish()
					o.do(t, "job-dismiss", m{"id": "j"}, nil)
				}
				h.check(t)
				file := strings.Fields(o.chainFiles(t))[0]
				o.do(t, "quit", nil, nil)
				<-o.done
				if err := o.m.Close(); err != nil {
					t.Error(err)
				}
				h.holds(t, at(file))
				for _, image := range []string{"base.qcow2", "middle.qcow2", "disk.qcow2"} {
					if _, err := os.Stat(at(image)); err == nil {
						clean(t, at(image))
					}
				}
				switch _, err := os.Stat(at("copy.qcow2")); {
				case job.args(at)["target"] == nil || end == "job-finalize" && job.moved:
				case end == "job-finalize": // of the instant that it is of
					imageHolds(t, at("copy.qcow2"), instant)
				case !os.IsNotExist(err):
					t.Errorf("the copy that was given up: %v", err)
				}
			})
		}
	}
}

// A copy that fails while its job is pending does not become the disk.
func TestCopyFailsWhilePending(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	qemuImg(t, "create", "-q", "-f", "raw", at("disk.img"), "8M")
	node := &failing{Node: openImage(t, diskSize)}
	socket := serveNode(t, node)
	o := withDisks(t, "spin", at("disk.img"))
	o.do(t, "blockdev-add", m{
		"driver": "nbd", "node-name": "copy", "export": "x", "server": m{"type": "unix", "path": socket},
	}, nil)
	h := newHistory(t, o, 0)
	h.write(t, 10)
	job := pendingJob{"blockdev-mirror", func(func(string) string) m { return m{"target": "copy", "sync": "full"} }, true, false, true}
	job.pend(t, o.peer, at)
	node.fail(syscall.EIO)
	h.write(t, 10)
	o.do(t, "job-finalize", m{"id": "j"}, nil)
	e := o.job(t, "j", "BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED")
	if e.Event != "BLOCK_JOB_COMPLETED" || e.Data["error"] == nil {
		t.Errorf("%+v", e)
	}
	h.write(t, 10)
	h.check(t)
	if got := o.chainFiles(t); got != "disk.img" {
		t.Errorf("the disk is in %s", got)
	}
}
