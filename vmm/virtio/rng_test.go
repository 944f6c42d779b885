package virtio

import (
	"bytes"
	"errors"
	"testing"
	"time"
)

func TestRNG(t *testing.T) {
	eachRingKind(t, func(t *testing.T, features uint64) {
		r := newRings(t, NewRNG(0), features)
		q := r.add(16, 4, 8192)
		r.up()
		seen := map[string]bool{}
		for i := range 8 {
			q.post(i % q.slots)
			slot, n := r.reap(q.d, 0)
			p := q.slot(slot)
			if n != rngMaxRequest {
				t.Fatalf("request of %d bytes was given %d", len(p), n)
			}
			if bytes.Equal(p[:n], make([]byte, n)) || seen[string(p[:n])] {
				t.Fatal("the same bytes twice, or none")
			}
			seen[string(p[:n])] = true
			if !bytes.Equal(p[n:], make([]byte, len(p)-int(n))) {
				t.Fatal("bytes behind those announced")
			}
		}
	})
}

// TestRNGRate: a greedy driver gets its rate and the rest stays in the queue.
func TestRNGRate(t *testing.T) {
	rng := NewRNG(6000)
	clock := time.Unix(0, 0)
	rng.now = func() time.Time { return clock }
	mem := testMemory(t)
	d, next := newDriver(mem, 0x10000, 16, 0)
	q, err := newQueue(mem, 0, 0, &d.state)
	if err != nil {
		t.Fatal(err)
	}
	if err := rng.Start(0, []*Queue{q}, nil); err != nil {
		t.Fatal(err)
	}
	defer rng.Stop()
	for i := range 8 {
		d.add([]segment{{next + uint64(i)*4096, 4096, true}}, false, i)
	}
	taken := func() (total uint32) {
		if err := rng.Handle(q); err != nil {
			t.Fatal(err)
		}
		for {
			_, n, ok := d.used()
			if !ok {
				return total
			}
			total += n
		}
	}
	if n := taken(); n != 6000 {
		t.Errorf("at first %d bytes, want a second's", n)
	}
	if n := taken(); n != 0 {
		t.Errorf("%d bytes with no time passed", n)
	}
	clock = clock.Add(500 * time.Millisecond)
	if n := taken(); n != 3000 {
		t.Errorf("%d bytes after half a second, want 3000", n)
	}
	clock = clock.Add(time.Hour)
	if n := taken(); n != 6000 {
		t.Errorf("%d bytes after an hour, want a second's", n)
	}
}

func TestRNGAllocates(t *testing.T) {
	rng := NewRNG(1 << 30)
	mem := testMemory(t)
	d, next := newDriver(mem, 0x10000, 16, 0)
	q, err := newQueue(mem, 0, 0, &d.state)
	if err != nil {
		t.Fatal(err)
	}
	if err := rng.Start(0, []*Queue{q}, nil); err != nil {
		t.Fatal(err)
	}
	segs := []segment{{next, 64, true}}
	var c Chain
	checkAllocs(t, func(serve func() error) func() {
		return func() {
			d.add(segs, false, 0)
			if err := serve(); err != nil {
				t.Fatal(err)
			}
			if _, _, ok := d.used(); !ok {
				t.Fatal("not served")
			}
		}
	}, func() error { _, err := q.Pop(&c); return errors.Join(err, q.Push(&c, 0)) },
		func() error { return rng.Handle(q) })
}
