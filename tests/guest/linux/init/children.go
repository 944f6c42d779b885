//go:build linux

package main

import (
	"os"
	"os/exec"
	"os/signal"
	"sync"

	"golang.org/x/sys/unix"
)

// children are the processes that this program started and waits for itself.
// Every other process that ends becomes ours as the first process's, and is
// reaped.
var children = registry{pids: map[int]bool{}, ended: make(chan struct{}, 1)}

type registry struct {
	ended chan struct{} // a word to reapOrphans that one of ours has been waited for

	mu   sync.Mutex // held across starting a child, so that its end is not mistaken for an orphan's
	pids map[int]bool
}

// run is cmd.Run for a program whose first process reaps orphans.
func (r *registry) run(cmd *exec.Cmd) error {
	r.mu.Lock()
	err := cmd.Start()
	if err == nil {
		r.pids[cmd.Process.Pid] = true
	}
	r.mu.Unlock()
	if err != nil {
		return err
	}
	err = cmd.Wait()
	r.mu.Lock()
	delete(r.pids, cmd.Process.Pid)
	r.mu.Unlock()
	select {
	case r.ended <- struct{}{}:
	default:
	}
	return err
}

func (r *registry) ours(pid int) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.pids[pid]
}

// reapOrphans waits for the processes that are not in children, for ever.
func reapOrphans() {
	died := make(chan os.Signal, 1)
	signal.Notify(died, unix.SIGCHLD)
	for {
		select {
		case <-died:
		case <-children.ended:
		}
		for {
			pid := endedChild()
			// One of ours may stand before others in the kernel's list; its
			// own Wait takes it away and wakes us again.
			if pid <= 0 || children.ours(pid) {
				break
			}
			_, _ = unix.Wait4(pid, nil, unix.WNOHANG, nil)
		}
	}
}
