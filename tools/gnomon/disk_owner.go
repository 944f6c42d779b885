package main

import (
	"errors"
	"fmt"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/gnomon-vmm/gnomon/disk/owner"
)

// ownerReport is what gnomon disk owner prints.
type ownerReport struct {
	State      string `json:"state"`
	Name       string `json:"name,omitempty"`
	PID        uint32 `json:"pid,omitempty"`
	Address    string `json:"address,omitempty"`
	Epoch      uint64 `json:"epoch"`
	Generation uint64 `json:"generation"`
	LeaseMS    int64  `json:"lease-ms,omitempty"`
}

func newDiskOwnerCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "owner FILE",
		Short: "Tell who owns a disk",
		Long: `Tell who owns a disk that is used with --disk file=F,owner=on. That a disk is owned does not tell that its owner lives:
who opens it finds out.`,
		Args: usageArgs(cobra.ExactArgs(1)),
	}
	output := addOutputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := checkOutput(*output); err != nil {
			return err
		}
		r, err := owner.Status(args[0])
		if err != nil {
			return err
		}
		report := ownerReport{State: r.State.String(), Epoch: r.Epoch, Generation: r.Generation}
		if r.State > owner.Released {
			report.Name, report.PID, report.Address, report.LeaseMS = r.Name, r.PID, r.Address, r.Lease.Milliseconds()
		}
		if *output == "json" {
			return printJSON(cmd.OutOrStdout(), report)
		}
		w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 1, ' ', 0)
		fmt.Fprintf(w, "state:\t%s\n", report.State)
		if r.State > owner.Released {
			fmt.Fprintf(w, "owner:\t%s\n", report.Name)
			fmt.Fprintf(w, "address:\t%s\n", report.Address)
			fmt.Fprintf(w, "lease:\t%s\n", r.Lease)
		}
		fmt.Fprintf(w, "epoch:\t%d\n", report.Epoch)
		return w.Flush()
	}
	return cmd
}

func newDiskReleaseCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "release FILE",
		Short: "Ask the owner of a disk to let go of it",
		Long:  `Ask the owner of a disk to let go of it, and wait until it has: its machine is paused, what it wrote is on the disk.`,
		Args:  usageArgs(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			err := owner.Release(cmd.Context(), args[0])
			if errors.Is(err, owner.ErrNotOwned) {
				return fmt.Errorf("%w: nobody need release it", err)
			}
			return err
		},
	}
}
