package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/gnomon-vmm/gnomon/qmp/client"
)

// Commands on a disk that a machine is using, Gnomon's or QEMU's, over its QMP.

// attachedDisk is what query-block tells of a disk.
type attachedDisk struct {
	Device   string `json:"device"`
	Qdev     string `json:"qdev"`
	Inserted *struct {
		NodeName         string        `json:"node-name"`
		Driver           string        `json:"drv"`
		File             string        `json:"file"`
		BackingFileDepth int           `json:"backing_file_depth"`
		Bitmaps          []dirtyBitmap `json:"dirty-bitmaps"`
		Image            struct {
			VirtualSize int64 `json:"virtual-size"`
		} `json:"image"`
	} `json:"inserted"`
}

// ref is what commands call the disk.
func (d *attachedDisk) ref() string {
	if d.Device != "" {
		return d.Device
	}
	return d.Inserted.NodeName
}

// findAttached finds a machine's disk by the name of its drive, device or node;
// "" is the only one.
func findAttached(ctx context.Context, c *client.Client, name string) (*attachedDisk, error) {
	var all []attachedDisk
	if err := c.Execute(ctx, "query-block", nil, &all); err != nil {
		return nil, err
	}
	var found []*attachedDisk
	var names []string
	for i := range all {
		d := &all[i]
		if d.Inserted == nil {
			continue
		}
		names = append(names, d.ref())
		qdev := strings.Split(strings.TrimSuffix(d.Qdev, "/virtio-backend"), "/")
		if name == "" || name == d.Device || name == d.Inserted.NodeName || name == qdev[len(qdev)-1] {
			found = append(found, d)
		}
	}
	switch {
	case len(found) == 1:
		return found[0], nil
	case len(names) == 0:
		return nil, errors.New("the machine has no disk")
	case name == "":
		return nil, usageError(fmt.Errorf("the machine has several disks: name one of %s", strings.Join(names, ", ")))
	}
	return nil, fmt.Errorf("the machine has no disk %s: it has %s", name, strings.Join(names, ", "))
}

// onDisk makes the command's run function: MACHINE and DISK are its arguments.
func onDisk(do func(cmd *cobra.Command, c *client.Client, d *attachedDisk) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		c, err := dialQMP(cmd.Context(), args[0])
		if err != nil {
			return err
		}
		defer c.Close()
		name := ""
		if len(args) > 1 {
			name = args[1]
		}
		d, err := findAttached(cmd.Context(), c, name)
		if err != nil {
			return fmt.Errorf("%s: %w", args[0], err)
		}
		if err := do(cmd, c, d); err != nil {
			return fmt.Errorf("%s: disk %s: %w", args[0], d.ref(), err)
		}
		return nil
	}
}

func newDiskSnapshotCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "snapshot MACHINE [DISK] --to OVERLAY",
		Short: "Have a running machine go on in a new overlay of its disk",
		Long: `Have a running machine, Gnomon's or QEMU's, go on in a new qcow2 overlay of its disk. The image that it used so far stays
as it is at this instant: the snapshot. gnomon disk consolidate deletes it again.`,
		Example: `  gnomon disk snapshot vm1 --to before-upgrade.qcow2`,
		Args:    usageArgs(cobra.RangeArgs(1, 2)),
	}
	to := cmd.Flags().String("to", "", "`file` of the overlay to make")
	cmd.RunE = changingDisk(func(cmd *cobra.Command, c *client.Client, d *attachedDisk) error {
		if *to == "" {
			return usageError(errors.New("no --to: name the overlay to make"))
		}
		path, err := filepath.Abs(*to) // the machine's process has a directory of its own
		if err != nil {
			return err
		}
		if _, err := os.Lstat(path); err == nil {
			return fmt.Errorf("%s exists: remove it, or choose another name", *to) // QEMU would write over it
		}
		args := map[string]any{"snapshot-file": path, "format": "qcow2"}
		if d.Device != "" {
			args["device"] = d.Device
		} else {
			args["node-name"] = d.Inserted.NodeName
			args["snapshot-node-name"] = fmt.Sprintf("snapshot-%d", time.Now().UnixNano())
		}
		if err := c.Execute(cmd.Context(), "blockdev-snapshot-sync", args, nil); err != nil {
			return err
		}
		fmt.Fprintf(cmd.OutOrStdout(), "%s is the snapshot; the machine goes on in %s\n", d.Inserted.File, *to)
		return nil
	})
	return cmd
}

