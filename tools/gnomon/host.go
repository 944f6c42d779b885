package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/gnomon-vmm/gnomon/disk/aio"
	"github.com/gnomon-vmm/gnomon/kvm"
	"github.com/gnomon-vmm/gnomon/kvm/hostinfo"
)

func newHostCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "host",
		Short: "Tell what this host offers virtual machines, what is missing, and what that costs",
		Args:  usageArgs(cobra.NoArgs),
	}
	output := addOutputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := checkOutput(*output); err != nil {
			return err
		}
		report := hostinfo.Probe()
		if *output == "json" {
			e := json.NewEncoder(cmd.OutOrStdout())
			e.SetIndent("", "  ")
			return e.Encode(report)
		}
		return printHost(cmd.OutOrStdout(), report)
	}
	return cmd
}

// kindInWords says what a user can expect of each kind of KVM.
var kindInWords = map[hostinfo.Kind]string{
	hostinfo.KindNone:  "none: virtual machines cannot run here",
	hostinfo.KindVTx:   "Intel VT-x: guests run at full speed",
	hostinfo.KindAMDV:  "AMD-V: guests run at full speed",
	hostinfo.KindOther: "yes, neither VT-x nor AMD-V by name: guests run at full speed",
	hostinfo.KindPVM:   "PVM, no VT-x or AMD-V: guest programs run at full speed, guest kernels are interpreted",
}

// printHost prints a report for people.
func printHost(out io.Writer, r hostinfo.Report) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	line := func(name, format string, args ...any) { fmt.Fprintf(w, "%s\t%s\n", name, fmt.Sprintf(format, args...)) }

	kind := kindInWords[r.KVM.Kind]
	if strings.HasPrefix(r.KVM.Error, kvm.ErrPermission.Error()) {
		kind = "no permission for " + kvm.DevicePath + ": what this host can do is not known"
	}
	line("Virtualisation", "%s", kind)
	if r.KVM.Error != "" {
		line("KVM", "%s", r.KVM.Error)
	} else {
		line("KVM", "API %d, %s; up to %d vCPUs a machine, %d memory slots", r.KVM.APIVersion,
			orNone(r.KVM.Modules, "built in"), r.KVM.MaxVCPUs, r.KVM.MemorySlots)
	}
	nested := ""
	if r.CPU.Hypervisor {
		nested = "; this host is itself a virtual machine"
	}
	line("Processors", "%d, %s%s", r.CPU.Count, r.CPU.Model, nested)
	line("Time", "%s", timeInWords(r))
	line("Memory", "%s, %s available", size(r.Memory.Total), size(r.Memory.Available))
	line("Huge pages", "%s; transparent: %s, on shared memory: %s", hugePagesInWords(r.Memory.HugePages),
		orUnknown(r.Memory.THP), orUnknown(r.Memory.THPOnShared))
	if r.Userfaultfd.By != "" {
		line("userfaultfd", "by %s, as %s: %s", r.Userfaultfd.By, userInWords(r.UID), strings.Join(r.Userfaultfd.Features, " "))
	} else {
		line("userfaultfd", "none as %s: %s", userInWords(r.UID), r.Userfaultfd.Error)
	}
	disks := "io_uring"
	if err := aio.Probe(); err != nil {
		disks = "threads: " + err.Error()
	}
	line("Direct disk I/O", "by %s", disks)
	for _, d := range r.Devices {
		state := "usable"
		if !d.Usable {
			state = "not usable, " + d.Error
		}
		line(d.Path, "%s: %s", state, d.Use)
	}
	line("Kernel", "Linux %s", r.Kernel)
	if err := w.Flush(); err != nil {
		return err
	}
	if len(r.KVM.Capabilities) > 0 {
		fmt.Fprintln(out, "\nKVM capabilities")
		for _, c := range r.KVM.Capabilities {
			mark := "yes"
			if c.Value == 0 {
				mark = "no"
			}
			fmt.Fprintf(w, "  %s\t%s\t%s\n", mark, c.Name, c.Use)
		}
		if err := w.Flush(); err != nil {
			return err
		}
	}
	if len(r.Missing) == 0 {
		fmt.Fprintln(out, "\nNothing is missing.")
		return nil
	}
	fmt.Fprintln(out, "\nMissing")
	for _, m := range r.Missing {
		fmt.Fprintf(out, "  %s\n    cost: %s\n", m.What, m.Cost)
		if m.Remedy != "" {
			fmt.Fprintf(out, "    remedy: %s\n", m.Remedy)
		}
	}
	return nil
}

func userInWords(uid int) string {
	if uid == 0 {
		return "root"
	}
	return fmt.Sprintf("user %d", uid)
}

func timeInWords(r hostinfo.Report) string {
	text := "clock source " + orUnknown(r.CPU.Clocksource)
	if r.KVM.TSCKHz != 0 {
		text += fmt.Sprintf("; guests' TSC counts at %.1f MHz", float64(r.KVM.TSCKHz)/1000)
	}
	if !r.CPU.ConstantTSC {
		text += ", not at a constant rate"
	}
	return text
}

func hugePagesInWords(pools []hostinfo.HugePages) string {
	var words []string
	for _, p := range pools {
		if p.Total > 0 {
			words = append(words, fmt.Sprintf("%d of %s, %d free", p.Total, size(p.Size), p.Free))
		}
	}
	return orNone(words, "none reserved")
}

func orNone(words []string, none string) string {
	if len(words) == 0 {
		return none
	}
	return strings.Join(words, ", ")
}

func orUnknown(word string) string {
	if word == "" {
		return "unknown"
	}
	return word
}

// size writes a number of bytes as people do.
func size(n uint64) string {
	switch {
	case n >= 1<<30:
		return fmt.Sprintf("%.1f GiB", float64(n)/(1<<30))
	case n >= 1<<20:
		return fmt.Sprintf("%.0f MiB", float64(n)/(1<<20))
	}
	return fmt.Sprintf("%d KiB", n>>10)
}
