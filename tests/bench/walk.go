package main

import (
	"context"
	"fmt"
	"os"
	"time"
)

// walk measures a guest that walks through 256 MiB of memory in virtual order,
// its pages scattered at random over physical memory. The peers are ourselves
// with other settings.
func (b *bench) walk() experiment {
	w := &walker{b: b, size: b.pick(256, 64)}
	cold := []string{"--no-background"}
	return experiment{
		name: "walk",
		schedule: contenders{
			{"gnomon restore", func(ctx context.Context) (figures, error) {
				f, err := w.restored(ctx, false)
				if err != nil {
					return nil, err
				}
				demand, err := w.restored(ctx, false, cold...)
				return figures{
					"walk": f["walk"], "warm": f["walk"], "none": f["walk"], "physical": f["walk"],
					"demand": demand["walk"], "faults": demand["faults"],
				}, err
			}},
			{"gnomon, memory loaded before the walk", func(ctx context.Context) (figures, error) {
				f, err := w.restored(ctx, true)
				return figures{"walk": f["walk"], "demand": f["walk"]}, err
			}},
			{"gnomon, never saved, second walk", func(ctx context.Context) (figures, error) {
				return figures{"warm": w.warm}, nil
			}},
			{"gnomon restore --prefetch none --no-background", func(ctx context.Context) (figures, error) {
				f, err := w.restored(ctx, false, append(cold, "--prefetch", "none")...)
				return figures{"none": f["walk"], "faults": f["faults"]}, err
			}},
			{"gnomon restore --prefetch physical --no-background", func(ctx context.Context) (figures, error) {
				f, err := w.restored(ctx, false, append(cold, "--prefetch", "physical")...)
				return figures{"physical": f["walk"]}, err
			}},
		},
		promises: []promise{
			{metric: "walk", text: "walk of scattered memory after restore, to one with memory loaded", unit: "ms", bound: bound{"ratio", "<=", 1.5}},
			{metric: "none", text: "walk of scattered memory after restore, to none prefetched", unit: "ms", bound: bound{"ratio", "<=", 0.2}},
			{metric: "physical", text: "walk of scattered memory after restore, to physical neighbours prefetched", unit: "ms"},
			{metric: "warm", text: "walk of scattered memory after restore, to one whose pages the guest has used before", unit: "ms"},
			{metric: "demand", text: "walk of scattered memory after restore, none loaded in the background, to one with memory loaded", unit: "ms"},
			{metric: "faults", text: "guest faults of that walk, to none prefetched", unit: "faults", bound: bound{"ratio", "<=", 0.02}},
		},
		end: w.close,
	}
}

// walker has the checkpoint of a guest that is about to walk.
type walker struct {
	b    *bench
	size int // MiB
	file string
	warm float64 // ms: its walk before it was saved
}

func (w *walker) close() {
	if w.file != "" {
		os.Remove(w.file)
	}
}

// save makes the checkpoint, once.
func (w *walker) save(ctx context.Context) error {
	if w.file != "" {
		return nil
	}
	words := fmt.Sprintf("fill size=%dM; touch op=sum; touch op=sum; wait; touch op=sum; spin", w.size)
	m, err := w.b.startMachine(ctx, w.b.ours(w.size+256, "--net", "none"), words, "")
	if err != nil {
		return err
	}
	defer m.close()
	for range 2 { // the first brings the pattern's pages into KVM's tables
		line, _, err := m.line("touch")
		if err != nil {
			return err
		}
		seconds, err := line.Seconds()
		if err != nil {
			return err
		}
		w.warm = seconds * 1000
	}
	if _, _, err := m.line("wait"); err != nil {
		return err
	}
	file, err := w.b.scratch("walk")
	if err != nil {
		return err
	}
	w.file = file
	_, err = m.checkpoint(ctx, file, "", "running")
	return err
}

// restored has the guest go on, and walk at once or when all is loaded.
func (w *walker) restored(ctx context.Context, loaded bool, flags ...string) (figures, error) {
	if err := w.save(ctx); err != nil {
		return nil, err
	}
	input := "\n"
	if loaded {
		input = ""
	}
	m, err := w.b.startMachine(ctx, w.b.restore(w.file, flags...), "", input)
	if err != nil {
		return nil, err
	}
	defer m.close()
	var r restoredStats
	if loaded {
		if err := until(ctx, 20*time.Millisecond, func() (bool, error) {
			err := m.qmp.execute("__org.gnomon_query-restore", struct{}{}, &r, nil)
			return r.Complete, err
		}); err != nil {
			return nil, err
		}
		if err := m.release(); err != nil {
			return nil, err
		}
	}
	line, _, err := m.line("touch")
	if err != nil {
		return nil, err
	}
	seconds, err := line.Seconds()
	if err != nil {
		return nil, err
	}
	err = m.qmp.execute("__org.gnomon_query-restore", struct{}{}, &r, nil)
	return figures{"walk": seconds * 1000, "faults": float64(r.Faults)}, err
}

// restoredStats is what Gnomon tells of the loading of memory.
type restoredStats struct {
	Complete bool   `json:"complete"`
	Faults   uint64 `json:"guest-faults"`
	Copies   uint64 `json:"copy-calls"`
}
