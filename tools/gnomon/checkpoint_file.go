package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/gnomon-vmm/gnomon/mm/checkpoint"
)

// newCheckpointFileCommands are the commands about checkpoint files, which need
// no machine.
func newCheckpointFileCommands() []*cobra.Command {
	return []*cobra.Command{
		newCheckpointInfoCommand(), newCheckpointVerifyCommand(), newCheckpointFlattenCommand(), newCheckpointExtractCommand(),
	}
}

func openCheckpoint(path string) (*checkpoint.Reader, error) {
	r, err := checkpoint.Open(path)
	return r, explainNoCheckpoint(path, err)
}

// explainNoCheckpoint says what to do about a checkpoint that is not there, or none;
// its parents' errors say it themselves.
func explainNoCheckpoint(path string, err error) error {
	_, missing := os.Stat(path)
	switch {
	case errors.Is(err, checkpoint.ErrFormat):
		return fmt.Errorf("%w: name one that gnomon checkpoint made", err)
	case err == nil || missing == nil:
		return err
	}
	return explainMissing("checkpoint", path, err)
}

func printJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

func newCheckpointInfoCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "info FILE",
		Short: "Tell what a checkpoint holds and which parents it needs",
		Args:  usageArgs(cobra.ExactArgs(1)),
	}
	output := addOutputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := checkOutput(*output); err != nil {
			return err
		}
		r, err := openCheckpoint(args[0])
		if err != nil {
			return err
		}
		defer r.Close()
		chain := r.Info()
		if *output == "json" {
			return printJSON(cmd.OutOrStdout(), map[string]any{"chain": chain})
		}
		w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
		for i, f := range chain {
			if i > 0 {
				fmt.Fprintln(w)
			}
			fmt.Fprintf(w, "file:\t%s\n", f.File)
			fmt.Fprintf(w, "id:\t%s\n", f.ID)
			if f.Parent != "" {
				fmt.Fprintf(w, "parent:\t%s (%s)\n", f.Parent, f.ParentID)
			}
			fmt.Fprintf(w, "size:\t%s\n", mebibytes(f.FileBytes))
			fmt.Fprintf(w, "memory:\t%s\n", mebibytes(f.MemoryBytes))
			fmt.Fprintf(w, "pages:\t%d: %d in %d blocks of %s, %d zero, %d duplicate\n", f.DataPages+f.ZeroPages+f.DuplicatePages,
				f.DataPages, f.Blocks, mebibytes(f.BlockBytes), f.ZeroPages, f.DuplicatePages)
			for _, s := range f.Sections {
				fmt.Fprintf(w, "section:\t%s version %d, %d bytes\n", s.Name, s.Version, s.Size)
			}
		}
		return w.Flush()
	}
	return cmd
}

// mebibytes is a size in MiB, or in KiB where that would be nothing.
func mebibytes(n int64) string {
	if n < 1<<20 {
		return fmt.Sprintf("%.1f KiB", float64(n)/(1<<10))
	}
	return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20))
}

func newCheckpointVerifyCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "verify FILE",
		Short: "Read every byte of a checkpoint and its parents and check it",
		Long: `Read every byte of a checkpoint and its parents and check it. The first fault ends this with status 1: the error
names the file, what is damaged in it, and the offset. With --output json it is in the object, too.`,
		Args: usageArgs(cobra.ExactArgs(1)),
	}
	output := addOutputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := checkOutput(*output); err != nil {
			return err
		}
		v := verified{Files: []string{args[0]}}
		err := v.verify(cmd.Context(), args[0])
		if *output == "json" && cmd.Context().Err() == nil {
			if err != nil {
				v.Error = err.Error()
			}
			return errors.Join(err, printJSON(cmd.OutOrStdout(), v))
		}
		if err != nil {
			return err
		}
		for _, f := range v.Files {
			fmt.Fprintf(cmd.OutOrStdout(), "%s: good\n", f)
		}
		return nil
	}
	return cmd
}

// verified is what became of a checkpoint's verification.
type verified struct {
	Good  bool     `json:"good"`
	Files []string `json:"files"` // as far as they are known
	Bytes int64    `json:"bytes"` // of all files, once they are known
	Error string   `json:"error,omitempty"`
}

func (v *verified) verify(ctx context.Context, path string) error {
	r, err := openCheckpoint(path)
	if err != nil {
		return err
	}
	defer r.Close()
	v.Files = append(v.Files, r.Parents()...)
	bar := newProgress("verifying")
	defer bar.Finish()
	if err := r.Verify(ctx, func(done, total int64) {
		v.Bytes = total
		bar.Set(done, total)
	}); err != nil {
		return err
	}
	v.Good = true
	return nil
}

func newCheckpointFlattenCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "flatten FILE --to OUT [--delete-parents]",
		Short: "Make one checkpoint that needs no parent from a chain",
		Long: `Make one checkpoint that needs no parent from FILE and its parents. OUT is there only when it is complete.

With --delete-parents FILE and its parents are deleted then. This is refused before anything is done if another
checkpoint in the directories where they are needs one of them; checkpoints elsewhere are not looked for.`,
		Example: `  gnomon checkpoint flatten vm1-later.ckpt --to vm1-flat.ckpt`,
		Args:    usageArgs(cobra.ExactArgs(1)),
	}
	to := cmd.Flags().String("to", "", "checkpoint `file` to make")
	deleteParents := cmd.Flags().Bool("delete-parents", false, "delete FILE and its parents when OUT is complete")
	output := addOutputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := checkOutput(*output); err != nil {
			return err
		}
		if *to == "" {
			return usageError(errors.New("no --to: name the checkpoint file to make"))
		}
		r, err := openCheckpoint(args[0])
		if err != nil {
			return err
		}
		defer r.Close()
		chain := append([]string{args[0]}, r.Parents()...)
		if *deleteParents {
			if err := r.Needed(); err != nil {
				return fmt.Errorf("%w: flatten that one first, or leave out --delete-parents", err)
			}
		}
		bar := newProgress("flattening")
		err = r.Flatten(cmd.Context(), *to, bar.Set)
		bar.Finish()
		if err != nil {
			return err
		}
		deleted := []string{}
		if *deleteParents {
			if deleted, err = r.Delete(); err != nil {
				return fmt.Errorf("%s is complete, but not all that it replaces was deleted: %w", *to, err)
			}
		}
		if *output == "json" {
			return printJSON(cmd.OutOrStdout(), map[string]any{"file": *to, "from": chain, "deleted": deleted})
		}
		fmt.Fprintf(cmd.OutOrStdout(), "%s: made of %d files\n", *to, len(chain))
		for _, f := range deleted {
			fmt.Fprintf(cmd.OutOrStdout(), "%s: deleted\n", f)
		}
		return nil
	}
	return cmd
}

func newCheckpointExtractCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "extract FILE [--to OUT] [--section NAME]",
		Short: "Write a checkpoint's memory as a raw image, or one of its sections",
		Long: `Write a checkpoint's memory to a raw image, in which each byte is at the offset that is its guest-physical address
and zero pages are holes. With --section write that section instead, to standard output if there is no --to.

OUT must not exist, and is there only when it is complete.`,
		Example: `  gnomon checkpoint extract vm1.ckpt --to vm1.ram
  gnomon checkpoint extract vm1.ckpt --section state:cpu0`,
		Args: usageArgs(cobra.ExactArgs(1)),
	}
	to := cmd.Flags().String("to", "", "`file` to write")
	section := cmd.Flags().String("section", "", "`name` of the section to write instead of the memory")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if *to == "" && *section == "" {
			return usageError(errors.New("no --to: name the file to write the memory to"))
		}
		r, err := openCheckpoint(args[0])
		if err != nil {
			return err
		}
		defer r.Close()
		write := func(out *os.File) error {
			bar := newProgress("extracting")
			defer bar.Finish()
			return r.Extract(cmd.Context(), out, bar.Set)
		}
		if *section != "" {
			_, data, err := r.Section(*section)
			if errors.Is(err, checkpoint.ErrMissing) {
				return fmt.Errorf("%w: gnomon checkpoint info %s lists them", err, args[0])
			} else if err != nil {
				return err
			}
			if *to == "" {
				_, err := cmd.OutOrStdout().Write(data)
				return err
			}
			write = func(out *os.File) error {
				_, err := out.Write(data)
				return err
			}
		}
		return writeNewFile(*to, write)
	}
	return cmd
}

// writeNewFile makes a file that is there only when write has filled it.
func writeNewFile(path string, write func(*os.File) error) error {
	if _, err := os.Lstat(path); err == nil {
		return fmt.Errorf("%s: %w: remove it, or choose another name", path, fs.ErrExist)
	}
	out, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*.partial")
	if err != nil {
		return adviseOnPath(err)
	}
	defer os.Remove(out.Name()) // in vain once it has its name
	defer out.Close()
	if err := write(out); err != nil {
		return err
	}
	if err := out.Sync(); err != nil {
		return err
	}
	// Unlike rename, link does not replace a file that came meanwhile.
	if err := os.Link(out.Name(), path); err != nil {
		return err
	}
	return nil
}
