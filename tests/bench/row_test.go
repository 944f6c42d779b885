package main

import (
	"bytes"
	"encoding/json"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestMedian(t *testing.T) {
	for _, test := range []struct {
		figures []float64
		want    float64
	}{
		{[]float64{7}, 7},
		{[]float64{9, 1, 5}, 5},
		{[]float64{8, 1, 2, 4}, 3},
	} {
		given := append([]float64(nil), test.figures...)
		if got := median(given); got != test.want {
			t.Errorf("median of %v is %v", test.figures, got)
		}
		if !cmp.Equal(given, test.figures) {
			t.Errorf("the figures are now in another order: %v", given)
		}
	}
}

func TestBounds(t *testing.T) {
	for _, test := range []struct {
		bound       bound
		ours, ratio float64
		want        bool
	}{
		{bound{}, 1e9, 1e9, true},
		{bound{"ratio", "<=", 0.5}, 100, 0.5, true},
		{bound{"ratio", "<=", 0.5}, 0, 0.51, false},
		{bound{"ratio", "<", 1}, 0, 1, false},
		{bound{"ratio", "<", 1}, 9, 0.99, true},
		{bound{"ratio", ">=", 1}, 0, 1, true},
		{bound{"ratio", ">=", 1}, 9, 0.99, false},
		{bound{"ours", "<=", 24}, 24, 9, true},
		{bound{"ours", "<=", 24}, 24.1, 0.1, false},
		{bound{"ratio", ">=", 1}, 1, math.NaN(), false},
		{bound{"ratio", "<=", 1}, 1, math.NaN(), false},
	} {
		if got := test.bound.holds(test.ours, test.ratio); got != test.want {
			t.Errorf("%q with ours %v, ratio %v: %v", test.bound, test.ours, test.ratio, got)
		}
	}
}

func TestTheBestPeerCounts(t *testing.T) {
	slow, none, quick := side{"slow", []float64{10, 10, 90}}, side{"none", nil}, side{"quick", []float64{1, 30, 30}}
	ours := side{"gnomon", []float64{15}}
	for _, test := range []struct {
		higher bool
		peers  []side
		want   string
		ratio  float64
	}{
		{true, []side{slow, none, quick}, "quick", 0.5},
		{true, []side{quick, slow}, "quick", 0.5},
		{false, []side{none, slow, quick}, "slow", 1.5},
		{false, []side{quick, slow}, "slow", 1.5},
	} {
		r, err := judge(promise{text: "x", higher: test.higher, bound: bound{"ratio", ">=", 1}}, ours, test.peers)
		if err != nil || r.PeerName != test.want || r.Ratio != test.ratio || r.OK != (test.ratio >= 1) {
			t.Errorf("higher %v: %+v, %v; want %s, %v", test.higher, r, err, test.want, test.ratio)
		}
	}
	for _, peers := range [][]side{nil, {none}, {{"zero", []float64{0}}}, {{"nan", []float64{math.NaN()}}}} {
		if r, err := judge(promise{text: "x"}, ours, peers); err == nil {
			t.Errorf("peers %v give %+v", peers, r)
		}
	}
	if _, err := judge(promise{text: "x"}, side{name: "gnomon"}, []side{slow}); err == nil {
		t.Error("a side without figures gives a row")
	}
}

func someRows() []row {
	return []row{
		{"start", "ms", 10.5, 42, "QEMU microvm", 0.25, "ratio <= 0.5", true},
		{"disk", "1/s", 900, 1000, "QEMU q35", 0.9, "ratio >= 1", false},
		{"exit", "us", 7.25, 7.25, "QEMU q35", 1, "", true},
	}
}

// TestJSON pins the file's shape, on which others rely.
func TestJSON(t *testing.T) {
	path := filepath.Join(t.TempDir(), "bench.json")
	if err := writeJSON(path, someRows()); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var got []map[string]any
	if err := json.Unmarshal(text, &got); err != nil {
		t.Fatal(err)
	}
	want := map[string]any{
		"promise": "disk", "unit": "1/s", "ours": 900.0, "peer": 1000.0, "peer_name": "QEMU q35",
		"ratio": 0.9, "bound": "ratio >= 1", "ok": false,
	}
	if len(got) != 3 || !cmp.Equal(got[1], want) {
		t.Errorf("%s", text)
	}
	if err := writeJSON(path, nil); err != nil {
		t.Fatal(err)
	}
	if text, _ := os.ReadFile(path); string(text) != "[]\n" {
		t.Errorf("no rows are %q", text)
	}
}

func TestTable(t *testing.T) {
	var out bytes.Buffer
	if err := printTable(&out, someRows()); err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	if len(lines) != 4 {
		t.Fatalf("%d lines:\n%s", len(lines), out.String())
	}
	for i, want := range []string{
		"PROMISE UNIT OURS PEER RATIO BOUND VERDICT PEER'S NAME",
		"start ms 10.5 42.0 0.25 ratio <= 0.5 ok QEMU microvm",
		"disk 1/s 900 1000 0.90 ratio >= 1 MISSED QEMU q35",
		"exit us 7.25 7.25 1.00 - QEMU q35",
	} {
		if got := strings.Join(strings.Fields(lines[i]), " "); got != want {
			t.Errorf("line %d is %q, want %q", i, got, want)
		}
	}
	if n := missed(someRows()); n != 1 {
		t.Errorf("%d bounds missed, want 1", n)
	}
}
