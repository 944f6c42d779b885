package copysync

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"iter"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/extfs"
	"github.com/gnomon-vmm/gnomon/disk/extfs/extfstest"
	"github.com/gnomon-vmm/gnomon/disk/raw"
)

// recorder is a node that keeps account of its requests.
type recorder struct {
	block.Node
	mu        sync.Mutex
	writes    []Range
	discards  []Range
	read      int64
	reads     int
	largest   int64
	flushes   int
	flushedAt int // writes before the last flush
	failAfter int // writes, if not 0
}

var errBroken = errors.New("broken")

func (r *recorder) Readv(bufs [][]byte, off int64) error {
	r.mu.Lock()
	r.reads++
	for _, b := range bufs {
		r.read += int64(len(b))
		r.largest = max(r.largest, int64(len(b)))
	}
	r.mu.Unlock()
	return r.Node.Readv(bufs, off)
}

func (r *recorder) wrote(off, n int64) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.failAfter > 0 && len(r.writes) >= r.failAfter {
		return errBroken
	}
	r.writes = append(r.writes, Range{off, off + n})
	return nil
}

func (r *recorder) Writev(bufs [][]byte, off int64) error {
	for _, b := range bufs {
		if err := r.wrote(off, int64(len(b))); err != nil {
			return err
		}
	}
	return r.Node.Writev(bufs, off)
}

func (r *recorder) WriteZeroes(off, n int64, unmap bool) error {
	if err := r.wrote(off, n); err != nil {
		return err
	}
	return r.Node.WriteZeroes(off, n, unmap)
}

func (r *recorder) Discard(off, n int64) error {
	r.mu.Lock()
	r.discards = append(r.discards, Range{off, off + n})
	r.mu.Unlock()
	return r.Node.Discard(off, n)
}

func (r *recorder) Flush() error {
	r.mu.Lock()
	r.flushes++
	r.flushedAt = len(r.writes)
	r.mu.Unlock()
	return r.Node.Flush()
}

// merged sorts ranges and joins neighbours; those that overlap it reports.
func merged(t *testing.T, ranges []Range) []Range {
	t.Helper()
	ranges = slices.Clone(ranges)
	slices.SortFunc(ranges, func(a, b Range) int { return int(a.Start - b.Start) })
	var out []Range
	for _, r := range ranges {
		n := len(out)
		switch {
		case n > 0 && out[n-1].End > r.Start:
			t.Errorf("%v and %v overlap", out[n-1], r)
		case n > 0 && out[n-1].End == r.Start:
			out[n-1].End = r.End
		default:
			out = append(out, r)
		}
	}
	return out
}

func openDisk(t *testing.T, path string) block.Node {
	t.Helper()
	n, err := raw.Open(path, false)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func readFile(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

const granule = 64 << 10

// changedGranules is what changed block tracking tells after a session.
func changedGranules(before, after []byte) []uint64 {
	words := make([]uint64, (len(after)+granule*64-1)/(granule*64))
	for i := 0; i*granule < len(after); i++ {
		end := min(len(after), (i+1)*granule)
		if !bytes.Equal(before[i*granule:end], after[i*granule:end]) {
			words[i/64] |= 1 << (i % 64)
		}
	}
	return words
}

// intersection is changed ∩ used by sector, from what dumpe2fs says.
func intersection(words []uint64, free []extfstest.Extent, base, size int64) (used, unused []Range) {
	const sector = 512
	isFree := make([]bool, size/sector)
	for _, e := range free {
		for at := base + e.Start; at < base+e.End; at += sector {
			isFree[at/sector] = true
		}
	}
	add := func(to *[]Range, at int64) {
		if n := len(*to); n > 0 && (*to)[n-1].End == at {
			(*to)[n-1].End += sector
			return
		}
		*to = append(*to, Range{at, at + sector})
	}
	for at := int64(0); at < size; at += sector {
		switch g := at / granule; {
		case words[g/64]>>(g%64)&1 == 0:
		case isFree[at/sector]:
			add(&unused, at)
		default:
			add(&used, at)
		}
	}
	return used, unused
}

func bytesOf(ranges []Range) (n int64) {
	for _, r := range ranges {
		n += r.End - r.Start
	}
	return n
}

// TestSyncCopiesTheIntersection fills an ext4 disk, deletes 80 % of it and writes
// some again, twice, and brings a copy up to date after each.
func TestSyncCopiesTheIntersection(t *testing.T) {
	for _, v := range []struct{ name, args string }{
		{"4k", "-b 4096 -O " + extfstest.Modern},
		{"1k", "-b 1024 -O " + extfstest.Modern},
		{"bigalloc", "-b 4096 -C 32768 -O bigalloc," + extfstest.Modern},
	} {
		for _, discard := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s discard=%v", v.name, discard), func(t *testing.T) {
				t.Parallel()
				const size = 96 << 20
				disk := extfstest.Make(t, size, append([]string{"-t", "ext4", "-E", "lazy_itable_init=0"}, strings.Fields(v.args)...)...)
				target := filepath.Join(t.TempDir(), "copy")
				before := readFile(t, disk)
				if err := os.WriteFile(target, before, 0o600); err != nil {
					t.Fatal(err)
				}
				files := map[string][]byte{}
				for session := range 2 {
					runSession(t, disk, session, files)
					after := readFile(t, disk)
					checkSync(t, disk, target, changedGranules(before, after), discard)
					checkFiles(t, target, files)
					before = after
				}
			})
		}
	}
}

