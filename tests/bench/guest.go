package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/tests/guest/probe"
)

// patience is how long one run may take.
const patience = 2 * time.Minute

// clock is CLOCK_MONOTONIC, on which the kernel's traces are, too.
func clock() time.Duration {
	var t unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &t) // cannot fail
	return time.Duration(t.Nano())
}

// A vmm starts machines with the probe guest.
type vmm struct {
	binary string
	ram    string // name of the memfd that holds guest RAM
	// args are those of a machine that runs the probe guest's workloads,
	// its serial port at stdin and stdout.
	args func(words string) []string
	env  []string
	// patience is how long a guest may run, where it is not patience.
	patience time.Duration
	file     *os.File // descriptor 3 of the process, where not nil
}

// A guest is a running VMM and its guest.
type guest struct {
	vmm     vmm
	cmd     *exec.Cmd
	started time.Duration // just before the process was made
	stdin   io.WriteCloser
	stderr  strings.Builder
	cancel  context.CancelFunc

	lines chan stamped

	once sync.Once
	err  error
}

// stamped is a line of serial output and when its end arrived.
type stamped struct {
	text string
	at   time.Duration
}

func (v vmm) start(ctx context.Context, words string, more ...string) (*guest, error) {
	limit := patience
	if v.patience > 0 {
		limit = v.patience
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	g := &guest{vmm: v, cancel: cancel, lines: make(chan stamped, 100)}
	g.cmd = exec.CommandContext(ctx, v.binary, append(v.args(words), more...)...)
	g.cmd.Env = append(os.Environ(), v.env...)
	g.cmd.Stderr = &g.stderr
	if v.file != nil {
		g.cmd.ExtraFiles = []*os.File{v.file}
	}
	var err error
	var stdout io.ReadCloser
	if g.stdin, err = g.cmd.StdinPipe(); err == nil {
		stdout, err = g.cmd.StdoutPipe()
	}
	if err != nil {
		cancel()
		return nil, err
	}
	g.started = clock()
	if err := g.cmd.Start(); err != nil {
		cancel()
		return nil, err
	}
	go func() {
		defer close(g.lines)
		for r := bufio.NewReader(stdout); ; {
			text, err := r.ReadString('\n')
			if err != nil {
				return
			}
			select {
			case g.lines <- stamped{text, clock()}:
			case <-ctx.Done():
				return
			}
		}
	}()
	return g, nil
}

// line waits for the next result of a workload.
func (g *guest) line(workload string) (probe.Line, time.Duration, error) {
	for l := range g.lines {
		for _, line := range probe.Parse(l.text).Lines {
			switch line.Name {
			case workload:
				return line, l.at, nil
			case "error", "unknown", "fault":
				return line, l.at, fmt.Errorf("the guest failed: %s", strings.TrimSpace(l.text))
			}
		}
	}
	return probe.Line{}, 0, errors.Join(fmt.Errorf("no line %q came from the guest", workload), g.end())
}

// results waits until the guest has powered off.
func (g *guest) results() (probe.Results, error) {
	var all strings.Builder
	for l := range g.lines {
		all.WriteString(l.text)
	}
	if err := g.end(); err != nil {
		return probe.Results{}, err
	}
	r := probe.Parse(all.String())
	return r, r.Err()
}

// release lets a guest in wait go on.
func (g *guest) release() error {
	_, err := io.WriteString(g.stdin, "\n")
	return err
}

// end waits for the process and tells how it ended.
func (g *guest) end() error {
	g.once.Do(func() {
		for range g.lines { // the pipe must be empty before Wait closes it
		}
		if err := g.cmd.Wait(); err != nil {
			g.err = fmt.Errorf("%s: %w: %s", g.cmd, err, g.stderr.String())
		}
		g.cancel()
	})
	return g.err
}

// kill ends a guest that may still run.
func (g *guest) kill() {
	g.cancel()
	_ = g.end()
}

func (g *guest) pid() int { return g.cmd.Process.Pid }

// ramFile opens the memfd with the guest's RAM.
func (g *guest) ramFile() (*os.File, error) {
	dir := fmt.Sprintf("/proc/%d/fd", g.pid())
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		if to, err := os.Readlink(path); err == nil && strings.HasPrefix(to, "/memfd:"+g.vmm.ram+" ") {
			return os.OpenFile(path, os.O_RDWR, 0)
		}
	}
	return nil, fmt.Errorf("process %d has no memfd %s", g.pid(), g.vmm.ram)
}
