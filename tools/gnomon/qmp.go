package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/gnomon-vmm/gnomon/qmp"
	"github.com/gnomon-vmm/gnomon/qmp/client"
)

// qmpConnectTimeout is how long a server may take to greet. QEMU serves one client at a time and lets others wait.
const qmpConnectTimeout = 5 * time.Second

func newQMPCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "qmp MACHINE [COMMAND [KEY=VALUE]...]",
		Short: "Run QMP commands on a machine of Gnomon or QEMU",
		Long: `Run a QMP command on a machine and print what it returns. MACHINE is a machine's name, or the path of a unix
socket, or unix:PATH or tcp:HOST:PORT; the server may be QEMU, too.

Arguments are as for QEMU's qmp-shell: integers, true and false are what they look like; values beginning with {, [
or " are JSON; all others are strings. Dots in a key lead into nested objects: file.driver=file is the same
as file={"driver":"file"}.

Without COMMAND, commands are read from standard input: at a terminal line by line, with history, completion and events as
they come; otherwise as JSON.`,
		Example: `  gnomon qmp vm1 query-status
  gnomon qmp /run/vm.sock set_link name=net0 up=false
  gnomon qmp vm1 --events
  echo '{"execute": "query-version"}' | gnomon qmp unix:/run/qemu.sock --output json`,
		Args:              usageArgs(cobra.MinimumNArgs(1)),
		ValidArgsFunction: completeQMP,
	}
	// What follows MACHINE belongs to the command, but flags may stand anywhere.
	output := addOutputFlag(cmd)
	events := cmd.Flags().Bool("events", false, "print events until interrupted, after COMMAND if there is one")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := checkOutput(*output); err != nil {
			return err
		}
		var command []byte
		if len(args) > 1 {
			var err error
			if command, err = client.ParseCommand(args[1:]); err != nil {
				return usageError(err)
			}
		}
		c, err := dialQMP(cmd.Context(), args[0])
		if err != nil {
			return err
		}
		defer c.Close()
		p := &qmpPrinter{out: cmd.OutOrStdout(), raw: *output == "json"}
		return runQMP(cmd.Context(), c, p, cmd.InOrStdin(), command, *events)
	}
	return cmd
}

func dialQMP(ctx context.Context, machine string) (*client.Client, error) {
	ctx, cancel := context.WithTimeout(ctx, qmpConnectTimeout)
	defer cancel()
	address, err := qmpAddress(machine)
	if err != nil {
		return nil, err
	}
	c, err := client.Dial(ctx, address)
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return nil, fmt.Errorf("%w; another client may be connected to it", err)
	case errors.Is(err, os.ErrNotExist):
		return nil, fmt.Errorf("%w; gnomon ps lists the machines that are running", err)
	}
	return c, err
}

// runQMP does what the arguments ask for: a command, watching events, or commands from in.
func runQMP(ctx context.Context, c *client.Client, p *qmpPrinter, in io.Reader, command []byte, watch bool) error {
	var events <-chan client.Event
	if watch {
		events = c.Subscribe(ctx)
	}
	switch {
	case command != nil:
		if err := p.execute(ctx, c, command); err != nil {
			return err
		}
	case watch:
	case isTerminal(in) && isTerminal(p.out):
		return interactQMP(ctx, c, in.(*os.File), p)
	default:
		return pipeQMP(ctx, c, in, p)
	}
	if watch {
		ended := false
		for e := range events {
			p.event(e)
			ended = ended || e.Event == "SHUTDOWN"
		}
		if ctx.Err() == nil && !ended {
			return fmt.Errorf("%w: the machine is gone", client.ErrConnection)
		}
	}
	return nil
}

func isTerminal(f any) bool {
	file, ok := f.(*os.File)
	return ok && term.IsTerminal(int(file.Fd()))
}

// pipeQMP runs JSON commands from in up to the first that fails.
func pipeQMP(ctx context.Context, c *client.Client, in io.Reader, p *qmpPrinter) error {
	d := json.NewDecoder(in)
	for {
		var command json.RawMessage
		err := d.Decode(&command)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("standard input: %w", err)
		}
		if err := p.execute(ctx, c, command); err != nil {
			return err
		}
	}
}

const promptHelp = `COMMAND [KEY=VALUE]...: query-commands lists the machine's commands.
Tab completes a command, the arrows up and down bring earlier lines back, Ctrl-D or Ctrl-C leaves; the machine runs on.`

