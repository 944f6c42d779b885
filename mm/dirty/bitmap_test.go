package dirty

import (
	"errors"
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/gnomon-vmm/gnomon/mm/guestmem"
)

const pageSize = guestmem.PageSize

// Ranges whose ends fall within words and on their edges, two of them adjacent.
var ranges = []guestmem.Range{
	{GPA: 0, Size: 64 * pageSize},
	{GPA: 64 * pageSize, Size: 3 * pageSize},
	{GPA: 1 << 32, Size: 200 * pageSize},
	{GPA: math.MaxUint64 &^ (pageSize - 1) &^ (1<<20 - 1), Size: 255 * pageSize},
}

// model is a Bitmap without bits.
type model map[uint64]bool

func inRanges(pfn uint64) bool {
	return slices.ContainsFunc(ranges, func(r guestmem.Range) bool { return pfn-r.GPA/pageSize < r.Size/pageSize })
}

type run struct{ pfn, n uint64 }

// runs are those of the model, by asking for each page.
func (m model) runs() (runs []run) {
	for _, r := range ranges {
		open := false
		for p := r.GPA / pageSize; p-r.GPA/pageSize < r.Size/pageSize; p++ {
			switch {
			case m[p] && open:
				runs[len(runs)-1].n++
			case m[p]:
				runs = append(runs, run{p, 1})
			}
			open = m[p]
		}
	}
	return runs
}

func runsOf(b *Bitmap) (runs []run) {
	b.Runs(func(pfn, n uint64) { runs = append(runs, run{pfn, n}) })
	return runs
}

func TestBitmapModel(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	b, m := NewBitmap(ranges), model{}
	for step := range 20000 {
		r := ranges[rng.IntN(len(ranges))]
		pfn := r.GPA/pageSize + rng.Uint64N(r.Size/pageSize+10) - min(r.GPA/pageSize, rng.Uint64N(5))
		switch rng.IntN(12) {
		case 0, 1, 2:
			b.Set(pfn)
			if inRanges(pfn) {
				m[pfn] = true
			}
		case 3, 4:
			b.Clear(pfn)
			delete(m, pfn)
		case 5:
			n := rng.Uint64N(1 << rng.IntN(9))
			if rng.IntN(20) == 0 {
				n = math.MaxUint64 - rng.Uint64N(1000)
			}
			b.SetRun(pfn, n)
			for _, r := range ranges {
				for p := r.GPA / pageSize; p < (r.GPA+r.Size)/pageSize; p++ {
					if p >= pfn && p-pfn < n {
						m[p] = true
					}
				}
			}
		case 6:
			if b.Has(pfn) != m[pfn] {
				t.Fatalf("step %d: page %#x: %v, want %v", step, pfn, b.Has(pfn), m[pfn])
			}
		case 7:
			other := NewBitmap(ranges)
			for range rng.IntN(20) {
				p := r.GPA/pageSize + rng.Uint64N(r.Size/pageSize)
				other.Set(p)
				m[p] = true
			}
			if err := b.Merge(other); err != nil {
				t.Fatal(err)
			}
		case 8:
			if rng.IntN(20) == 0 {
				b.Reset()
				clear(m)
			}
		case 9:
			if rng.IntN(50) == 0 {
				b.SetAll()
				for _, r := range ranges {
					for p := uint64(0); p < r.Size/pageSize; p++ {
						m[r.GPA/pageSize+p] = true
					}
				}
			}
		default:
			if got, want := runsOf(b), m.runs(); !slices.Equal(got, want) {
				t.Fatalf("step %d: runs %v, want %v", step, got, want)
			}
			if b.Count() != uint64(len(m)) {
				t.Fatalf("step %d: count %d, want %d", step, b.Count(), len(m))
			}
		}
	}
}

func TestMergeRefusesOtherMemory(t *testing.T) {
	b := NewBitmap(ranges)
	for _, other := range [][]guestmem.Range{nil, ranges[:3], {ranges[0], ranges[1], ranges[2], {GPA: ranges[3].GPA, Size: pageSize}}} {
		if err := b.Merge(NewBitmap(other)); !errors.Is(err, ErrRanges) {
			t.Errorf("%x: %v", other, err)
		}
	}
}

func FuzzBitmap(f *testing.F) {
	f.Add([]byte{0, 0, 1, 1, 63, 2, 2, 70, 9})
	f.Add([]byte{1, 0, 255, 2, 199, 1, 0, 64, 1})
	f.Fuzz(func(t *testing.T, program []byte) {
		b, m := NewBitmap(ranges), model{}
		for ; len(program) >= 3; program = program[3:] {
			r := ranges[int(program[0])%len(ranges)]
			pfn, n := r.GPA/pageSize+uint64(program[1]), uint64(program[2])
			if program[0] >= 128 {
				b.Clear(pfn)
				delete(m, pfn)
				continue
			}
			b.SetRun(pfn, n)
			for p := pfn; p < pfn+n; p++ {
				if inRanges(p) {
					m[p] = true
				}
			}
		}
		if got, want := runsOf(b), m.runs(); !slices.Equal(got, want) || b.Count() != uint64(len(m)) {
			t.Errorf("%d pages, runs %v; want %d, %v", b.Count(), got, len(m), want)
		}
	})
}
