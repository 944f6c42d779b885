//go:build !race

// The race detector makes pools forget what they hold.

package mirror

import "testing"

func TestNoAllocations(t *testing.T) {
	f, content, _ := copying(t, 32<<20, Options{})
	f.turns.granted.Store(1 << 30)
	bufs := [][]byte{content[:4096]}
	if n := testing.AllocsPerRun(100, func() {
		f.turns.cost.Store(0) // so that the disk's user copies
		if err := f.Writev(bufs, 0); err != nil {
			t.Fatal(err)
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
	if f.turns.at < 100*turnSize {
		t.Errorf("%d bytes were passed", f.turns.at)
	}
}
