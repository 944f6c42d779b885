// Command bench measures what Gnomon promises beside its peers, in the same
// run, and tells which promises hold. docs/performance.md says what each
// figure is.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"regexp"
	"syscall"
)

func main() {
	output := flag.String("o", "", "write the figures to this JSON `file`")
	only := flag.String("only", "", "measure the promises that match this `regexp`")
	runs := flag.Int("runs", 0, "`times` each side runs (default 9; 3 with -quick)")
	quick := flag.Bool("quick", false, "short and rough")
	gnomon := flag.String("gnomon", "", "gnomon `binary` to measure (default: built from this module)")
	flag.Parse()
	if *runs == 0 {
		*runs = 9
		if *quick {
			*runs = 3
		}
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	n, err := measureAll(ctx, *output, *only, *gnomon, *runs, *quick)
	switch {
	case err != nil:
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	case n > 0:
		fmt.Fprintf(os.Stderr, "bench: %d of the promises missed\n", n)
		os.Exit(1)
	}
}

// measureAll runs the experiments, shows and writes what they gave, and
// returns how many bounds were missed. An experiment that fails does not keep
// the others from being shown.
func measureAll(ctx context.Context, output, only, gnomon string, runs int, quick bool) (int, error) {
	var filter *regexp.Regexp
	if only != "" {
		var err error
		if filter, err = regexp.Compile(only); err != nil {
			return 0, fmt.Errorf("-only: %w", err)
		}
	}
	b, err := newBench(gnomon, quick)
	if b != nil {
		defer b.close()
	}
	if err != nil {
		return 0, err
	}
	var rows []row
	var failed error
	for _, e := range b.experiments() {
		if e = e.choose(filter); len(e.promises) == 0 {
			continue
		}
		got, err := e.measure(ctx, runs, newProgress())
		rows = append(rows, got...)
		if err != nil {
			fmt.Fprintln(os.Stderr, "bench:", err)
			failed = err
		}
	}
	if err := printTable(os.Stdout, rows); err != nil {
		return 0, err
	}
	if output != "" {
		if err := writeJSON(output, rows); err != nil {
			return 0, err
		}
	}
	if failed != nil {
		return 0, fmt.Errorf("not all could be measured: %w", failed)
	}
	return missed(rows), nil
}

func (b *bench) experiments() []experiment {
	return []experiment{b.start(), b.memory(), b.block(), b.qmp(), b.exits()}
}