// interactQMP is a shell on a terminal.
func interactQMP(ctx context.Context, c *client.Client, in *os.File, p *qmpPrinter) error {
	ctx, leave := context.WithCancel(ctx)
	defer leave() // before the connection is closed: who leaves need not hear that
	names, err := c.Commands(ctx)
	if err != nil {
		return err
	}
	before, err := term.MakeRaw(int(in.Fd()))
	if err != nil {
		return fmt.Errorf("terminal: %w", err)
	}
	defer term.Restore(int(in.Fd()), before)
	t := term.NewTerminal(struct {
		io.Reader
		io.Writer
	}{in, p.out}, "(QMP) ")
	t.AutoCompleteCallback = func(line string, pos int, key rune) (string, int, bool) {
		if key != '\t' {
			return "", 0, false
		}
		completed, choices := completeName(line[:pos], names)
		if len(choices) > 1 {
			// The terminal holds its lock while it asks, so this must come later.
			go fmt.Fprintln(t, strings.Join(choices, "  "))
		}
		return completed + line[pos:], len(completed), true
	}
	p = &qmpPrinter{out: t, raw: p.raw}
	fmt.Fprintf(t, "Connected to %s %s. help tells the keys, Ctrl-D ends.\n", c.Version.Package, c.Version)
	events := c.Subscribe(ctx)
	go func() {
		for e := range events {
			p.event(e)
		}
		if ctx.Err() == nil {
			fmt.Fprintln(t, "The machine is gone.")
		}
	}()
	for {
		line, err := t.ReadLine()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("terminal: %w", err)
		}
		words := client.SplitWords(line)
		if len(words) == 0 {
			continue
		}
		if len(words) == 1 && words[0] == "help" {
			fmt.Fprintln(t, promptHelp)
			continue
		}
		command, err := client.ParseCommand(words)
		if err == nil {
			err = p.execute(ctx, c, command)
		}
		if errors.Is(err, client.ErrConnection) {
			return err
		}
		if err != nil {
			fmt.Fprintln(t, err)
		}
	}
}

// completeName completes the command at the beginning of a line as far as it is certain, and returns what it may become.
func completeName(line string, names []string) (completed string, choices []string) {
	for _, name := range names {
		if strings.HasPrefix(name, line) {
			choices = append(choices, name)
		}
	}
	if len(choices) == 0 {
		return line, nil
	}
	completed = choices[0]
	for _, name := range choices[1:] {
		for !strings.HasPrefix(name, completed) {
			completed = completed[:len(completed)-1]
		}
	}
	if len(choices) == 1 {
		completed += " "
	}
	return completed, choices
}

// qmpPrinter writes results and events for people, or raw, one JSON value a line.
type qmpPrinter struct {
	out io.Writer
	raw bool
}

// execute runs a command and prints what it returns. A refusal is reported with its class.
func (p *qmpPrinter) execute(ctx context.Context, c *client.Client, command []byte) error {
	value, err := c.ExecuteRaw(ctx, command)
	var refusal *qmp.Error
	if errors.As(err, &refusal) {
		return fmt.Errorf("%s: %w", refusal.Class, refusal)
	}
	if err != nil {
		return err
	}
	return p.value(value)
}

func (p *qmpPrinter) value(value json.RawMessage) error {
	var b bytes.Buffer
	var err error
	if p.raw {
		err = json.Compact(&b, value)
	} else {
		err = json.Indent(&b, value, "", "  ")
	}
	if err != nil {
		return fmt.Errorf("what the machine returned: %w", err)
	}
	b.WriteByte('\n')
	_, err = p.out.Write(b.Bytes())
	return err
}

// qmpEvent is the shape of an event with --output json.
type qmpEvent struct {
	Event     string         `json:"event"`
	Data      map[string]any `json:"data,omitempty"`
	Timestamp struct {
		Seconds      int64 `json:"seconds"`
		Microseconds int64 `json:"microseconds"`
	} `json:"timestamp"`
}

func (p *qmpPrinter) event(e client.Event) {
	if p.raw {
		out := qmpEvent{Event: e.Event, Data: e.Data}
		out.Timestamp.Seconds, out.Timestamp.Microseconds = e.Timestamp.Seconds, e.Timestamp.Microseconds
		if line, err := json.Marshal(out); err == nil {
			fmt.Fprintf(p.out, "%s\n", line)
		}
		return
	}
	at := time.Unix(e.Timestamp.Seconds, e.Timestamp.Microseconds*1000)
	line := at.Format("15:04:05.000000") + " " + e.Event
	if len(e.Data) > 0 {
		if data, err := json.Marshal(e.Data); err == nil {
			line += " " + string(data)
		}
	}
	fmt.Fprintln(p.out, line)
}

// completeQMP completes a machine's name, then a command of that machine.
func completeQMP(cmd *cobra.Command, args []string, prefix string) ([]string, cobra.ShellCompDirective) {
	switch len(args) {
	case 0:
		machines, err := runningMachines()
		if err != nil {
			return nil, cobra.ShellCompDirectiveDefault
		}
		var names []string
		for _, m := range machines {
			if strings.HasPrefix(m.Name, prefix) {
				names = append(names, m.Name)
			}
		}
		return names, cobra.ShellCompDirectiveDefault
	case 1:
		c, err := dialQMP(context.Background(), args[0])
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		defer c.Close()
		names, err := c.Commands(context.Background())
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		_, choices := completeName(prefix, names)
		return choices, cobra.ShellCompDirectiveNoFileComp
	default:
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
}
