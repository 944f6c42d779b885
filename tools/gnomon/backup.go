package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/gnomon-vmm/gnomon/disk"
	"github.com/gnomon-vmm/gnomon/disk/archive"
	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/changes"
	"github.com/gnomon-vmm/gnomon/disk/convert"
	"github.com/gnomon-vmm/gnomon/disk/qcow2"
	"github.com/gnomon-vmm/gnomon/qmp/client"
)

// backupFlags are those of gnomon backup.
type backupFlags struct {
	to, sync, format string
	into             string
	incremental      bool
	application      string
	diskFormat       string
	output           string
	serve            pullFlags
}

func newBackupCommand() *cobra.Command {
	f := &backupFlags{}
	cmd := &cobra.Command{
		Use:   "backup MACHINE|FILE [DISK] --to FILE|--into DIRECTORY|--serve ADDRESS",
		Short: "Copy a disk as it is now, or only what changed since the last time",
		Long: `Copy a disk as it is at this instant: a running machine's, Gnomon's or QEMU's, which goes on writing meanwhile, or one that
no machine uses.

With --to a running machine's disk is copied to an image; with --sync top only what its newest image holds.

With --into the backup is added to those in a directory. With --incremental it has only what changed since the newest of
them, and lies on it; where that is not known it has all, and it is said why. The machine keeps a dirty bitmap for this (on
a qcow2 disk it outlives the machine). Of a disk that no machine uses the changes are known from --disk ...,changes=on.
The first backup decides how all of the directory are kept: as qcow2 images or, with --format raw, as plain sparse files,
as long as the disk, beside which a manifest in JSON tells what they hold.

With --serve the disk as it is now can be fetched by NBD, until this is interrupted, by other backup programs: the machine
serves it at unix:PATH or localhost:PORT, and keeps what it writes over in a scratch image meanwhile. With --since NAME what
changed since is told too, as qemu:dirty-bitmap:changed: NAME is a dirty bitmap of the machine's, such as an earlier --mark
NAME made at the instant that was served then.`,
		Example: `  gnomon backup vm1 --to monday.qcow2
  gnomon backup vm1 --into /backups/vm1 --incremental
  gnomon backup disk.img --into /backups/vm1 --incremental
  gnomon backup vm1 --into /backups/plain --format raw
  gnomon backup restore /backups/vm1 disk.img
  gnomon backup vm1 --serve unix:/tmp/vm1.sock --since monday --mark tuesday`,
		Args: usageArgs(cobra.RangeArgs(1, 2)),
	}
	flags := cmd.Flags()
	flags.StringVar(&f.to, "to", "", "`image` to make")
	flags.StringVar(&f.sync, "sync", "full", "`what` is copied to it: full|top")
	flags.StringVar(&f.format, "format", "", "`format` of the image, or of the directory's backups: qcow2|raw (default: qcow2, or what the directory has)")
	flags.StringVar(&f.into, "into", "", "`directory` of backups, made if it is not there")
	flags.BoolVar(&f.incremental, "incremental", false, "only what changed since the newest backup in the directory")
	flags.StringVarP(&f.application, "application", "a", "", "`name` by which a disk that no machine uses knows what changed (default: the directory's own)")
	flags.StringVarP(&f.diskFormat, "disk-format", "f", "", "`format` of FILE: raw|qcow2 (default: what the name says)")
	completeFlag(cmd, "sync", "full", "top")
	completeFlag(cmd, "format", "qcow2", "raw")
	completeFlag(cmd, "disk-format", disk.FormatRaw, disk.FormatQcow2)
	f.serve.add(flags)
	cmd.MarkFlagsMutuallyExclusive("to", "into", "serve")
	cmd.MarkFlagsMutuallyExclusive("serve", "incremental")
	cmd.MarkFlagsMutuallyExclusive("serve", "sync")
	cmd.MarkFlagsMutuallyExclusive("serve", "format")
	cmd.MarkFlagsMutuallyExclusive("to", "incremental")
	cmd.MarkFlagsMutuallyExclusive("sync", "into")
	output := addOutputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := checkOutput(*output); err != nil {
			return err
		}
		f.output = *output
		if !slices.Contains([]string{"", archive.FormatQcow2, archive.FormatRaw}, f.format) {
			return usageError(fmt.Errorf("--format %q: qcow2 and raw are possible", f.format))
		}
		info, err := os.Stat(args[0])
		atRest := err == nil && info.Mode()&(os.ModeSocket|os.ModeDir) == 0
		switch {
		case f.serve.address != "" && atRest:
			return usageError(fmt.Errorf("%s is a disk that no machine uses: serve it by gnomon disk serve", args[0]))
		case f.serve.address != "":
			return changingDisk(f.serve.run)(cmd, args)
		case f.serve.since != "" || f.serve.mark != "" || f.serve.scratch != "":
			return usageError(errors.New("--since, --mark and --scratch without --serve: say where the disk is to be served"))
		case f.to == "" && f.into == "":
			return usageError(errors.New("no --to, --into or --serve: name the image to make, the directory of backups, or where to serve the disk"))
		case f.to != "" && atRest:
			return usageError(fmt.Errorf("%s is a disk that no machine uses: copy it by gnomon disk convert, or use --into", args[0]))
		case f.to != "":
			return changingDisk(f.copyRunning)(cmd, args)
		case atRest && len(args) == 2:
			return usageError(fmt.Errorf("%s is a disk: leave out %s", args[0], args[1]))
		case atRest:
			return f.addAtRest(cmd, args[0])
		}
		return changingDisk(f.addRunning)(cmd, args)
	}
	cmd.AddCommand(newBackupListCommand(), newBackupRestoreCommand(), newBackupVerifyCommand(), newBackupPruneCommand())
	return cmd
}

