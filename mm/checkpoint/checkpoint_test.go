package checkpoint

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/mm/guestmem"
)

var testRAM = []guestmem.Range{{GPA: 0, Size: 3000 * PageSize}, {GPA: 1 << 32, Size: 1500 * PageSize}}

// model is what a chain must hold.
type model map[uint64][]byte

// pages makes some content: zero, random, repetitive, and the same as others.
func randomPage(r *rand.Rand) []byte {
	p := make([]byte, PageSize)
	switch r.IntN(5) {
	case 0: // zero
	case 1: // one of few
		p[17] = byte(1 + r.IntN(3))
	case 2:
		copy(p, bytes.Repeat([]byte(fmt.Sprintf("line %d ", r.IntN(1000))), 300))
	default:
		for i := range p {
			p[i] = byte(r.Uint32())
		}
	}
	return p
}

func randomPFN(r *rand.Rand) uint64 {
	if r.IntN(3) == 0 {
		return 1<<32/PageSize + r.Uint64N(1500)
	}
	return r.Uint64N(3000)
}

// write makes a checkpoint of n random pages and enters them in m.
func write(t testing.TB, path, parent string, r *rand.Rand, m model, n int) {
	t.Helper()
	w, err := Create(path, CreateOptions{Memory: testRAM, Parent: parent})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Abort()
	if err := w.Section("machine", 3, []byte("state of "+path)); err != nil {
		t.Fatal(err)
	}
	done := map[uint64]bool{}
	for len(done) < n {
		var pfns []uint64
		var data []byte
		for range 1 + r.IntN(BlockPages) {
			pfn := randomPFN(r)
			if done[pfn] {
				continue
			}
			done[pfn] = true
			p := randomPage(r)
			m[pfn] = p
			pfns, data = append(pfns, pfn), append(data, p...)
		}
		if len(pfns) == 0 {
			continue
		}
		if err := w.Block(pfns, data); err != nil {
			t.Fatal(err)
		}
		if zero := randomPFN(r); !done[zero] {
			done[zero] = true
			delete(m, zero)
			if err := w.Zero(zero); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.Commit(); err != nil {
		t.Fatal(err)
	}
}

// check compares a chain with the model, page by page and block by block.
func check(t testing.TB, path string, m model) {
	t.Helper()
	r, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if err := r.Verify(context.Background(), nil); err != nil {
		t.Fatal(err)
	}
	page, buf := make([]byte, PageSize), make([]byte, blockBytes)
	var zero [PageSize]byte
	for i := range r.layout.pages {
		pfn := r.layout.pfn(i)
		want := m[pfn]
		if want == nil {
			want = zero[:]
		}
		if err := r.Read(pfn*PageSize, page); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(page, want) {
			t.Fatalf("%s: page %#x is wrong", path, pfn)
		}
		at := r.Find(pfn)
		if (at.Kind == Zero) != bytes.Equal(want, zero[:]) {
			t.Fatalf("%s: page %#x is found at %+v", path, pfn, at)
		}
		if at.Kind == Data && i%7 == 0 {
			got, _, err := r.ReadBlock(at.Block, buf)
			if err != nil || !bytes.Equal(got[at.Slot*PageSize:][:PageSize], want) {
				t.Fatalf("%s: page %#x is not in its block: %v", path, pfn, err)
			}
		}
	}
}

func TestChain(t *testing.T) {
	dir := t.TempDir()
	r := rand.New(rand.NewPCG(1, 2))
	m := model{}
	parent := ""
	var paths []string
	for i := range 6 {
		path := filepath.Join(dir, fmt.Sprintf("c%d", i))
		write(t, path, parent, r, m, 1500/(i+1))
		check(t, path, m)
		paths, parent = append(paths, path), path
	}
	// The chain as one file, which needs no other.
	read, err := Open(parent)
	if err != nil {
		t.Fatal(err)
	}
	defer read.Close()
	flat := filepath.Join(dir, "flat")
	if err := read.Flatten(context.Background(), flat, nil); err != nil {
		t.Fatal(err)
	}
	out, err := os.Create(filepath.Join(dir, "raw"))
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	if err := read.Extract(context.Background(), out, nil); err != nil {
		t.Fatal(err)
	}
	page := make([]byte, PageSize)
	for pfn, want := range m {
		if _, err := out.ReadAt(page, int64(pfn*PageSize)); err != nil || !bytes.Equal(page, want) {
			t.Fatalf("page %#x of the raw image: %v", pfn, err)
		}
	}
	if kids, err := Children(paths[2]); err != nil || !slices.Equal(kids, paths[3:4]) {
		t.Errorf("children %v: %v", kids, err)
	}
	for _, p := range paths[:5] {
		if err := os.Remove(p); err != nil {
			t.Fatal(err)
		}
	}
	check(t, flat, m)
	if v, data, err := read.Section("machine"); err != nil || v != 3 || string(data) != "state of "+parent {
		t.Errorf("section: %d %q %v", v, data, err)
	}
	if _, err := Open(parent); !errors.Is(err, ErrParent) || !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "c4") {
		t.Errorf("a missing parent: %v", err)
	}
	write(t, paths[4], "", r, model{}, 10)
	if _, err := Open(parent); !errors.Is(err, ErrParent) || !strings.Contains(err.Error(), "replaced") {
		t.Errorf("a replaced parent: %v", err)
	}
	if _, _, err := read.Section("nowhere"); !errors.Is(err, ErrMissing) {
		t.Errorf("a section that is not there: %v", err)
	}
}

// Several goroutines write blocks at once.
func TestWriterIsShared(t *testing.T) {
	path := filepath.Join(t.TempDir(), "c")
	w, err := Create(path, CreateOptions{Memory: testRAM})
	if err != nil {
		t.Fatal(err)
	}
	m := model{}
	r := rand.New(rand.NewPCG(5, 6))
	for pfn := range uint64(3000) {
		m[pfn] = randomPage(r)
	}
	var wg sync.WaitGroup
	for worker := range uint64(4) {
		wg.Go(func() {
			for at := worker * BlockPages; at < 3000; at += 4 * BlockPages {
				var pfns []uint64
				var data []byte
				for pfn := at; pfn < min(at+BlockPages, 3000); pfn++ {
					pfns, data = append(pfns, pfn), append(data, m[pfn]...)
				}
				if err := w.Block(pfns, data); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if err := w.Commit(); err != nil {
		t.Fatal(err)
	}
	s := w.Stats()
	if s.Pages != 3000 || s.ZeroPages < 500 || s.DuplicatePages < 400 {
		t.Errorf("%+v", s)
	}
	if most := s.Bytes/(256<<10) + 50; s.Writes > most {
		t.Errorf("%d writes for %d bytes; at most %d", s.Writes, s.Bytes, most)
	}
	check(t, path, m)
}

func TestCreateRefuses(t *testing.T) {
	dir := t.TempDir()
	parent := filepath.Join(dir, "parent")
	write(t, parent, "", rand.New(rand.NewPCG(1, 1)), model{}, 10)
	for name, c := range map[string]struct {
		path string
		o    CreateOptions
		want error
	}{
		"file is there":     {parent, CreateOptions{Memory: testRAM}, ErrExists},
		"no memory":         {filepath.Join(dir, "a"), CreateOptions{}, ErrMemory},
		"overlap":           {filepath.Join(dir, "a"), CreateOptions{Memory: []guestmem.Range{{GPA: 0, Size: 8192}, {GPA: 4096, Size: 4096}}}, ErrMemory},
		"other memory":      {filepath.Join(dir, "a"), CreateOptions{Memory: testRAM[:1], Parent: parent}, ErrParent},
		"missing parent":    {filepath.Join(dir, "a"), CreateOptions{Memory: testRAM, Parent: filepath.Join(dir, "x")}, fs.ErrNotExist},
		"no such directory": {filepath.Join(dir, "x", "a"), CreateOptions{Memory: testRAM}, fs.ErrNotExist},
	} {
		if _, err := Create(c.path, c.o); !errors.Is(err, c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	w, err := Create(filepath.Join(dir, "b"), CreateOptions{Memory: testRAM})
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Block([]uint64{5000}, make([]byte, PageSize)); err == nil {
		t.Error("a page that is not RAM was taken")
	}
	w.Abort()
	entries, _ := os.ReadDir(dir)
	if len(entries) != 1 {
		t.Errorf("left behind: %v", entries)
	}
}

// The disk fills up, at any point: nothing is left.
func TestDiskFull(t *testing.T) {
	dir := t.TempDir()
	data := content("random", 3<<20)
	for full := 0; ; full++ {
		size := 256<<10 + full*160<<10
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprintf("size=%d", size)); err != nil {
			t.Skipf("host feature missing: mounting a tmpfs (%v)", err)
		}
		err := func() error {
			defer unix.Unmount(dir, 0)
			w, err := Create(filepath.Join(dir, "c"), CreateOptions{Memory: testRAM})
			if err != nil {
				return err
			}
			defer func() {
				if entries, _ := os.ReadDir(dir); err != nil && len(entries) != 0 {
					t.Errorf("with %d bytes: left behind: %v", size, entries)
				}
			}()
			for pfn := 0; pfn < len(data)/PageSize && err == nil; pfn++ {
				err = w.Block([]uint64{uint64(pfn)}, data[pfn*PageSize:][:PageSize])
			}
			if commit := w.Commit(); err != nil && !errors.Is(commit, unix.ENOSPC) {
				t.Errorf("blocks: %v; commit: %v", err, commit)
			} else {
				err = commit
			}
			return err
		}()
		if err == nil {
			if full < 10 {
				t.Errorf("%d bytes were enough", size)
			}
			break
		}
		if !errors.Is(err, unix.ENOSPC) || !errors.Is(err, ErrWrite) {
			t.Errorf("with %d bytes: %v", size, err)
		}
	}
}

// A writer that is killed at any point leaves its parent as it was, and no file
// by the name it wanted unless that is whole.
func TestKilledWriter(t *testing.T) {
	if path := os.Getenv("CHECKPOINT_TEST_WRITE"); path != "" {
		writeForEver(t, path)
	}
	dir := t.TempDir()
	base := filepath.Join(dir, "base")
	m := model{}
	write(t, base, "", rand.New(rand.NewPCG(1, 3)), m, 1000)
	r := rand.New(rand.NewPCG(rand.Uint64(), 4))
	complete, partial := 0, 0
	for range 30 {
		cmd := exec.Command(os.Args[0], "-test.run=^TestKilledWriter$")
		cmd.Env = append(os.Environ(), "CHECKPOINT_TEST_WRITE="+base)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		// It tells each step: kill it after some of them, and some instructions.
		if _, err := io.CopyN(io.Discard, out, r.Int64N(150)); err != nil {
			t.Error(err)
		}
		for n := r.IntN(1 << 20); n > 0; n-- {
			runtime.KeepAlive(n)
		}
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			path := filepath.Join(dir, e.Name())
			if path == base {
				continue
			}
			if strings.HasPrefix(e.Name(), ".base.") && strings.HasSuffix(e.Name(), ".partial") {
				partial++
			} else if err := tryRead(path); err != nil {
				t.Error(err)
			} else {
				complete++
			}
			if err := os.Remove(path); err != nil {
				t.Error(err)
			}
		}
	}
	if complete == 0 || partial == 0 {
		t.Errorf("of the files that were killed for, %d were complete and %d not", complete, partial)
	}
	check(t, base, m)
}

// writeForEver makes children of a checkpoint, and prints a byte for each step.
func writeForEver(t *testing.T, parent string) {
	random := rand.NewChaCha8([32]byte{3})
	data := make([]byte, blockBytes)
	for i := 0; ; i++ {
		w, err := Create(fmt.Sprintf("%s.%d", parent, i), CreateOptions{Memory: testRAM, Parent: parent})
		if err != nil {
			t.Fatal(err)
		}
		for first := uint64(0); first < 2560; first += BlockPages {
			_, _ = random.Read(data)
			var pfns []uint64
			for pfn := first; pfn < first+BlockPages; pfn++ {
				pfns = append(pfns, pfn)
			}
			if err := w.Block(pfns, data); err != nil {
				t.Fatal(err)
			}
			fmt.Print(".")
		}
		if err := w.Section("cpu0", 1, data); err != nil {
			t.Fatal(err)
		}
		fmt.Print(".")
		if err := w.Commit(); err != nil {
			t.Fatal(err)
		}
		fmt.Print(".")
	}
}

func TestReadBlockAllocatesNothing(t *testing.T) {
	path := filepath.Join(t.TempDir(), "c")
	write(t, path, "", rand.New(rand.NewPCG(1, 2)), model{}, 1000)
	r, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	buf := make([]byte, blockBytes)
	b := BlockID(0)
	if n := testing.AllocsPerRun(100, func() {
		if _, _, err := r.ReadBlock(b, buf); err != nil {
			t.Fatal(err)
		}
		r.Find(uint64(b))
		b = (b + 1) % BlockID(r.Blocks())
	}); n >= 1 {
		t.Errorf("%v allocations a block", n)
	}
}
