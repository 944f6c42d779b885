package block

import (
	"errors"
	"sync"
	"testing"
	"time"
)

// pass is how long requests take that come one after another, by a clock of its own.
func pass(t *throttle, write bool, n int64, requests int) time.Duration {
	start := time.Unix(1000, 0)
	now := start
	for range requests {
		now = now.Add(t.reserve(write, n, now))
	}
	return now.Sub(start)
}

func TestThrottleRates(t *testing.T) {
	const ms = time.Millisecond
	for _, c := range []struct {
		name     string
		limits   Limits
		write    bool
		n        int64
		requests int
		want     time.Duration
	}{
		{"bytes", Limits{Bytes: Limit{Rate: 1 << 20}}, true, 64 << 10, 160, 9900 * ms},
		{"requests", Limits{Ops: Limit{Rate: 100}}, false, 4096, 1000, 9900 * ms},
		{"only writes", Limits{WriteOps: Limit{Rate: 100}}, false, 4096, 1000, 0},
		{"writes", Limits{WriteOps: Limit{Rate: 100}}, true, 4096, 1000, 9900 * ms},
		{"reads", Limits{ReadBytes: Limit{Rate: 4096 * 10}}, false, 4096, 100, 9900 * ms},
		{"burst", Limits{Ops: Limit{Rate: 100, Max: 500}}, false, 4096, 1000, 5000 * ms},
		{"long burst", Limits{Ops: Limit{Rate: 100, Max: 200, BurstSeconds: 3}}, false, 4096, 600, 2900 * ms},
		{"large requests", Limits{Ops: Limit{Rate: 100}, OpBytes: 4096}, false, 8192, 500, 9900 * ms},
	} {
		if got := pass(newThrottle(c.limits), c.write, c.n, c.requests); got < c.want-150*ms || got > c.want+150*ms {
			t.Errorf("%s: %d requests take %v, want %v", c.name, c.requests, got, c.want)
		}
	}
}

func TestThrottleChecks(t *testing.T) {
	for _, l := range []Limits{
		{Bytes: Limit{Rate: -1}},
		{Bytes: Limit{Rate: maxRate + 1}},
		{Bytes: Limit{Max: 1}},
		{Bytes: Limit{Rate: 2, Max: 1}},
		{Bytes: Limit{Rate: 2, BurstSeconds: 2}},
		{Bytes: Limit{Rate: 2, Max: maxRate, BurstSeconds: 2}},
		{Bytes: Limit{Rate: 2}, ReadBytes: Limit{Rate: 1}},
		{OpBytes: -1},
	} {
		if err := new(Root).SetLimits(l); !errors.Is(err, ErrLimits) {
			t.Errorf("%+v: %v", l, err)
		}
	}
}

// nothing is a node that does nothing.
type nothing struct{ Node }

func (nothing) Readv([][]byte, int64) error  { return nil }
func (nothing) Writev([][]byte, int64) error { return nil }

// Who waits for the end of requests need not wait for those that are held back.
func TestHurry(t *testing.T) {
	r := NewRoot(nothing{})
	p := [][]byte{make([]byte, 1<<20)}
	for _, end := range []func(){
		func() { r.Hurry(true) },
		func() { _ = r.SetLimits(Limits{}) },
	} {
		r.Hurry(false)
		if err := r.SetLimits(Limits{Bytes: Limit{Rate: 1}}); err != nil {
			t.Fatal(err)
		}
		var ended sync.WaitGroup
		for range 4 {
			ended.Add(1)
			go func() {
				defer ended.Done()
				if err := r.Writev(p, 0); err != nil {
					t.Error(err)
				}
			}()
		}
		r.Drained(func(n Node) Node { return n }) // requests that wait are none under way
		end()
		ended.Wait()
	}
	if allocs := testing.AllocsPerRun(100, func() { _ = r.Readv(p, 0) }); allocs != 0 {
		t.Errorf("a request without limits allocates %v times", allocs)
	}
	if err := r.SetLimits(Limits{Ops: Limit{Rate: maxRate}}); err != nil {
		t.Fatal(err)
	}
	if allocs := testing.AllocsPerRun(100, func() { _ = r.Readv(p, 0) }); allocs != 0 {
		t.Errorf("a request within limits allocates %v times", allocs)
	}
}
