package snapshot_test

import (
	"context"
	"path/filepath"
	"testing"

	"github.com/gnomon-vmm/gnomon/mm/pager"
	"github.com/gnomon-vmm/gnomon/vmm"
	"github.com/gnomon-vmm/gnomon/vmm/snapshot"
)

// faults saves a guest that waits between filling its memory and using it, has
// it go on from the file by each policy, and returns the pagers' figures.
func faults(t *testing.T, memory uint64, words, result string, policies ...pager.Policy) map[pager.Policy]pager.Stats {
	t.Helper()
	path := filepath.Join(t.TempDir(), "c")
	r := start(t, words, func(c *vmm.Config) { c.Memory = memory })
	r.serial.waitFor(t, "wait for=line")
	saver := snapshot.NewSaver(r.Machine, nil, nil)
	if _, err := saver.Save(context.Background(), path, snapshot.SaveOptions{}); err != nil {
		t.Fatal(err)
	}
	// What it finds in memory that is all there is what it must find.
	r.release(t)
	want := sum(t, r, result)
	figures := map[pager.Policy]pager.Stats{}
	for _, policy := range policies {
		next, m := restored(t, path, snapshot.Options{Policy: policy, NoBackground: true})
		next.release(t)
		if got := sum(t, next, result); got != want {
			t.Errorf("%s: sum %s, want %s", policy, got, want)
		}
		figures[policy] = m.Pager.Stats()
		used, unused, err := m.Pager.Usage()
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%s: used %d, unused %d of what came along; %+v", policy, used, unused, figures[policy])
		if policy == pager.Locality && unused*4 > used+unused {
			t.Errorf("%s: %d of %d pages that came along were never used", policy, unused, used+unused)
		}
	}
	return figures
}

// sum is what a guest has summed up at last.
func sum(t *testing.T, r *running, workload string) string {
	t.Helper()
	text := ""
	for _, line := range r.results(t).Lines {
		if line.Name == workload {
			text = line.Values["sum"]
		}
	}
	if text == "" || text == "0x0" {
		t.Fatalf("no sum in\n%s", r.serial)
	}
	return text
}

// A walk through 256 MiB in virtual order, the pages scattered over physical memory.
func TestWalkFaults(t *testing.T) {
	f := faults(t, 384<<20, "fill size=256M; wait by=mailbox; touch op=sum", "touch", pager.Physical, pager.Locality)
	physical, locality := f[pager.Physical].GuestFaults, f[pager.Locality].GuestFaults
	const none = 256 << 20 / 4096 // a fault a page, as TestChaseFaults counts, and some more
	if locality*50 > none {
		t.Errorf("%d faults by locality, more than 2 %% of %d without", locality, none)
	}
	if locality*10 > physical {
		t.Errorf("%d faults by locality, more than a tenth of %d by physical neighbours", locality, physical)
	}
}

// A chase of pointers at random through 16 MiB of 64.
func TestChaseFaults(t *testing.T) {
	f := faults(t, 128<<20, "fill size=64M; chase off=24M span=16M; wait by=mailbox; chase off=24M span=16M build=0", "chase", 0, pager.Locality)
	none, locality := f[0].GuestFaults, f[pager.Locality].GuestFaults
	if none < 4096 {
		t.Errorf("%d faults to bring 4096 pages one by one", none)
	}
	if locality*10 > none {
		t.Errorf("%d faults by locality, more than 10 %% of %d without", locality, none)
	}
}
