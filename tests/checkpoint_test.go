package tests

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/gnomon-vmm/gnomon/disk/qcow2"
	"github.com/gnomon-vmm/gnomon/mm/checkpoint"
	"github.com/gnomon-vmm/gnomon/tests/guest/probe"
)

// command runs gnomon with the given arguments and returns what it prints.
func command(ctx context.Context, t *testing.T, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(ctx, gnomon, args...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("gnomon %s: %v\n%s", strings.Join(args, " "), err, &stderr)
	}
	return string(out)
}

// restoreFigures is what __org.gnomon_query-restore returns of what matters here.
type restoreFigures struct {
	Complete        bool  `json:"complete"`
	GuestFaults     int64 `json:"guest-faults"`
	DeviceFaults    int64 `json:"device-faults"`
	DemandPages     int64 `json:"demand-pages"`
	AheadPages      int64 `json:"ahead-pages"`
	BackgroundPages int64 `json:"background-pages"`
	CopyCalls       int64 `json:"copy-calls"`
	BlockReads      int64 `json:"block-reads"`
	UsedPages       int64 `json:"used-pages"`
	UnusedPages     int64 `json:"unused-pages"`
}

// A machine is saved while it runs, once whole and once by what changed, its
// process is killed, and another goes on with it.
func TestCheckpointCommands(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	kernel, err := probe.Path()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	full, child, flat := filepath.Join(dir, "full"), filepath.Join(dir, "child"), filepath.Join(dir, "flat")
	p, serial := launch(t, "--kernel", kernel, "--append", "fill size=32M; wait for=host; verify", "--memory", "96M", "--net", "none")
	p.connect(ctx, t)
	readUntil(serial, "probe: fill")
	for !strings.Contains(command(ctx, t, "ps", "--output", "json"), p.name) {
	}
	var report struct {
		File   string `json:"file"`
		ID     string `json:"id"`
		Parent string `json:"parent"`
		Pages  int64  `json:"pages"`
		Bytes  int64  `json:"file-bytes"`
		Writes int64  `json:"writes"`
	}
	save := func(args ...string) {
		t.Helper()
		out := command(ctx, t, append([]string{"checkpoint", p.name, "--output", "json"}, args...)...)
		report.Parent = ""
		if err := json.Unmarshal([]byte(out), &report); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		if most := report.Bytes/(256<<10) + 50; report.Writes > most {
			t.Errorf("%d writes for %d bytes", report.Writes, report.Bytes)
		}
	}
	save("--to", full)
	if report.File != full || report.Pages != 96<<20/4096 {
		t.Errorf("%+v", report)
	}
	whole := report
	save("--to", child, "--parent", full, "--mode", "stop", "--no-flush")
	if report.Parent != full || report.Pages*10 > whole.Pages && report.Bytes*2 > whole.Bytes {
		t.Errorf("%+v continues %+v", report, whole)
	}
	if out := command(ctx, t, "checkpoint", p.name, "--to", filepath.Join(dir, "text")); !strings.Contains(out, "paused for") {
		t.Errorf("printed %q", out)
	}
	if err := p.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	<-p.stopped

	command(ctx, t, "checkpoint", "verify", child)
	if out := command(ctx, t, "checkpoint", "info", child); !strings.Contains(out, report.ID) || !strings.Contains(out, whole.ID) {
		t.Errorf("info does not name the chain:\n%s", out)
	}
	command(ctx, t, "checkpoint", "flatten", child, "--to", flat)
	if err := os.Remove(full); err != nil {
		t.Fatal(err)
	}
	for _, prefetch := range []string{"none", "locality"} {
		next, rw := launchCommand(t, "restore", flat, "--prefetch", prefetch, "--record")
		if _, err := rw.Write([]byte("go on\n")); err != nil {
			t.Fatal(err)
		}
		said := readUntil(rw, "probe: done")
		if status := next.status(ctx, t); status != 0 {
			t.Errorf("status %d\n%s", status, &next.log)
		}
		results := probe.Parse(said)
		if len(results.Lines) == 0 || results.Lines[len(results.Lines)-1].Values["bad"] != "0" {
			t.Errorf("%s: the restored guest says:\n%s", prefetch, said)
		}
	}
}

