// Command gnomon runs virtual machines on /dev/kvm and drives them, and QEMU's,
// over QMP.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
)

// Exit statuses.
const (
	statusOK    = 0
	statusError = 1
	statusUsage = 2
	statusPanic = 3 // gnomon run: the guest's kernel panicked
	statusReset = 4 // gnomon run --no-reboot: the guest reset itself
)

// exitStatus is an error with an exit status of its own.
type exitStatus struct {
	status int
	err    error // nil: nothing to print
}

func (e *exitStatus) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit status %d", e.status)
	}
	return e.err.Error()
}

func (e *exitStatus) Unwrap() error { return e.err }

func usageError(err error) error { return &exitStatus{statusUsage, err} }

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	status := execute(ctx, os.Args[1:])
	stop()
	os.Exit(status)
}

func execute(ctx context.Context, args []string) int {
	root := newRootCommand()
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return statusOK
	}
	status := statusError
	var exit *exitStatus
	if errors.As(err, &exit) {
		status = exit.status
		if exit.err == nil {
			return status
		}
	}
	fmt.Fprintf(os.Stderr, "gnomon: %v\n", err)
	if status == statusUsage {
		fmt.Fprintln(os.Stderr, "gnomon: see gnomon --help, and gnomon COMMAND --help")
	}
	return status
}

func newRootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:           "gnomon",
		Short:         "Run virtual machines on /dev/kvm and drive them over QMP",
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          usageArgs(cobra.NoArgs),
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError(err) })
	root.AddCommand(newRunCommand(), newPsCommand(), newQMPCommand(), newHostCommand())
	return root
}

// usageArgs makes a wrong number of arguments a usage error.
func usageArgs(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if err := check(cmd, args); err != nil {
			return usageError(err)
		}
		return nil
	}
}

// addOutputFlag adds --output to a command that prints data.
func addOutputFlag(cmd *cobra.Command) *string {
	return cmd.Flags().String("output", "text", "form of what is printed: text or json")
}

func checkOutput(output string) error {
	if output != "text" && output != "json" {
		return usageError(fmt.Errorf("--output %q: text and json are possible", output))
	}
	return nil
}
