package main

import (
	"encoding/json"
	"fmt"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
)

func newPsCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "ps",
		Short: "List your running machines",
		Args:  usageArgs(cobra.NoArgs),
	}
	output := addOutputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := checkOutput(*output); err != nil {
			return err
		}
		machines, err := runningMachines()
		if err != nil {
			return err
		}
		if *output == "json" {
			e := json.NewEncoder(cmd.OutOrStdout())
			e.SetIndent("", "  ")
			return e.Encode(machines)
		}
		w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
		fmt.Fprintln(w, "NAME\tPID\tCPUS\tMEMORY\tUP\tQMP")
		for _, m := range machines {
			fmt.Fprintf(w, "%s\t%d\t%d\t%d MiB\t%s\t%s\n", m.Name, m.PID, m.CPUs, m.Memory>>20,
				time.Since(m.Started).Round(time.Second), m.QMP)
		}
		return w.Flush()
	}
	return cmd
}
