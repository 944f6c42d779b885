package main

import (
	"context"
	"fmt"
)

// A standby is a side that is there while the others have their turns, and does a load
// for a moment when its own comes.
type standby interface {
	// turn does the load and returns its figure.
	turn(ctx context.Context, l load) (float64, error)
	close()
}

// opener prepares a side to do each of the loads so many times, one load after the other.
// place is one of as many as there are sides, each another one, and each all of them as the
// runs go on.
type opener func(ctx context.Context, loads []load, times, place int) (standby, error)

// A load is one way to use what is measured.
type load struct {
	metric, text, unit string
	words              string // for who does it
}

// turns has the sides of an experiment do each load for a moment, one side after the
// other, again and again. A disk of a virtual host changes its speed within a second:
// only what is measured close together compares.
type turns struct {
	count int // in a run, after the first, which does not count
	loads []load
	sides []contestant
	run   int
}

// A contestant is a side by its name.
type contestant struct {
	name string
	open opener
}

// round is a run of all loads that are wanted.
func (t *turns) round(ctx context.Context, wanted func(metric string) bool, got *notes, say func(string)) error {
	var loads []load
	for _, l := range t.loads {
		if wanted(l.metric) {
			loads = append(loads, l)
		}
	}
	say("all in turn")
	sides := make([]standby, len(t.sides))
	figures := make([]map[string][]float64, len(t.sides))
	for i, s := range t.sides {
		figures[i] = got.of(s.name)
	}
	for place := range sides {
		// Who starts first gets other memory than who does last: the kernel's
		// leftovers, of which large requests have many pieces.
		i := (place + t.run) % len(sides)
		side, err := t.sides[i].open(ctx, loads, 1+t.count, place)
		if err != nil {
			return fmt.Errorf("%s: %w", t.sides[i].name, err)
		}
		defer side.close()
		sides[i] = side
	}
	t.run++
	for _, l := range loads {
		for n := range 1 + t.count {
			for i := range sides {
				i = (i + n) % len(sides)
				x, err := sides[i].turn(ctx, l)
				if err != nil {
					return fmt.Errorf("%s: %s: %w", t.sides[i].name, l.text, err)
				}
				if n > 0 {
					figures[i][l.metric] = append(figures[i][l.metric], x)
				}
			}
		}
	}
	return ctx.Err()
}
