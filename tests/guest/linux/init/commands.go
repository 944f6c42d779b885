//go:build linux

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/tests/guest/wire"
)

type handler func(ctx context.Context, a *agent, args json.RawMessage) (any, error)

// commands is what the agent can do, but for cancel, which needs to know the
// connection.
var commands map[wire.Command]handler

func init() {
	commands = map[wire.Command]handler{
		wire.CommandFacts:      plain((*agent).facts),
		wire.CommandExec:       with(runProgram),
		wire.CommandMount:      with(mount),
		wire.CommandUnmount:    with(unmount),
		wire.CommandWrite:      with(writePattern),
		wire.CommandRead:       with(readSum),
		wire.CommandGetFile:    with(getFile),
		wire.CommandPutFile:    with(putFile),
		wire.CommandDropCaches: plain(dropCaches),
		wire.CommandChurn:      with(churn),
		wire.CommandDHCP:       with(dhcp),
		wire.CommandAddress:    with(setAddress),
		wire.CommandLink:       with(linkState),
		wire.CommandHTTPGet:    with(httpGet),
		wire.CommandEchoTest:   with(echoTest),
		wire.CommandConverse:   with(converse),
		wire.CommandRandom:     with(random),
		wire.CommandMemInfo:    plain(memInfo),
		wire.CommandFill:       withAgent((*agent).fill),
		wire.CommandVerify:     withAgent((*agent).verify),
		wire.CommandForget:     withAgent((*agent).forget),
		wire.CommandBurn:       with(burn),
		wire.CommandClocks:     plain(clocks),
		wire.CommandWatchClock: with(watchClock),
		wire.CommandSleep:      with(sleep),
		wire.CommandDmesg:      with(dmesg),
		wire.CommandEvents:     plain((*agent).events),
		wire.CommandPowerOff:   plain(func(*agent) (any, error) { soon(func() { leave(powerOff) }); return nil, nil }),
		wire.CommandReboot:     plain(func(*agent) (any, error) { soon(func() { leave(restart) }); return nil, nil }),
		wire.CommandPanic:      plain(func(*agent) (any, error) { soon(func() { _ = crash() }); return nil, nil }),
	}
}

// plain makes a handler of a function without arguments.
func plain(f func(*agent) (any, error)) handler {
	return func(_ context.Context, a *agent, _ json.RawMessage) (any, error) { return f(a) }
}

// with makes a handler of a function of decoded arguments.
func with[A any](f func(context.Context, A) (any, error)) handler {
	return withAgent(func(_ *agent, ctx context.Context, args A) (any, error) { return f(ctx, args) })
}

// withAgent is with for methods.
func withAgent[A any](f func(*agent, context.Context, A) (any, error)) handler {
	return func(ctx context.Context, a *agent, raw json.RawMessage) (result any, err error) {
		err = call(raw, func(args A) error {
			result, err = f(a, ctx, args)
			return err
		})
		return result, err
	}
}

func (a *agent) facts() (any, error) {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return nil, err
	}
	cmdline, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return nil, err
	}
	return wire.FactsResult{
		Release: unix.ByteSliceToString(name.Release[:]),
		CPUs:    runtime.NumCPU(),
		Cmdline: strings.TrimSpace(string(cmdline)),
		BootMS:  a.started.Milliseconds(),
		ReadyMS: a.ready.Milliseconds(),
	}, nil
}

func (a *agent) events() (any, error) {
	return wire.EventsResult{PowerButton: a.powerButton.Load()}, nil
}

// limited keeps the first MaxOutput bytes written to it.
type limited struct{ bytes.Buffer }

func (l *limited) Write(p []byte) (int, error) {
	if room := wire.MaxOutput - l.Len(); room < len(p) {
		l.Buffer.Write(p[:max(room, 0)])
		return len(p), nil
	}
	return l.Buffer.Write(p)
}

