package main

import "context"

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
	count   int // in a run, after the first, which does not count
	loads   []load
	openers []opener // of the contenders, in their order
	run     int
}

// measure returns what each side measured in each turn of a run.
func (t *turns) measure(ctx context.Context, wanted func(metric string) bool) ([]map[string][]float64, error) {
	var loads []load
	for _, l := range t.loads {
		if wanted(l.metric) {
			loads = append(loads, l)
		}
	}
	sides := make([]standby, len(t.openers))
	got := make([]map[string][]float64, len(t.openers))
	for place := range sides {
		// Who starts first gets other memory than who does last: the kernel's
		// leftovers, of which large requests have many pieces.
		i := (place + t.run) % len(sides)
		side, err := t.openers[i](ctx, loads, 1+t.count, place)
		if err != nil {
			return nil, err
		}
		defer side.close()
		sides[i], got[i] = side, map[string][]float64{}
	}
	t.run++
	for _, l := range loads {
		for n := range 1 + t.count {
			for i := range sides {
				i = (i + n) % len(sides)
				x, err := sides[i].turn(ctx, l)
				if err != nil {
					return nil, err
				}
				if n > 0 {
					got[i][l.metric] = append(got[i][l.metric], x)
				}
			}
		}
	}
	return got, ctx.Err()
}
