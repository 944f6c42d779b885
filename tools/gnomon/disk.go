package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/gnomon-vmm/gnomon/disk"
	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/convert"
	"github.com/gnomon-vmm/gnomon/disk/nbd"
	"github.com/gnomon-vmm/gnomon/disk/qcow2"
)

func newDiskCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "disk COMMAND",
		Short: "Make, look into, convert and compare disk images",
		Long: `Make, look into, convert and compare disk images. Where qemu-img has the same command, options and output are its
own. An image whose name ends in .qcow2 is taken for qcow2, any other for raw: -f says otherwise. What is only read may
also be an NBD server's, nbd://HOST[:PORT]/NAME or nbd+unix:///NAME?socket=PATH.`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newDiskCreateCommand(), newDiskInfoCommand(), newDiskMapCommand(), newDiskConvertCommand(), newDiskCompareCommand(), newDiskCommitCommand(),
		newDiskSnapshotCommand(), newDiskConsolidateCommand(), newDiskOwnerCommand(), newDiskReleaseCommand(), newDiskServeCommand(), newDiskChangesCommand(),
		newDiskCheckCommand(), newDiskResizeCommand(), newDiskRebaseCommand(), newDiskSyncCommand())
	return cmd
}

// addFormatFlag adds qemu-img's -f or another flag that names a format.
func addFormatFlag(cmd *cobra.Command, long, short, usage string) *string {
	var format formatFlag
	cmd.Flags().VarP(&format, long, short, usage)
	completeFlag(cmd, long, disk.FormatRaw, disk.FormatQcow2)
	return (*string)(&format)
}

// formatFlag is the value of a flag that names a format, or empty.
type formatFlag string

const formatType = "format"

func (f *formatFlag) String() string { return string(*f) }
func (f *formatFlag) Type() string   { return formatType }

func (f *formatFlag) Set(text string) error {
	if text != "" && text != disk.FormatRaw && text != disk.FormatQcow2 {
		return disk.ErrFormat
	}
	*f = formatFlag(text)
	return nil
}

// openImage opens an image that is only read: a file, or an NBD server's by its
// URI.
func openImage(ctx context.Context, name, format string) (block.Node, error) {
	return openSource(ctx, name, disk.Options{Format: format})
}

// openSource is openImage with options.
func openSource(ctx context.Context, name string, o disk.Options) (block.Node, error) {
	if isURI(name) {
		return nbd.DialURI(ctx, name, nbd.ClientOptions{ReadOnly: true})
	}
	o.ReadOnly = true
	return disk.Open(name, o)
}

// isURI tells an NBD server's image from a file.
func isURI(name string) bool {
	return strings.HasPrefix(name, "nbd://") || strings.HasPrefix(name, "nbd+")
}

// sameDisk refuses a target that is the source, or one that the source lies on: to open
// it would look as if another machine had it.
func sameDisk(src block.Node, target string) error {
	there, err := os.Stat(target)
	if err != nil {
		return nil // who opens it says more
	}
	info := src.Info()
	for i := &info; i != nil; i = i.Backing {
		if named, err := os.Stat(i.Filename); err != nil || !os.SameFile(named, there) {
			continue
		}
		if i == &info {
			return fmt.Errorf("%s and %s are the same disk: name another target", info.Filename, target)
		}
		return fmt.Errorf("%s lies on %s: name another target", info.Filename, target)
	}
	return nil
}

// formatOf is the format that a name says where no flag does.
func formatOf(format, path string) string {
	switch {
	case format != "":
		return format
	case strings.HasSuffix(path, ".qcow2"):
		return disk.FormatQcow2
	}
	return disk.FormatRaw
}

