package main

import (
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/gnomon-vmm/gnomon/disk"
	"github.com/gnomon-vmm/gnomon/disk/qcow2"
)

// Exit statuses of gnomon disk check, which are qemu-img's.
const (
	statusCorrupt     = 2
	statusLeaks       = 3
	statusUncheckable = 63
)

func newDiskCheckCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "check FILE [-f FORMAT] [-r leaks|all] [-q]",
		Short: "Find out whether an image is whole, and repair it",
		Long: `Find out whether an image is whole: whether its clusters are counted as often as they are used, and its tables lead to
places that exist. The status is qemu-img's: 0, it is; 1, it cannot be checked; 2, it is damaged; 3, space is lost, and no
more; 63, its format has nothing to check. -r leaks gives lost space back; -r all repairs what can be repaired: what led
nowhere reads as zero then. No machine uses it meanwhile.`,
		Args: cobra.ExactArgs(1), // status 2 has another meaning here
	}
	cmd.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return flagError(err) })
	format := addFormatFlag(cmd, "format", "f", "`format`: raw|qcow2 (default: what the name says)")
	manner := addQuiet(cmd)
	repair := cmd.Flags().StringP("repair", "r", "", "`what` is repaired: leaks|all")
	completeFlag(cmd, "repair", "leaks", "all")
	output := addOutputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if *output != "text" && *output != "json" {
			return fmt.Errorf("--output %q: text and json are possible", *output)
		}
		var o qcow2.CheckOptions
		switch *repair {
		case "":
		case "leaks":
			o.Repair = qcow2.RepairLeaks
		case "all":
			o.Repair = qcow2.RepairAll
		default:
			return fmt.Errorf("-r %q: leaks and all are possible", *repair)
		}
		if formatOf(*format, args[0]) == disk.FormatRaw {
			return &exitStatus{statusUncheckable, fmt.Errorf("%s: a raw image has nothing to check; for qcow2, say -f qcow2", args[0])}
		}
		r, err := checkImage(cmd, args[0], manner, o)
		if err != nil {
			return err
		}
		for _, p := range r.Problems {
			kind, what := "ERROR", ""
			if p.Leak {
				kind = "Leak"
			}
			if p.Fixed {
				what = " (repaired)"
			}
			fmt.Fprintf(cmd.ErrOrStderr(), "%s: at %#x: %s%s\n", kind, p.Offset, p.Text, what)
		}
		if *output == "json" {
			err = printJSON(cmd.OutOrStdout(), r)
		} else {
			err = printCheck(manner.out(cmd), r)
		}
		switch {
		case err != nil:
			return err
		case r.Corruptions > 0:
			return &exitStatus{statusCorrupt, nil}
		case r.Leaks > 0:
			return &exitStatus{statusLeaks, nil}
		case r.CheckErrors > 0:
			return &exitStatus{statusError, nil}
		}
		return nil
	}
	return cmd
}

// checkImage checks an image; what was repaired it checks again, as qemu-img does.
func checkImage(cmd *cobra.Command, path string, m *manner, o qcow2.CheckOptions) (*qcow2.Report, error) {
	bar := m.bar(cmd, "checking")
	defer bar.Finish()
	o.Progress = bar.Set
	r, err := qcow2.Check(cmd.Context(), path, o)
	if err != nil || r.CorruptionsFixed+r.LeaksFixed == 0 {
		return r, err
	}
	again, err := qcow2.Check(cmd.Context(), path, qcow2.CheckOptions{Progress: bar.Set})
	if err != nil {
		return nil, errors.Join(errors.New("after it was repaired"), err)
	}
	again.CorruptionsFixed, again.LeaksFixed = r.CorruptionsFixed, r.LeaksFixed
	again.Problems = append(r.Problems, again.Problems...)
	return again, nil
}

func printCheck(w io.Writer, r *qcow2.Report) error {
	if r.CorruptionsFixed+r.LeaksFixed > 0 {
		fmt.Fprintf(w, "The following inconsistencies were found and repaired:\n\n    %d leaked clusters\n    %d corruptions\n\n", r.LeaksFixed, r.CorruptionsFixed)
	}
	if r.Clean() {
		fmt.Fprintln(w, "No errors were found on the image.")
	}
	if r.Corruptions > 0 {
		fmt.Fprintf(w, "\n%d errors were found on the image.\nData may be corrupted, or further writes to the image may corrupt it.\n", r.Corruptions)
	}
	if r.Leaks > 0 {
		fmt.Fprintf(w, "\n%d leaked clusters were found on the image.\nThis means waste of disk space, but no harm to data.\n", r.Leaks)
	}
	if r.TotalClusters > 0 && r.AllocatedClusters > 0 {
		percent := func(n, of int64) float64 { return 100 * float64(n) / float64(of) }
		fmt.Fprintf(w, "%d/%d = %.2f%% allocated, %.2f%% fragmented, %.2f%% compressed clusters\n", r.AllocatedClusters, r.TotalClusters,
			percent(r.AllocatedClusters, r.TotalClusters), percent(r.FragmentedClusters, r.AllocatedClusters), percent(r.CompressedClusters, r.AllocatedClusters))
	}
	_, err := fmt.Fprintf(w, "Image end offset: %d\n", r.ImageEndOffset)
	return err
}
