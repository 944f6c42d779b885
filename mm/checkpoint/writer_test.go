package checkpoint

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/mm/guestmem"
)

// writeCalls is how many system calls that write this process has made.
func writeCalls(t *testing.T) int64 {
	t.Helper()
	b, err := os.ReadFile("/proc/self/io")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(b), "syscw: ")
	number, _, _ := strings.Cut(rest, "\n")
	n, err := strconv.ParseInt(number, 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// As the kernel counts them, write calls are at most one for 256 KiB and 50.
func TestFewWrites(t *testing.T) {
	for _, kind := range []string{"zero", "typical", "random"} {
		data := content(kind, 64<<20)
		path := filepath.Join(t.TempDir(), "c")
		before := writeCalls(t)
		s := writeAll(t, path, data)
		calls := writeCalls(t) - before
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if most := info.Size()/(256<<10) + 50; calls > most || s.Writes > calls || s.Bytes != info.Size() {
			t.Errorf("%s: %d calls, at most %d; %+v for %d bytes", kind, calls, most, s, info.Size())
		}
		t.Logf("%s: %d bytes in %d calls", kind, info.Size(), calls)
	}
}

// Blocks are counted in the order that BlockAt is given, whoever comes first.
func TestOrder(t *testing.T) {
	path := filepath.Join(t.TempDir(), "c")
	w, err := Create(path, CreateOptions{Memory: testRAM})
	if err != nil {
		t.Fatal(err)
	}
	m := model{}
	orders := rand.New(rand.NewPCG(1, 8)).Perm(100)
	for _, order := range orders {
		first := uint64(order) * 20
		var data []byte
		var pfns []uint64
		for pfn := first; pfn < first+20; pfn++ {
			m[pfn] = page(pfn % 1500) // some are duplicates
			pfns, data = append(pfns, pfn), append(data, m[pfn]...)
		}
		if err := w.BlockAt(uint64(order), pfns, split(data)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Commit(); err != nil {
		t.Fatal(err)
	}
	check(t, path, m)
	r, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	last := uint64(0)
	for b := range r.Blocks() {
		pfns, err := r.Pages(BlockID(b))
		if err != nil {
			t.Fatal(err)
		}
		for _, pfn := range pfns {
			if pfn < last {
				t.Fatalf("page %#x comes after %#x", pfn, last)
			}
			last = pfn
		}
	}
}

// Shared tells of exactly those slots that several pages are in.
func TestShared(t *testing.T) {
	path := filepath.Join(t.TempDir(), "c")
	r := rand.New(rand.NewPCG(2, 2))
	write(t, path, "", r, model{}, 2000)
	c, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	users := map[Location]int{}
	for i := range c.layout.pages {
		if at := c.Find(c.layout.pfn(i)); at.Kind == Data {
			users[at]++
		}
	}
	shared := 0
	for b := range c.Blocks() {
		pfns, err := c.Pages(BlockID(b))
		if err != nil {
			t.Fatal(err)
		}
		mask, err := c.Shared(BlockID(b))
		if err != nil {
			t.Fatal(err)
		}
		for slot := range pfns {
			n := users[Location{Data, BlockID(b), slot}]
			if is := mask&(1<<slot) != 0; n == 0 || is != (n > 1) {
				t.Errorf("slot %d of block %d has %d pages, shared: %v", slot, b, n, is)
			}
			if n > 1 {
				shared++
			}
		}
	}
	if shared == 0 {
		t.Error("no page has its like")
	}
}

// Pages that almost equal others are none of their duplicates, and as many equal
// ones as there may be are found.
func TestDuplicates(t *testing.T) {
	dir := t.TempDir()
	r := rand.New(rand.NewPCG(6, 6))
	m := model{}
	base := make([]byte, PageSize)
	for i := range base {
		base[i] = byte(r.Uint32())
	}
	var pfns []uint64
	for pfn := range uint64(3000) {
		p := slices.Clone(base)
		if pfn%3 != 0 {
			p[r.IntN(PageSize)] ^= 1 << r.IntN(8)
		}
		m[pfn] = p
		pfns = append(pfns, pfn)
	}
	path := filepath.Join(dir, "c")
	writePages(t, path, "", pfns, func(pfn uint64) []byte { return m[pfn] })
	check(t, path, m)
	c, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if info := c.Info()[0]; info.DuplicatePages < 999 || info.DuplicatePages > 1200 {
		t.Errorf("%+v", info)
	}
	d1, err1 := newDuplicates(1)
	d2, err2 := newDuplicates(1)
	if err := errors.Join(err1, err2); err != nil {
		t.Fatal(err)
	}
	var s1, s2 pageSum
	d1.sum(&s1, base)
	d2.sum(&s2, base)
	if s1 == s2 || s1 == (pageSum{}) {
		t.Error("the sum has no key")
	}
}

// What a writer refuses; after most of it there is no Commit.
func TestWriterRefuses(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "c")
	two := append(page(1), page(2)...)
	for name, f := range map[string]func(w *Writer) error{
		"a page twice in a block": func(w *Writer) error { return w.Block([]uint64{4, 4}, two) },
		"a page of another block": func(w *Writer) error {
			return errors.Join(w.Block([]uint64{4}, page(1)), w.Block([]uint64{4}, page(2)))
		},
		"a page that is zero":      func(w *Writer) error { return errors.Join(w.Zero(4), w.Block([]uint64{4}, page(2))) },
		"a zero page that is data": func(w *Writer) error { return errors.Join(w.Block([]uint64{4}, page(2)), w.Zero(4)) },
		"no pages":                 func(w *Writer) error { return w.Block(nil, nil) },
		"too many pages":           func(w *Writer) error { return w.Block(make([]uint64, 65), make([]byte, 65*PageSize)) },
		"too few bytes":            func(w *Writer) error { return w.Block([]uint64{1, 2}, page(1)) },
		"not RAM":                  func(w *Writer) error { return w.Block([]uint64{3000}, page(1)) },
		"zeros that are not RAM":   func(w *Writer) error { return w.Zero(1 << 40) },
	} {
		w, err := Create(path, CreateOptions{Memory: testRAM})
		if err != nil {
			t.Fatal(err)
		}
		if err := f(w); !errors.Is(err, ErrWrite) {
			t.Errorf("%s: %v", name, err)
		}
		if err := w.Commit(); !errors.Is(err, ErrWrite) {
			t.Errorf("%s, and Commit: %v", name, err)
		}
		w.Abort()
	}
	w, err := Create(path, CreateOptions{Memory: testRAM})
	if err != nil {
		t.Fatal(err)
	}
	for name, err := range map[string]error{
		"no name":       w.Section("", 1, nil),
		"a long name":   w.Section(strings.Repeat("x", 256), 1, nil),
		"too much":      w.Section("x", 1, make([]byte, maxSection+1)),
		"the same name": errors.Join(w.Section("y", 1, nil), w.Section("y", 2, nil)),
	} {
		if !errors.Is(err, ErrWrite) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := os.WriteFile(path, nil, 0o600); err != nil { // somebody was faster
		t.Fatal(err)
	}
	if err := w.Commit(); !errors.Is(err, unix.EEXIST) {
		t.Errorf("over a file that came meanwhile: %v", err)
	}
	for name, err := range map[string]error{
		"Block": w.Block([]uint64{1}, page(1)), "Zero": w.Zero(3), "Section": w.Section("z", 1, nil), "Commit": w.Commit(),
	} {
		if !errors.Is(err, ErrWrite) {
			t.Errorf("%s after Commit: %v", name, err)
		}
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 1 {
		t.Errorf("left behind: %v", entries)
	}
}

// A large section and blocks of several goroutines do not get into each other.
func TestLargeSections(t *testing.T) {
	path := filepath.Join(t.TempDir(), "c")
	w, err := Create(path, CreateOptions{Memory: []guestmem.Range{{Size: 64 << 20}}})
	if err != nil {
		t.Fatal(err)
	}
	sections := [][]byte{content("random", 5<<20), content("typical", 9<<20), content("zero", 3<<20)}
	data := content("random", 32<<20)
	var wg sync.WaitGroup
	for i, s := range sections {
		wg.Go(func() {
			if err := w.Section(fmt.Sprint(i), uint32(i), s); err != nil {
				t.Error(err)
			}
		})
	}
	for half := range uint64(2) {
		wg.Go(func() {
			for at := half * 16 << 20; at < (half+1)*16<<20; at += blockBytes {
				var pfns []uint64
				for i := range uint64(BlockPages) {
					pfns = append(pfns, at/PageSize+i)
				}
				if err := w.Block(pfns, data[at:at+blockBytes]); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if err := w.Commit(); err != nil {
		t.Fatal(err)
	}
	r, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if err := r.Verify(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	for i, want := range sections {
		if v, got, err := r.Section(fmt.Sprint(i)); err != nil || v != uint32(i) || !slices.Equal(got, want) {
			t.Errorf("section %d: %v", i, err)
		}
	}
	got := make([]byte, len(data))
	if err := r.Read(0, got); err != nil || !slices.Equal(got, data) {
		t.Errorf("memory: %v", err)
	}
}

// Abort while others write: they get errors, and nothing is left.
func TestAbortMeanwhile(t *testing.T) {
	dir := t.TempDir()
	w, err := Create(filepath.Join(dir, "c"), CreateOptions{Memory: []guestmem.Range{{Size: 1 << 30}}})
	if err != nil {
		t.Fatal(err)
	}
	data := content("random", blockBytes)
	var wg sync.WaitGroup
	started := make(chan struct{}, 4)
	for worker := range uint64(4) {
		wg.Go(func() {
			own := slices.Clone(data)
			pfns := make([]uint64, BlockPages)
			for n := range uint64(1 << 10) {
				for i := range pfns {
					pfns[i] = (worker<<10+n)*BlockPages + uint64(i)
					le.PutUint64(own[i*PageSize:], pfns[i]) // no duplicates
				}
				if err := w.Block(pfns, own); err != nil {
					if !errors.Is(err, ErrWrite) {
						t.Error(err)
					}
					return
				}
				if n == 5 {
					started <- struct{}{}
				}
			}
			t.Error("nobody told that it has ended")
		})
	}
	for range 4 {
		<-started
	}
	w.Abort()
	wg.Wait()
	if entries, _ := os.ReadDir(dir); len(entries) != 0 {
		t.Errorf("left behind: %v", entries)
	}
}