// createImage makes an image at path, which must not exist.
func createImage(path, format string, o qcow2.CreateOptions) error {
	o.Size = (o.Size + 511) / 512 * 512
	if info, err := os.Stat(path); err == nil && info.Mode()&fs.ModeDevice != 0 {
		return fmt.Errorf("create disk %s: it is a device, and there: -n converts into it", path)
	}
	if formatOf(format, path) == disk.FormatQcow2 {
		return qcow2.Create(path, o)
	}
	if o.Backing != "" {
		return usageError(errors.New("a raw image has no backing file: make it qcow2, -f qcow2"))
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	switch {
	case errors.Is(err, fs.ErrExist):
		return fmt.Errorf("create disk %s: %w: remove it, or choose another name", path, fs.ErrExist)
	case err != nil:
		return fmt.Errorf("create disk: %w", err)
	}
	err = errors.Join(f.Truncate(o.Size), f.Close())
	if err != nil {
		os.Remove(path)
	}
	return err
}

func newDiskCreateCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "create FILE [SIZE] [-f FORMAT] [-b BACKING -F FORMAT [-u]]",
		Short: "Make an empty image, or an overlay on another",
		Long: `Make an empty image of SIZE, or, with -b, an overlay that reads as another image and keeps what is written to it; then
SIZE may be left out. FILE must not exist. With -u the other image need not be there yet.`,
		Example: `  gnomon disk create root.qcow2 10G
  gnomon disk create vm1.qcow2 -b root.qcow2 -F qcow2`,
		Args: usageArgs(cobra.RangeArgs(1, 2)),
	}
	format := addFormatFlag(cmd, "format", "f", "`format`: raw|qcow2 (default: what the name says)")
	backing := cmd.Flags().StringP("backing", "b", "", "`image` that the new one lies on, as the new one shall name it")
	backingFormat := addFormatFlag(cmd, "backing-format", "F", "`format` of the backing image: raw|qcow2")
	unsafe := cmd.Flags().BoolP("unsafe", "u", false, "do not look at the backing image; SIZE must be given")
	cluster := addClusterSize(cmd)
	addQuiet(cmd) // qemu-img's; there is nothing to say
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		var o qcow2.CreateOptions
		var err error
		if o.ClusterSize, err = cluster(); err != nil {
			return err
		}
		if *backing != "" {
			if *backingFormat == "" {
				return usageError(errors.New("-b without -F: say which format the backing image has"))
			}
			o.Backing, o.BackingFormat = *backing, *backingFormat
		}
		if *backing != "" && !*unsafe {
			path := *backing
			if !filepath.IsAbs(path) {
				path = filepath.Join(filepath.Dir(args[0]), path)
			}
			n, err := disk.Open(path, disk.Options{Format: *backingFormat, ReadOnly: true})
			if err != nil {
				return err
			}
			o.Size = n.Size()
			n.Close()
		}
		switch {
		case len(args) == 2:
			size, err := parseSize(args[1], 1)
			if err != nil {
				return usageError(err)
			}
			o.Size = int64(size)
		case *backing == "" || *unsafe:
			return usageError(errors.New("no SIZE: how large shall the image be?"))
		}
		return createImage(args[0], *format, o)
	}
	return cmd
}

// addClusterSize adds a flag for the size of clusters, in bytes.
func addClusterSize(cmd *cobra.Command) func() (int64, error) {
	text := cmd.Flags().String("cluster-size", "64K", "`bytes` of a qcow2 cluster, 512 to 2M")
	return func() (int64, error) {
		size, err := parseSize(*text, 1)
		if err != nil || size < 512 || size > 2<<20 || size&(size-1) != 0 {
			return 0, usageError(fmt.Errorf("--cluster-size %q: powers of two from 512 to 2M are possible", *text))
		}
		return int64(size), nil
	}
}

// imageInfo is what qemu-img info prints of an image.
type imageInfo struct {
	Filename      string `json:"filename"`
	Format        string `json:"format"`
	VirtualSize   int64  `json:"virtual-size"`
	ActualSize    int64  `json:"actual-size"`
	ClusterSize   int64  `json:"cluster-size,omitempty"`
	Dirty         bool   `json:"dirty-flag"`
	Backing       string `json:"backing-filename,omitempty"` // as the image names it
	FullBacking   string `json:"full-backing-filename,omitempty"`
	BackingFormat string `json:"backing-filename-format,omitempty"`
}

func newDiskInfoCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "info FILE [-f FORMAT] [--backing-chain]",
		Short: "Tell an image's format, sizes and backing file",
		Args:  usageArgs(cobra.ExactArgs(1)),
	}
	format := addFormatFlag(cmd, "format", "f", "`format`: raw|qcow2 (default: what the name says)")
	chain := cmd.Flags().Bool("backing-chain", false, "tell of the images behind it too")
	output := addOutputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := checkOutput(*output); err != nil {
			return err
		}
		all, err := imageInfos(cmd.Context(), args[0], *format, *chain)
		if err != nil {
			return err
		}
		switch {
		case *output == "json" && *chain:
			return printJSON(cmd.OutOrStdout(), all)
		case *output == "json":
			return printJSON(cmd.OutOrStdout(), all[0])
		}
		w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 1, ' ', 0)
		for i, one := range all {
			if i > 0 {
				fmt.Fprintln(w)
			}
			fmt.Fprintf(w, "image:\t%s\n", printable(one.Filename))
			fmt.Fprintf(w, "file format:\t%s\n", one.Format)
			fmt.Fprintf(w, "virtual size:\t%s (%d bytes)\n", humanSize(one.VirtualSize), one.VirtualSize)
			fmt.Fprintf(w, "disk size:\t%s\n", humanSize(one.ActualSize))
			if one.ClusterSize != 0 {
				fmt.Fprintf(w, "cluster_size:\t%d\n", one.ClusterSize)
			}
			if one.Dirty {
				fmt.Fprintf(w, "cleanly shut down:\tno\n")
			}
			if one.Backing != "" {
				fmt.Fprintf(w, "backing file:\t%s", printable(one.Backing))
				if one.FullBacking != one.Backing && one.FullBacking != "" {
					fmt.Fprintf(w, " (actual path: %s)", printable(one.FullBacking))
				}
				fmt.Fprintln(w)
				if one.BackingFormat != "" {
					fmt.Fprintf(w, "backing file format:\t%s\n", printable(one.BackingFormat))
				}
			}
		}
		return w.Flush()
	}
	return cmd
}

// imageInfos tells of an image, and of those behind it, which need not be there for one
// alone.
func imageInfos(ctx context.Context, name, format string, chain bool) ([]imageInfo, error) {
	if chain { // it is whole
		n, err := openImage(ctx, name, format)
		if err != nil {
			return nil, err
		}
		n.Close()
	}
	var all []imageInfo
	for {
		n, err := openAlone(ctx, name, format)
		if err != nil {
			return nil, err
		}
		i := n.Info()
		one := imageInfo{Filename: i.Filename, Format: i.Format, VirtualSize: i.VirtualSize, ActualSize: i.ActualSize, ClusterSize: i.ClusterSize}
		if q, ok := n.(*qcow2.Node); ok {
			one.Dirty = q.Header().Dirty()
			one.Backing, one.BackingFormat = q.Header().BackingFile, q.Header().BackingFormat
			one.FullBacking = q.BackingPath()
		}
		n.Close()
		if all = append(all, one); !chain || one.Backing == "" {
			return all, nil
		}
		name, format = one.FullBacking, one.BackingFormat
	}
}

// openAlone opens an image to be read without those behind it.
func openAlone(ctx context.Context, name, format string) (block.Node, error) {
	if formatOf(format, name) != disk.FormatQcow2 || isURI(name) {
		return openImage(ctx, name, format)
	}
	n, err := qcow2.OpenAlone(name)
	if err != nil {
		return nil, err
	}
	return n, nil
}

// mapEntry is an extent as qemu-img map prints it.
type mapEntry struct {
	Start      int64  `json:"start"`
	Length     int64  `json:"length"`
	Depth      int    `json:"depth"`
	Present    bool   `json:"present"`
	Zero       bool   `json:"zero"`
	Data       bool   `json:"data"`
	Compressed bool   `json:"compressed"`
	Offset     *int64 `json:"offset,omitempty"`
	file       string
}

// follows tells that e goes on where m ends, in the same way.
func (m *mapEntry) follows(e mapEntry) bool {
	return m.Depth == e.Depth && m.Present == e.Present && m.Zero == e.Zero && m.Data == e.Data && m.Compressed == e.Compressed && m.file == e.file &&
		(m.Offset == nil) == (e.Offset == nil) && (m.Offset == nil || *m.Offset+m.Length == *e.Offset)
}

func newDiskMapCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "map FILE [-f FORMAT] [-s OFFSET] [-l LENGTH]",
		Short: "Tell which image of a chain holds which bytes, and where",
		Args:  usageArgs(cobra.ExactArgs(1)),
	}
	format := addFormatFlag(cmd, "format", "f", "`format`: raw|qcow2 (default: what the name says)")
	start := cmd.Flags().StringP("start-offset", "s", "0", "`offset` of the first byte that is told of")
	length := cmd.Flags().StringP("max-length", "l", "", "`bytes` that are told of (default: to the disk's end)")
	output := addOutputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := checkOutput(*output); err != nil {
			return err
		}
		first, err := parseSize(*start, 1)
		if err != nil {
			return usageError(fmt.Errorf("--start-offset: %w", err))
		}
		most := uint64(math.MaxInt64)
		if *length != "" {
			if most, err = parseSize(*length, 1); err != nil {
				return usageError(fmt.Errorf("--max-length: %w", err))
			}
		}
		n, err := openImage(cmd.Context(), args[0], *format)
		if err != nil {
			return err
		}
		defer n.Close()
		m, ok := n.(block.Mapper)
		if !ok {
			return fmt.Errorf("%s: an image of format %s cannot be mapped", args[0], n.Info().Format)
		}
		entries := []mapEntry{}
		off := min(int64(first), n.Size())
		for end := off + min(int64(most), n.Size()-off); off < end; {
			e, err := m.Map(off, end-off)
			if err != nil {
				return err
			}
			one := mapEntry{Start: off, Length: e.Length, Depth: e.Depth, Present: e.Present, Zero: e.Zero, Data: e.Data, Compressed: e.Compressed, file: e.File}
			if e.Offset >= 0 {
				one.Offset = &e.Offset
			}
			if k := len(entries) - 1; k >= 0 && entries[k].follows(one) {
				entries[k].Length += one.Length
			} else {
				entries = append(entries, one)
			}
			off += e.Length
		}
		if *output == "json" {
			return printJSON(cmd.OutOrStdout(), entries)
		}
		w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
		fmt.Fprintln(w, "Offset\tLength\tMapped to\tFile")
		for _, e := range entries {
			if e.Data && !e.Zero && e.Offset != nil {
				fmt.Fprintf(w, "%#x\t%#x\t%#x\t%s\n", e.Start, e.Length, *e.Offset, printable(e.file))
			}
		}
		return w.Flush()
	}
	return cmd
}

func newDiskConvertCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "convert SOURCE TARGET [-f FORMAT] [-O FORMAT] [-c] [-n] [-t CACHE] [-T CACHE] [-r RATE] [-m N] [-p] [-q]",
		Short: "Copy what an image and its backing files read as into a new image",
		Long: `Copy what an image and its backing files read as into a new image, which must not exist and is removed again if this
fails; with -n into one that is there and is as large. What reads as zero takes no space. The image outlives the host when this has ended; with --cache unsafe, which is
what qemu-img does unless told otherwise, that is left to the host and takes less time.`,
		Example: `  gnomon disk convert disk.img disk.qcow2
  gnomon disk convert overlay.qcow2 whole.img`,
		Args: usageArgs(cobra.ExactArgs(2)),
	}
	format := addFormatFlag(cmd, "format", "f", "`format` of the source: raw|qcow2 (default: what the name says)")
	target := addFormatFlag(cmd, "target-format", "O", "`format` of the target: raw|qcow2 (default: what the name says)")
	compressed := cmd.Flags().BoolP("compressed", "c", false, "compress what can be made smaller; qcow2 only")
	cluster := addClusterSize(cmd)
	cache := addCacheFlag(cmd, "cache", "t", "`cache` mode of the target")
	sourceCache := addCacheFlag(cmd, "source-cache", "T", "`cache` mode of the source")
	there := cmd.Flags().BoolP("no-create", "n", false, "the target is there; what it holds is replaced")
	isZero := cmd.Flags().Bool("target-is-zero", false, "the target reads as zero, with -n")
	rate := addRate(cmd)
	workers := cmd.Flags().IntP("workers", "m", 0, "how many pieces are copied side by side, 1 to 16 (default: as many as processors, up to 8)")
	cmd.Flags().BoolP("out-of-order", "W", false, "the target need not be written in order: as it always is here; qemu-img's")
	manner := addManner(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) (err error) {
		targetFormat := formatOf(*target, args[1])
		options, err := diskOptions(disk.Options{Format: targetFormat}, *cache, "")
		if err != nil {
			return err
		}
		sourceOptions, err := diskOptions(disk.Options{Format: *format}, *sourceCache, "")
		if err != nil {
			return err
		}
		o := convert.Options{TargetIsZero: !*there || *isZero, Direct: options.Cache.Direct(), Workers: *workers}
		if o.Rate, err = rate(); err != nil {
			return err
		}
		clusterSize, err := cluster()
		switch {
		case err != nil:
			return err
		case *compressed && targetFormat == disk.FormatRaw:
			return usageError(errors.New("--compressed: raw images cannot be compressed: use -O qcow2"))
		case cmd.Flags().Changed("workers") && (*workers < 1 || *workers > 16):
			return usageError(fmt.Errorf("--workers %d: 1 to 16 are possible", *workers))
		case *isZero && !*there:
			return usageError(errors.New("--target-is-zero without -n: a new image reads as zero"))
		case *there && cmd.Flags().Changed("cluster-size"):
			return usageError(errors.New("--cluster-size with -n: the target has its own"))
		}
		src, err := openSource(cmd.Context(), args[0], sourceOptions)
		if err != nil {
			return err
		}
		defer src.Close()
		if *there {
			if err := sameDisk(src, args[1]); err != nil {
				return err
			}
		} else {
			if err := createImage(args[1], *target, qcow2.CreateOptions{Size: src.Size(), ClusterSize: clusterSize}); err != nil {
				return err
			}
			defer func() {
				if err != nil {
					os.Remove(args[1])
				}
			}()
		}
		dst, err := disk.Open(args[1], options)
		if err != nil {
			return err
		}
		if *compressed {
			image := dst.(*qcow2.Node)
			o.Write = image.WriteCompressed
		}
		bar := manner.bar(cmd, "converting")
		o.Progress = bar.Set
		err = convert.Copy(cmd.Context(), dst, src, o)
		bar.Finish()
		return errors.Join(err, dst.Close())
	}
	return cmd
}

