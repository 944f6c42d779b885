package probe

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// What Parse and Results.Err report.
var (
	ErrIncomplete = errors.New("probe guest: it did not get to its end")
	ErrFault      = errors.New("probe guest: exception")
	ErrWorkload   = errors.New("probe guest: workload failed")
	ErrNoResult   = errors.New("probe guest: no such result")
)

// A Line is one line of results: the workload's name and its values.
type Line struct {
	Name   string
	Values map[string]string
}

// Number returns a value as a number, decimal or 0x hexadecimal.
func (l Line) Number(key string) (uint64, error) {
	text, ok := l.Values[key]
	if !ok {
		return 0, fmt.Errorf("%w: %s has no %s", ErrNoResult, l.Name, key)
	}
	n, err := strconv.ParseUint(text, 0, 64)
	if err != nil {
		return 0, fmt.Errorf("%w: %s %s: %w", ErrNoResult, l.Name, key, err)
	}
	return n, nil
}

// Seconds converts the line's cycles by its khz.
func (l Line) Seconds() (float64, error) {
	cycles, err := l.Number("cycles")
	if err != nil {
		return 0, err
	}
	khz, err := l.Number("khz")
	if err != nil {
		return 0, err
	}
	if khz == 0 {
		return 0, fmt.Errorf("%w: %s: TSC rate unknown", ErrNoResult, l.Name)
	}
	return float64(cycles) / float64(khz) / 1000, nil
}

// Results is what a run of the guest reported, in order.
type Results struct {
	Lines []Line
	Done  bool // the guest got to the end of its command line
}

const prefix = "probe: "

// Parse finds the guest's lines in serial output, which may hold other text
// (the firmware's) and may end anywhere.
func Parse(serial string) Results {
	var r Results
	for serial != "" {
		text, rest, ended := strings.Cut(serial, "\n")
		serial = rest
		if !ended {
			break // cut off: its values may be too
		}
		at := strings.Index(text, prefix)
		if at < 0 {
			continue
		}
		fields := strings.Fields(text[at+len(prefix):])
		if len(fields) == 0 {
			continue
		}
		line := Line{Name: fields[0], Values: make(map[string]string, len(fields)-1)}
		for _, field := range fields[1:] {
			key, value, _ := strings.Cut(field, "=")
			line.Values[key] = value
		}
		if line.Name == "done" {
			r.Done = true
			continue
		}
		r.Lines = append(r.Lines, line)
	}
	return r
}

// Err tells whether the run went wrong in the guest's own eyes: an exception,
// a workload that could not run, or an end that never came.
func (r Results) Err() error {
	for _, line := range r.Lines {
		switch line.Name {
		case "fault":
			return fmt.Errorf("%w: vector %s, error %s, rip %s, cr2 %s", ErrFault,
				line.Values["vector"], line.Values["error"], line.Values["rip"], line.Values["cr2"])
		case "error":
			return fmt.Errorf("%w: %s: %s", ErrWorkload, line.Values["at"], line.Values["why"])
		case "unknown":
			return fmt.Errorf("%w: no workload is called %q", ErrWorkload, line.Values["word"])
		}
	}
	if !r.Done {
		return ErrIncomplete
	}
	return nil
}

// Find returns the n-th line (from 0) of a workload.
func (r Results) Find(name string, n int) (Line, error) {
	for _, line := range r.Lines {
		if line.Name != name {
			continue
		}
		if n == 0 {
			return line, nil
		}
		n--
	}
	return Line{}, fmt.Errorf("%w: %s", ErrNoResult, name)
}

// Number returns a value of the first line of a workload.
func (r Results) Number(name, key string) (uint64, error) {
	line, err := r.Find(name, 0)
	if err != nil {
		return 0, err
	}
	return line.Number(key)
}
