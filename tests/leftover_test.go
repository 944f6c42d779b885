package tests

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// jobName is what a command names its job after its process.
func jobName(t *testing.T, pid int) string {
	t.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	namespace, err := os.Readlink("/proc/self/ns/pid")
	if err != nil {
		t.Fatal(err)
	}
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	return fmt.Sprintf("consolidate-%d-%s-%s-1", pid, fields[19], strings.Trim(namespace, "pid:[]"))
}

// The job of a command that was killed does not keep the next from the disk, whatever
// that is to do; one whose process lives is left alone.
func TestJobsOfKilledCommands(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	for _, vmm := range []string{"gnomon", "QEMU"} {
		t.Run(vmm, func(t *testing.T) {
			dir := t.TempDir()
			at := func(name string) string { return filepath.Join(dir, name) }
			machine := at("qmp.sock")
			launchWriting(ctx, t, vmm, at("disk.img"), machine)
			command(ctx, t, "disk", "snapshot", machine, "disk0", "--to", at("one.qcow2"))
			leave := func(id string) {
				t.Helper()
				command(ctx, t, "qmp", machine, "block-commit", "job-id="+id, "device=disk0", "auto-dismiss=false")
			}
			there := func(id string) bool { return strings.Contains(command(ctx, t, "qmp", machine, "query-jobs"), id) }

			alive := jobName(t, os.Getpid())
			leave(alive)
			if out, err := exec.CommandContext(ctx, gnomon, "disk", "consolidate", machine).CombinedOutput(); err == nil || !there(alive) {
				t.Errorf("beside one that is alive: %v, %s", err, out)
			}
			command(ctx, t, "qmp", machine, "job-cancel", "id="+alive)
			for !there("concluded") {
			}
			command(ctx, t, "qmp", machine, "job-dismiss", "id="+alive)

			for _, next := range [][]string{
				{"disk", "snapshot", machine, "disk0", "--to", at("two.qcow2")},
				{"backup", machine, "--to", at("copy.qcow2")},
				{"backup", machine, "--into", at("backups"), "--incremental"},
				{"disk", "consolidate", machine, "--all"},
			} {
				p, _ := launchProgram(t, "sleep", "1000")
				id := jobName(t, p.Process.Pid)
				leave(id)
				if err := p.Process.Kill(); err != nil {
					t.Fatal(err)
				}
				<-p.stopped
				command(ctx, t, next...)
				if there(id) {
					t.Errorf("%v left the job of one that was killed", next)
				}
			}
		})
	}
}
