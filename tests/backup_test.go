package tests

import (
	"context"
	"encoding/json"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/gnomon-vmm/gnomon/tests/guest/probe"
)

// backedUp is what gnomon backup prints.
type backedUp struct {
	Number int
	Full   bool
	Bytes  int64
	File   string
}

func backupInto(ctx context.Context, t *testing.T, args ...string) (b backedUp) {
	t.Helper()
	if err := json.Unmarshal([]byte(command(ctx, t, append([]string{"backup", "--output", "json"}, args...)...)), &b); err != nil {
		t.Fatal(err)
	}
	return b
}

// Backups of a machine that is running, ours and QEMU's, have what changed since the
// one before, and are the disk as it was.
func TestBackupsOfMachines(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	const words = "blk op=randwrite bs=4k qd=4 count=50000 seed=5 order=1; wait for=test; blk op=randread bs=4k qd=4 count=8192 seed=5 order=1 verify=1"
	for _, vmm := range []string{"gnomon", "QEMU"} {
		for _, tt := range []struct{ format, kept string }{{"raw", ""}, {"qcow2", "qcow2"}, {"raw", "raw"}, {"qcow2", "raw"}} {
			format := tt.format
			t.Run(vmm+" "+format+" "+tt.kept, func(t *testing.T) {
				dir := t.TempDir()
				at := func(name string) string { return filepath.Join(dir, name) }
				img, machine, into := at("disk."+format), at("qmp.sock"), at("backups")
				qemuImg(ctx, t, "create", "-q", "-f", format, img, "16M")
				p, serial := launchEither(ctx, t, vmm, words, img, ",changes=on", machine)
				same := func() {
					t.Helper()
					qemuImg(ctx, t, "compare", "-U", "-f", format, "-F", "qcow2", img, at("reference.qcow2"))
				}
				for i := range 5 {
					b := backupInto(ctx, t, machine, "--into", into, "--incremental", "--format", tt.kept)
					if b.Number != i+1 || b.Full != (i == 0) {
						t.Errorf("backup %d: %+v", i+1, b)
					}
				}
				// Nobody writes while it is compared.
				command(ctx, t, "qmp", machine, "stop")
				backupInto(ctx, t, machine, "disk0", "--into", into, "--incremental")
				if b := backupInto(ctx, t, machine, "disk0", "--into", into, "--incremental"); b.Full || b.Bytes > 1<<20 {
					t.Errorf("nothing changed, and backup %d has %d bytes", b.Number, b.Bytes)
				}
				command(ctx, t, "backup", machine, "--to", at("reference.qcow2"))
				command(ctx, t, "backup", "restore", into, at("restored.img"))
				qemuImg(ctx, t, "compare", "-f", "raw", "-F", "qcow2", at("restored.img"), at("reference.qcow2"))
				if format == "raw" {
					same()
				}
				command(ctx, t, "qmp", machine, "cont")
				if b := backupInto(ctx, t, machine, "--into", into); b.Number != 8 || !b.Full {
					t.Errorf("a full backup: %+v", b)
				}
				if out := command(ctx, t, "backup", "verify", into); !strings.HasPrefix(out, "8 backups") {
					t.Errorf("verify: %q", out)
				}
				if out := command(ctx, t, "backup", "prune", into, "--keep", "3"); !strings.HasPrefix(out, "removed 5") {
					t.Errorf("prune: %q", out)
				}
				command(ctx, t, "backup", "restore", into, at("again.img"), "--step", "7")
				qemuImg(ctx, t, "compare", "-f", "raw", "-F", "raw", at("restored.img"), at("again.img"))
				verified(t, serial)
				if status := p.status(ctx, t); status != 0 {
					t.Errorf("status %d\n%s", status, &p.log)
				}
			})
		}
	}
}