// runSession writes files until the disk is nearly full, deletes 80 % of them, and
// writes some more.
func runSession(t *testing.T, disk string, session int, files map[string][]byte) {
	t.Helper()
	dir := t.TempDir()
	rng := rand.New(rand.NewPCG(uint64(session), 7))
	var script strings.Builder
	write := func(name string, size int) {
		content := make([]byte, size)
		rand.NewChaCha8([32]byte{byte(rng.IntN(256)), byte(session)}).Read(content)
		if rng.IntN(4) == 0 {
			clear(content[size/3:]) // written as zeroes, or left out
		}
		host := filepath.Join(dir, name)
		if err := os.WriteFile(host, content, 0o600); err != nil {
			t.Fatal(err)
		}
		files[name] = content
		fmt.Fprintf(&script, "write %s %s\n", host, name)
	}
	var names []string
	for i, left := 0, 60<<20; left > 0 && session == 0 || i < 40; i++ {
		size := rng.IntN(900 << 10)
		left -= size
		name := fmt.Sprintf("s%d-%d", session, i)
		names = append(names, name)
		write(name, size)
	}
	rng.Shuffle(len(names), func(i, j int) { names[i], names[j] = names[j], names[i] })
	for _, name := range names[:len(names)*8/10] {
		fmt.Fprintf(&script, "rm %s\n", name)
		delete(files, name)
	}
	for i := range 30 {
		write(fmt.Sprintf("s%d-again%d", session, i), rng.IntN(200<<10))
	}
	extfstest.Run(t, script.String(), "debugfs", "-w", "-f", "-", disk)
}

