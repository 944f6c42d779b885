package main

import (
	"context"
	"fmt"
	"os"
	"strings"
)

// increment measures the checkpoint of a guest that has written one page in a
// hundred since the last one. The peer is the checkpoint of everything.
func (b *bench) increment() experiment {
	i := &incremental{b: b, size: b.pick(1024, 256)}
	return experiment{
		name: "increment",
		schedule: contenders{
			{"gnomon checkpoint --parent", func(ctx context.Context) (figures, error) { return i.save(ctx, false) }},
			{"gnomon checkpoint", func(ctx context.Context) (figures, error) { return i.save(ctx, true) }},
		},
		promises: []promise{
			{metric: "bytes", text: "file of a checkpoint after 1 % of memory was written", unit: "KiB", bound: bound{"ratio", "<=", 0.03}},
			{metric: "time", text: "checkpoint after 1 % of memory was written", unit: "ms", bound: bound{"ratio", "<=", 0.03}},
			{metric: "pause", text: "pause of a checkpoint after 1 % of memory was written", unit: "ms"},
		},
		end: i.close,
	}
}

// incremental is a guest that writes a part of its memory whenever it is told.
type incremental struct {
	b    *bench
	size int // MiB
	m    *machine
	last string // the last checkpoint of everything
}

func (i *incremental) close() {
	i.m.close()
	if i.last != "" {
		os.Remove(i.last)
	}
}

// save has the guest write, and saves it.
func (i *incremental) save(ctx context.Context, everything bool) (figures, error) {
	if i.m == nil {
		words := fmt.Sprintf("fill size=%dM; wait by=mailbox", i.size) +
			strings.Repeat(fmt.Sprintf("; touch op=write span=%dk; wait by=mailbox", i.size*1024/100), 100)
		m, err := i.b.startMachine(ctx, i.b.ours(i.size+i.size/8+128, "--net", "none"), words, "")
		if err != nil {
			return nil, err
		}
		i.m = m
		if _, _, err := m.line("wait"); err != nil {
			return nil, err
		}
		if _, err := i.checkpoint(ctx, ""); err != nil {
			return nil, err
		}
	}
	box, err := openMailbox(i.m.guest)
	if err != nil {
		return nil, err
	}
	defer box.close()
	box.stop()
	if _, _, err := i.m.line("wait"); err != nil {
		return nil, err
	}
	parent := i.last
	if everything {
		parent = ""
	}
	s, err := i.checkpoint(ctx, parent)
	if err != nil {
		return nil, err
	}
	return figures{"bytes": float64(s.Bytes) / 1024, "time": float64(s.Total) / 1e6, "pause": float64(s.Pause) / 1e6}, nil
}

// checkpoint saves the guest. What was saved before is removed unless it is
// the parent of a checkpoint that is itself of no further use.
func (i *incremental) checkpoint(ctx context.Context, parent string) (*saved, error) {
	file, err := i.b.scratch("increment")
	if err != nil {
		return nil, err
	}
	s, err := i.m.checkpoint(ctx, file, parent, "running")
	if parent != "" {
		os.Remove(file)
	} else {
		if i.last != "" {
			os.Remove(i.last)
		}
		i.last = file
	}
	return s, err
}
