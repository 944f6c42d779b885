package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/gnomon-vmm/gnomon/disk/qcow2"
)

// checkpointReport is what __org.gnomon_query-checkpoint returns of the last save.
type checkpointReport struct {
	File           string `json:"file"`
	ID             string `json:"id"`
	Parent         string `json:"parent,omitempty"`
	PauseNS        int64  `json:"pause-ns"`
	TotalNS        int64  `json:"total-ns"`
	Pages          int64  `json:"pages"`
	ZeroPages      int64  `json:"zero-pages"`
	DuplicatePages int64  `json:"duplicate-pages"`
	FaultPages     int64  `json:"fault-pages"`
	FileBytes      int64  `json:"file-bytes"`
	Writes         int64  `json:"writes"`
	Disks          []struct {
		ID      string `json:"id"`
		File    string `json:"file"`
		Overlay string `json:"overlay"`
	} `json:"disks"`
}

func newCheckpointCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "checkpoint MACHINE --to FILE [flags]",
		Short: "Save a running machine, or look into what was saved",
		Long: `Save a machine into a checkpoint file while it runs. It is paused for a moment only; the file is what it was then.

Its disks belong to the checkpoint: each that can be written stays as it was, and the machine goes on in a qcow2
overlay beside it, from which you also start it the next time. gnomon checkpoint commit writes an overlay back when
the checkpoint is not needed any more. With --disks copy they are copied beside the checkpoint, FILE.DISK.qcow2,
and the machine stays in its own; with --disks none they are your own affair, and a machine that is restored writes to
the files that this one uses.

With --parent the file holds only what changed since that checkpoint, which must be the last one taken of this
machine. gnomon restore starts a machine from the file.`,
		Example: `  gnomon checkpoint vm1 --to vm1.ckpt
  gnomon checkpoint vm1 --to vm1-later.ckpt --parent vm1.ckpt
  gnomon checkpoint info vm1-later.ckpt`,
		Args: usageArgs(cobra.ExactArgs(1)),
	}
	flags := cmd.Flags()
	to := flags.String("to", "", "checkpoint `file` to make")
	parent := flags.String("parent", "", "`file` of the checkpoint that this one continues")
	mode := flags.String("mode", "running", "`how`: running|stop (the machine stands still until the file is complete)")
	disks := flags.String("disks", "keep", "`what` becomes of disks that can be written: keep|copy|none (they are left to you)")
	noFlush := flags.Bool("no-flush", false, "do not wait until the file is on disk: it is complete sooner, but a power failure may damage it")
	output := addOutputFlag(cmd)
	completeFlag(cmd, "disks", "keep", "copy", "none")
	completeFlag(cmd, "mode", "running", "stop")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := checkOutput(*output); err != nil {
			return err
		}
		if *mode != "running" && *mode != "stop" {
			return usageError(fmt.Errorf("--mode %q: running and stop are possible", *mode))
		}
		if *disks != "keep" && *disks != "copy" && *disks != "none" {
			return usageError(fmt.Errorf("--disks %q: keep, copy and none are possible", *disks))
		}
		if *to == "" {
			return usageError(errors.New("no --to: name the checkpoint file to make"))
		}
		if flags.Changed("parent") && *parent == "" {
			return usageError(errors.New(`--parent "": name the checkpoint that this one continues, or leave out --parent to save everything`))
		}
		arguments := map[string]any{"mode": *mode, "disks": *disks, "dismiss-on-disconnect": true}
		if *noFlush { // which machines of before do not know
			arguments["no-flush"] = true
		}
		for key, path := range map[string]string{"file": *to, "parent": *parent} {
			if path == "" {
				continue
			}
			abs, err := filepath.Abs(path) // the machine's process has a directory of its own
			if err != nil {
				return err
			}
			arguments[key] = abs
		}
		ctx := cmd.Context()
		c, err := dialQMP(ctx, args[0])
		if err != nil {
			return err
		}
		defer c.Close()
		id := fmt.Sprintf("checkpoint-%d-%d", os.Getpid(), time.Now().UnixNano())
		if err := runJob(ctx, c, "saving", id, "__org.gnomon_checkpoint", arguments); err != nil {
			return fmt.Errorf("checkpoint %s: %w", args[0], err)
		}
		var raw json.RawMessage
		// The checkpoint is there, even if this was interrupted just now.
		if err := c.Execute(context.WithoutCancel(ctx), "__org.gnomon_query-checkpoint", map[string]any{"file": arguments["file"]}, &raw); err != nil {
			return err
		}
		if *output == "json" {
			_, err := fmt.Fprintf(cmd.OutOrStdout(), "%s\n", raw)
			return err
		}
		var r checkpointReport
		if err := json.Unmarshal(raw, &r); err != nil {
			return fmt.Errorf("result of __org.gnomon_query-checkpoint: %w", err)
		}
		out := cmd.OutOrStdout()
		fmt.Fprintf(out, "%s: %s in %s, machine paused for %s\n", r.File, mebibytes(r.FileBytes),
			time.Duration(r.TotalNS).Round(time.Millisecond), time.Duration(r.PauseNS).Round(10*time.Microsecond))
		for _, d := range r.Disks {
			if d.Overlay != "" {
				fmt.Fprintf(out, "disk %s: %s belongs to the checkpoint; the machine goes on in %s\n", d.ID, d.File, d.Overlay)
			}
		}
		return nil
	}
	cmd.AddCommand(newCommitCommand())
	cmd.AddCommand(newCheckpointFileCommands()...)
	return cmd
}

func newCommitCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "commit OVERLAY",
		Short: "Write what a disk's overlay holds back to the image it lies on",
		Long: `Write what a qcow2 overlay holds to the image that it lies on. No machine may use either. Checkpoints that need the
image as it was cannot be restored afterwards. The overlay stays, and holds nothing new any more.`,
		Args: usageArgs(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			if _, err := os.Stat(args[0]); err != nil {
				return explainMissing("overlay", args[0], err)
			}
			bar := newProgress("committing")
			defer bar.Finish()
			_, err := qcow2.Commit(cmd.Context(), args[0], qcow2.CommitOptions{Progress: bar.Set})
			return err
		},
	}
}
