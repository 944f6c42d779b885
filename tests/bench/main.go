// Command bench measures what Gnomon promises beside its peers, in the same
// run, and tells which promises hold. docs/performance.md says what each
// figure is.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"regexp"
	"syscall"
)

// options are the command line.
type options struct {
	output, only, gnomon, dir string
	runs                      int
	quick, verbose            bool
}

func main() {
	var o options
	flag.StringVar(&o.output, "o", "", "write the figures to this JSON `file`")
	flag.StringVar(&o.only, "only", "", "measure the promises that match this `regexp`")
	flag.IntVar(&o.runs, "runs", 0, "`times` each side runs (default 9; 3 with -quick)")
	flag.BoolVar(&o.quick, "quick", false, "short and rough")
	flag.BoolVar(&o.verbose, "v", false, "show what each run measured")
	flag.StringVar(&o.gnomon, "gnomon", "", "gnomon `binary` to measure (default: built from this module)")
	flag.StringVar(&o.dir, "dir", "", "make the disk image in this `directory` (default: that of temporary files)")
	flag.Parse()
	if o.runs <= 0 {
		o.runs = 9
		if o.quick {
			o.runs = 3
		}
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	n, err := measureAll(ctx, o)
	stop()
	switch {
	case err != nil:
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	case n > 0:
		fmt.Fprintf(os.Stderr, "bench: missed bounds: %d\n", n)
		os.Exit(1)
	}
}

// measureAll runs the experiments, shows and writes what they gave, and
// returns how many bounds were missed. An experiment that fails does not keep
// the others from being shown.
func measureAll(ctx context.Context, o options) (int, error) {
	var filter *regexp.Regexp
	if o.only != "" {
		var err error
		if filter, err = regexp.Compile(o.only); err != nil {
			return 0, fmt.Errorf("-only: %w", err)
		}
	}
	b, err := newBench(o)
	if err != nil {
		return 0, err
	}
	defer b.close()
	var rows []row
	var failed error
	for _, e := range b.experiments() {
		if e = e.choose(filter); len(e.promises) == 0 {
			continue
		}
		got, err := e.measure(ctx, o.runs, newProgress(o.verbose))
		rows = append(rows, got...)
		if err != nil {
			fmt.Fprintln(os.Stderr, "bench:", err)
			failed = errors.Join(failed, err)
		}
		if ctx.Err() != nil {
			break
		}
	}
	if err := printTable(os.Stdout, rows); err != nil {
		return 0, err
	}
	if o.output != "" {
		if err := writeJSON(o.output, rows); err != nil {
			return 0, err
		}
	}
	if failed != nil {
		return 0, errors.New("not all could be measured")
	}
	return missed(rows), nil
}

func (b *bench) experiments() []experiment {
	return []experiment{
		b.start(), b.memory(), b.block("raw", "writeback"), b.block("qcow2", "writeback"), b.allocating("raw", "writeback"), b.allocating("qcow2", "writeback"), b.nbd("raw", "writeback"), b.nbd("qcow2", "writeback"),
		b.block("raw", "none"), b.block("qcow2", "none"), b.allocating("raw", "none"), b.allocating("qcow2", "none"), b.nbd("raw", "none"), b.nbd("qcow2", "none"),
		b.convert("writeback"), b.convert("unsafe"), b.consolidate(), b.recording(), b.qmp(),
		b.exits(), b.walk(), b.saving(), b.growth(), b.increment(), b.idle(),
	}
}
