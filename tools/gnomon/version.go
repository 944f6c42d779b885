package main

import (
	"encoding/json"
	"fmt"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"
)

// versionInfo is what gnomon version --output json prints.
type versionInfo struct {
	Version string `json:"version"` // of the module; "devel" when it was not built from a release
	Commit  string `json:"commit"`  // what it was built from; empty when the build does not know
	Dirty   bool   `json:"dirty"`   // with changes that are not in Commit
	Go      string `json:"go"`      // the Go it was built with
}

func readVersion() versionInfo {
	v := versionInfo{Version: "devel", Go: runtime.Version()}
	build, ok := debug.ReadBuildInfo()
	if !ok {
		return v
	}
	if build.Main.Version != "" && build.Main.Version != "(devel)" {
		v.Version = build.Main.Version
	}
	for _, s := range build.Settings {
		switch s.Key {
		case "vcs.revision":
			v.Commit = s.Value
		case "vcs.modified":
			v.Dirty = s.Value == "true"
		}
	}
	return v
}

// version is readVersion in a few words.
func version() string {
	v := readVersion()
	text := v.Version
	if v.Commit != "" {
		text += " (commit " + v.Commit[:min(12, len(v.Commit))]
		if v.Dirty {
			text += ", changed"
		}
		text += ")"
	}
	return text + ", " + v.Go
}

func newVersionCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "version",
		Short: "Print the version of this program",
		Args:  usageArgs(cobra.NoArgs),
	}
	output := addOutputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := checkOutput(*output); err != nil {
			return err
		}
		if *output == "json" {
			e := json.NewEncoder(cmd.OutOrStdout())
			e.SetIndent("", "  ")
			return e.Encode(readVersion())
		}
		_, err := fmt.Fprintln(cmd.OutOrStdout(), "gnomon", version())
		return err
	}
	return cmd
}
