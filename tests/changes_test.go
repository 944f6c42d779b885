package tests

import (
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/gnomon-vmm/gnomon/tests/guest/probe"
)

// changesOf is what gnomon disk changes tells of an application.
func changesOf(ctx context.Context, t *testing.T, img, application string) (c struct {
	All     bool
	Reason  string
	Bytes   int64
	Extents []struct{ Start, Length int64 }
},
) {
	t.Helper()
	if err := json.Unmarshal([]byte(command(ctx, t, "disk", "changes", img, "--application", application, "--output", "json")), &c); err != nil {
		t.Fatal(err)
	}
	return c
}

// What guests write is told to each application since its own last backup, after an
// end in order and after a kill -9, of raw and qcow2 disks.
func TestChangesOfDisks(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	kernel, err := probe.Path()
	if err != nil {
		t.Fatal(err)
	}
	for _, format := range []string{"raw", "qcow2"} {
		t.Run(format, func(t *testing.T) {
			dir := t.TempDir()
			img, machine := filepath.Join(dir, "disk."+format), filepath.Join(dir, "qmp.sock")
			qemuImg(ctx, t, "create", "-q", "-f", format, img, "64M")
			run := func(words string) (*process, func()) {
				p, serial := launchProgram(t, gnomon, "run", "--kernel", kernel, "--append", words, "--memory", "64M", "--net", "none", "--disk", "file="+img+",changes=on", "--qmp", "unix:"+machine)
				if strings.Contains(words, "wait") {
					readUntil(serial, "probe: wait")
					return p, func() {}
				}
				return p, func() {
					verified(t, serial)
					if status := p.status(ctx, t); status != 0 {
						t.Fatalf("status %d\n%s", status, &p.log)
					}
				}
			}
			if out, err := exec.CommandContext(ctx, gnomon, "disk", "changes", img).CombinedOutput(); err == nil || !strings.Contains(string(out), "are not recorded") {
				t.Errorf("before any recording: %v, %s", err, out)
			}
			command(ctx, t, "disk", "changes", img, "--application", "hourly", "--reset")
			command(ctx, t, "disk", "changes", img, "--application", "daily", "--reset")

			_, ended := run("blk op=seqwrite bs=64k seed=3 total=8M; blk op=seqread bs=64k seed=3 total=8M verify=1")
			ended()
			if c := changesOf(ctx, t, img, "hourly"); c.All || c.Bytes != 8<<20 || len(c.Extents) != 1 || c.Extents[0].Start != 0 {
				t.Errorf("after 8 MiB: %+v", c)
			}
			command(ctx, t, "disk", "changes", img, "--application", "hourly", "--reset")

			killed, _ := run("blk op=seqwrite bs=64k seed=4 total=1M; wait for=ever")
			if out, err := exec.CommandContext(ctx, gnomon, "disk", "changes", img).CombinedOutput(); err == nil || !strings.Contains(string(out), "in use") {
				t.Errorf("while it is in use: %v, %s", err, out)
			}
			if c := changesOf(ctx, t, machine, "hourly"); c.All || c.Bytes != 1<<20 || len(c.Extents) != 1 || c.Extents[0].Start != 0 || c.Extents[0].Length != 1<<20 {
				t.Errorf("of the machine: %+v", c)
			}
			if c := changesOf(ctx, t, machine, "weekly"); !c.All || c.Bytes != 64<<20 || !strings.Contains(c.Reason, "no earlier backup") {
				t.Errorf("of the machine, without a backup: %+v", c)
			}
			command(ctx, t, "disk", "changes", machine, "disk0", "--application", "weekly", "--reset")
			if c := changesOf(ctx, t, machine, "weekly"); c.All || c.Bytes != 0 || len(c.Extents) != 0 {
				t.Errorf("of the machine, just backed up: %+v", c)
			}
			if out := command(ctx, t, "disk", "changes", machine, "--list"); strings.Count(out, "known") != 3 || !strings.Contains(out, "weekly") {
				t.Errorf("of the machine: %s", out)
			}
			command(ctx, t, "disk", "changes", machine, "--application", "weekly", "--forget")
			if err := killed.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			killed.status(ctx, t)
			if c := changesOf(ctx, t, img, "hourly"); c.All || c.Bytes < 1<<20 || c.Bytes > 16<<20 || c.Extents[0].Start != 0 {
				t.Errorf("after kill -9: %+v", c)
			}
			if c := changesOf(ctx, t, img, "daily"); c.All || c.Bytes < 8<<20 || c.Bytes > 24<<20 {
				t.Errorf("since the day before: %+v", c)
			}
			if c := changesOf(ctx, t, img, "yearly"); !c.All || c.Bytes != 64<<20 || !strings.Contains(c.Reason, "no earlier backup") {
				t.Errorf("an application without a backup: %+v", c)
			}

			// Without changes=on.
			f, err := os.OpenFile(img, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			b := make([]byte, 1)
			if _, err := f.ReadAt(b, 0); err != nil {
				t.Fatal(err)
			}
			if _, err := f.WriteAt(b, 0); err != nil {
				t.Fatal(err)
			}
			f.Close()
			if c := changesOf(ctx, t, img, "daily"); !c.All || !strings.Contains(c.Reason, "was written while") {
				t.Errorf("after a write that was not recorded: %+v", c)
			}
			command(ctx, t, "disk", "changes", img, "--application", "daily", "--forget")
			var all []struct {
				Application string
				All         bool
			}
			if err := json.Unmarshal([]byte(command(ctx, t, "disk", "changes", img, "--list", "--output", "json")), &all); err != nil || len(all) != 1 || all[0].Application != "hourly" || !all[0].All {
				t.Errorf("list: %+v, %v", all, err)
			}
		})
	}
}
