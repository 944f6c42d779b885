package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
)

// changesLoads are those whose rate recording of changes may take from.
var changesLoads = []diskLoad{
	{"recording1", "4 KiB random write, 1 in flight", "1/s", "op=randwrite bs=4k qd=1 data=same", false},
	{"recording32", "4 KiB random write, 32 in flight", "1/s", "op=randwrite bs=4k qd=32 data=same", false},
}

// recording measures writes of a disk whose changes are recorded beside those of one
// whose are not. Both machines are there all the time, and the guests write in
// turn for a moment each, so that what disturbs the host falls on both.
type recording struct {
	b        *bench
	machines [2]*machine // with and without
	turns    int         // so many of each load are in a run
	last     [2]figures  // of the last run
}

func (b *bench) recording() experiment {
	r := &recording{b: b, turns: b.pick(16, 6)}
	e := experiment{
		name: "recording of changes",
		contenders: []contender{
			{"gnomon changes=on", func(ctx context.Context) (figures, error) {
				err := r.run(ctx)
				return r.last[0], err
			}},
			{"gnomon", func(context.Context) (figures, error) { return r.last[1], nil }},
		},
		end: r.close,
	}
	for _, l := range changesLoads {
		e.promises = append(e.promises, promise{metric: l.metric, text: "recording of changes: " + l.text, unit: l.unit, higher: true, bound: bound{"ratio", ">=", 0.98}})
	}
	return e
}

func (r *recording) close() {
	for i, m := range r.machines {
		m.close()
		r.machines[i] = nil
	}
}

// run starts the machines anew: a command line has room for the turns of one run.
func (r *recording) run(ctx context.Context) error {
	r.close()
	var words strings.Builder
	for range 1 + r.turns {
		for _, l := range changesLoads {
			fmt.Fprintf(&words, "wait; blk %s ms=%d; ", l.words, r.b.pick(60, 30))
		}
	}
	words.WriteString("wait")
	var got [2]map[string][]float64
	for i, flags := range []string{",changes=on", ""} {
		img := image{filepath.Join(r.b.dir, fmt.Sprintf("recording%d.img", i)), "raw", 256 * mib}
		if err := img.make(); err != nil {
			return err
		}
		var err error
		r.machines[i], err = r.b.startMachine(ctx, r.b.ours(64, "--disk", "file="+img.path+flags, "--net", "none"), words.String(), "")
		if err == nil {
			err = r.machines[i].waiting()
		}
		if err != nil {
			return err
		}
		got[i] = map[string][]float64{}
	}
	for turn := range 1 + r.turns {
		for _, l := range changesLoads {
			for i := range r.machines {
				which := (i + turn) % 2
				w, err := r.machines[which].turn()
				if err != nil {
					return err
				}
				if turn > 0 { // the first marks what it writes to
					got[which][l.metric] = append(got[which][l.metric], float64(w.ios)/w.seconds)
				}
			}
		}
	}
	for i, all := range got {
		r.last[i] = figures{}
		for metric, f := range all {
			r.last[i][metric] = median(f)
		}
	}
	return ctx.Err()
}

// waiting returns when the guest waits. Then the machine stands still.
func (m *machine) waiting() error {
	if _, _, err := m.line("wait"); err != nil {
		return err
	}
	return m.qmp.execute("stop", struct{}{}, nil, nil)
}

// turn has the guest write until it waits again.
func (m *machine) turn() (w writing, err error) {
	if err := errors.Join(m.release(), m.qmp.execute("cont", struct{}{}, nil, nil)); err != nil {
		return w, err
	}
	if w, err = m.writing(); err != nil {
		return w, err
	}
	return w, m.waiting()
}
