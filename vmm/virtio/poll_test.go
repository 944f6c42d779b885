package virtio

import (
	"testing"
	"time"
)

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
		w.ends.Length, w.chains.Length = window, window
		found := w.spin(news)
		if e.armed > 0 {
			t.Fatal("armed while it looks")
		}
		return found
	}
	const ever, never = time.Hour, 1 << 30
	if !spin(1, 1000, ever, true) || e.left != 0 || w.ends.Idle() {
		t.Errorf("after 1000 looks %d are left of them; idle: %v", e.left, w.ends.Idle())
	}
	if spin(1, never, time.Nanosecond, true) || !w.ends.Idle() {
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