func checkSync(t *testing.T, disk, target string, changed []uint64, discard bool) {
	t.Helper()
	src := &recorder{Node: openDisk(t, disk)}
	defer src.Close()
	dst := &recorder{Node: openDisk(t, target)}
	defer dst.Close()
	size := src.Size()
	used, unused := intersection(changed, extfstest.Free(t, disk), 0, size)

	var done, total, steps int64
	var skipped []Range
	figures, err := Sync(context.Background(), dst, src, Bitmap(changed, granule, size), Options{
		Discard: discard,
		Skipped: func(r Range) { skipped = append(skipped, r) },
		Progress: func(d, n int64) {
			if d < done {
				t.Errorf("progress goes from %d to %d", done, d)
			}
			done, total = d, n
			steps++
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	if got := merged(t, dst.writes); !slices.Equal(got, used) {
		t.Errorf("written: %v\nchanged and used: %v", got, used)
	}
	if got := merged(t, skipped); !slices.Equal(got, unused) {
		t.Errorf("skipped: %v\nchanged and not used: %v", got, unused)
	}
	if got := merged(t, dst.discards); discard && !slices.Equal(got, unused) || !discard && got != nil {
		t.Errorf("discarded: %v\nchanged and not used: %v", got, unused)
	}
	if figures.Copied != bytesOf(used) || figures.Skipped != bytesOf(unused) || figures.Changed != figures.Copied+figures.Skipped {
		t.Errorf("figures %+v; %d are to be copied, %d to be skipped", figures, bytesOf(used), bytesOf(unused))
	}
	if figures.Skipped < figures.Copied {
		t.Errorf("figures %+v: a disk of which most is deleted", figures)
	}
	if done != figures.Copied || total != figures.Copied || steps < 2 {
		t.Errorf("progress ended at %d of %d after %d steps; %d were copied", done, total, steps, figures.Copied)
	}
	if dst.flushes != 1 || dst.flushedAt != len(dst.writes) {
		t.Errorf("%d flushes, the last after %d writes of %d", dst.flushes, dst.flushedAt, len(dst.writes))
	}
	t.Logf("%+v, %d reads of %d bytes, the largest %d", figures, src.reads, src.read, src.largest)
}

// checkFiles has fsck and debugfs look at the copy.
func checkFiles(t *testing.T, target string, files map[string][]byte) {
	t.Helper()
	extfstest.Run(t, "", "e2fsck", "-f", "-n", target)
	dir := t.TempDir()
	var script strings.Builder
	for name := range files {
		fmt.Fprintf(&script, "dump %s %s\n", name, filepath.Join(dir, name))
	}
	extfstest.Run(t, script.String(), "debugfs", "-f", "-", target)
	for name, want := range files {
		if !bytes.Equal(readFile(t, filepath.Join(dir, name)), want) {
			t.Errorf("file %s differs in the copy", name)
		}
	}
}

// TestBitmapAgainstBits compares the ranges with the bits one by one.
func TestBitmapAgainstBits(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 3))
	for range 2000 {
		words := make([]uint64, rng.IntN(5))
		for i := range words {
			switch rng.IntN(4) {
			case 0:
				words[i] = ^uint64(0)
			case 1:
				words[i] = rng.Uint64() & rng.Uint64() & rng.Uint64()
			case 2:
				words[i] = rng.Uint64() | rng.Uint64()
			}
		}
		size := rng.Int64N(int64(len(words))*64*10 + 1)
		var want []Range
		for at := int64(0); at < size; at++ {
			if bit := at / 10; words[bit/64]>>(bit%64)&1 != 0 {
				if n := len(want); n > 0 && want[n-1].End == at {
					want[n-1].End++
				} else {
					want = append(want, Range{at, at + 1})
				}
			}
		}
		if got := slices.Collect(Bitmap(words, 10, size)); !slices.Equal(got, want) {
			t.Fatalf("%x of %d bytes: %v, not %v", words, size, got, want)
		}
	}
}

// blank is an empty disk.
func blank(t *testing.T, size int64) *recorder {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk")
	extfstest.Sparse(t, path, size)
	r := &recorder{Node: openDisk(t, path)}
	t.Cleanup(func() { r.Close() })
	return r
}

func TestSyncRefusesChangesOutOfOrder(t *testing.T) {
	for _, changed := range [][]Range{
		{{4096, 8192}, {0, 4096}},
		{{0, 8192}, {4096, 12288}},
		{{8192, 4096}},
		{{-4096, 4096}},
		{{1 << 20, 1<<20 + 512}},
	} {
		dst := blank(t, 1<<20)
		if _, err := Sync(context.Background(), dst, blank(t, 1<<20), slices.Values(changed), Options{}); !errors.Is(err, ErrChanges) || !errors.Is(err, ErrSync) {
			t.Errorf("%v: %v", changed, err)
		}
		if len(dst.writes) != 0 {
			t.Errorf("%v: %d writes", changed, len(dst.writes))
		}
	}
}

func TestSyncRefusesASmallerTarget(t *testing.T) {
	if _, err := Sync(context.Background(), blank(t, 1<<20), blank(t, 2<<20), everything(2<<20), Options{}); !errors.Is(err, ErrSync) {
		t.Fatal(err)
	}
}

func everything(size int64) iter.Seq[Range] { return slices.Values([]Range{{0, size}}) }

// TestSyncCopiesWhatItDoesNotKnow copies all changes of a disk without file
// systems, by large reads; its zeroes as zeroes.
func TestSyncCopiesWhatItDoesNotKnow(t *testing.T) {
	const size = 9<<20 + 512
	src, dst := blank(t, size), blank(t, size)
	content := make([]byte, size)
	rand.NewChaCha8([32]byte{1}).Read(content[:5<<20])
	if err := src.Node.Writev([][]byte{content}, 0); err != nil {
		t.Fatal(err)
	}
	figures, err := Sync(context.Background(), dst, src, everything(size), Options{Used: extfs.Everything(size)})
	if err != nil {
		t.Fatal(err)
	}
	if want := (Figures{Changed: size, Used: size, Copied: size, Zero: size - 5<<20}); figures != want {
		t.Errorf("figures %+v, not %+v", figures, want)
	}
	if src.reads != 10 || src.read != size {
		t.Errorf("%d reads of %d bytes", src.reads, src.read)
	}
	got := make([]byte, size)
	if err := dst.Node.Readv([][]byte{got}, 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, content) {
		t.Error("the copy differs")
	}
}

// TestSyncFailsAndGoesOn has the target break in the middle, then syncs again.
func TestSyncFailsAndGoesOn(t *testing.T) {
	const size = 16 << 20
	src, dst := blank(t, size), blank(t, size)
	dst.failAfter = 5
	figures, err := Sync(context.Background(), dst, src, everything(size), Options{})
	if !errors.Is(err, ErrSync) || !errors.Is(err, errBroken) || !strings.Contains(err.Error(), " at ") {
		t.Fatal(err)
	}
	if figures.Copied != 5<<20 || dst.flushes != 0 {
		t.Errorf("figures %+v and %d flushes after 5 writes", figures, dst.flushes)
	}
	dst.failAfter = 0
	if figures, err = Sync(context.Background(), dst, src, everything(size), Options{}); err != nil || figures.Copied != size {
		t.Fatal(figures, err)
	}
}

func TestSyncIsCancelled(t *testing.T) {
	const size = 64 << 20
	ctx, cancel := context.WithCancel(context.Background())
	dst := blank(t, size)
	figures, err := Sync(ctx, dst, blank(t, size), everything(size), Options{Workers: 2, Progress: func(done, _ int64) {
		if done >= 8<<20 {
			cancel()
		}
	}})
	if !errors.Is(err, context.Canceled) || !errors.Is(err, ErrSync) {
		t.Fatal(err)
	}
	if figures.Copied < 8<<20 || figures.Copied > 10<<20 {
		t.Errorf("%d bytes were copied; cancelled after 8 MiB", figures.Copied)
	}
}

// void reads and writes nothing.
type void struct {
	block.Node
	size int64
}

func (v void) Size() int64 { return v.size }

func (void) ReadOnly() bool { return false }

func (void) Readv(bufs [][]byte, _ int64) error {
	bufs[0][0] = 1
	return nil
}

func (void) Writev([][]byte, int64) error { return nil }

func (void) WriteZeroes(int64, int64, bool) error { return nil }

func (void) Flush() error { return nil }

// TestCopyingDoesNotAllocate compares syncs of few and of many ranges.
func TestCopyingDoesNotAllocate(t *testing.T) {
	allocations := func(ranges int) float64 {
		var changed []Range
		for i := range int64(ranges) {
			changed = append(changed, Range{i * 100000, i*100000 + 5000})
		}
		n := void{size: int64(ranges) * 100000}
		return testing.AllocsPerRun(3, func() {
			if _, err := Sync(context.Background(), n, n, slices.Values(changed), Options{Used: extfs.Everything(n.size), Workers: 1}); err != nil {
				t.Error(err)
			}
		})
	}
	if few, many := allocations(10), allocations(5000); many > few+2 {
		t.Errorf("%v allocations for 10 ranges, %v for 5000", few, many)
	}
}

// TestReadsAreJoined counts the reads of ranges with small and large gaps; only
// the ranges are written.
func TestReadsAreJoined(t *testing.T) {
	const size = 8 << 20
	for _, c := range []struct {
		name    string
		changed []Range
		reads   int
		read    int64
	}{
		{"small gaps", []Range{{0, 4096}, {20480, 24576}, {24576, 28672}}, 1, 28672},
		{"a large gap", []Range{{0, 4096}, {20481, 24576}}, 2, 4096 + 4095},
		{"a long range behind a short one", []Range{{512, 4096}, {8192, 3 << 20}}, 3, 3<<20 - 512},
		{"a gap across a chunk's end", []Range{{0, chunk - 4096}, {chunk + 4096, chunk + 8192}}, 2, chunk},
	} {
		t.Run(c.name, func(t *testing.T) {
			src, dst := blank(t, size), blank(t, size)
			if _, err := Sync(context.Background(), dst, src, slices.Values(c.changed), Options{Used: extfs.Everything(size)}); err != nil {
				t.Fatal(err)
			}
			if src.reads != c.reads || src.read != c.read || src.largest > chunk {
				t.Errorf("%d reads of %d bytes, not %d of %d", src.reads, src.read, c.reads, c.read)
			}
			if got, want := merged(t, dst.writes), merged(t, c.changed); !slices.Equal(got, want) {
				t.Errorf("written: %v, not %v", got, want)
			}
		})
	}
}
