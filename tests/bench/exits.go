package main

import "context"

// exits measures a port write that nobody listens to, from the guest to the
// VMM's own process and back. That Gnomon does it without an allocation is a
// unit test of package vmm.
func (b *bench) exits() experiment {
	run := func(v vmm) func(context.Context) (figures, error) {
		return func(ctx context.Context) (figures, error) { return b.exitsOnce(ctx, v) }
	}
	return experiment{
		name: "exits",
		schedule: contenders{
			{"gnomon", run(b.ours(128, "--net", "none"))},
			{"QEMU microvm", run(b.peer(microvm, 128))},
			{"QEMU q35", run(b.peer("q35", 128))},
		},
		promises: []promise{
			{metric: "out", text: "OUT to a port nobody serves", unit: "us"},
			{metric: "mmio", text: "4-byte read of MMIO nobody serves", unit: "us"},
		},
	}
}

func (b *bench) exitsOnce(ctx context.Context, v vmm) (figures, error) {
	g, err := v.start(ctx, map[bool]string{
		true:  "out count=5000; mmio count=5000",
		false: "out count=30000; mmio count=30000",
	}[b.quick])
	if err != nil {
		return nil, err
	}
	defer g.kill()
	results, err := g.results()
	if err != nil {
		return nil, err
	}
	f := figures{}
	for _, name := range []string{"out", "mmio"} {
		line, err := results.Find(name, 0)
		if err != nil {
			return nil, err
		}
		seconds, err := line.Seconds()
		if err != nil {
			return nil, err
		}
		count, err := line.Number("count")
		if err != nil {
			return nil, err
		}
		f[name] = seconds * 1e6 / float64(count)
	}
	return f, nil
}