// readUntil reads what a guest says until it says text, or ends.
func readUntil(r io.Reader, text string) string {
	var said strings.Builder
	for buf := make([]byte, 4096); !strings.Contains(said.String(), text); {
		n, err := r.Read(buf)
		said.Write(buf[:n])
		if err != nil {
			break
		}
	}
	return said.String()
}

// A machine's process that is killed at any point of saving leaves the earlier
// checkpoints whole, their disk as it was, that in use good, and no file by the
// new one's name that is not whole.
func TestKilledWhileSaving(t *testing.T) {
	const kills = 100
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	kernel, err := probe.Path()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	random := rand.New(rand.NewPCG(1, 2))
	complete, partial := 0, 0
	window := 20 * time.Millisecond // within which a save is killed: about half of them are complete then
	for i := range kills {
		full, child := filepath.Join(dir, "full"), filepath.Join(dir, "child")
		img := filepath.Join(dir, "disk.qcow2")
		if err := qcow2.Create(img, qcow2.CreateOptions{Size: 4 << 20}); err != nil {
			t.Fatal(err)
		}
		p, _ := launch(t, "--kernel", kernel, "--append", "fill size=8M; blk op=randwrite bs=4k qd=4 count=100000000", "--memory", "32M", "--net", "none", "--serial", "null", "--disk", "file="+img)
		p.connect(ctx, t)
		save := func(file, parent string) error {
			args := map[string]any{"job-id": filepath.Base(file), "file": file}
			if parent != "" {
				args["parent"] = parent
			}
			return p.qmp.Execute(ctx, "__org.gnomon_checkpoint", args, nil)
		}
		if err := save(full, ""); err != nil {
			t.Fatal(err)
		}
		for !concluded(ctx, t, p, "full") {
			time.Sleep(time.Millisecond) // its process needs the processor
		}
		kept := sum(t, img)
		if err := save(child, full); err != nil {
			t.Fatal(err)
		}
		for until := time.Now().Add(time.Duration(random.Int64N(int64(window)))); time.Now().Before(until); {
			runtime.Gosched()
		}
		if err := p.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		<-p.stopped
		if r, err := checkpoint.Open(full); err != nil {
			t.Fatalf("kill %d: the earlier checkpoint: %v", i, err)
		} else if err := errors.Join(r.Verify(ctx, nil), r.Close()); err != nil {
			t.Fatalf("kill %d: the earlier checkpoint: %v", i, err)
		}
		switch r, err := checkpoint.Open(child); {
		case err == nil:
			complete++
			window = window * 8 / 10
			if err := errors.Join(r.Verify(ctx, nil), r.Close()); err != nil {
				t.Errorf("kill %d: %v", i, err)
			}
		case errors.Is(err, fs.ErrNotExist):
			partial++
			window = window * 10 / 8
		default:
			t.Errorf("kill %d: a file by the checkpoint's name: %v", i, err)
		}
		if sum(t, img) != kept {
			t.Errorf("kill %d: the disk that belongs to the earlier checkpoint was changed", i)
		}
		overlays, _ := filepath.Glob(img + ".*.qcow2")
		for _, overlay := range overlays {
			n, err := qcow2.Open(overlay, false) // which repairs what was not closed
			if err == nil {
				err = n.Close()
			}
			if err != nil {
				t.Errorf("kill %d: %v", i, err)
			}
		}
		if i%10 == 0 && len(overlays) > 0 {
			// Status 3: nothing but leaked clusters.
			cmd := exec.CommandContext(ctx, "qemu-img", "check", overlays[0])
			if out, err := cmd.CombinedOutput(); err != nil && cmd.ProcessState.ExitCode() != 3 {
				t.Errorf("kill %d: %v: %s", i, err, out)
			}
		}
		left, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range left {
			if partial, _ := filepath.Match(".child.*.partial", f.Name()); !partial && f.Name() != "full" && f.Name() != "child" && !strings.HasPrefix(strings.TrimPrefix(f.Name(), "."), "disk.qcow2") {
				t.Errorf("kill %d left %s behind", i, f.Name())
			}
			if err := os.Remove(filepath.Join(dir, f.Name())); err != nil {
				t.Fatal(err)
			}
		}
	}
	t.Logf("%d saves were complete, %d were not", complete, partial)
	if partial == 0 || complete == 0 {
		t.Errorf("%d complete and %d partial saves: the kills were not spread over saving", complete, partial)
	}
}

