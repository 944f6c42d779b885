package main

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestContendersTakeTurns(t *testing.T) {
	var order strings.Builder
	turn := func(name string, x float64) contender {
		return contender{name, func(context.Context) (figures, error) {
			order.WriteString(name)
			return figures{"a": x, "b": 2 * x}, nil
		}}
	}
	e := experiment{
		name:     "test",
		schedule: contenders{turn("A", 3), turn("B", 4), turn("C", 6)},
		promises: []promise{
			{metric: "a", text: "first", higher: true, bound: bound{"ratio", ">=", 1}},
			{metric: "b", text: "second", bound: bound{"ratio", "<", 1}},
		},
	}
	rows, err := e.measure(t.Context(), 3, progress{})
	if err != nil {
		t.Fatal(err)
	}
	if order.String() != "ABCABCABC" {
		t.Errorf("order %s", order.String())
	}
	want := []row{
		{Promise: "first", Ours: 3, Peer: 6, PeerName: "C", Ratio: 0.5, Bound: "ratio >= 1"},
		{Promise: "second", Ours: 6, Peer: 8, PeerName: "B", Ratio: 0.75, Bound: "ratio < 1", OK: true},
	}
	if d := cmp.Diff(want, rows); d != "" {
		t.Error(d)
	}
	if c := e.choose(regexp.MustCompile("^sec")); len(c.promises) != 1 || c.promises[0].metric != "b" {
		t.Errorf("chosen: %v", c.promises)
	}
	broken := errors.New("broken")
	e.schedule.(contenders)[1].run = func(context.Context) (figures, error) { return nil, broken }
	if _, err := e.measure(t.Context(), 1, progress{}); !errors.Is(err, broken) || !strings.Contains(err.Error(), "B") {
		t.Errorf("a broken peer: %v", err)
	}
}

// clockwork is a side that tells its turns.
type clockwork struct {
	told  *strings.Builder
	name  string
	open  *int
	turns *int
}

func (c clockwork) close() { *c.open-- }

func (c clockwork) turn(_ context.Context, l load) (float64, error) {
	fmt.Fprintf(c.told, "%s%s ", c.name, l.metric)
	*c.turns++
	return float64(*c.turns - 1), nil
}

func TestSidesTakeTurns(t *testing.T) {
	var told strings.Builder
	open := 0
	side := func(name string) opener {
		return func(_ context.Context, loads []load, times, place int) (standby, error) {
			open++
			fmt.Fprintf(&told, "%s:%d*%d@%d ", name, len(loads), times, place)
			return clockwork{&told, name, &open, new(int)}, nil
		}
	}
	loads := []load{{metric: "a"}, {metric: "b"}, {metric: "c"}}
	e := experiment{name: "test", schedule: &turns{count: 2, loads: loads, sides: []contestant{{"A", side("A")}, {"B", side("B")}}}}
	e.promise(loads[1:], 1)
	rows, err := e.measure(t.Context(), 2, progress{})
	if err != nil {
		t.Fatal(err)
	}
	const turns = "Ab Bb Bb Ab Ab Bb Ac Bc Bc Ac Ac Bc "
	if want := "A:2*3@0 B:2*3@1 " + turns + "B:2*3@0 A:2*3@1 " + turns; told.String() != want || open != 0 {
		t.Errorf("%s, %d left open; want %s", told.String(), open, want)
	}
	if len(rows) != 2 || rows[0].Ours != 1.5 || rows[1].Ours != 4.5 || !rows[0].OK {
		t.Errorf("%+v: the first turn counts", rows)
	}
}

func TestFirstRecordOfTheProcess(t *testing.T) {
	const text = `# tracer: nop
#           TASK-PID     CPU#  |||||  TIMESTAMP  FUNCTION
          gnomon-18245   [000] .....  4293.465830: sys_ioctl(fd: 5, cmd: ae80, arg: 0)
     CPU 0/KVM-3518    [001] .....  4293.716810: sys_ioctl(fd: a, cmd: ae80, arg: 0)
     CPU 0/KVM-3518    [001] .....  4293.816810: sys_ioctl(fd: a, cmd: ae80, arg: 0)
`
	at, err := firstOf(text, func(tid int) bool { return tid == 3518 })
	if want := 4293*time.Second + 716810*time.Microsecond; err != nil || at != want {
		t.Errorf("%v, %v; want %v", at, err, want)
	}
	if _, err := firstOf(text, func(tid int) bool { return tid == 1 }); err == nil {
		t.Error("a process without records has a first one")
	}
}

func TestMapsWithoutRAM(t *testing.T) {
	const text = `00400000-00989000 r-xp 00000000 fe:00 66060531                           /usr/bin/gnomon
Size:               5668 kB
Rss:                1000 kB
Pss:                 500 kB
Private_Clean:       100 kB
Private_Dirty:        10 kB
VmFlags: rd ex mr mw me sd
7f0000000000-7f0008000000 rw-s 00000000 00:01 1038                       /memfd:gnomon-ram (deleted)
Size:             131072 kB
Rss:               90000 kB
Pss:               90000 kB
Private_Dirty:     90000 kB
c000000000-c000400000 rw-p 00000000 00:00 0                              [anon: Go: heap]
Rss:                  24 kB
Pss:                  24 kB
Private_Dirty:        24 kB
7ffd1b5a1000-7ffd1b5c2000 rw-p 00000000 00:00 0
Rss:                   4 kB
Pss:                   4 kB
`
	got, err := readMaps(strings.NewReader(text), "/memfd:gnomon-ram")
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]int64{"rss": 1028 << 10, "pss": 528 << 10, "private": 134 << 10}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	if _, err := readMaps(strings.NewReader(text), "/memfd:other"); err == nil {
		t.Error("guest RAM that is not there is left out")
	}
	if _, err := readMaps(strings.NewReader(strings.ReplaceAll(text, "1000 kB", "1000 MB")), "/memfd:gnomon-ram"); err == nil {
		t.Error("MB are taken for kB")
	}
}
