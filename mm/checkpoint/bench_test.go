package checkpoint

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/gnomon-vmm/gnomon/mm/guestmem"
)

// content makes memory of a kind.
func content(kind string, size int) []byte {
	b := make([]byte, size)
	r := rand.NewChaCha8([32]byte{1})
	switch kind {
	case "zero":
	case "random":
		_, _ = r.Read(b)
	case "equal":
		_, _ = r.Read(b[:PageSize])
		for n := PageSize; n < size; n *= 2 {
			copy(b[n:], b[:n])
		}
	case "typical":
		// As a guest's memory: a third of the pages zero, the others code, text and
		// tables, which this test binary has too.
		self, err := os.ReadFile(os.Args[0])
		if err != nil {
			panic(err)
		}
		var word [8]byte
		for at, from := 0, 0; at < size; at += PageSize {
			_, _ = r.Read(word[:])
			if word[0] < 85 {
				continue
			}
			if from+PageSize > len(self) {
				from = 0
			}
			copy(b[at:at+PageSize], self[from:])
			copy(b[at:], word[:]) // pages differ
			from += PageSize
		}
	}
	return b
}

// BenchmarkWrite saves memory with as many goroutines as there are CPUs, and
// for comparison writes it as it is with large plain system calls. Both end with
// the file on disk if synced, and in the page cache if not.
func BenchmarkWrite(b *testing.B) {
	const size = 256 << 20
	for _, kind := range []string{"zero", "equal", "typical", "random"} {
		data := content(kind, size)
		b.Run(kind+"/checkpoint", func(b *testing.B) {
			b.SetBytes(size)
			var s WriteStats
			for b.Loop() {
				s = writeAll(b, filepath.Join(b.TempDir(), "c"), data)
			}
			b.ReportMetric(float64(s.Bytes)/size, "stored/raw")
			b.ReportMetric(float64(s.Bytes)/float64(s.Writes)/1024, "KiB/write")
		})
		b.Run(kind+"/plain", func(b *testing.B) {
			b.SetBytes(size)
			for b.Loop() {
				f, err := os.Create(filepath.Join(b.TempDir(), "p"))
				if err != nil {
					b.Fatal(err)
				}
				for at := 0; at < size; at += writeSize {
					if _, err := f.Write(data[at : at+writeSize]); err != nil {
						b.Fatal(err)
					}
				}
				if os.Getenv("CHECKPOINT_BENCH_SYNC") != "" {
					if err := f.Sync(); err != nil {
						b.Fatal(err)
					}
				}
				f.Close()
			}
		})
	}
}

func writeAll(t testing.TB, path string, data []byte) WriteStats {
	w, err := Create(path, CreateOptions{Memory: []guestmem.Range{{Size: uint64(len(data))}}})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Abort()
	addAll(t, w, data)
	if err := w.Commit(); err != nil {
		t.Fatal(err)
	}
	return w.Stats()
}

// split makes pages of bytes.
func split(data []byte) [][]byte { return slices.Collect(slices.Chunk(data, PageSize)) }

// addAll adds memory with as many goroutines as there are CPUs.
func addAll(t testing.TB, w *Writer, data []byte) {
	var next atomic.Int64
	var wg sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			pfns := make([]uint64, BlockPages)
			for {
				at := (next.Add(1) - 1) * blockBytes
				if at >= int64(len(data)) {
					return
				}
				for i := range pfns {
					pfns[i] = uint64(at)/PageSize + uint64(i)
				}
				if err := w.BlockAt(uint64(at), pfns, split(data[at:at+blockBytes])); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
}

func BenchmarkReadBlock(b *testing.B) {
	for _, kind := range []string{"typical", "random"} {
		b.Run(kind, func(b *testing.B) {
			path := filepath.Join(b.TempDir(), "c")
			writeAll(b, path, content(kind, 32<<20))
			r, err := Open(path)
			if err != nil {
				b.Fatal(err)
			}
			defer r.Close()
			buf := make([]byte, blockBytes)
			n := 0
			b.SetBytes(blockBytes)
			b.ReportAllocs()
			for b.Loop() {
				if _, _, err := r.ReadBlock(BlockID(n%r.blocks), buf); err != nil {
					b.Fatal(err)
				}
				n++
			}
		})
	}
}

// BenchmarkOpen opens checkpoints of small and large memories.
func BenchmarkOpen(b *testing.B) {
	for _, size := range []uint64{256 << 20, 8 << 30} {
		b.Run(fmt.Sprintf("%dMiB", size>>20), func(b *testing.B) {
			path := filepath.Join(b.TempDir(), "c")
			w, err := Create(path, CreateOptions{Memory: []guestmem.Range{{Size: size}}})
			if err != nil {
				b.Fatal(err)
			}
			data := content("random", blockBytes)
			pfns := make([]uint64, BlockPages)
			for at := uint64(0); at < size/PageSize; at += BlockPages {
				for i := range pfns {
					pfns[i] = at + uint64(i)
				}
				if err := w.Block(pfns, data); err != nil {
					b.Fatal(err)
				}
			}
			if err := w.Commit(); err != nil {
				b.Fatal(err)
			}
			for b.Loop() {
				r, err := Open(path)
				if err != nil {
					b.Fatal(err)
				}
				r.Find(77)
				r.Close()
			}
		})
	}
}
