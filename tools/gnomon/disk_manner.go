package main

import (
	"fmt"
	"io"

	"github.com/spf13/cobra"
)

// manner is how a command on an image tells what it does: qemu-img's -q and -p.
type manner struct{ quiet, progress *bool }

// addQuiet adds -q.
func addQuiet(cmd *cobra.Command) *manner {
	never := false
	return &manner{cmd.Flags().BoolP("quiet", "q", false, "say nothing but errors"), &never}
}

// addManner adds -q and -p.
func addManner(cmd *cobra.Command) *manner {
	m := addQuiet(cmd)
	m.progress = cmd.Flags().BoolP("progress", "p", false, "show the progress where standard error is no terminal, too")
	return m
}

// bar is a progress bar; it is to be finished.
func (m *manner) bar(cmd *cobra.Command, label string) *progress {
	switch {
	case *m.quiet:
		return &progress{}
	case *m.progress:
		return &progress{newBar(cmd.ErrOrStderr(), label)}
	}
	return newProgress(label)
}

// say prints a line of what is only said.
func (m *manner) say(cmd *cobra.Command, text string) {
	fmt.Fprintln(m.out(cmd), text)
}

// out is where to print what is only said.
func (m *manner) out(cmd *cobra.Command) io.Writer {
	if *m.quiet {
		return io.Discard
	}
	return cmd.OutOrStdout()
}

// addRate adds qemu-img's -r. Its value is bytes a second.
func addRate(cmd *cobra.Command) func() (int64, error) {
	text := cmd.Flags().StringP("rate-limit", "r", "", "`bytes` a second that are written at most, as 10M (default: no limit)")
	return func() (int64, error) {
		if *text == "" {
			return 0, nil
		}
		rate, err := parseSize(*text, 1)
		if err != nil || rate == 0 {
			return 0, usageError(fmt.Errorf("--rate-limit %q: bytes a second, as 10M", *text))
		}
		return int64(rate), nil
	}
}
