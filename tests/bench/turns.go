package main

import (
	"context"
	"fmt"
)

// A standby is a side that is there while the others have their turns, and does one load
// for a moment when its own comes.
type standby interface {
	// turn does the load for the n-th time, from 0, and returns its figure.
	turn(ctx context.Context, n int) (float64, error)
	close()
}

// opener prepares a side to do a load so many times. place is one of as many as there
// are sides, each another one, and each all of them as the runs go on.
type opener func(ctx context.Context, l load, turns, place int) (standby, error)

// A load is one way to use what is measured.
type load struct {
	metric, text, unit string
	words              string // for who does it
}

// turns has the sides of an experiment do each load for a moment, one side after the
// other, again and again. A disk of a virtual host changes its speed within a second:
// only what is measured close together compares.
type turns struct {
	count   int // in a run, after the first, which does not count
	loads   []load
	openers []opener // of the contenders, in their order
	run     int
}

// measure returns what each side measured in each turn of a run.
func (t *turns) measure(ctx context.Context, wanted func(metric string) bool) ([]map[string][]float64, error) {
	got := make([]map[string][]float64, len(t.openers))
	for i := range got {
		got[i] = map[string][]float64{}
	}
	for _, l := range t.loads {
		if !wanted(l.metric) {
			continue
		}
		figures, err := t.take(ctx, l)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", l.text, err)
		}
		for i := range figures {
			got[i][l.metric] = figures[i]
		}
	}
	t.run++
	return got, nil
}

// take measures one load.
func (t *turns) take(ctx context.Context, l load) ([][]float64, error) {
	sides := make([]standby, len(t.openers))
	for i, open := range t.openers {
		side, err := open(ctx, l, 1+t.count, (i+t.run)%len(t.openers))
		if err != nil {
			return nil, err
		}
		defer side.close()
		sides[i] = side
	}
	got := make([][]float64, len(sides))
	for n := range 1 + t.count {
		for i := range sides {
			i = (i + n) % len(sides)
			x, err := sides[i].turn(ctx, n)
			if err != nil {
				return nil, err
			}
			if n > 0 {
				got[i] = append(got[i], x)
			}
		}
	}
	return got, ctx.Err()
}
