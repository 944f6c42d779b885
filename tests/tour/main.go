// Command tour is what make run runs: it boots the Linux kit with bin/gnomon.
// With -shell the guest's shell is at this terminal. Otherwise it is shown
// around: each step does one thing in the guest or over QMP and prints what came
// of it, and the exit status is 0 when all went well.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/gnomon-vmm/gnomon/tests/guest"
)

// limit ends a tour that hangs.
const limit = 15 * time.Minute

func main() {
	gnomon := flag.String("gnomon", "bin/gnomon", "the command to run machines with")
	shell := flag.Bool("shell", false, "give this terminal to a shell in the guest")
	flag.Parse()
	if err := run(*gnomon, *shell); err != nil {
		fmt.Fprintln(os.Stderr, "tour:", err)
		fmt.Println("FAIL\ttour")
		os.Exit(1)
	}
}

func run(gnomon string, shell bool) error {
	gnomon, err := filepath.Abs(gnomon)
	if err != nil {
		return err
	}
	if _, err := os.Stat(gnomon); err != nil {
		return fmt.Errorf("%w: make build makes it", err)
	}
	kit, err := guest.FindLinux()
	if err != nil {
		return err
	}
	// What the kernel says while it starts is worth seeing here.
	kit.Cmdline = strings.Replace(kit.Cmdline, " quiet ", " loglevel=6 ", 1)
	if shell {
		return giveShell(gnomon, kit)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("not done after %v", limit))
	defer cancel()
	return tour(ctx, gnomon, kit)
}

const shellHelp = `A Linux machine named %[1]s starts at this terminal.
  Ctrl-a x  ends it at once; exit or poweroff in its shell end it in order
  Ctrl-a h  tells the other keys
From another terminal:
  %[2]s ps
  %[2]s qmp %[1]s stop              # pauses it, time included
  %[2]s qmp %[1]s query-cpus-fast   # looks at it
  %[2]s qmp %[1]s cont              # lets it go on
  %[2]s qmp %[1]s system_powerdown  # presses its power button
  %[2]s qmp %[1]s                   # a prompt with all commands

`

// giveShell becomes gnomon run.
func giveShell(gnomon string, kit guest.Kit) error {
	name, err := freeName(gnomon, "linux")
	if err != nil {
		return err
	}
	short := gnomon
	if here, err := os.Getwd(); err == nil {
		if relative, err := filepath.Rel(here, gnomon); err == nil && !strings.HasPrefix(relative, "..") {
			short = relative
		}
	}
	fmt.Printf(shellHelp, name, short)
	cmdline := strings.Replace(kit.Cmdline, "gnomon.console=agent", "gnomon.console=shell", 1)
	err = syscall.Exec(gnomon, []string{
		gnomon, "run", "--name", name, "--cpus", "2", "--memory", "256M",
		"--kernel", kit.Kernel, "--initrd", kit.Initrd, "--append", cmdline,
	}, os.Environ())
	return fmt.Errorf("run %s: %w", gnomon, err)
}

// freeName is name, or one made of it if a machine of that name is running.
func freeName(gnomon, name string) (string, error) {
	out, err := exec.Command(gnomon, "ps", "--output", "json").Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return "", fmt.Errorf("gnomon ps: %w: %s", err, strings.TrimSpace(string(exit.Stderr)))
	}
	if err != nil {
		return "", fmt.Errorf("gnomon ps: %w", err)
	}
	var machines []struct{ Name string }
	if err := json.Unmarshal(out, &machines); err != nil {
		return "", fmt.Errorf("gnomon ps: %w", err)
	}
	for _, m := range machines {
		if m.Name == name {
			return fmt.Sprintf("%s-%d", name, os.Getpid()), nil
		}
	}
	return name, nil
}
