package tests

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"syscall"

	"github.com/vishvananda/netlink"
)

const inOwnNetwork = "GNOMON_TESTS_IN_OWN_NETWORK"

// inNetwork runs run in a network namespace of its own where that is permitted:
// neither the host's interfaces nor those that a killed run left are seen, and the
// tests' end with their processes.
func inNetwork(run func() int) int {
	if os.Geteuid() != 0 {
		return run() // what needs an interface says so
	}
	if os.Getenv(inOwnNetwork) != "" {
		if err := loopbackUp(); err != nil {
			fmt.Fprintln(os.Stderr, "loopback:", err)
			return 1
		}
		return run()
	}
	// The child is killed when the thread that began it ends.
	runtime.LockOSThread()
	child := exec.Command("/proc/self/exe", os.Args[1:]...)
	child.Env = append(os.Environ(), inOwnNetwork+"=1")
	child.Stdin, child.Stdout, child.Stderr = os.Stdin, os.Stdout, os.Stderr
	child.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	err := child.Run()
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit) && exit.Exited():
		return exit.ExitCode()
	}
	fmt.Fprintln(os.Stderr, "tests in a network of their own:", err)
	return 1
}

func loopbackUp() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(lo)
}
