//go:build linux

// Command init is the only program that the Linux kit's guest must run: it
// makes the guest usable, answers the requests of package wire on the console
// and on vsock, and gives a person a shell.
//
// The kernel command line chooses what the console is for:
//
//	gnomon.console=shell  a busybox shell (the default)
//	gnomon.console=agent  requests and replies, nothing else
//	gnomon.console=tour   a short tour of the guest, then a wait for power-off
//
// Requests on vsock and on the first virtio console are answered in each case.
//
// It runs where a system call costs the better part of a millisecond and the
// first touch of a page costs several, so it does little before it is ready.
package main

import (
	"fmt"
	"os"
	"runtime/debug"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/tests/guest/wire"
)

func main() {
	// The heap stays small; collecting it less often saves guest time.
	debug.SetGCPercent(400)
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "init: this program is the first process of the Gnomon Linux kit and does nothing elsewhere")
		os.Exit(2)
	}
	started := sinceBoot()
	mountBasics()
	cmdline := readCmdline()
	avoidUnsavedRegisters(cmdline)
	console, err := openConsole()
	if err != nil {
		// Without a console there is nobody to tell; vsock may still work.
		fmt.Fprintln(os.Stderr, "init:", err)
	}
	a := newAgent(started)
	go reapOrphans()
	watchPowerButton(a) // before ready: a press that comes earlier is lost
	mode := cmdline["gnomon.console"]
	if console != nil && mode == "agent" {
		if err := console.raw(); err != nil {
			fmt.Fprintln(os.Stderr, "init: console:", err)
		}
		// A message in the middle of a reply would spoil it. What the kernel
		// says when it panics comes all the same.
		setConsoleLevel(1)
	}
	if err := bringUp("lo"); err != nil {
		fmt.Fprintln(os.Stderr, "init: lo:", err)
	}
	a.listenVsock()
	a.listenVirtioConsole(console)
	a.ready = sinceBoot()
	fmt.Fprintf(os.Stderr, "%s after %.2f s\n", wire.Ready, a.ready.Seconds())
	go serveNetwork()
	switch {
	case console == nil:
	case mode == "agent":
		a.serve(console.file)
	case mode == "tour":
		tour(console, a)
	default:
		shell(console)
	}
	select {}
}

// sinceBoot is the guest's own time since its kernel started.
func sinceBoot() time.Duration {
	var ts unix.Timespec
	if unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts) != nil {
		return 0
	}
	return time.Duration(ts.Nano())
}

func mountBasics() {
	for _, m := range []struct{ source, target, fstype string }{
		{"devtmpfs", "/dev", "devtmpfs"},
		{"proc", "/proc", "proc"},
		{"sysfs", "/sys", "sysfs"},
	} {
		_ = unix.Mkdir(m.target, 0o755)
		err := unix.Mount(m.source, m.target, m.fstype, unix.MS_NOSUID, "")
		if err != nil && err != unix.EBUSY {
			fmt.Fprintf(os.Stderr, "init: mount %s: %v\n", m.target, err)
		}
	}
	for _, kv := range [][2]string{
		{"PATH", "/bin:/sbin"},
		{"HOME", "/root"},
		{"TERM", "linux"},
	} {
		_ = os.Setenv(kv[0], kv[1])
	}
}

func readCmdline() map[string]string {
	m := map[string]string{}
	data, _ := os.ReadFile("/proc/cmdline") // without it: the defaults
	for _, word := range strings.Fields(string(data)) {
		key, value, _ := strings.Cut(word, "=")
		m[key] = value
	}
	return m
}

// setConsoleLevel is what `dmesg -n` does.
func setConsoleLevel(level int) {
	const syslogActionConsoleLevel = 8
	_, _, _ = unix.Syscall(unix.SYS_SYSLOG, syslogActionConsoleLevel, 0, uintptr(level))
}
