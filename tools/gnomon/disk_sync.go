package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/spf13/cobra"

	"github.com/gnomon-vmm/gnomon/disk"
	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/changes"
	"github.com/gnomon-vmm/gnomon/disk/copysync"
	"github.com/gnomon-vmm/gnomon/disk/qcow2"
)

// syncReport is what gnomon disk sync prints.
type syncReport struct {
	All    bool   `json:"all"` // all of the disk counted as changed
	Reason string `json:"reason,omitempty"`
	copysync.Figures
}

// syncState is kept beside a target, as TARGET.sync: which point of the source's
// recording the target holds, and what changed before it and was not copied.
type syncState struct {
	Version int           `json:"version"`
	Point   changes.Point `json:"point"`
	Size    int64         `json:"size"`
	Skipped [][2]int64    `json:"skipped"` // starts and ends, ascending
}

const syncVersion = 1

func newDiskSyncCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "sync SOURCE TARGET [--application NAME]",
		Short: "Bring a copy of a disk up to date: what changed and is used",
		Long: `Bring a copy of a disk up to date. Copied is what the disk's ext2, ext3 and ext4 file systems use, partitions or not, and
all that is not known to be free. With --application only what of it changed since that application's last sync to this
TARGET, as --disk file=SOURCE,changes=on had it recorded; TARGET.sync remembers what was left out. TARGET is made where it
does not exist. No machine uses either meanwhile.`,
		Example: `  gnomon disk sync vm1.img /mnt/copy.img --application copy`,
		Args:    usageArgs(cobra.ExactArgs(2)),
	}
	flags := cmd.Flags()
	format := addFormatFlag(cmd, "format", "f", "`format` of SOURCE: raw|qcow2 (default: what the name says)")
	target := addFormatFlag(cmd, "target-format", "F", "`format` of TARGET: raw|qcow2 (default: what the name says)")
	application := flags.StringP("application", "a", "", "`name` under which SOURCE's changes are asked for: another for each TARGET")
	discard := flags.Bool("discard", false, "have TARGET give back space that is not used any more")
	output := addOutputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := checkOutput(*output); err != nil {
			return err
		}
		var report *syncReport
		var err error
		s := syncing{ctx: cmd.Context(), path: args[1], format: *target, discard: *discard}
		if *application == "" {
			var src block.Node
			if src, err = openImage(cmd.Context(), args[0], *format); err == nil {
				report, err = s.all(src, "no --application")
				err = errors.Join(err, src.Close())
			}
		} else {
			if _, err := os.Stat(changes.Path(args[0])); errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("%s: its changes are not recorded: use it with --disk file=%s,changes=on, or sync it without --application", args[0], args[0])
			}
			err = withChanges(args[0], *format, func(src block.Node, r *changes.Recorder) (err error) {
				report, err = s.changed(src, r, *application)
				return err
			})
		}
		if err != nil {
			return err
		}
		if *output == "json" {
			return printJSON(cmd.OutOrStdout(), report)
		}
		if report.All {
			fmt.Fprintf(cmd.ErrOrStderr(), "all of the disk counted as changed: %s\n", report.Reason)
		}
		_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s of %s changed; %s copied, %s not used\n",
			mebibytes(report.Changed), mebibytes(s.size), mebibytes(report.Copied), mebibytes(report.Skipped))
		return err
	}
	return cmd
}

// syncing is one run of gnomon disk sync.
type syncing struct {
	ctx     context.Context
	path    string // the target's
	format  string
	discard bool
	size    int64 // the source's

	skipped [][2]int64
}

func (s *syncing) statePath() string { return s.path + ".sync" }

// all copies what is used.
func (s *syncing) all(src block.Node, reason string) (*syncReport, error) {
	figures, err := s.copy(src, []copysync.Range{{Start: 0, End: src.Size()}})
	return &syncReport{true, reason, figures}, err
}

