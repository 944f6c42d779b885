package virtio

import (
	"testing"
	"time"
)

// A window grows until it spares the sleeps that it can spare, and closes where it spares
// none; a closed one is tried again.
func TestPollerAdapts(t *testing.T) {
	for name, kind := range map[string]poller{"chains": pollChains, "ends": pollEnds} {
		p := kind
		for range 10 {
			p.adapt(p.worth)
		}
		if p.window != p.most {
			t.Errorf("%s: a window of %v after sleeps that were worth one of %v", name, p.window, p.most)
		}
		p = kind
		for range 10 {
			p.adapt(20 * time.Microsecond)
		}
		if p.window < 20*time.Microsecond || p.window > 40*time.Microsecond {
			t.Errorf("%s: a window of %v for sleeps of 20 us", name, p.window)
		}
		p.window = p.most
		sleeps := 0
		for ; p.window > 0 && sleeps < 100; sleeps++ {
			p.adapt(p.worth + 1)
		}
		if sleeps > 10 {
			t.Errorf("%s: open after %d sleeps that were too long for any window", name, sleeps)
		}
		for range pollRetry {
			p.adapt(p.worth + 1)
		}
		if p.window != pollFirst {
			t.Errorf("%s: not tried again: a window of %v", name, p.window)
		}
	}
}

// countedEnds are ends of which there is one after so many looks.
type countedEnds struct{ left, armed int }

func (e *countedEnds) Ended() bool { e.left--; return e.left <= 0 }
func (e *countedEnds) Arm() bool   { e.armed++; return false }

// A worker looks for the end of what is under way and for chains, but not for chains that
// were left, and not while others serve some.
func TestWorkerLooksForEnds(t *testing.T) {
	mem := testMemory(t)
	d, heap := newDriver(mem, 0x4000, 64, allFeatures)
	q := must(newQueue(mem, 0, allFeatures, &d.state))
	e := &countedEnds{}
	q.ends = e
	w := &worker{queue: q, gate: newGate()}
	spin := func(begun, left int, window time.Duration, news bool) bool {
		t.Helper()
		q.begun, e.left = begun, left
		w.ends.window, w.chains.window = window, window
		found := w.spin(news)
		if e.armed > 0 {
			t.Fatal("armed while it looks")
		}
		return found
	}
	const ever, never = time.Hour, 1 << 30
	if !spin(1, 1000, ever, true) || e.left != 0 || !w.ends.idle.IsZero() {
		t.Errorf("after 1000 looks %d are left of them; idle since %v", e.left, w.ends.idle)
	}
	if spin(1, never, time.Nanosecond, true) || w.ends.idle.IsZero() {
		t.Error("found what is not there, or no time to adapt by")
	}
	if spin(1, 1, 0, true) {
		t.Error("looked without a window")
	}
	if !d.add([]segment{{heap, 16, false}}, false, 0) {
		t.Fatal("ring is full")
	}
	if !spin(1, never, ever, true) || !spin(0, never, ever, true) {
		t.Error("a chain was not found")
	}
	if spin(1, never, time.Nanosecond, false) || spin(0, never, ever, false) {
		t.Error("a chain that was left is news")
	}
	q.aside = true
	if spin(1, 1, ever, true) {
		t.Error("looked while others serve chains")
	}
	q.aside = false
	w.gate.hold.Store(true)
	if spin(1, 1, ever, true) {
		t.Error("looked though it is to come out")
	}
}
