package main

import (
	"context"
	"fmt"
	"regexp"
	"slices"
)

// figures are what one run of a contender measured, by metric.
type figures map[string]float64

// A contender is one of the VMMs in one of its set-ups. Several of one name are one whose
// turn comes as often.
type contender struct {
	name string
	run  func(ctx context.Context) (figures, error)
}

// An experiment measures its promises on ours, the first contender, and the
// peers, the others.
type experiment struct {
	name       string
	contenders []contender
	promises   []promise
	// turns, where not nil, measures all contenders together, whose run is nil then.
	turns *turns
	// end, where not nil, ends what the runs share.
	end func()
}

// choose leaves the promises whose text matches; none left: no experiment.
func (e experiment) choose(only *regexp.Regexp) experiment {
	var chosen []promise
	for _, p := range e.promises {
		if only == nil || only.MatchString(p.text) {
			chosen = append(chosen, p)
		}
	}
	e.promises = chosen
	return e
}

// has tells whether a metric is one of a promise.
func (e experiment) has(metric string) bool {
	return slices.ContainsFunc(e.promises, func(p promise) bool { return p.metric == metric })
}

// measure runs the contenders in turn, so many times each, and judges. What
// disturbs the host thus falls on all of them.
func (e experiment) measure(ctx context.Context, runs int, p progress) ([]row, error) {
	if e.end != nil {
		defer e.end()
	}
	var names []string
	got := map[string]map[string][]float64{}
	for _, c := range e.contenders {
		if got[c.name] == nil {
			got[c.name] = map[string][]float64{}
			names = append(names, c.name)
		}
	}
	for n := range runs {
		if e.turns != nil {
			p.step("%s: run %d of %d", e.name, n+1, runs)
			all, err := e.turns.measure(ctx, e.has)
			if err != nil {
				p.done()
				return nil, fmt.Errorf("%s: %w", e.name, err)
			}
			for i, c := range e.contenders {
				for metric, figures := range all[i] {
					got[c.name][metric] = append(got[c.name][metric], figures...)
				}
			}
			continue
		}
		for _, c := range e.contenders {
			p.step("%s: run %d of %d: %s", e.name, n+1, runs, c.name)
			f, err := c.run(ctx)
			if err != nil {
				p.done()
				return nil, fmt.Errorf("%s: %s: %w", e.name, c.name, err)
			}
			for metric, x := range f {
				got[c.name][metric] = append(got[c.name][metric], x)
			}
		}
	}
	p.done()
	var rows []row
	for _, wanted := range e.promises {
		sides := make([]side, len(names))
		for i, name := range names {
			sides[i] = side{name, got[name][wanted.metric]}
			if len(sides[i].figures) > 0 {
				p.detail("%s, %s: %s: %.4g", wanted.text, wanted.unit, name, sides[i].figures)
			}
		}
		r, err := judge(wanted, sides[0], sides[1:])
		if err != nil {
			return rows, err
		}
		rows = append(rows, r)
	}
	return rows, nil
}
