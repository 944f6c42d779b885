package mirror

import (
	"testing"

	"github.com/gnomon-vmm/gnomon/disk/block"
)

// sparse is a source that holds what covers says, for each MiB of the disk.
type sparse struct {
	block.Node
	covers func(mib int64) bool
}

func (s *sparse) Size() int64 { return 64 << 20 }

func (s *sparse) Map(off, n int64) (block.Extent, error) {
	e := block.Extent{Start: off, Present: true, Data: true, Offset: -1}
	if !s.covers(off >> 20) {
		e.Depth = 1
	}
	for e.Length = 0; e.Length < n && s.covers((off+e.Length)>>20) == (e.Depth == 0); {
		e.Length += min(n-e.Length, 1<<20-(off+e.Length)%(1<<20))
	}
	return e, nil
}

// evicted is a target that keeps which of its MiB the page cache gave up.
type evicted struct {
	sparse
	t   *testing.T
	mib [64]bool
}

func (e *evicted) Evict(off, n int64) {
	if off < 0 || n <= 0 || off%(1<<20) != 0 || n%(1<<20) != 0 || off+n > e.Size() {
		e.t.Fatalf("%d bytes at %d are evicted", n, off)
	}
	for i := off >> 20; i < (off+n)>>20; i++ {
		e.mib[i] = true
	}
}

// In front of the pass, and no further than it is told, the page cache gives up what the
// source covers, and nothing else; of a copy, whose target may be read, nothing.
func TestEvict(t *testing.T) {
	for name, covers := range map[string]func(int64) bool{
		"all":     func(int64) bool { return true },
		"nothing": func(int64) bool { return false },
		"parts":   func(mib int64) bool { return mib%13 > 4 || mib%7 == 2 },
	} {
		for _, depth := range []int{0, 1} {
			target := &evicted{t: t}
			f, err := New(&sparse{covers: covers}, target, Options{Depth: depth})
			if err != nil {
				t.Fatal(err)
			}
			for place := int64(0); place <= f.Size(); place += 5 << 20 {
				f.evict(place)
				for i := range int64(64) {
					covered := depth > 0 && covers(i)
					// What is asked for at once may lie a little further, or wait for more.
					must, may := i<<20 < place+evictAhead-largestPiece, i<<20 < place+2*evictAhead
					if got := target.mib[i]; got && !(covered && may) || !got && covered && must {
						t.Fatalf("%s, depth %d, the pass at %d MiB: MiB %d evicted: %v", name, depth, place>>20, i, got)
					}
				}
			}
		}
	}
}
