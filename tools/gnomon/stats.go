package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sort"
	"strings"

	"github.com/spf13/cobra"

	"github.com/gnomon-vmm/gnomon/qmp"
)

// statsQueries are the QMP commands whose figures gnomon stats shows.
var statsQueries = []struct{ name, command string }{
	{"restore", "__org.gnomon_query-restore"},
	{"checkpoint", "__org.gnomon_query-checkpoint"},
}

func newStatsCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "stats MACHINE",
		Short: "Show figures of a machine's restore and of its last checkpoint",
		Long: `Show how the memory of a restored machine is being loaded, and what its last checkpoint took. Times are in
nanoseconds, sizes in bytes. With --output prometheus the figures are in Prometheus' text format.`,
		Args: usageArgs(cobra.ExactArgs(1)),
	}
	output := cmd.Flags().String("output", "text", "`form` of what is printed: text, json or prometheus")
	completeFlag(cmd, "output", "text", "json", "prometheus")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if *output != "prometheus" {
			if err := checkOutput(*output); err != nil {
				return usageError(fmt.Errorf("--output %q: text, json and prometheus are possible", *output))
			}
		}
		ctx := cmd.Context()
		c, err := dialQMP(ctx, args[0])
		if err != nil {
			return err
		}
		defer c.Close()
		figures := map[string]map[string]any{}
		for _, q := range statsQueries {
			var f map[string]any
			err := c.Execute(ctx, q.command, nil, &f)
			var refused *qmp.Error
			switch {
			case errors.As(err, &refused): // it was not restored, or not saved
			case err != nil:
				return err
			default:
				figures[q.name] = f
			}
		}
		out := cmd.OutOrStdout()
		if *output == "json" {
			e := json.NewEncoder(out)
			e.SetIndent("", "  ")
			return e.Encode(figures)
		}
		return printStats(out, args[0], figures, *output == "prometheus")
	}
	return cmd
}

// printStats prints the figures that are numbers or yes and no, by name.
func printStats(out io.Writer, machine string, figures map[string]map[string]any, prometheus bool) error {
	for _, q := range statsQueries {
		var names []string
		for name := range figures[q.name] {
			names = append(names, name)
		}
		sort.Strings(names)
		for _, name := range names {
			value := figures[q.name][name]
			switch v := value.(type) {
			case bool:
				value = map[bool]int{true: 1}[v]
			case float64:
				value = int64(v)
			case string:
				if prometheus {
					continue
				}
			default:
				continue
			}
			line := fmt.Sprintf("%s %s: %v\n", q.name, name, value)
			if prometheus {
				metric := "gnomon_" + q.name + "_" + strings.ReplaceAll(name, "-", "_")
				line = fmt.Sprintf("# TYPE %s gauge\n%s{machine=%q} %v\n", metric, metric, machine, value)
			}
			if _, err := io.WriteString(out, line); err != nil {
				return err
			}
		}
	}
	return nil
}
