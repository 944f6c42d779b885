//go:build linux

package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// terminal is the device behind /dev/console.
type terminal struct {
	name string
	file *os.File
}

// openConsole finds the terminal that the kernel's console= named last:
// /dev/console itself cannot be a controlling terminal.
func openConsole() (*terminal, error) {
	active, err := os.ReadFile("/sys/class/tty/console/active")
	if err != nil {
		return nil, fmt.Errorf("find the console: %w", err)
	}
	names := strings.Fields(string(active))
	if len(names) == 0 {
		return nil, errors.New("find the console: the kernel has none")
	}
	name := names[len(names)-1]
	// Not os.OpenFile: the runtime's poller must not own a descriptor that a
	// shell will share.
	fd, err := unix.Open("/dev/"+name, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open the console /dev/%s: %w", name, err)
	}
	return &terminal{name: name, file: os.NewFile(uintptr(fd), "/dev/"+name)}, nil
}

// raw turns off echo, line editing and newline translation.
func (t *terminal) raw() error {
	fd := int(t.file.Fd())
	tio, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return err
	}
	tio.Iflag &^= unix.BRKINT | unix.ICRNL | unix.INLCR | unix.IGNCR | unix.INPCK | unix.ISTRIP | unix.IXON
	tio.Oflag &^= unix.OPOST
	tio.Cflag |= unix.CS8
	tio.Lflag &^= unix.ECHO | unix.ICANON | unix.IEXTEN | unix.ISIG
	tio.Cc[unix.VMIN], tio.Cc[unix.VTIME] = 1, 0
	return unix.IoctlSetTermios(fd, unix.TCSETS, tio)
}

const greeting = `
This is the Gnomon Linux kit: busybox, e2fsprogs and a small init.
Leaving the shell powers the machine off.
`

// shell gives the console to a person and powers off when they leave.
func shell(t *terminal) {
	setConsoleLevel(4)
	fmt.Fprint(t.file, greeting)
	cmd := exec.Command("/bin/busybox", "sh", "-l")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = t.file, t.file, t.file
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := children.run(cmd); err != nil {
		var exit *exec.ExitError
		if !errors.As(err, &exit) {
			fmt.Fprintln(t.file, "init: no shell:", err)
			return
		}
	}
	leave(powerOff)
}
