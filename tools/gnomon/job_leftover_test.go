package main

import (
	"os"
	"os/exec"
	"strings"
	"testing"
)

// A job is known by its name to be of a process that lives, or of one that is gone,
// whoever has its id now; of others nothing is known.
func TestJobNames(t *testing.T) {
	for _, label := range []string{"consolidate", "backup"} {
		id, err := nameJob(label)
		if err != nil {
			t.Fatal(err)
		}
		if again, _ := nameJob(label); again == id {
			t.Errorf("two jobs are named %s", id)
		}
		p, ok := jobOf(id)
		if !ok || p.pid != os.Getpid() || p.gone() {
			t.Errorf("%s: %+v, %v", id, p, ok)
		}
		later := p
		later.beganAtTick--
		if !later.gone() {
			t.Error("a process that had our id before us is not gone")
		}
		elsewhere := later
		elsewhere.namespace++
		if elsewhere.gone() {
			t.Error("a process of another namespace passes for gone")
		}
	}
	cmd := exec.Command("cat")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p, err := findProcess(cmd.Process.Pid)
	if err != nil || p.gone() {
		t.Errorf("%+v: %v", p, err)
	}
	in.Close()
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	if !p.gone() {
		t.Error("a process that has ended is not gone")
	}
	for _, id := range strings.Fields("consolidate consolidate- consolidate-12 consolidate-12-345 backup-0-1-2-3 backup--1-1-2-3 pull-1-2-3-4 consolidate-x-y-z-w") {
		if p, ok := jobOf(id); ok {
			t.Errorf("%s is named after %+v", id, p)
		}
	}
}
