package main

import (
	"fmt"
	"os"

	"golang.org/x/term"
)

// progress tells on stderr how far a measurement is: a line that changes at a
// terminal, a line for each run elsewhere.
type progress struct{ terminal, verbose bool }

func newProgress(verbose bool) progress {
	return progress{terminal: term.IsTerminal(int(os.Stderr.Fd())), verbose: verbose}
}

// step replaces the line.
func (p progress) step(format string, args ...any) {
	if p.terminal {
		fmt.Fprintf(os.Stderr, "\r\x1b[K"+format, args...)
		return
	}
	fmt.Fprintf(os.Stderr, format+"\n", args...)
}

// done ends the line.
func (p progress) done() {
	if p.terminal {
		fmt.Fprint(os.Stderr, "\r\x1b[K")
	}
}

// detail tells what is told with -v only.
func (p progress) detail(format string, args ...any) {
	if p.verbose {
		fmt.Fprintf(os.Stderr, format+"\n", args...)
	}
}
