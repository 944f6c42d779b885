package extfs

import (
	"math/rand/v2"
	"testing"
)

// TestRegionAgainstBits compares a region of random groups with a bit for each
// byte of it.
func TestRegionAgainstBits(t *testing.T) {
	rng := rand.New(rand.NewPCG(5, 6))
	for range 500 {
		const perGroup, cluster = 8 * 10, 4
		groups := 1 + rng.IntN(4)
		r := &region{
			FileSystem: FileSystem{ClusterSize: cluster},
			start:      int64(rng.IntN(50)), groupSize: perGroup * cluster, perGroup: perGroup,
			groups: make([]groupMap, groups),
		}
		r.end = r.start + int64(groups)*r.groupSize - rng.Int64N(r.groupSize-1)
		m := &Map{end: r.end + int64(rng.IntN(50)), regions: []*region{r}}
		used := make([]bool, m.end)
		for i := range used {
			used[i] = true
		}
		for g := range groups {
			bitmap := make([]byte, perGroup/8)
			fill := rng.IntN(5)
			for i := range bitmap {
				switch fill {
				case 0, 1: // free but for a few
				case 2:
					bitmap[i] = 0xff
				default:
					bitmap[i] = byte(rng.Uint32())
				}
			}
			// Near the end of the last group too, and behind it, where bits do not count.
			if at := r.clusters(int64(g)) - int64(rng.IntN(8)); fill == 1 && at >= 0 && at < perGroup {
				bitmap[at/8] ^= 1 << (at % 8)
			}
			if err := r.set(int64(g), bitmap); err != nil {
				t.Fatal(err)
			}
			from := rng.Int64N(r.clusters(int64(g)))
			to := from + rng.Int64N(r.clusters(int64(g))-from+1)
			marked := rng.IntN(2) == 0
			if marked {
				if err := r.mark(int64(g), from, to); err != nil {
					t.Fatal(err)
				}
			}
			for c := range r.clusters(int64(g)) {
				for b := range int64(cluster) {
					at := r.start + int64(g)*r.groupSize + c*cluster + b
					if at < r.end {
						used[at] = bitmap[c/8]>>(c%8)&1 != 0 || marked && c >= from && c < to
					}
				}
			}
		}
		free := int64(0)
		for at, u := range used {
			if !u {
				free++
			}
			got, end := m.Run(int64(at), m.end)
			want := at + 1
			for want < len(used) && used[want] == u {
				want++
			}
			if got != u || end != int64(want) {
				t.Fatalf("byte %d: used %v until %d, not %v until %d", at, got, end, u, want)
			}
			if limit := int64(at + 1 + rng.IntN(len(used)-at)); limit < end {
				if _, end := m.Run(int64(at), limit); end != limit {
					t.Fatalf("byte %d: a run until %d passes the limit %d", at, end, limit)
				}
			}
		}
		if m.UsedBytes() != m.end-free || m.FileSystems()[0].FreeBytes != free {
			t.Fatalf("%d bytes are used, of %d with %d free", m.UsedBytes(), m.end, free)
		}
	}
}
