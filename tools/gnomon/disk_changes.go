package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/gnomon-vmm/gnomon/disk"
	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/changes"
	"github.com/gnomon-vmm/gnomon/qmp/client"
)

// changesReport is what gnomon disk changes prints of an application.
type changesReport struct {
	Application string         `json:"application"`
	All         bool           `json:"all"` // all of the disk counts as changed
	Reason      string         `json:"reason,omitempty"`
	BlockSize   int64          `json:"block-size"`
	Bytes       int64          `json:"bytes"`
	Extents     []changeExtent `json:"extents"`
}

type changeExtent struct {
	Start  int64 `json:"start"`
	Length int64 `json:"length"`
}

// applicationReport is what gnomon disk changes --list prints of each application.
type applicationReport struct {
	Application string    `json:"application"`
	Time        time.Time `json:"time"` // of its last backup
	All         bool      `json:"all"`  // which does not count any more
}

func newDiskChangesCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "changes FILE|MACHINE [DISK] [--application NAME [--since-last|--reset|--forget]] [--list]",
		Short: "Tell which parts of a disk changed since an application's last backup",
		Long: `Tell which parts of a disk changed since an application's last backup, as --disk file=FILE,changes=on had them recorded in
FILE.changes. Any number of applications have their own. Where it is not known what changed (the first time, or when the
disk was written without recording) all of it is told, and why. Of a disk that is in use name the machine: what has changed
up to now is told.`,
		Example: `  gnomon disk changes disk.img --application offsite
  gnomon disk changes disk.img --application offsite --reset   # it has been backed up
  gnomon disk changes vm1 disk0 --application offsite`,
		Args: usageArgs(cobra.RangeArgs(1, 2)),
	}
	flags := cmd.Flags()
	format := addFormatFlag(cmd, "format", "f", "`format`: raw|qcow2 (default: what the name says)")
	application := flags.StringP("application", "a", "", "`name` of the application")
	flags.Bool("since-last", false, "tell what changed since the application's last backup (the default where one is named)")
	reset := flags.Bool("reset", false, "the application has backed up the disk as it is now")
	forget := flags.Bool("forget", false, "the application does not exist any more")
	list := flags.Bool("list", false, "tell of all applications (the default where none is named)")
	cmd.MarkFlagsMutuallyExclusive("since-last", "reset", "forget", "list")
	output := addOutputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) (err error) {
		if err := checkOutput(*output); err != nil {
			return err
		}
		*list = *list || *application == "" && !*reset && !*forget && !flags.Changed("since-last")
		if !*list && *application == "" {
			return usageError(errors.New("no --application: name the one that is meant"))
		}
		q := changesQuery{*application, *list, *reset, *forget, *output}
		if info, err := os.Stat(args[0]); err != nil || info.Mode()&os.ModeSocket != 0 {
			return onDisk(q.running)(cmd, args)
		}
		if len(args) == 2 {
			return usageError(fmt.Errorf("%s is a disk: leave out %s", args[0], args[1]))
		}
		if _, err := os.Stat(changes.Path(args[0])); errors.Is(err, fs.ErrNotExist) && !*reset {
			return fmt.Errorf("%s: its changes are not recorded: use it with --disk file=%s,changes=on", args[0], args[0])
		}
		return withChanges(args[0], *format, func(n block.Node, r *changes.Recorder) error {
			switch {
			case *list:
				all := []applicationReport{}
				for _, a := range r.Applications() {
					all = append(all, applicationReport{a.Name, a.Time, a.Epoch == 0})
				}
				return printApplications(cmd, all, *output)
			case *forget:
				return r.Forget(*application)
			}
			s, err := r.Since(n, *application)
			if err != nil {
				return err
			}
			if *reset {
				return s.Commit()
			}
			report := changesReport{
				Application: s.Application, All: s.Changed == nil, Reason: s.Reason, BlockSize: r.BlockSize(), Bytes: s.Bytes(), Extents: []changeExtent{},
			}
			for off, n := range s.Extents() {
				report.Extents = append(report.Extents, changeExtent{off, n})
			}
			return printChanges(cmd, report, *output)
		})
	}
	return cmd
}

// changesQuery is what is asked about a running machine's disk.
type changesQuery struct {
	application         string
	list, reset, forget bool
	output              string
}

func (q *changesQuery) running(cmd *cobra.Command, c *client.Client, d *attachedDisk) error {
	args := map[string]any{"device": d.ref()}
	if q.list {
		all := []applicationReport{}
		if err := c.Execute(cmd.Context(), "__org.gnomon_disk-changes-list", args, &all); err != nil {
			return err
		}
		return printApplications(cmd, all, q.output)
	}
	args["application"] = q.application
	switch {
	case q.forget:
		return c.Execute(cmd.Context(), "__org.gnomon_disk-changes-forget", args, nil)
	case q.reset:
		return c.Execute(cmd.Context(), "__org.gnomon_disk-changes-reset", args, nil)
	}
	report := changesReport{Application: q.application}
	if err := c.Execute(cmd.Context(), "__org.gnomon_disk-changes", args, &report); err != nil {
		return err
	}
	return printChanges(cmd, report, q.output)
}

// withChanges calls f with a disk that no machine uses and what has recorded its
// changes.
func withChanges(path, format string, f func(block.Node, *changes.Recorder) error) error {
	n, err := disk.Open(path, disk.Options{Format: format, ReadOnly: true})
	if err != nil {
		return err
	}
	r, err := changes.Open(changes.Path(path), n, changes.Options{})
	if err != nil {
		if errors.Is(err, block.ErrInUse) {
			err = fmt.Errorf("%w: name that machine instead of the disk, or end it", err)
		}
		return errors.Join(err, n.Close())
	}
	err = f(n, r)
	return errors.Join(err, n.Close(), r.Close())
}

func printApplications(cmd *cobra.Command, all []applicationReport, output string) error {
	if output == "json" {
		return printJSON(cmd.OutOrStdout(), all)
	}
	w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "APPLICATION\tLAST BACKUP\tCHANGES SINCE")
	for _, a := range all {
		known := "known"
		if a.All {
			known = "not known"
		}
		fmt.Fprintf(w, "%s\t%s\t%s\n", a.Application, a.Time.Format(time.RFC3339), known)
	}
	return w.Flush()
}

func printChanges(cmd *cobra.Command, report changesReport, output string) error {
	if output == "json" {
		return printJSON(cmd.OutOrStdout(), report)
	}
	w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "Offset\tLength")
	for _, e := range report.Extents {
		fmt.Fprintf(w, "%#x\t%#x\n", e.Start, e.Length)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	if report.All {
		fmt.Fprintf(cmd.ErrOrStderr(), "all of the disk counts as changed: %s\n", report.Reason)
	}
	return nil
}
