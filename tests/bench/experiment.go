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

// A schedule has contenders measured, ours first, each as often as the others.
type schedule interface {
	// round measures each contender once and notes what it measured, of the metrics that
	// are wanted if that saves time. say tells people what is being done.
	round(ctx context.Context, wanted func(metric string) bool, n *notes, say func(what string)) error
}

// notes are what contenders measured.
type notes struct {
	names   []string // of the contenders, in their order
	figures map[string]map[string][]float64
}

// of returns the figures of a contender by metric, to be added to. Who is asked for first
// is ours.
func (n *notes) of(name string) map[string][]float64 {
	if n.figures == nil {
		n.figures = map[string]map[string][]float64{}
	}
	if n.figures[name] == nil {
		n.names = append(n.names, name)
		n.figures[name] = map[string][]float64{}
	}
	return n.figures[name]
}

// contenders run one after the other.
type contenders []contender

func (all contenders) round(ctx context.Context, _ func(string) bool, n *notes, say func(string)) error {
	for _, c := range all {
		say(c.name)
		got := n.of(c.name)
		f, err := c.run(ctx)
		if err != nil {
			return fmt.Errorf("%s: %w", c.name, err)
		}
		for metric, x := range f {
			got[metric] = append(got[metric], x)
		}
	}
	return nil
}

// An experiment measures its promises on ours and the peers.
type experiment struct {
	name string
	schedule
	promises []promise
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

// measure has so many rounds, and judges. What disturbs the host thus falls on all
// contenders.
func (e experiment) measure(ctx context.Context, runs int, p progress) ([]row, error) {
	if e.end != nil {
		defer e.end()
	}
	var got notes
	for n := range runs {
		say := func(what string) { p.step("%s: run %d of %d: %s", e.name, n+1, runs, what) }
		if err := e.round(ctx, e.has, &got, say); err != nil {
			p.done()
			return nil, fmt.Errorf("%s: %w", e.name, err)
		}
	}
	p.done()
	var rows []row
	for _, wanted := range e.promises {
		sides := make([]side, len(got.names))
		for i, name := range got.names {
			sides[i] = side{name, got.of(name)[wanted.metric]}
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
