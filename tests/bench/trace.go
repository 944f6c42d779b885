package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// traceFS is where the kernel's tracing is; it takes root.
const traceFS = "/sys/kernel/tracing"

func traceable() bool {
	_, err := os.Stat(filepath.Join(traceFS, "events/syscalls/sys_enter_ioctl"))
	return err == nil
}

// trace records every ioctl(KVM_RUN) on the host in a buffer of its own.
type trace struct{ dir string }

// newTrace begins recording. It returns nil where tracing is not to be had.
func newTrace() (*trace, error) {
	if !traceable() {
		return nil, nil
	}
	t := &trace{filepath.Join(traceFS, "instances", fmt.Sprintf("gnomon-bench-%d", os.Getpid()))}
	if err := os.Mkdir(t.dir, 0o700); err != nil {
		return nil, fmt.Errorf("trace: %w", err)
	}
	const event = "events/syscalls/sys_enter_ioctl/"
	for _, setting := range [][2]string{
		{"trace_clock", "mono"},
		{"options/overwrite", "0"}, // the first of the records is the one we want
		{event + "filter", "cmd==0xae80"},
		{event + "enable", "1"},
	} {
		if err := os.WriteFile(filepath.Join(t.dir, setting[0]), []byte(setting[1]), 0); err != nil {
			t.close()
			return nil, fmt.Errorf("trace: %w", err)
		}
	}
	return t, nil
}

func (t *trace) close() {
	if t != nil {
		_ = os.WriteFile(filepath.Join(t.dir, "events/enable"), []byte("0"), 0)
		_ = os.Remove(t.dir)
	}
}

// firstRun is when a thread of the process first called KVM_RUN.
func (t *trace) firstRun(pid int) (time.Duration, error) {
	text, err := os.ReadFile(filepath.Join(t.dir, "trace"))
	if err != nil {
		return 0, fmt.Errorf("trace: %w", err)
	}
	return firstOf(string(text), func(tid int) bool {
		_, err := os.Stat(fmt.Sprintf("/proc/%d/task/%d", pid, tid))
		return err == nil
	})
}

// A line of a trace: command-TID [CPU] flags seconds.microseconds: event.
var traceLine = regexp.MustCompile(`-(\d+) +\[\d+\] +\S+ +(\d+)\.(\d{6}): sys_ioctl\(`)

// firstOf finds the first record of a thread.
func firstOf(text string, thread func(tid int) bool) (time.Duration, error) {
	for line := range strings.Lines(text) {
		m := traceLine.FindStringSubmatch(line)
		if m == nil {
			continue
		}
		tid, err := strconv.Atoi(m[1])
		if err != nil || !thread(tid) {
			continue
		}
		seconds, err := strconv.ParseInt(m[2]+m[3], 10, 64)
		if err != nil {
			return 0, fmt.Errorf("trace: %w", err)
		}
		return time.Duration(seconds) * time.Microsecond, nil
	}
	return 0, errors.New("trace: the process never called KVM_RUN")
}
