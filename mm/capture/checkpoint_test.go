package capture

import (
	"bytes"
	"math/rand/v2"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/gnomon-vmm/gnomon/mm/checkpoint"
	"github.com/gnomon-vmm/gnomon/mm/dirty"
)

// TestChain: a guest that never stops writing but for the pauses is saved to a
// file, and then what changed to three more, each the child of the one before.
func TestChain(t *testing.T) {
	m := newMachine(t, layout)
	pfns := allPages(layout)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	if err := m.tracker.Start(); err != nil {
		t.Fatal(err)
	}
	var stop atomic.Bool
	var stores atomic.Uint64
	var guest sync.WaitGroup
	// guestStores returns when the guest has stored n times more, or waits for c.
	guestStores := func(n uint64, c *Capture) {
		for at := stores.Load(); stores.Load() < at+n && len(c.urgent) == 0; {
			runtime.Gosched()
		}
	}
	run := func(seed uint64) {
		rng := rand.New(rand.NewPCG(seed, 1))
		stop.Store(false)
		guest.Go(func() {
			// It keeps to a quarter of its memory at a time.
			for near := rng.IntN(len(pfns)); !stop.Load(); {
				pfn := pfns[(near+rng.IntN(len(pfns)/4))%len(pfns)]
				m.store(pfn, min(16, pagesBehind(pfn)), rng.Uint64())
				stores.Add(1)
			}
		})
	}
	pause := func() { stop.Store(true); guest.Wait() }

	dir := t.TempDir()
	parent := ""
	var full, armed, kept uint64
	for _, name := range []string{"full", "first", "second", "third"} {
		run(rng.Uint64())
		c := newCapture(t, m.mem, Options{Side: newSide(t, 100)})
		guestStores(30, c)
		var only, more *dirty.Bitmap
		if parent != "" {
			only, more = dirty.NewBitmapOf(m.mem), dirty.NewBitmapOf(m.mem)
			if err := m.tracker.CollectInto(only); err != nil {
				t.Fatal(err)
			}
		}
		if err := c.Arm(only); err != nil {
			t.Fatal(err)
		}
		guestStores(20, c)
		if err := c.Rearm(); err != nil {
			t.Fatal(err)
		}
		guestStores(5, c)
		pause()
		if more == nil {
			more = dirty.NewBitmapOf(m.mem) // what was written till now is in the full one
		}
		if err := m.tracker.CollectInto(more); err != nil {
			t.Fatal(err)
		}
		if err := c.Freeze(more); err != nil {
			t.Fatal(err)
		}
		want := m.content()
		run(rng.Uint64())

		path := filepath.Join(dir, name)
		w, err := checkpoint.Create(path, checkpoint.CreateOptions{Memory: layout, Parent: parent})
		if err != nil {
			t.Fatal(err)
		}
		order := append([]uint64(nil), pfns...)
		rng.Shuffle(len(order), func(i, j int) { order[i], order[j] = order[j], order[i] })
		var last uint64
		if err := c.Save(t.Context(), w, order, func(done, _ uint64) { last = done; guestStores(3, c) }); err != nil {
			t.Fatal(err)
		}
		if err := w.Commit(); err != nil {
			t.Fatal(err)
		}
		pause()
		r, err := checkpoint.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		page := make([]byte, pageSize)
		for pfn, content := range want {
			if err := r.Read(pfn*pageSize, page); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(page, content) {
				t.Fatalf("%s: page %#x differs", name, pfn)
			}
		}
		if err := r.Close(); err != nil {
			t.Error(err)
		}
		t.Logf("%s: %d pages, %+v", name, last, c.Stats())
		if parent == "" {
			full = last
		} else if last == 0 || last >= full {
			t.Errorf("%s has %d pages of %d", name, last, full)
		}
		parent = path
		armed, kept = armed+c.Stats().FaultsArming, kept+c.Stats().CopiedByFault
	}
	if armed == 0 || kept == 0 {
		t.Errorf("the guest wrote nothing: %d faults while armed, %d pages kept", armed, kept)
	}
}
