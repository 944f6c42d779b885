// Command gnomon runs virtual machines on /dev/kvm and drives them, and QEMU's,
// over QMP.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"unicode"

	"github.com/spf13/cobra"

	"github.com/gnomon-vmm/gnomon/vmm"
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
		return ""
	}
	return e.err.Error()
}

func (e *exitStatus) Unwrap() error { return e.err }

func usageError(err error) error { return &exitStatus{statusUsage, err} }

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	status := execute(ctx, os.Args[1:])
	stop()
	os.Exit(status)
}

func execute(ctx context.Context, args []string) int {
	root := newRootCommand()
	root.SetArgs(args)
	cmd, err := root.ExecuteContextC(ctx)
	if err == nil {
		return statusOK
	}
	status := statusError
	var exit *exitStatus
	switch {
	case errors.As(err, &exit):
		status = exit.status
	case errors.Is(err, vmm.ErrConfig):
		status = statusUsage
	}
	if text := said(ctx, cmd, args, err); text != "" {
		if status == statusUsage {
			text += fmt.Sprintf(" (%s --help tells more)", cmd.CommandPath())
		}
		fmt.Fprintf(os.Stderr, "gnomon: %s\n", text)
	}
	return status
}

// said is what the user is told of an error.
func said(ctx context.Context, cmd *cobra.Command, args []string, err error) string {
	text := err.Error()
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		text = strings.ReplaceAll(text, context.Canceled.Error(), interrupted)
		if text == interrupted {
			text = strings.TrimPrefix(cmd.CommandPath(), "gnomon ") + ": " + text
		}
	}
	for _, arg := range args {
		_, value, _ := strings.Cut(arg, "=")
		for _, name := range []string{arg, value} {
			if clean := printable(name); clean != name {
				text = strings.ReplaceAll(text, name, clean)
			}
		}
	}
	return oneLine(errors.New(text))
}

const interrupted = "interrupted"

// printable is a text with what is not to be printed, such as a newline in a name,
// written as Go does.
func printable(s string) string {
	if strings.IndexFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) < 0 {
		return s
	}
	quoted := strconv.Quote(s)
	return quoted[1 : len(quoted)-1]
}

// oneLine is what an error says, on one line.
func oneLine(err error) string {
	lines := strings.FieldsFunc(err.Error(), func(r rune) bool { return r == '\n' || r == '\r' })
	return strings.Join(lines, "; ")
}

func newRootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:   "gnomon",
		Short: "Run virtual machines on /dev/kvm and drive them over QMP",
		Long: `Run virtual machines on /dev/kvm and drive them, and QEMU's, over QMP.

gnomon host tells what this host can do; gnomon run starts a machine; gnomon ps
and gnomon qmp find it and drive it from another terminal.`,
		Version:       version(),
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          usageArgs(cobra.NoArgs),
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError(flagError(err)) })
	root.AddCommand(newRunCommand(), newCheckpointCommand(), newRestoreCommand(), newStatsCommand(), newPsCommand(), newDiskCommand(), newBackupCommand(), newQMPCommand(), newHostCommand(), newVersionCommand())
	root.SetVersionTemplate("gnomon {{.Version}}\n")
	return root
}

// usageArgs makes a wrong number of arguments a usage error.
func usageArgs(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		err := check(cmd, args)
		if err == nil {
			return nil
		}
		if !strings.HasPrefix(err.Error(), "unknown command") {
			given := fmt.Sprintf("%d arguments were", len(args))
			if len(args) == 1 {
				given = "1 argument was"
			}
			err = fmt.Errorf("%s given: the command is %s", given, cmd.UseLine())
		}
		return usageError(err)
	}
}

// addOutputFlag adds --output to a command that prints data.
func addOutputFlag(cmd *cobra.Command) *string {
	output := cmd.Flags().String("output", "text", "`form` of what is printed: text or json")
	completeFlag(cmd, "output", "text", "json")
	return output
}

// completeFlag has shells complete a flag's value to one of the choices.
func completeFlag(cmd *cobra.Command, flag string, choices ...string) {
	err := cmd.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(choices, cobra.ShellCompDirectiveNoFileComp))
	if err != nil {
		panic(err) // there is no such flag, which every test of the command would see
	}
}

func checkOutput(output string) error {
	if output != "text" && output != "json" {
		return usageError(fmt.Errorf("--output %q: text and json are possible", output))
	}
	return nil
}
