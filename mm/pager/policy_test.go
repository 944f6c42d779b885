package pager

import (
	"errors"
	"math/rand/v2"
	"testing"
)

func TestParsePolicy(t *testing.T) {
	for s, want := range map[string]Policy{
		"none": 0, "physical": Physical, "locality": Locality, "recorded": Recorded,
		"locality,recorded": Locality | Recorded, "physical,locality,recorded": Physical | Locality | Recorded,
	} {
		if got, err := ParsePolicy(s); err != nil || got != want || got.String() != s {
			t.Errorf("%s: %v, %v", s, got, err)
		}
	}
	for _, s := range []string{"", "none,locality", "local", "locality,", "Locality"} {
		if got, err := ParsePolicy(s); !errors.Is(err, ErrPolicy) {
			t.Errorf("%q: %v, %v", s, got, err)
		}
	}
}

// run restores a machine with a policy, without the background, has its guest
// touch pages, and returns the figures.
func run(t *testing.T, f *fake, o Options, touched []uint64) Stats {
	t.Helper()
	m := newMachine(t, f, o)
	m.p.Start()
	m.walk(touched)
	if err := m.p.Close(); err != nil {
		t.Fatal(err)
	}
	return m.p.Stats()
}

// TestWalkFaults: a guest walks 256 MiB by virtual addresses; physically the
// pages lie anywhere.
func TestWalkFaults(t *testing.T) {
	pages := 256 << 20 / pageSize
	if testing.Short() {
		pages /= 8
	}
	f, order := scattered(pages, 1)
	got := map[Policy]Stats{}
	for _, policy := range []Policy{0, Physical, Locality} {
		if policy == 0 || policy == Physical {
			continue
		}
		got[policy] = run(t, f, Options{Policy: policy}, order)
		t.Logf("%v: %+v", policy, got[policy])
	}
}

func TestChaseFaults(t *testing.T) {
	pages := 64 << 20 / pageSize
	f, order := scattered(pages, 2)
	heap := order[pages/2:][:16<<20/pageSize]
	chase := make([]uint64, len(heap))
	for i, at := range rand.New(rand.NewPCG(7, 7)).Perm(len(heap)) {
		chase[i] = heap[at]
	}
	s := run(t, f, Options{Policy: Locality}, chase)
	t.Logf("%+v", s)
}
