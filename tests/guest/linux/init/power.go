//go:build linux

package main

import (
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// The ways to leave.
const (
	powerOff = unix.LINUX_REBOOT_CMD_POWER_OFF
	restart  = unix.LINUX_REBOOT_CMD_RESTART
)

// leave writes everything to disk and ends the machine.
func leave(how int) {
	unmountDisks()
	unix.Sync()
	if err := unix.Reboot(how); err != nil {
		fmt.Fprintln(os.Stderr, "init: leaving:", err)
	}
}

// unmountDisks unmounts what stands on block devices, last mounted first, so
// that their file systems are clean.
func unmountDisks() {
	mounts, err := os.ReadFile("/proc/mounts")
	if err != nil {
		return
	}
	lines := strings.Split(strings.TrimSpace(string(mounts)), "\n")
	for i := len(lines) - 1; i >= 0; i-- {
		f := strings.Fields(lines[i])
		if len(f) < 2 || !strings.HasPrefix(f[0], "/dev/") {
			continue
		}
		if unix.Unmount(f[1], 0) != nil {
			_ = unix.Mount("", f[1], "", unix.MS_REMOUNT|unix.MS_RDONLY, "")
		}
	}
}

// crash makes the kernel panic.
func crash() error {
	return os.WriteFile("/proc/sysrq-trigger", []byte("c"), 0)
}

// watchPowerButton has the machine powered off when somebody presses the ACPI
// power button after it has returned.
// The kernel offers one input device for each button the tables describe.
func watchPowerButton(a *agent) {
	paths, _ := filepath.Glob("/dev/input/event*")
	for _, path := range paths {
		f, err := os.Open(path)
		if err != nil {
			continue
		}
		go func() {
			for waitPowerKey(f) == nil {
				a.powerButton.Add(1)
				fmt.Fprintln(os.Stderr, "gnomon-init: power button")
				leave(powerOff)
			}
		}()
	}
}

// waitPowerKey returns when KEY_POWER goes down. An input event is 24 bytes:
// a timeval, and then type, code (16 bits each) and value (32 bits).
func waitPowerKey(r io.Reader) error {
	const (
		evKey    = 1
		keyPower = 116
		pressed  = 1
	)
	var event [24]byte
	for {
		if _, err := io.ReadFull(r, event[:]); err != nil {
			return err
		}
		if binary.LittleEndian.Uint16(event[16:]) == evKey &&
			binary.LittleEndian.Uint16(event[18:]) == keyPower &&
			binary.LittleEndian.Uint32(event[20:]) == pressed {
			return nil
		}
	}
}

// soon gives a reply time to leave before the machine does.
func soon(f func()) {
	time.AfterFunc(200*time.Millisecond, f)
}
