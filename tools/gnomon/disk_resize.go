package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/gnomon-vmm/gnomon/disk"
	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/qcow2"
	"github.com/gnomon-vmm/gnomon/disk/raw"
)

func newDiskResizeCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "resize FILE [+|-]SIZE [--shrink] [--preallocation off|falloc|full] [-q]",
		Short: "Make an image larger or smaller",
		Long: `Make an image larger or smaller: of SIZE, or by it with a sign. What is added reads as zero; what is cut off is lost, which
--shrink permits. No machine uses the image meanwhile; block_resize over QMP is for those. Write -- before a size that
begins with -.`,
		Example: `  gnomon disk resize root.qcow2 +10G
  gnomon disk resize --shrink root.qcow2 -- -1G`,
		Args: usageArgs(cobra.ExactArgs(2)),
	}
	format := addFormatFlag(cmd, "format", "f", "`format`: raw|qcow2 (default: what the name says)")
	shrink := cmd.Flags().Bool("shrink", false, "the image may become smaller")
	manner := addQuiet(cmd)
	preallocation := cmd.Flags().String("preallocation", "off", "`space` for what is added: off, falloc (raw images), or full, which writes zeroes")
	completeFlag(cmd, "preallocation", "off", "falloc", "full")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		switch *preallocation {
		case "off", "falloc", "full":
		default:
			return usageError(fmt.Errorf("--preallocation %q: off, falloc and full are possible", *preallocation))
		}
		n, err := disk.Open(args[0], disk.Options{Format: formatOf(*format, args[0])})
		if err != nil {
			return err
		}
		err = resize(cmd, n, manner, args[1], *shrink, *preallocation)
		if err = errors.Join(err, n.Close()); err != nil {
			return err
		}
		manner.say(cmd, "Image resized.")
		return nil
	}
	return cmd
}

func resize(cmd *cobra.Command, n block.Node, m *manner, text string, shrink bool, preallocation string) error {
	old := n.Size()
	size, err := newSize(old, text)
	switch {
	case err != nil:
		return usageError(err)
	case size < old && !shrink:
		return usageError(fmt.Errorf("%s has %d bytes: to make it smaller loses what lies behind byte %d, which --shrink permits", n.Info().Filename, old, size))
	}
	file, isRaw := n.(*raw.Node)
	fill := func() error { return nil }
	switch {
	case preallocation == "falloc" && !isRaw:
		return usageError(fmt.Errorf("--preallocation falloc: off and full are possible for %s", n.Info().Format))
	case size <= old:
	case preallocation == "falloc":
		fill = func() error { return file.Allocate(old, size-old) }
	case preallocation == "full":
		fill = func() error { return writeZeroes(cmd.Context(), n, m.bar(cmd, "allocating"), old, size) }
	}
	// The image has its new size last: one that this was killed for is resized again.
	return n.(extender).Extend(size, fill)
}

// extender is a disk that becomes larger once what is added is there.
type extender interface {
	Extend(size int64, fill func() error) error
}

// newSize is what a size that may have a sign makes of the old one, in whole
// sectors.
func newSize(old int64, text string) (int64, error) {
	digits, grow := strings.CutPrefix(text, "+")
	digits, less := strings.CutPrefix(digits, "-")
	by, err := parseSize(digits, 1)
	if err != nil || grow && less {
		return 0, fmt.Errorf("size %q: write it as 10G, +1G or -512M", text)
	}
	size := int64(by)
	switch {
	case grow:
		size += old
	case less:
		size = old - size
	}
	if size <= 0 {
		return 0, fmt.Errorf("size %q: the image has %d bytes: none would be left", text, old)
	}
	return (size + 511) / 512 * 512, nil
}

// writeZeroes has all from off to end take space.
func writeZeroes(ctx context.Context, n block.Node, bar *progress, off, end int64) error {
	defer bar.Finish()
	zeroes := make([]byte, min(1<<20, end-off))
	for begin := off; off < end; {
		if err := ctx.Err(); err != nil {
			return err
		}
		part := zeroes[:min(int64(len(zeroes)), end-off)]
		if err := n.Writev([][]byte{part}, off); err != nil {
			return err
		}
		off += int64(len(part))
		bar.Set(off-begin, end-begin)
	}
	return nil
}

func newDiskRebaseCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "rebase FILE -b BACKING [-F FORMAT] [-u] [-t CACHE] [-p] [-q]",
		Short: "Have an overlay lie on another image, or on none",
		Long: `Have an overlay lie on another image, or, with -b "", on none. It reads as before: what the new image holds otherwise than
the old one is copied into the overlay. With -u only the name changes, for an image that was moved or renamed. No machine
uses the overlay meanwhile.`,
		Example: `  gnomon disk rebase vm1.qcow2 -b root.qcow2 -F qcow2   # without the images between the two
  gnomon disk rebase vm1.qcow2 -b ""                    # stands alone`,
		Args: usageArgs(cobra.ExactArgs(1)),
	}
	format := addFormatFlag(cmd, "format", "f", "`format`: qcow2 (default: what the name says)")
	backing := cmd.Flags().StringP("backing", "b", "", "`image` that it shall lie on, as it shall name it; empty: none")
	backingFormat := addFormatFlag(cmd, "backing-format", "F", "`format` of the backing image: raw|qcow2")
	unsafe := cmd.Flags().BoolP("unsafe", "u", false, "change the name alone: the image of that name holds the same")
	cache := addCacheFlag(cmd, "cache", "t", "`cache` mode of the images")
	manner := addManner(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		options, err := diskOptions(disk.Options{}, *cache, "")
		switch {
		case err != nil:
			return err
		case !cmd.Flags().Changed("backing"):
			return usageError(errors.New(`no -b: name the image that it shall lie on, or none by -b ""`))
		case *backing != "" && *backingFormat == "":
			return usageError(errors.New("-b without -F: say which format the backing image has"))
		case formatOf(*format, args[0]) != disk.FormatQcow2:
			return usageError(fmt.Errorf("%s: only a qcow2 image lies on another; say -f qcow2 if it is one", args[0]))
		}
		bar := manner.bar(cmd, "rebasing")
		defer bar.Finish()
		return qcow2.Rebase(cmd.Context(), args[0], qcow2.RebaseOptions{
			Backing: *backing, BackingFormat: *backingFormat, NameOnly: *unsafe, Files: options.Files(), Progress: bar.Set,
		})
	}
	return cmd
}
