package main

import (
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/gnomon-vmm/gnomon/disk"
	"github.com/gnomon-vmm/gnomon/disk/qcow2"
)

func newDiskCommitCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "commit OVERLAY [-b BASE] [-d] [-t CACHE] [-r RATE] [-p] [-q]",
		Short: "Write what an overlay holds back to an image that it lies on",
		Long: `Write what a qcow2 overlay holds to the image that it lies on, which reads as the overlay does then, and empty the
overlay; with -d it stays as it is. With -b what is written goes into an image further down the chain, and the overlay
stays as it is, too; images between the two are of no use any more. No machine may use any of them. Checkpoints that need
the image as it was cannot be restored afterwards.`,
		Example: `  gnomon disk commit vm1.qcow2
  gnomon disk commit vm1.qcow2 -b root.qcow2`,
		Args: usageArgs(cobra.ExactArgs(1)),
	}
	format := addFormatFlag(cmd, "format", "f", "`format`: qcow2 (default: what the name says)")
	base := cmd.Flags().StringP("base", "b", "", "`image` of the chain that is written to (default: the one that the overlay lies on)")
	keep := cmd.Flags().BoolP("drop", "d", false, "leave the overlay as it is: it is going to be removed")
	cache := addCacheFlag(cmd, "cache", "t", "`cache` mode of the images")
	rate := addRate(cmd)
	manner := addManner(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if _, err := os.Stat(args[0]); err != nil {
			return explainMissing("overlay", args[0], err)
		}
		switch {
		case *base == "" && cmd.Flags().Changed("base"):
			return usageError(errors.New("-b without an image: name one that the overlay lies on"))
		case *format == disk.FormatRaw:
			return usageError(fmt.Errorf("%s: only a qcow2 image lies on another", args[0]))
		}
		options, err := diskOptions(disk.Options{}, *cache, "")
		if err != nil {
			return err
		}
		o := qcow2.CommitOptions{Base: *base, Empty: *base == "" && !*keep, Files: options.Files()}
		if o.Rate, err = rate(); err != nil {
			return err
		}
		bar := manner.bar(cmd, "committing")
		o.Progress = bar.Set
		invalid, err := qcow2.Commit(cmd.Context(), args[0], o)
		bar.Finish()
		if errors.Is(err, qcow2.ErrNotEmptied) {
			err = fmt.Errorf("%w; with -d it is committed and not emptied", err)
		}
		if err != nil {
			return err
		}
		for _, path := range invalid {
			fmt.Fprintf(cmd.ErrOrStderr(), "gnomon: %s is not what it was any more, since %s has changed: remove it when nothing lies on it\n", path, *base)
		}
		manner.say(cmd, "Image committed.")
		return nil
	}
	return cmd
}