// copyRunning copies a running machine's disk to an image.
func (f *backupFlags) copyRunning(cmd *cobra.Command, c *client.Client, d *attachedDisk) error {
	path, err := filepath.Abs(f.to)
	if err != nil {
		return err
	}
	if _, err := os.Lstat(path); err == nil {
		return fmt.Errorf("%s exists: remove it, or choose another name", f.to)
	}
	begin := time.Now()
	format := cmp.Or(f.format, disk.FormatQcow2)
	err = runDiskJob(cmd.Context(), c, "backup", "drive-backup", map[string]any{"device": d.ref(), "target": path, "format": format, "sync": f.sync})
	if err != nil {
		os.Remove(path) // QEMU leaves what it has copied so far
		return err
	}
	fmt.Fprintf(cmd.OutOrStdout(), "%s: the disk as it was at %s, copied in %s\n", f.to, begin.Format(time.RFC3339), time.Since(begin).Round(time.Millisecond))
	return nil
}

// addAtRest adds a backup of a disk that no machine uses.
func (f *backupFlags) addAtRest(cmd *cobra.Command, path string) error {
	a, err := archive.Create(f.into, f.format)
	if err != nil {
		return err
	}
	defer a.Close()
	if f.application == "" {
		f.application = "backup-" + a.ID()
	}
	if _, err := os.Stat(changes.Path(path)); err != nil && !f.incremental {
		n, err := disk.Open(path, disk.Options{Format: f.diskFormat, ReadOnly: true})
		if err != nil {
			return err
		}
		defer n.Close()
		return f.add(cmd, a, n, nil)
	}
	return withChanges(path, f.diskFormat, func(n block.Node, r *changes.Recorder) error {
		set, err := r.Since(n, f.application)
		if err != nil {
			return err
		}
		if !f.incremental {
			set.Changed = nil
		} else if ok, why := a.Continues(set); !ok {
			report("the backup has all of the disk: %s", why)
		}
		if err := f.add(cmd, a, n, set); err != nil {
			return err
		}
		return set.Commit()
	})
}

func (f *backupFlags) add(cmd *cobra.Command, a *archive.Archive, n block.Node, set *changes.Set) error {
	bar := newProgress("backup")
	s, err := a.Add(cmd.Context(), n, set, bar.Set)
	bar.Finish()
	if err != nil {
		return err
	}
	return f.print(cmd, a, s)
}

// addRunning adds a backup of a running machine's disk.
func (f *backupFlags) addRunning(cmd *cobra.Command, c *client.Client, d *attachedDisk) error {
	a, err := archive.Create(f.into, f.format)
	if err != nil {
		return err
	}
	defer a.Close()
	switch left, err := takeBackPush(context.WithoutCancel(cmd.Context()), c, a.ID()); {
	case err != nil:
		return err
	case left:
		if d, err = d.again(cmd.Context(), c); err != nil {
			return err
		}
	}
	s, err := f.addByBitmap(cmd.Context(), a, c, d)
	if err != nil {
		return err
	}
	return f.print(cmd, a, s)
}

