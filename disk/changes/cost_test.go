package changes

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/raw"
)

// Recording allocates nothing, whether the block had changed or not.
func TestRecordAllocatesNothing(t *testing.T) {
	h := newHost(1 << 30)
	r := h.open(t, 0)
	rnd := rand.New(rand.NewPCG(1, 2))
	for off := int64(0); off < 1<<30; off += 1 << 20 {
		r.Record(off, 1)
	}
	backup(t, r, h, "app")
	if n := testing.AllocsPerRun(1000, func() {
		r.Record(rnd.Int64N(1<<30), 64<<10)
		r.Record(0, 4096)
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// A recorder of a disk of 2 TiB takes at most 4 MiB, with the set of a backup 5.
func TestMemory(t *testing.T) {
	h := newHost(2 << 40)
	h.open(t, 0) // the store's own
	before := memory()
	r := h.open(t, 0)
	after := memory()
	if used := after - before; used > 4<<20 {
		t.Errorf("%d bytes", used)
	} else {
		t.Logf("%d bytes in blocks of %d", used, r.BlockSize())
	}
	backup(t, r, h, "app")
	before = memory()
	s := since(t, r, h, "app")
	if used := memory() - before; used > 5<<19 {
		t.Errorf("%d bytes for a set", used)
	}
	runtime.KeepAlive(s)
	runtime.KeepAlive(r)
}

func memory() int64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

func BenchmarkRecord(b *testing.B) {
	h := newHost(1 << 40)
	r := h.open(b, 0)
	rnd := rand.New(rand.NewPCG(1, 2))
	offsets := make([]int64, 1<<16)
	for i := range offsets {
		offsets[i] = rnd.Int64N(1 << 40)
		r.Record(offsets[i], 4096)
	}
	for i := 0; b.Loop(); i++ {
		r.Record(offsets[i%len(offsets)], 4096)
	}
}

// BenchmarkForeground is how much longer writes of 4 KiB take through a root that records
// them than through one that does not, in percent. Rounds of 500 writes of both take
// turns; there are backups, and as many ticks as their time has. Marks, which the
// median does not see, are counted.
func BenchmarkForeground(b *testing.B) {
	const size, length = 256 << 20, 4 << 10
	path := filepath.Join(b.TempDir(), "disk.img")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		b.Fatal(err)
	}
	if err := os.Truncate(path, size); err != nil {
		b.Fatal(err)
	}
	n, err := raw.Open(path, false)
	if err != nil {
		b.Fatal(err)
	}
	defer n.Close()
	r, err := Open(Path(path), n, Options{})
	if err != nil {
		b.Fatal(err)
	}
	defer r.Close()
	rnd := rand.New(rand.NewPCG(1, 2))
	data := make([]byte, length)
	rand.NewChaCha8([32]byte{}).Read(data)
	bufs := [][]byte{data}
	for off := int64(0); off+length <= size; off += length { // allocated by the host
		n.Writev(bufs, off)
	}
	with, without := block.NewRoot(n), block.NewRoot(n)
	with.SetRecorders([]block.Recorder{r})
	var took [2][]time.Duration
	for round := 0; b.Loop(); round++ {
		for i := range 2 {
			which := (i + round) % 2
			root := []*block.Root{without, with}[which]
			begin := time.Now()
			for range 500 {
				if err := root.Writev(bufs, rnd.Int64N((size-length)/4096)*4096); err != nil {
					b.Fatal(err)
				}
			}
			took[which] = append(took[which], time.Since(begin))
		}
		if round%2000 == 1000 {
			if _, err := r.Since(n, fmt.Sprint("app", round%3)); err != nil {
				b.Fatal(err)
			}
		}
	}
	b.ReportMetric(100*(float64(median(took[1]))/float64(median(took[0]))-1), "%cost")
	b.ReportMetric(float64(r.marks)/float64(b.N), "marks/op")
}

// median is little moved by whatever else runs on the host.
func median(d []time.Duration) time.Duration {
	slices.Sort(d)
	return d[len(d)/2]
}
