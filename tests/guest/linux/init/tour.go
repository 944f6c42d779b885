//go:build linux

package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/gnomon-vmm/gnomon/tests/guest/wire"
)

// tour shows on the console what the guest has and does, and then waits for
// somebody outside to end the machine.
func tour(t *terminal, a *agent) {
	setConsoleLevel(4)
	say := func(what string, result any, err error) {
		if err != nil {
			fmt.Fprintf(t.file, "tour: %-12s %v\r\n", what, err)
			return
		}
		fmt.Fprintf(t.file, "tour: %-12s %v\r\n", what, result)
	}
	ctx := context.Background()
	facts, err := a.facts()
	if f, ok := facts.(wire.FactsResult); ok {
		say("kernel", fmt.Sprintf("Linux %s, %d CPUs, init after %d ms of guest time", f.Release, f.CPUs, f.BootMS), nil)
	} else {
		say("kernel", nil, err)
	}
	mem, err := memInfo(a)
	if m, ok := mem.(wire.MemInfoResult); ok {
		say("memory", fmt.Sprintf("%d MiB, %d MiB free", m.Total>>20, m.Free>>20), nil)
	} else {
		say("memory", nil, err)
	}
	now, err := clocks(a)
	if c, ok := now.(wire.ClocksResult); ok {
		say("clock", c.Source, nil)
	} else {
		say("clock", nil, err)
	}
	if disks := list("/sys/class/block"); disks != "" {
		say("disks", disks, nil)
	}
	if _, err := os.Stat("/sys/class/net/" + defaultInterface); err == nil {
		lease, err := dhcp(ctx, wire.LinkArgs{})
		if l, ok := lease.(wire.DHCPResult); ok && err == nil {
			say("network", fmt.Sprintf("%s by DHCP from %s", l.Address, l.Server), nil)
		} else {
			say("network", nil, err)
		}
	}
	if _, err := os.Stat("/dev/hwrng"); err == nil {
		entropy, err := random(ctx, wire.RandomArgs{Source: "/dev/hwrng", Size: 16})
		if d, ok := entropy.(wire.DataResult); ok {
			say("entropy", fmt.Sprintf("%x", d.Data), nil)
		} else {
			say("entropy", nil, err)
		}
	}
	_, _ = io.WriteString(t.file, "tour: done; press the power button (system_powerdown) to end\r\n")
}

// list names what is in a directory, on one line.
func list(dir string) string {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return ""
	}
	names := make([]string, 0, len(entries))
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return strings.Join(names, " ")
}