// concluded tells that a job has ended well.
func concluded(ctx context.Context, t *testing.T, p *process, id string) bool {
	t.Helper()
	var jobs []struct{ ID, Status, Error string }
	p.do(ctx, t, "query-jobs", nil, &jobs)
	for _, j := range jobs {
		if j.ID == id && j.Status == "concluded" {
			if j.Error != "" {
				t.Fatal(j.Error)
			}
			return true
		}
	}
	return false
}

// A disk belongs to the checkpoint as it was: neither the machine that goes on
// nor one that is restored changes it, and both find what they wrote.
func TestCheckpointKeepsDisks(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	kernel, err := probe.Path()
	if err != nil {
		t.Fatal(err)
	}
	for _, format := range []string{"raw", "qcow2"} {
		t.Run(format, func(t *testing.T) {
			dir := t.TempDir()
			img, file := filepath.Join(dir, "disk."+format), filepath.Join(dir, "checkpoint")
			qemuImg(ctx, t, "create", "-q", "-f", format, img, "8M")
			const words = "blk op=randwrite bs=4k qd=4 count=300000 seed=5 order=1; wait for=test; blk op=randread bs=4k qd=4 count=4096 seed=5 order=1 verify=1"
			p, serial := launch(t, "--kernel", kernel, "--append", words, "--memory", "64M", "--net", "none", "--disk", "file="+img)
			p.connect(ctx, t)
			parent := ""
			files := []string{}
			for i := range 3 {
				args := []string{"checkpoint", p.name, "--to", fmt.Sprint(file, i)}
				if parent != "" {
					args = append(args, "--parent", parent)
				}
				if i == 2 { // this one has a disk of its own
					args = append(args, "--disks", "copy")
				}
				command(ctx, t, args...)
				parent = fmt.Sprint(file, i)
				files = append(files, parent)
			}
			kept := sum(t, img)
			verified(t, serial)
			p.status(ctx, t)
			for i, f := range files {
				next, serial := launchCommand(t, "restore", f)
				verified(t, serial)
				if status := next.status(ctx, t); status != 0 {
					t.Errorf("checkpoint %d: status %d\n%s", i, status, &next.log)
				}
			}
			if sum(t, img) != kept {
				t.Error("the disk that belongs to the first checkpoint was changed")
			}
			images, _ := filepath.Glob(filepath.Join(dir, "*.qcow2"))
			if len(images) < 6 {
				t.Errorf("overlays are missing: %v", images)
			}
			for _, i := range images {
				if out := qemuImg(ctx, t, "check", i); !strings.Contains(out, "No errors were found") {
					t.Errorf("%s: %s", i, out)
				}
			}
			// The machine's last overlays go back into the image.
			for i := len(files) - 2; i >= 0; i-- {
				command(ctx, t, "checkpoint", "commit", img+"."+filepath.Base(files[i])+".qcow2")
			}
			p, serial = launch(t, "--kernel", kernel, "--append", words[strings.Index(words, ";")+1:], "--memory", "64M", "--net", "none", "--disk", "file="+img)
			verified(t, serial)
			p.status(ctx, t)
		})
	}
}