// changed copies what is used of what changed since the application's last sync, and
// of what was left out then.
func (s *syncing) changed(src block.Node, r *changes.Recorder, application string) (*syncReport, error) {
	set, err := r.Since(src, application)
	if err != nil {
		return nil, err
	}
	report := &syncReport{All: set.Changed == nil, Reason: set.Reason}
	var ranges []copysync.Range
	if !report.All {
		state, err := s.load(set)
		if report.All = err != nil; report.All {
			report.Reason = err.Error()
		} else {
			ranges = joined(set, state.Skipped)
		}
	}
	if report.All {
		ranges = []copysync.Range{{Start: 0, End: src.Size()}}
	}
	if report.Figures, err = s.copy(src, ranges); err != nil {
		return nil, err
	}
	if err := s.save(syncState{syncVersion, set.To, src.Size(), s.skipped}); err != nil {
		return nil, err
	}
	return report, set.Commit()
}

// load reads what is known of the target, which is at the set's beginning.
func (s *syncing) load(set *changes.Set) (*syncState, error) {
	b, err := os.ReadFile(s.statePath())
	if err != nil {
		return nil, fmt.Errorf("it is not known what the target holds: %w", err)
	}
	var state syncState
	if err := json.Unmarshal(b, &state); err != nil {
		return nil, fmt.Errorf("it is not known what the target holds: %s: %w", s.statePath(), err)
	}
	end := int64(0)
	for _, r := range state.Skipped {
		if r[0] < end || r[1] < r[0] || r[1] > set.Size {
			return nil, fmt.Errorf("it is not known what the target holds: %s names bytes %d to %d", s.statePath(), r[0], r[1])
		}
		end = r[1]
	}
	if _, err := os.Stat(s.path); err != nil {
		return nil, fmt.Errorf("there is no target: %w", err)
	}
	switch {
	case state.Version != syncVersion:
		return nil, fmt.Errorf("%s has version %d", s.statePath(), state.Version)
	case state.Point != set.From || state.Size != set.Size:
		return nil, errors.New("the target is not what the application synced last")
	}
	return &state, nil
}

// save makes durable what the target holds now.
func (s *syncing) save(state syncState) error {
	b, err := json.Marshal(state)
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(s.statePath()), filepath.Base(s.statePath())+".*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(append(b, '\n'))
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), s.statePath())
}

// joined are ranges of a set and others, ascending.
func joined(set *changes.Set, others [][2]int64) []copysync.Range {
	var all []copysync.Range
	for off, n := range set.Extents() {
		all = append(all, copysync.Range{Start: off, End: off + n})
	}
	for _, r := range others {
		all = append(all, copysync.Range{Start: r[0], End: r[1]})
	}
	slices.SortFunc(all, func(a, b copysync.Range) int { return cmp.Compare(a.Start, b.Start) })
	out := all[:0]
	for _, r := range all {
		if k := len(out) - 1; k >= 0 && r.Start <= out[k].End {
			out[k].End = max(out[k].End, r.End)
			continue
		}
		out = append(out, r)
	}
	return out
}

// copy brings the target up to date, which is made if there is none.
func (s *syncing) copy(src block.Node, ranges []copysync.Range) (figures copysync.Figures, err error) {
	s.size = src.Size()
	if err := sameDisk(src, s.path); err != nil {
		return figures, err
	}
	if _, missing := os.Lstat(s.path); errors.Is(missing, fs.ErrNotExist) {
		if err = createImage(s.path, s.format, qcow2.CreateOptions{Size: src.Size()}); err != nil {
			return figures, err
		}
		defer func() {
			if err != nil {
				os.Remove(s.path)
			}
		}()
	}
	dst, err := disk.Open(s.path, disk.Options{Format: formatOf(s.format, s.path)})
	if err != nil {
		return figures, err
	}
	bar := newProgress("syncing")
	figures, err = copysync.Sync(s.ctx, dst, src, slices.Values(ranges), copysync.Options{
		Discard: s.discard, Progress: bar.Set, Skipped: func(r copysync.Range) { s.skipped = append(s.skipped, [2]int64{r.Start, r.End}) },
	})
	bar.Finish()
	return figures, errors.Join(err, dst.Close())
}
