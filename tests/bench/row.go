package main

import (
	"encoding/json"
	"fmt"
	"io"
	"math"
	"os"
	"slices"
	"text/tabwriter"
)

// A promise is something measured on both sides and, where it has a bound,
// something Gnomon answers for.
type promise struct {
	metric string // its name among what a contender measures
	text   string
	unit   string
	higher bool // more is better; otherwise less is
	bound  bound
}

// A bound is what must hold: of the ratio ours/peer, or of our figure by
// itself. The zero bound always holds: the figure is information only.
type bound struct {
	of    string // "ratio" or "ours"
	op    string // "<=", "<" or ">="
	value float64
}

func (b bound) String() string {
	if b == (bound{}) {
		return ""
	}
	return fmt.Sprintf("%s %s %g", b.of, b.op, b.value)
}

// holds compares; what is not a number holds no bound.
func (b bound) holds(ours, ratio float64) bool {
	if b == (bound{}) {
		return true
	}
	figure := ratio
	if b.of == "ours" {
		figure = ours
	}
	switch b.op {
	case "<=":
		return figure <= b.value
	case "<":
		return figure < b.value
	default:
		return figure >= b.value
	}
}

// A row is one line of the table, and one object of bench.json.
type row struct {
	Promise  string  `json:"promise"`
	Unit     string  `json:"unit"`
	Ours     float64 `json:"ours"`
	Peer     float64 `json:"peer"`
	PeerName string  `json:"peer_name"`
	Ratio    float64 `json:"ratio"` // ours/peer
	Bound    string  `json:"bound"` // empty: none
	OK       bool    `json:"ok"`
}

// A side is one contender's figures for one metric, a run each.
type side struct {
	name    string
	figures []float64
}

// judge makes the row of a promise from our figures and the peers', of which
// the best counts.
func judge(p promise, ours side, peers []side) (row, error) {
	if len(ours.figures) == 0 || len(peers) == 0 {
		return row{}, fmt.Errorf("%s: nothing was measured", p.text)
	}
	best := -1
	for i, peer := range peers {
		if len(peer.figures) == 0 {
			continue
		}
		if best < 0 || p.higher == (median(peer.figures) > median(peers[best].figures)) {
			best = i
		}
	}
	if best < 0 {
		return row{}, fmt.Errorf("%s: no peer was measured", p.text)
	}
	r := row{
		Promise: p.text, Unit: p.unit, Bound: p.bound.String(), PeerName: peers[best].name,
		Ours: median(ours.figures), Peer: median(peers[best].figures),
	}
	if r.Peer == 0 || math.IsNaN(r.Ours) || math.IsInf(r.Ours/r.Peer, 0) || math.IsNaN(r.Ours/r.Peer) {
		return row{}, fmt.Errorf("%s: ours %g, %s %g: not figures to compare", p.text, r.Ours, r.PeerName, r.Peer)
	}
	r.Ratio = r.Ours / r.Peer
	r.OK = p.bound.holds(r.Ours, r.Ratio)
	return r, nil
}

func median(figures []float64) float64 {
	sorted := slices.Sorted(slices.Values(figures))
	middle := len(sorted) / 2
	if len(sorted)%2 == 1 {
		return sorted[middle]
	}
	return (sorted[middle-1] + sorted[middle]) / 2
}

// printTable writes the rows for people.
func printTable(w io.Writer, rows []row) error {
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "PROMISE\tUNIT\tOURS\tPEER\tRATIO\tBOUND\tVERDICT\tPEER'S NAME")
	for _, r := range rows {
		verdict := "ok"
		switch {
		case r.Bound == "":
			verdict = "-"
		case !r.OK:
			verdict = "MISSED"
		}
		fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%.2f\t%s\t%s\t%s\n",
			r.Promise, r.Unit, figure(r.Ours), figure(r.Peer), r.Ratio, r.Bound, verdict, r.PeerName)
	}
	return table.Flush()
}

// figure shows three digits or all before the point.
func figure(x float64) string {
	switch a := math.Abs(x); {
	case a >= 100:
		return fmt.Sprintf("%.0f", x)
	case a >= 10:
		return fmt.Sprintf("%.1f", x)
	default:
		return fmt.Sprintf("%.2f", x)
	}
}

// writeJSON replaces the file with the rows.
func writeJSON(path string, rows []row) error {
	if rows == nil {
		rows = []row{}
	}
	text, err := json.MarshalIndent(rows, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(text, '\n'), 0o644)
}

// missed counts the rows whose bound does not hold.
func missed(rows []row) int {
	n := 0
	for _, r := range rows {
		if !r.OK {
			n++
		}
	}
	return n
}