// verified lets a guest that waits for the test go on, and waits for its end; it
// must have found what it wrote.
func verified(t *testing.T, serial io.ReadWriter) {
	t.Helper()
	goOn := func() {
		// One that has ended reads no more.
		if _, err := io.WriteString(serial, "\n"); err != nil && !errors.Is(err, syscall.EPIPE) {
			t.Fatal(err)
		}
	}
	goOn() // it may wait already, and have said so to another process
	var text strings.Builder
	for lines := bufio.NewReader(serial); ; {
		line, err := lines.ReadString('\n')
		text.WriteString(line)
		if strings.HasPrefix(line, "probe: wait") {
			goOn()
		}
		if err == io.EOF {
			break
		} else if err != nil {
			t.Fatal(err)
		}
	}
	results := probe.Parse(text.String())
	checks := 0
	for _, l := range results.Lines {
		if bad, ok := l.Values["bad"]; ok {
			checks++
			if bad != "0" {
				t.Errorf("%s found %s bad", l.Name, bad)
			}
		}
	}
	if err := results.Err(); err != nil || checks == 0 || t.Failed() {
		t.Errorf("%v: the guest says:\n%s", err, &text)
	}
}

func qemuImg(ctx context.Context, t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(ctx, "qemu-img", args...).CombinedOutput()
	if err != nil {
		t.Fatalf("qemu-img %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

func sum(t *testing.T, path string) [sha256.Size]byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return sha256.Sum256(b)
}

// QEMU's jobs take a machine back and forth between its snapshots, its disk and its
// memory together.
func TestSnapshotJobs(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	kernel, err := probe.Path()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	img := filepath.Join(dir, "disk.qcow2")
	qemuImg(ctx, t, "create", "-q", "-f", "qcow2", img, "8M")
	const words = "fill size=16M; blk op=randwrite bs=4k qd=4 count=300000 seed=5 order=1; verify; wait for=test; blk op=randread bs=4k qd=4 count=4096 seed=5 order=1 verify=1"
	p, serial := launch(t, "--kernel", kernel, "--append", words, "--memory", "64M", "--net", "none", "--cpus", "2", "--disk", "file="+img)
	p.connect(ctx, t)
	var nodes []struct {
		NodeName string `json:"node-name"`
		File     string `json:"file"`
	}
	p.do(ctx, t, "query-named-block-nodes", nil, &nodes)
	node := nodes[0].NodeName
	jobs := 0
	job := func(kind, tag string) string {
		t.Helper()
		jobs++
		id := fmt.Sprint("job", jobs)
		args := map[string]any{"job-id": id, "tag": tag, "devices": []string{node}}
		if kind != "snapshot-delete" {
			args["vmstate"] = node
		}
		p.do(ctx, t, kind, args, nil)
		for {
			var all []struct{ ID, Type, Status, Error string }
			p.do(ctx, t, "query-jobs", nil, &all)
			for _, j := range all {
				if j.ID == id && j.Status == "concluded" {
					if j.Type != kind {
						t.Errorf("%s is a job of type %s", kind, j.Type)
					}
					p.do(ctx, t, "job-dismiss", map[string]any{"id": id}, nil)
					return j.Error
				}
			}
			time.Sleep(time.Millisecond) // its process needs the processor
		}
	}
	for i, step := range []struct{ kind, tag, refused string }{
		{"snapshot-load", "a", "does not exist"},
		{"snapshot-save", "a", ""},
		{"snapshot-save", "a", "already exists"},
		{"snapshot-save", "b", ""},
		{"snapshot-load", "a", ""},
		{"snapshot-load", "b", ""},
		{"snapshot-save", "c", ""},
		{"snapshot-load", "a", ""},
		{"snapshot-load", "c", ""},
		{"snapshot-delete", "b", ""},
		{"snapshot-delete", "b", ""},
		{"snapshot-load", "b", "does not exist"},
		{"snapshot-save", "../d", "cannot be part of a file's name"},
		{"snapshot-load", "a", ""},
	} {
		if got := job(step.kind, step.tag); step.refused == "" && got != "" || !strings.Contains(got, step.refused) {
			t.Fatalf("step %d, %s %s: error %q, want %q\n%s", i, step.kind, step.tag, got, step.refused, &p.log)
		}
	}
	p.do(ctx, t, "query-named-block-nodes", nil, &nodes)
	verified(t, serial)
	p.status(ctx, t)
	if out := qemuImg(ctx, t, "check", nodes[0].File); !strings.Contains(out, "No errors were found") {
		t.Errorf("%s: %s", nodes[0].File, out)
	}
}