// Backups of a disk that no machine uses go on from what machines recorded.
func TestBackupsAtRest(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	kernel, err := probe.Path()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	img, into := at("disk.img"), at("backups")
	qemuImg(ctx, t, "create", "-q", "-f", "raw", img, "16M")
	for i := range 3 {
		b := backupInto(ctx, t, img, "--into", into, "--incremental")
		if b.Full != (i == 0) || i > 0 && (b.Bytes < 1<<20 || b.Bytes > 2<<20) {
			t.Errorf("backup %d: %+v", i+1, b)
		}
		command(ctx, t, "backup", "restore", into, at("restored.img"))
		qemuImg(ctx, t, "compare", "-f", "raw", "-F", "raw", img, at("restored.img"))
		if err := os.Remove(at("restored.img")); err != nil {
			t.Fatal(err)
		}
		words := []string{"blk op=seqwrite bs=64k seed=3 total=1M; blk op=seqread bs=64k seed=3 total=1M verify=1", "blk op=seqwrite bs=64k seed=4 total=1M; blk op=seqread bs=64k seed=4 total=1M verify=1", ""}[i]
		if words == "" {
			break
		}
		p, serial := launchProgram(t, gnomon, "run", "--kernel", kernel, "--append", words, "--memory", "64M", "--net", "none", "--disk", "file="+img+",changes=on")
		verified(t, serial)
		if status := p.status(ctx, t); status != 0 {
			t.Fatalf("status %d\n%s", status, &p.log)
		}
	}
	var list []backedUp
	if err := json.Unmarshal([]byte(command(ctx, t, "backup", "list", into, "--output", "json")), &list); err != nil || len(list) != 3 {
		t.Fatalf("list: %+v, %v", list, err)
	}
	damaged := filepath.Join(into, list[1].File)
	b, err := os.ReadFile(damaged)
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)/2] ^= 1
	if err := os.WriteFile(damaged, b, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		args   []string
		status int
		says   string
	}{
		{[]string{"verify", into}, 1, "2 of 3 backups cannot be restored"},
		{[]string{"restore", into, at("new.img")}, 1, "damaged backup 2"},
		{[]string{"restore", into, at("new.img"), "--step", "9"}, 1, "no such backup"},
		{[]string{"prune", into}, 2, "--keep"},
		{[]string{"prune", into, "--keep", "1"}, 1, "damaged backup 2"},
		{[]string{"list", dir}, 1, "backups.json"},
		{[]string{img, "--to", at("new.img")}, 2, "gnomon disk convert"},
		{[]string{img}, 2, "no --to, --into or --serve"},
		{[]string{img, "--into", into, "--format", "raw"}, 1, "kept as qcow2"},
		{[]string{img, "--into", into, "--format", "dir"}, 2, "qcow2 and raw are possible"},
	} {
		cmd := exec.CommandContext(ctx, gnomon, append([]string{"backup"}, tt.args...)...)
		var stderr strings.Builder
		cmd.Stderr = &stderr
		err := cmd.Run()
		if cmd.ProcessState.ExitCode() != tt.status || !strings.Contains(stderr.String(), tt.says) {
			t.Errorf("backup %v: %v, %q; want status %d and %q", tt.args, err, &stderr, tt.status, tt.says)
		}
		if _, err := os.Lstat(at("new.img")); err == nil {
			t.Errorf("backup %v left an image behind", tt.args)
		}
	}
	command(ctx, t, "backup", "restore", into, at("new.img"), "--step", "1")
}

// pushed is the node on a machine that is sent to a backup into raw files.
var pushed = regexp.MustCompile(`"node-name": *"gnomon-`)

// A backup into raw files that is killed while the machine sends it what changed leaves
// a job and a node on the machine: the next one takes them back, and goes on from the
// newest backup that counts.
func TestKilledBackupsOfMachines(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	for i, vmm := range []string{"gnomon", "QEMU"} {
		t.Run(vmm, func(t *testing.T) {
			dir := t.TempDir()
			at := func(name string) string { return filepath.Join(dir, name) }
			img, machine, into := at("disk.qcow2"), at("qmp.sock"), at("backups")
			qemuImg(ctx, t, "create", "-q", "-f", "qcow2", img, "32M")
			launchEither(ctx, t, vmm, "blk op=randwrite bs=4k qd=4 rounds=1000000 total=4M span=32M seed=5 order=1", img, "", machine)
			args := []string{machine, "--into", into, "--incremental", "--format", "raw"}
			backupInto(ctx, t, args...)
			left, w, random := 0, newWindow(), rand.New(rand.NewPCG(uint64(i), 9))
			for kills := 0; kills < 15 || left == 0 || w.complete == 0; kills++ {
				if kills == 100 {
					t.Fatalf("%d times something was left, %d backups were complete", left, w.complete)
				}
				cmd := exec.CommandContext(ctx, gnomon, append([]string{"backup"}, args...)...)
				var stderr strings.Builder
				cmd.Stderr = &stderr
				if err := cmd.Start(); err != nil {
					t.Fatal(err)
				}
				timer := time.AfterFunc(w.random(random), func() { cmd.Process.Kill() })
				err := cmd.Wait()
				timer.Stop()
				if err != nil && cmd.ProcessState.ExitCode() != -1 {
					t.Fatalf("backup: %v: %s", err, &stderr)
				}
				w.count(err == nil)
				if pushed.MatchString(command(ctx, t, "qmp", machine, "query-named-block-nodes")) {
					left++
				}
			}
			command(ctx, t, "qmp", machine, "stop")
			last := backupInto(ctx, t, args...)
			if again := backupInto(ctx, t, args...); last.Full || again.Full || again.Bytes != 0 {
				t.Errorf("%+v, then %+v", last, again)
			}
			command(ctx, t, "backup", machine, "--to", at("reference.qcow2"))
			command(ctx, t, "backup", "restore", into, at("restored.img"))
			qemuImg(ctx, t, "compare", "-f", "raw", "-F", "qcow2", at("restored.img"), at("reference.qcow2"))
			command(ctx, t, "backup", "verify", into)
			if out := command(ctx, t, "qmp", machine, "query-named-block-nodes"); pushed.MatchString(out) {
				t.Errorf("a node is left on the machine: %s", out)
			}
			if out := command(ctx, t, "qmp", machine, "query-jobs"); strings.Contains(out, "gnomon-") {
				t.Errorf("a job is left on the machine: %s", out)
			}
		})
	}
}