// addByBitmap has the machine copy what a dirty bitmap tells, and begin another at
// the same instant. The old one is as it was until the backup counts.
func (f *backupFlags) addByBitmap(ctx context.Context, a *archive.Archive, c *client.Client, d *attachedDisk) (archive.Step, error) {
	var none archive.Step
	size := d.Inserted.Image.VirtualSize
	last, full := a.Last(), !f.incremental
	if !full {
		why := ""
		switch {
		case last == nil:
			why = "there is no earlier backup"
		case last.Size != size:
			why = fmt.Sprintf("the disk had %d bytes, and has %d now", last.Size, size)
		case last.Bitmap == "" || !d.hasBitmap(last.Bitmap):
			why = "the machine does not know what changed since the newest backup here"
		}
		if full = why != ""; full {
			report("the backup has all of the disk: %s", why)
		}
	}
	p, err := a.Begin(size, full)
	if err != nil {
		return none, err
	}
	name := fmt.Sprintf("gnomon-%s-%d", a.ID(), p.Number())
	drop := func(name string) error {
		return c.Execute(context.WithoutCancel(ctx), "block-dirty-bitmap-remove", map[string]any{"node": d.Inserted.NodeName, "name": name}, nil)
	}
	since := ""
	if !full {
		since = last.Bitmap
	}
	if err := copyByBitmap(ctx, p, c, d, pushName(a.ID()), since, name, drop); err != nil {
		p.Abandon()
		return none, err
	}
	s, err := p.Finish(nil, name)
	if err != nil {
		return none, errors.Join(err, drop(name))
	}
	// Others of this directory are of no use any more.
	for _, b := range d.Inserted.Bitmaps {
		if b.Name != name && strings.HasPrefix(b.Name, "gnomon-"+a.ID()+"-") {
			if err := drop(b.Name); err != nil {
				report("bitmap %s is of no use any more, and could not be removed: %v", b.Name, err)
			}
		}
	}
	return s, nil
}

// copyByBitmap has a job of the machine's copy what a bitmap tells, or with "" all, and
// begin the bitmap next at the same instant. drop removes a bitmap.
func copyByBitmap(ctx context.Context, p *archive.Pending, c *client.Client, d *attachedDisk, id, since, next string, drop func(string) error) (err error) {
	if d.bitmap(next) != nil { // of a backup that was interrupted
		if err := drop(next); err != nil {
			return err
		}
	}
	job := map[string]any{"job-id": id, "device": d.ref(), "sync": "full", "auto-dismiss": false}
	if since != "" {
		job["sync"], job["bitmap"], job["bitmap-mode"] = "bitmap", since, "never"
	}
	command := "drive-backup"
	if path := p.Path(); path != "" {
		if path, err = filepath.Abs(path); err != nil {
			return err
		}
		job["target"], job["format"], job["mode"] = path, p.Format(), "existing"
	} else {
		to, err := servePush(ctx, c, id, p)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, to.close()) }()
		command, job["target"] = "blockdev-backup", id
	}
	if err := c.Execute(ctx, "transaction", map[string]any{"actions": []any{
		map[string]any{"type": "block-dirty-bitmap-add", "data": map[string]any{"node": d.Inserted.NodeName, "name": next, "persistent": d.Inserted.Driver == disk.FormatQcow2}},
		map[string]any{"type": command, "data": job},
	}}, nil); err != nil {
		return err
	}
	if err := awaitJob(ctx, c, "backup", id); err != nil {
		return errors.Join(err, drop(next))
	}
	return nil
}

// dirtyBitmap is what query-block tells of a bitmap.
type dirtyBitmap struct {
	Name         string `json:"name"`
	Recording    bool   `json:"recording"`
	Busy         bool   `json:"busy"`
	Inconsistent bool   `json:"inconsistent"`
}

func (d *attachedDisk) bitmap(name string) *dirtyBitmap {
	i := slices.IndexFunc(d.Inserted.Bitmaps, func(b dirtyBitmap) bool { return b.Name == name })
	if i < 0 {
		return nil
	}
	return &d.Inserted.Bitmaps[i]
}

// hasBitmap tells that a bitmap tells of all changes.
func (d *attachedDisk) hasBitmap(name string) bool {
	b := d.bitmap(name)
	return b != nil && b.Recording && !b.Busy && !b.Inconsistent
}

// stepReport is what is printed of a backup in a directory.
type stepReport struct {
	Number int       `json:"number"`
	Time   time.Time `json:"time"`
	Full   bool      `json:"full"`
	Size   int64     `json:"size"`
	Bytes  int64     `json:"bytes"`
	File   string    `json:"file"`
}

func reportOf(a *archive.Archive, s archive.Step) stepReport {
	return stepReport{s.Number, s.Time, s.Full, s.Size, s.Bytes, a.File(s)}
}

func (r *stepReport) kind() string {
	if r.Full {
		return "full"
	}
	return "incremental"
}

func (f *backupFlags) print(cmd *cobra.Command, a *archive.Archive, s archive.Step) error {
	r := reportOf(a, s)
	if f.output == "json" {
		return printJSON(cmd.OutOrStdout(), r)
	}
	fmt.Fprintf(cmd.OutOrStdout(), "backup %d, %s: %s in %s\n", r.Number, r.kind(), mebibytes(r.Bytes), filepath.Join(f.into, r.File))
	return nil
}

func newBackupListCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "list DIRECTORY",
		Short: "Tell of the backups in a directory",
		Args:  usageArgs(cobra.ExactArgs(1)),
	}
	output := addOutputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := checkOutput(*output); err != nil {
			return err
		}
		return withArchive(args[0], func(a *archive.Archive) error {
			all := []stepReport{}
			for _, s := range a.Steps() {
				all = append(all, reportOf(a, s))
			}
			if *output == "json" {
				return printJSON(cmd.OutOrStdout(), all)
			}
			w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
			fmt.Fprintln(w, "BACKUP\tTIME\tKIND\tSIZE\tFILE")
			for _, r := range all {
				fmt.Fprintf(w, "%d\t%s\t%s\t%s\t%s\n", r.Number, r.Time.Format(time.RFC3339), r.kind(), mebibytes(r.Bytes), r.File)
			}
			return w.Flush()
		})
	}
	return cmd
}

// withArchive calls f with the backups in a directory.
func withArchive(dir string, f func(*archive.Archive) error) error {
	a, err := archive.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(f(a), a.Close())
}

func newBackupRestoreCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "restore DIRECTORY TARGET [--step N]",
		Short: "Make an image of what a disk was at a backup",
		Long: `Make an image, TARGET, of what the disk was at a backup: the newest, or that of the given number. TARGET must not exist. The
backup and those it lies on are verified first.`,
		Args: usageArgs(cobra.ExactArgs(2)),
	}
	step := cmd.Flags().Int("step", 0, "`number` of the backup (default: the newest)")
	format := addFormatFlag(cmd, "target-format", "O", "`format` of the target: raw|qcow2 (default: what the name says)")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		return withArchive(args[0], func(a *archive.Archive) error {
			if err := a.VerifyStep(cmd.Context(), *step); err != nil {
				return err
			}
			src, err := a.OpenStep(*step)
			if err != nil {
				return err
			}
			defer src.Close()
			return restoreTo(cmd.Context(), args[1], *format, src)
		})
	}
	return cmd
}

// restoreTo makes an image that reads as src.
func restoreTo(ctx context.Context, path, format string, src block.Node) (err error) {
	if err := createImage(path, format, qcow2.CreateOptions{Size: src.Size()}); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(path)
		}
	}()
	dst, err := disk.Open(path, disk.Options{Format: formatOf(format, path)})
	if err != nil {
		return err
	}
	bar := newProgress("restore")
	err = convert.Copy(ctx, dst, src, convert.Options{TargetIsZero: true, Progress: bar.Set})
	bar.Finish()
	return errors.Join(err, dst.Close())
}

func newBackupVerifyCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "verify DIRECTORY",
		Short: "Tell whether the backups in a directory are as they were made",
		Long:  `Read all backups in a directory, and tell which are not as they were made, or lie on one that is not: status 1.`,
		Args:  usageArgs(cobra.ExactArgs(1)),
	}
	output := addOutputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := checkOutput(*output); err != nil {
			return err
		}
		return withArchive(args[0], func(a *archive.Archive) error {
			problems, err := a.Verify(cmd.Context(), nil)
			if err != nil {
				return err
			}
			if *output == "json" {
				if problems == nil {
					problems = []archive.Problem{}
				}
				if err := printJSON(cmd.OutOrStdout(), map[string]any{"backups": len(a.Steps()), "problems": problems}); err != nil {
					return err
				}
			} else {
				for _, p := range problems {
					fmt.Fprintf(cmd.OutOrStdout(), "backup %d: %s\n", p.Number, p.Text)
				}
			}
			if len(problems) > 0 {
				return fmt.Errorf("%s: %d of %d backups cannot be restored", args[0], len(problems), len(a.Steps()))
			}
			if *output != "json" {
				fmt.Fprintf(cmd.OutOrStdout(), "%d backups are as they were made\n", len(a.Steps()))
			}
			return nil
		})
	}
	return cmd
}

func newBackupPruneCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "prune DIRECTORY --keep N",
		Short: "Remove the oldest backups in a directory",
		Long: `Remove all but the newest N backups in a directory. The oldest that is kept gets what it needs of the others. Interrupted
anywhere, this leaves all that are kept.`,
		Args: usageArgs(cobra.ExactArgs(1)),
	}
	keep := cmd.Flags().Int("keep", 0, "how many backups are kept, at least 1")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if *keep < 1 {
			return usageError(errors.New("no --keep: say how many backups are kept, at least 1"))
		}
		return withArchive(args[0], func(a *archive.Archive) error {
			bar := newProgress("merge")
			removed, err := a.Prune(cmd.Context(), *keep, bar.Set)
			bar.Finish()
			if err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "removed %d backups, %d are left\n", removed, len(a.Steps()))
			return nil
		})
	}
	return cmd
}
