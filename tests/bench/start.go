package main

import (
	"context"
	"fmt"
	"math"
	"time"
)

// start measures from just before the VMM's process is made: to its first
// ioctl(KVM_RUN), where the kernel's tracing tells; to the kernel's first
// instruction, by the guest's own clock; and to the kernel's first line of
// serial output.
func (b *bench) start() experiment {
	run := func(v vmm) func(context.Context) (figures, error) {
		return func(ctx context.Context) (figures, error) { return b.startOnce(ctx, v) }
	}
	half := bound{"ratio", "<=", 0.5}
	promises := []promise{
		{metric: "entry", text: "start to kernel's first instruction", unit: "ms", bound: half},
		{metric: "line", text: "start to first line of serial output", unit: "ms"},
		{metric: "whole", text: "start to end of a guest that powers off at once", unit: "ms"},
	}
	if traceable() {
		promises = append([]promise{{metric: "run", text: "start to first KVM_RUN", unit: "ms", bound: half}}, promises...)
	}
	return experiment{
		name: "start",
		schedule: contenders{
			{"gnomon", run(b.ours(128, "--net", "none"))},
			{"QEMU microvm", run(b.peer(microvm, 128))},
			{"QEMU microvm acpi=off", run(b.peer(microvm+",acpi=off", 128))},
		},
		promises: promises,
	}
}

func (b *bench) startOnce(ctx context.Context, v vmm) (figures, error) {
	f := figures{}
	trace, err := newTrace()
	if err != nil {
		return nil, err
	}
	defer trace.close()
	g, err := v.start(ctx, "boot; tsc; spin")
	if err != nil {
		return nil, err
	}
	defer g.kill()
	boot, at, err := g.line("boot")
	if err != nil {
		return nil, err
	}
	f["line"] = milliseconds(at - g.started)
	if trace != nil {
		first, err := trace.firstRun(g.pid())
		if err != nil {
			return nil, err
		}
		f["run"] = milliseconds(first - g.started)
	}
	bootTSC, err := boot.Number("tsc")
	if err != nil {
		return nil, err
	}
	tsc, _, err := g.line("tsc")
	if err != nil {
		return nil, err
	}
	khz, err := tsc.Number("khz")
	if err != nil {
		return nil, err
	}
	m, err := openMailbox(g)
	if err != nil {
		return nil, err
	}
	defer m.close()
	entry, err := m.when(ctx, bootTSC, khz)
	if err != nil {
		return nil, err
	}
	f["entry"] = milliseconds(entry - g.started)
	m.stop()
	if _, err := g.results(); err != nil {
		return nil, err
	}

	whole, err := v.start(ctx, "boot")
	if err != nil {
		return nil, err
	}
	defer whole.kill()
	if _, err := whole.results(); err != nil {
		return nil, err
	}
	f["whole"] = milliseconds(clock() - whole.started)
	return f, nil
}

func milliseconds(d time.Duration) float64 { return d.Seconds() * 1000 }

// when converts a reading of the guest's TSC to our clock's. The guest counts
// in the mailbox: the time we see a count at, less the time from the reading to
// that count, is when the reading was taken, and a bit more when we saw the
// count late, so the least of many is right. The guest's TSC may thus have any offset.
func (m *mailbox) when(ctx context.Context, reading, khz uint64) (time.Duration, error) {
	if khz == 0 {
		return 0, fmt.Errorf("the guest's TSC has no known rate")
	}
	least := time.Duration(math.MaxInt64)
	for n, last := 0, m.tsc(); n < 1000; {
		tsc := m.tsc()
		if tsc == last {
			if ctx.Err() != nil {
				return 0, ctx.Err()
			}
			continue
		}
		last = tsc
		now := clock()
		least = min(least, now-time.Duration(float64(int64(tsc-reading))*1e6/float64(khz)))
		n++
	}
	return least, nil
}
