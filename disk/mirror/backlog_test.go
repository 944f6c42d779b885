package mirror

import "testing"

// A backlog is first in, first out, bounded, and loses nothing when it is closed.
func TestBacklog(t *testing.T) {
	var b backlog
	if b.put(0, 1) {
		t.Error("one that is not open takes a write")
	}
	b.open()
	next := int64(0)
	for put := int64(0); put < 2*maxBacklog; put++ {
		if !b.put(put, 1) {
			t.Fatalf("no room for write %d, of %d that wait", put, b.waiting())
		}
		if put%3 != 0 {
			continue
		}
		for range 2 {
			if w, ok := b.take(); ok && w.off != next {
				t.Fatalf("write %d, want %d", w.off, next)
			} else if ok {
				next++
			}
		}
	}
	for b.put(next+int64(b.waiting()), 1) {
	}
	if n := b.waiting(); n != maxBacklog {
		t.Errorf("%d wait, of at most %d", n, maxBacklog)
	}
	if a := testing.AllocsPerRun(100, func() { b.take(); b.put(next+maxBacklog, 1); next++ }); a != 0 {
		t.Errorf("%v allocations", a)
	}
	for i, w := range b.close() {
		if w.off != next+int64(i) {
			t.Fatalf("write %d, want %d", w.off, next+int64(i))
		}
	}
	if _, ok := b.take(); ok || b.put(0, 1) {
		t.Error("one that was closed has or takes writes")
	}
}
