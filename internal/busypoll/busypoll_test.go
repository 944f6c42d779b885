package busypoll

import (
	"testing"
	"time"
)

// A window grows until it spares the sleeps that it can spare, and closes where it spares
// none; a closed one is tried again.
func TestWindowAdapts(t *testing.T) {
	for name, kind := range map[string]Window{
		"64 us": {Most: 64 * time.Microsecond, Worth: 128 * time.Microsecond}, "256 us": {Most: 256 * time.Microsecond, Worth: 256 * time.Microsecond},
	} {
		p := kind
		for range 10 {
			p.adapt(p.Worth)
		}
		if p.Length != p.Most {
			t.Errorf("%s: a window of %v after sleeps that were worth one of %v", name, p.Length, p.Most)
		}
		p = kind
		for range 10 {
			p.adapt(20 * time.Microsecond)
		}
		if p.Length < 20*time.Microsecond || p.Length > 40*time.Microsecond {
			t.Errorf("%s: a window of %v for sleeps of 20 us", name, p.Length)
		}
		p.Length = p.Most
		sleeps := 0
		for ; p.Length > 0 && sleeps < 100; sleeps++ {
			p.adapt(p.Worth + 1)
		}
		if sleeps > 10 {
			t.Errorf("%s: open after %d sleeps that were too long for any window", name, sleeps)
		}
		for range Retry {
			p.adapt(p.Worth + 1)
		}
		if p.Length != First {
			t.Errorf("%s: not tried again: a window of %v", name, p.Length)
		}
	}
}

// What was found before the sleep, or without a look, is no sleep to adapt to.
func TestWindowKnowsSleeps(t *testing.T) {
	w := Window{Most: time.Hour, Worth: time.Hour}
	w.Woken()
	if w.Length != 0 || w.Idle() {
		t.Errorf("a window of %v without a sleep", w.Length)
	}
	if w.Open() || !w.Idle() {
		t.Error("a closed window is looked through")
	}
	w.Woken()
	if w.Length != First || w.Idle() {
		t.Errorf("a window of %v after a short sleep", w.Length)
	}
	w.Length = time.Hour
	if !w.Open() || w.Over() {
		t.Error("an hour is over")
	}
	w.Found()
	w.Woken()
	if w.Length != time.Hour || w.Idle() {
		t.Errorf("a window of %v after something was found", w.Length)
	}
	w.Length = 1
	for w.Open(); !w.Over(); { // soon
	}
}