// runDiskJob runs a block job under a name of its own.
func runDiskJob(ctx context.Context, c *client.Client, label, command string, args map[string]any) error {
	args["auto-dismiss"] = false
	id, err := nameJob(label)
	if err != nil {
		return err
	}
	return runJob(ctx, c, label, id, command, args)
}

func newDiskConsolidateCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "consolidate MACHINE [DISK] [--all | --top IMAGE] [--base IMAGE]",
		Short: "Delete snapshots of a running machine's disk",
		Long: `Delete the newest snapshot of a running machine's disk, Gnomon's or QEMU's: what the overlay holds goes into the image it
lies on, while the machine uses it, and then the machine goes on there. Interrupted, it leaves the machine in its overlay; the job of one
that was killed is taken back by the next gnomon disk consolidate, snapshot or gnomon backup.
A Gnomon machine's overlay is empty then, and still a name of the disk; QEMU's is of no use any more.

With --base more than the newest goes: all images before that one. With --top an image in the middle of the chain goes, and
those between it and the base; the machine goes on in its overlay, and their files can be removed then.`,
		Example: `  gnomon disk consolidate vm1
  gnomon disk consolidate vm1 --top tuesday.qcow2 --base monday.qcow2`,
		Args: usageArgs(cobra.RangeArgs(1, 2)),
	}
	top := cmd.Flags().String("top", "", "first `image` to delete (default: the machine's overlay)")
	to := cmd.Flags().String("base", "", "`image` that stays and gets what they hold (default: the overlay's; with --top the last)")
	all := cmd.Flags().Bool("all", false, "delete all snapshots: everything goes into the last image of the chain")
	cmd.RunE = changingDisk(func(cmd *cobra.Command, c *client.Client, d *attachedDisk) error {
		if d.Inserted.BackingFileDepth == 0 {
			return errors.New("it has no snapshot: its image has no backing file")
		}
		args := map[string]any{"device": d.ref()}
		for name, path := range map[string]string{"top": *top, "base": *to} {
			if path == "" {
				continue
			}
			if *all {
				return usageError(errors.New("--all leaves no choice of --top and --base"))
			}
			full, err := filepath.Abs(path) // the machine's process has a directory of its own
			if err != nil {
				return err
			}
			args[name] = full
		}
		if !*all && len(args) == 1 {
			base, err := backingFile(cmd.Context(), c, d)
			if err != nil {
				return err
			}
			args["base"] = base
		}
		begin := time.Now()
		if err := runDiskJob(cmd.Context(), c, "consolidate", "block-commit", args); err != nil {
			return err
		}
		now, err := findAttached(cmd.Context(), c, d.ref())
		if err != nil {
			return err
		}
		fmt.Fprintf(cmd.OutOrStdout(), "consolidated in %s; the machine goes on in %s\n", time.Since(begin).Round(time.Millisecond), now.Inserted.File)
		return nil
	})
	return cmd
}

// backingFile is the image that a disk's image lies on.
func backingFile(ctx context.Context, c *client.Client, d *attachedDisk) (string, error) {
	var nodes []struct {
		NodeName string `json:"node-name"`
		Image    struct {
			Full    string `json:"full-backing-filename"`
			Backing string `json:"backing-filename"`
		} `json:"image"`
	}
	if err := c.Execute(ctx, "query-named-block-nodes", map[string]any{"flat": true}, &nodes); err != nil {
		return "", err
	}
	for _, n := range nodes {
		if n.NodeName == d.Inserted.NodeName {
			if n.Image.Full != "" {
				return n.Image.Full, nil
			}
			return n.Image.Backing, nil
		}
	}
	return "", fmt.Errorf("node %s: the machine does not tell its backing file", d.Inserted.NodeName)
}