// statusDiffer is gnomon disk compare's, as qemu-img's.
const statusDiffer = 1

func newDiskCompareCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "compare A B [-f FORMAT] [-F FORMAT] [-s] [-T CACHE] [-p] [-q]",
		Short: "Tell whether two images read the same",
		Long: `Tell whether two images read the same: status 0 if they do, 1 if they do not, 2 if one cannot be read. What one has
behind the other's end counts as the same if it is zero, unless -s.`,
		Args: usageArgs(cobra.ExactArgs(2)),
	}
	first := addFormatFlag(cmd, "format", "f", "`format` of the first: raw|qcow2 (default: what the name says)")
	second := addFormatFlag(cmd, "second-format", "F", "`format` of the second: raw|qcow2 (default: what the name says)")
	strict := cmd.Flags().BoolP("strict", "s", false, "images of different sizes are different")
	cache := addCacheFlag(cmd, "source-cache", "T", "`cache` mode of both")
	manner := addManner(cmd)
	output := addOutputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := checkOutput(*output); err != nil {
			return err
		}
		var nodes [2]block.Node
		for i, format := range []string{*first, *second} {
			options, err := diskOptions(disk.Options{Format: format}, *cache, "")
			if err != nil {
				return err
			}
			if nodes[i], err = openSource(cmd.Context(), args[i], options); err != nil {
				return &exitStatus{statusUsage, err}
			}
			defer nodes[i].Close()
		}
		bar := manner.bar(cmd, "comparing")
		d, err := convert.Compare(cmd.Context(), nodes[0], nodes[1], *strict, bar.Set)
		bar.Finish()
		if err != nil {
			return &exitStatus{statusUsage, err}
		}
		if *output == "json" {
			result := map[string]any{"identical": d == nil}
			if d != nil {
				result["offset"], result["size-differs"] = d.Offset, d.Size
			}
			if err := printJSON(cmd.OutOrStdout(), result); err != nil {
				return err
			}
		} else {
			switch {
			case d == nil:
				manner.say(cmd, "Images are identical.")
			case d.Size:
				fmt.Fprintf(manner.out(cmd), "Images differ: one goes on at offset %d, where the other ends\n", d.Offset)
			default:
				fmt.Fprintf(manner.out(cmd), "Content mismatch at offset %d!\n", d.Offset)
			}
		}
		if d != nil {
			return &exitStatus{statusDiffer, nil}
		}
		return nil
	}
	return cmd
}
