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
		Use:   "changes FILE [--application NAME [--since-last|--reset|--forget]] [--list]",
		Short: "Tell which parts of a disk changed since an application's last backup",
		Long: `Tell which parts of a disk changed since an application's last backup, as --disk file=FILE,changes=on had them recorded in
FILE.changes. Any number of applications have their own. No machine uses the disk meanwhile. Where it is not known what
changed (the first time, or when the disk was written without recording) all of it is told, and why.`,
		Example: `  gnomon disk changes disk.img --application offsite
  gnomon disk changes disk.img --application offsite --reset   # it has been backed up`,
		Args: usageArgs(cobra.ExactArgs(1)),
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
		if _, err := os.Stat(changes.Path(args[0])); errors.Is(err, fs.ErrNotExist) && !*reset {
			return fmt.Errorf("%s: its changes are not recorded: use it with --disk file=%s,changes=on", args[0], args[0])
		}
		return withChanges(args[0], *format, func(n block.Node, r *changes.Recorder) error {
			switch {
			case *list:
				return printApplications(cmd, r, *output)
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
			return printChanges(cmd, s, r.BlockSize(), *output)
		})
	}
	return cmd
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
			err = fmt.Errorf("%w: end that machine first", err)
		}
		return errors.Join(err, n.Close())
	}
	err = f(n, r)
	return errors.Join(err, n.Close(), r.Close())
}

func printApplications(cmd *cobra.Command, r *changes.Recorder, output string) error {
	all := []applicationReport{}
	for _, a := range r.Applications() {
		all = append(all, applicationReport{a.Name, a.Time, a.Epoch == 0})
	}
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

func printChanges(cmd *cobra.Command, s *changes.Set, blockSize int64, output string) error {
	report := changesReport{
		Application: s.Application, All: s.Changed == nil, Reason: s.Reason, BlockSize: blockSize, Bytes: s.Bytes(), Extents: []changeExtent{},
	}
	for off, n := range s.Extents() {
		report.Extents = append(report.Extents, changeExtent{off, n})
	}
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
		fmt.Fprintf(cmd.ErrOrStderr(), "all of the disk counts as changed: %s\n", s.Reason)
	}
	return nil
}