func runProgram(ctx context.Context, args wire.ExecArgs) (any, error) {
	if len(args.Argv) == 0 {
		return nil, errors.New("no program named")
	}
	if args.TimeoutMS > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Duration(args.TimeoutMS)*time.Millisecond)
		defer cancel()
	}
	argv := args.Argv
	if _, err := exec.LookPath(argv[0]); err != nil && !strings.Contains(argv[0], "/") {
		argv = append([]string{"/bin/busybox"}, argv...)
	}
	var stdout, stderr limited
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(args.Stdin), &stdout, &stderr
	// Grandchildren may hold the pipes after the program is killed.
	cmd.WaitDelay = time.Second
	err := children.run(cmd)
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return nil, err
	}
	status := cmd.ProcessState.ExitCode()
	if ws, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		status = 128 + int(ws.Signal())
	}
	return wire.ExecResult{Status: status, Stdout: stdout.String(), Stderr: stderr.String()}, nil
}

func random(_ context.Context, args wire.RandomArgs) (any, error) {
	if args.Size < 0 || args.Size > wire.MaxOutput {
		return nil, fmt.Errorf("size %d is not between 0 and %d", args.Size, wire.MaxOutput)
	}
	f, err := os.Open(args.Source)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data := make([]byte, args.Size)
	if _, err := io.ReadFull(f, data); err != nil {
		return nil, err
	}
	return wire.DataResult{Data: data}, nil
}

// burn counts turns of a loop on each of so many processors.
func burn(ctx context.Context, args wire.BurnArgs) (any, error) {
	if args.CPUs < 1 || args.CPUs > runtime.NumCPU() {
		return nil, fmt.Errorf("%d processors asked for, %d are here", args.CPUs, runtime.NumCPU())
	}
	ctx, cancel := context.WithTimeout(ctx, time.Duration(args.MS)*time.Millisecond)
	defer cancel()
	turns := make([]uint64, args.CPUs)
	done := make(chan struct{})
	for i := range turns {
		go func() {
			defer func() { done <- struct{}{} }()
			runtime.LockOSThread()
			for ctx.Err() == nil {
				turns[i] += spin()
			}
		}()
	}
	for range turns {
		<-done
	}
	return wire.BurnResult{Turns: turns}, nil
}

// spin is about a millisecond of user-mode work, short of what makes Go's
// scheduler send a signal, which is dear in an interpreted kernel.
func spin() uint64 {
	const turns = 1 << 20
	x := uint64(1)
	for range turns {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
	}
	runtime.KeepAlive(x)
	runtime.Gosched()
	return turns
}

func sleep(ctx context.Context, args wire.SleepArgs) (any, error) {
	select {
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-time.After(time.Duration(args.MS) * time.Millisecond):
		return nil, nil
	}
}

func clocks(*agent) (any, error) {
	var r wire.ClocksResult
	for _, c := range []struct {
		id int32
		ns *int64
	}{
		{unix.CLOCK_REALTIME, &r.Realtime},
		{unix.CLOCK_MONOTONIC, &r.Monotonic},
		{unix.CLOCK_BOOTTIME, &r.Boottime},
	} {
		var ts unix.Timespec
		if err := unix.ClockGettime(c.id, &ts); err != nil {
			return nil, err
		}
		*c.ns = ts.Nano()
	}
	source, err := os.ReadFile("/sys/devices/system/clocksource/clocksource0/current_clocksource")
	if err != nil {
		return nil, err
	}
	r.Source = strings.TrimSpace(string(source))
	return r, nil
}

func dmesg(_ context.Context, args wire.DmesgArgs) (any, error) {
	const syslogActionReadAll = 3
	buf := make([]byte, wire.MaxOutput)
	n, err := unix.Klogctl(syslogActionReadAll, buf)
	if err != nil {
		return nil, err
	}
	lines := strings.Split(strings.TrimRight(string(buf[:n]), "\n"), "\n")
	if args.Lines > 0 && len(lines) > args.Lines {
		lines = lines[len(lines)-args.Lines:]
	}
	return wire.TextResult{Text: strings.Join(lines, "\n")}, nil
}
