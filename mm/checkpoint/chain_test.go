package checkpoint

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// page makes a page that no other number has.
func page(n uint64) []byte {
	p := bytes.Repeat([]byte("some text "), PageSize/10+1)[:PageSize]
	le.PutUint64(p, n)
	return p
}

// writePages makes a checkpoint of pages in an order.
func writePages(t testing.TB, path, parent string, pfns []uint64, content func(pfn uint64) []byte) {
	t.Helper()
	w, err := Create(path, CreateOptions{Memory: testRAM, Parent: parent})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Abort()
	for some := range slices.Chunk(pfns, BlockPages) {
		var data []byte
		for _, pfn := range some {
			data = append(data, content(pfn)...)
		}
		if err := w.Block(some, data); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Commit(); err != nil {
		t.Fatal(err)
	}
}

// Chains of many shapes, each compared with its model, as it is and flattened.
func TestRandomChains(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	for range 5 {
		dir := t.TempDir()
		m := model{}
		path := ""
		for i := range 1 + r.IntN(5) {
			next := filepath.Join(dir, fmt.Sprint(i))
			write(t, next, path, r, m, 1+r.IntN(800))
			path = next
		}
		check(t, path, m)
		chain, err := Open(path)
		if err != nil {
			t.Fatal(err)
		}
		flat := filepath.Join(dir, "flat")
		if err := chain.Flatten(context.Background(), flat, nil); err != nil {
			t.Fatal(err)
		}
		if deleted, err := chain.Delete(); err != nil || len(deleted) != len(chain.files) {
			t.Fatalf("deleted %v: %v", deleted, err)
		}
		chain.Close()
		check(t, flat, m)
	}
}

// What is flattened is in the order of the first file, although a tenth of it
// changed in each of the others; and it has no more blocks than it had then.
func TestFlattenKeepsNeighbours(t *testing.T) {
	dir := t.TempDir()
	r := rand.New(rand.NewPCG(1, 2))
	var order []uint64
	for _, i := range r.Perm(2048) {
		order = append(order, uint64(i))
	}
	version := map[uint64]uint64{}
	content := func(pfn uint64) []byte { return page(version[pfn]<<32 | pfn) }
	path := filepath.Join(dir, "0")
	writePages(t, path, "", order, content)
	for i := 1; i < 6; i++ {
		var some []uint64
		for _, pfn := range order {
			if r.IntN(10) == 0 {
				version[pfn]++
				some = append(some, pfn)
			}
		}
		parent := path
		path = filepath.Join(dir, fmt.Sprint(i))
		writePages(t, path, parent, some, content)
	}
	chain, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer chain.Close()
	flat := filepath.Join(dir, "flat")
	var last, total int64
	if err := chain.Flatten(context.Background(), flat, func(done, of int64) {
		if done < last || done > of {
			t.Errorf("progress %d after %d of %d", done, last, of)
		}
		last, total = done, of
	}); err != nil {
		t.Fatal(err)
	}
	if last != 2048*PageSize || total != 4500*PageSize {
		t.Errorf("progress ended at %d of %d", last, total)
	}
	got, err := Open(flat)
	if err != nil {
		t.Fatal(err)
	}
	defer got.Close()
	var pfns []uint64
	for b := range got.Blocks() {
		some, err := got.Pages(BlockID(b))
		if err != nil {
			t.Fatal(err)
		}
		pfns = append(pfns, some...)
	}
	if !slices.Equal(pfns, order) {
		t.Errorf("%d pages are in another order", len(pfns))
	}
	p := make([]byte, PageSize)
	for _, pfn := range order {
		if err := got.Read(pfn*PageSize, p); err != nil || !bytes.Equal(p, content(pfn)) {
			t.Fatalf("page %#x: %v", pfn, err)
		}
	}
	// Cancelled, it leaves nothing.
	ctx, cancel := context.WithCancel(context.Background())
	cancelled := filepath.Join(dir, "cancelled")
	if err := chain.Flatten(ctx, cancelled, func(int64, int64) { cancel() }); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	if left, _ := filepath.Glob(filepath.Join(dir, "*cancelled*")); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

// The image that Extract makes has the memory at its GPAs and holes elsewhere.
func TestExtract(t *testing.T) {
	dir := t.TempDir()
	m := model{}
	r := rand.New(rand.NewPCG(7, 7))
	parent, child := filepath.Join(dir, "parent"), filepath.Join(dir, "child")
	write(t, parent, "", r, m, 800)
	write(t, child, parent, r, m, 300)
	chain, err := Open(child)
	if err != nil {
		t.Fatal(err)
	}
	defer chain.Close()
	out, err := os.Create(filepath.Join(dir, "raw"))
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	if err := chain.Extract(context.Background(), out, nil); err != nil {
		t.Fatal(err)
	}
	var stored int64
	got := make([]byte, PageSize)
	for i := range chain.layout.pages {
		pfn := chain.layout.pfn(i)
		want := m[pfn]
		if want == nil {
			want = zeroPage[:]
		}
		if _, err := out.ReadAt(got, int64(pfn*PageSize)); err != nil || !bytes.Equal(got, want) {
			t.Fatalf("page %#x: %v", pfn, err)
		}
		if !isZero(want) {
			stored += PageSize
		}
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(out.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	if end := testRAM[1].GPA + testRAM[1].Size; uint64(st.Size) != end || st.Blocks*512 > stored+stored/4+1<<20 {
		t.Errorf("%d bytes, %d on disk, for %d that are not zero", st.Size, st.Blocks*512, stored)
	}
}

// Chains that cannot be.
func TestBadChains(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	writePages(t, at("0"), "", []uint64{1}, page)
	last := ""
	for i := 1; i < maxChain; i++ {
		last = at(fmt.Sprint(i))
		writePages(t, last, at(fmt.Sprint(i-1)), []uint64{uint64(i)}, page)
	}
	r, err := Open(last)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Read(0, make([]byte, 100*PageSize)); err != nil || len(r.Parents()) != maxChain-1 {
		t.Errorf("%d parents: %v", len(r.Parents()), err)
	}
	r.Close()
	if _, err := Create(at("more"), CreateOptions{Memory: testRAM, Parent: last}); !errors.Is(err, ErrParent) || !strings.Contains(err.Error(), "flatten") {
		t.Errorf("a chain that is too long is continued: %v", err)
	}

	// rewrite makes a file with another header.
	rewrite := func(from, to string, f func(h *header)) {
		b, err := os.ReadFile(at(from))
		if err != nil {
			t.Fatal(err)
		}
		h, err := decodeHeader(b)
		if err != nil {
			t.Fatal(err)
		}
		f(h)
		head, err := h.encode()
		if err != nil {
			t.Fatal(err)
		}
		copy(b, head)
		seal(b)
		if err := os.WriteFile(at(to), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	child := func(parent string) func(h *header) {
		return func(h *header) {
			h.parent, h.parentID = parent, ID{1}
			if p, err := openFile(at(parent)); err == nil {
				h.parentID = p.head.id
				p.f.Close()
			}
			h.id = newID()
		}
	}
	rewrite("0", "too long", child("63"))
	rewrite("0", "self", func(h *header) { h.parent, h.parentID = "self", h.id })
	loop := newID()
	rewrite("0", "a", func(h *header) { h.id, h.parent, h.parentID = ID{1}, "b", loop })
	rewrite("0", "b", func(h *header) { h.id, h.parent, h.parentID = loop, "a", ID{1} })
	rewrite("0", "other memory", func(h *header) { child("0")(h); h.ranges = h.ranges[:1] })
	rewrite("0", "no file", child("nothing"))
	rewrite("0", "directory", child("."))
	if err := unix.Mkfifo(at("fifo.ckpt"), 0o600); err != nil {
		t.Fatal(err)
	}
	rewrite("0", "fifo", func(h *header) { h.parent, h.parentID = "fifo.ckpt", ID{1} })
	rewrite("0", "wrong id", func(h *header) { child("1")(h); h.parentID[3] ^= 1 })
	for name, want := range map[string]struct {
		kind error
		text string
	}{
		"too long":     {ErrParent, "more than 64"},
		"self":         {ErrParent, "its own parent"},
		"a":            {ErrParent, "its own parent"},
		"other memory": {ErrMemory, "with other RAM"},
		"no file":      {ErrParent, "nothing"},
		"directory":    {ErrFormat, "not a regular file"},
		"fifo":         {ErrFormat, "not a regular file"},
		"wrong id":     {ErrParent, "was replaced"},
	} {
		if _, err := Open(at(name)); !errors.Is(err, want.kind) || !strings.Contains(err.Error(), want.text) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A chain is found from elsewhere, through links, and when it has been moved.
func TestChainPaths(t *testing.T) {
	root := t.TempDir()
	base, deep := filepath.Join(root, "base"), filepath.Join(root, "deep", "er")
	if err := os.MkdirAll(deep, 0o700); err != nil {
		t.Fatal(err)
	}
	writePages(t, base, "", []uint64{1}, page)
	linked := filepath.Join(root, "link")
	if err := os.Symlink(deep, linked); err != nil {
		t.Fatal(err)
	}
	// By a path in which ".." leads elsewhere than it seems to.
	writePages(t, filepath.Join(linked, "child"), base, []uint64{2}, page)
	direct := filepath.Join(root, "direct")
	if err := os.Symlink(filepath.Join("deep", "er", "child"), direct); err != nil {
		t.Fatal(err)
	}
	try := func(path string) {
		t.Helper()
		r, err := Open(path)
		if err != nil {
			t.Error(err)
			return
		}
		defer r.Close()
		got := make([]byte, PageSize)
		if err := r.Read(PageSize, got); err != nil || !bytes.Equal(got, page(1)) {
			t.Errorf("%s: %v", path, err)
		}
	}
	try(filepath.Join(deep, "child"))
	try(filepath.Join(linked, "child"))
	try(direct)
	t.Chdir(deep)
	try("child")
	writePages(t, "grandchild", "child", []uint64{3}, page)
	try(filepath.Join(deep, "grandchild"))
	t.Chdir("/")
	moved := t.TempDir()
	for _, name := range []string{"base", "deep"} {
		if err := os.Rename(filepath.Join(root, name), filepath.Join(moved, name)); err != nil {
			t.Fatal(err)
		}
	}
	try(filepath.Join(moved, "deep", "er", "grandchild"))
}

// Nobody deletes what another checkpoint needs.
func TestDelete(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	writePages(t, at("a"), "", []uint64{1}, page)
	writePages(t, at("b"), at("a"), []uint64{2}, page)
	writePages(t, at("c"), at("b"), []uint64{3}, page)
	writePages(t, at("other"), at("a"), []uint64{4}, page)
	chain, err := Open(at("b"))
	if err != nil {
		t.Fatal(err)
	}
	defer chain.Close()
	if deleted, err := chain.Delete(); !errors.Is(err, ErrNeeded) || !strings.Contains(err.Error(), at("c")) || len(deleted) != 0 {
		t.Errorf("b, which c needs: %v, %v", deleted, err)
	}
	if err := os.Remove(at("c")); err != nil {
		t.Fatal(err)
	}
	if _, err := chain.Delete(); !errors.Is(err, ErrNeeded) || !strings.Contains(err.Error(), at("other")) {
		t.Errorf("a, which other needs: %v", err)
	}
	if err := os.Remove(at("other")); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"a", "b"} {
		if err := os.WriteFile(RecordedPath(at(name)), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	// Somebody puts another file in a's place.
	if err := os.Rename(at("a"), at("kept")); err != nil {
		t.Fatal(err)
	}
	writePages(t, at("a"), "", []uint64{5}, page)
	if deleted, err := chain.Delete(); !errors.Is(err, ErrParent) || !slices.Equal(deleted, []string{at("b")}) {
		t.Errorf("a, which was replaced: %v, %v", deleted, err)
	}
	for name, want := range map[string]bool{"a": true, "b": false} {
		if _, err := os.Stat(RecordedPath(at(name))); (err == nil) != want {
			t.Errorf("what was recorded of %s: %v", name, err)
		}
	}
	if err := tryRead(at("a")); err != nil {
		t.Error(err)
	}
}
