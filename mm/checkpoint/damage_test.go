package checkpoint

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// small makes a checkpoint of few bytes that has something of everything, and
// returns them.
func small(t testing.TB) []byte {
	t.Helper()
	path := filepath.Join(t.TempDir(), "c")
	w, err := Create(path, CreateOptions{Memory: testRAM})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Abort()
	data := bytes.Repeat([]byte("a page of a guest "), 4*PageSize/18+1)[:4*PageSize]
	data[PageSize] ^= 1
	copy(data[3*PageSize:], data[:PageSize])
	raw := make([]byte, PageSize)
	for i := range raw {
		raw[i] = byte(rand.Uint32())
	}
	for _, err := range []error{
		w.Section("cpu0", 1, []byte(`{"RIP":1}`)),
		w.Section("empty", 1, nil),
		w.Block([]uint64{7, 2, 1<<32/PageSize + 3, 11}, data),
		w.Section("text", 9, bytes.Repeat([]byte("text "), 100)),
		w.Block([]uint64{12, 13}, append(raw, data[:PageSize]...)),
		w.Zero(9), w.Commit(),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// tryRead reads all that a file has.
func tryRead(path string) error {
	r, err := Open(path)
	if err != nil {
		return err
	}
	defer r.Close()
	return r.Verify(context.Background(), nil)
}

// asFile has bytes in a file.
func asFile(t testing.TB, b []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "made")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// parts names each part of a good file, by its offset.
func parts(t *testing.T, path string) map[uint64]string {
	t.Helper()
	r, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	f := r.files[0]
	names := map[uint64]string{0: "header", f.end: "directory", f.size - footerSize: "footer"}
	all, err := f.extents()
	if err != nil {
		t.Fatal(err)
	}
	kinds := map[string]bool{}
	for _, p := range all {
		if p.length == 0 {
			continue
		}
		name := map[placeKind]string{aBlock: "block", aPageChunk: "page index", aBlockChunk: "block index", aSection: "section"}[p.kind]
		names[p.offset] = name
		kinds[name] = true
	}
	if len(kinds) != 4 {
		t.Fatalf("the file has only %v", kinds)
	}
	return names
}

// Every byte that is not what was written is refused, and its part of the file
// named; so is every other length.
func TestDamageIsFound(t *testing.T) {
	good := small(t)
	path := asFile(t, good)
	names := parts(t, path)
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	put := func(i int, c byte) {
		if _, err := f.WriteAt([]byte{c}, int64(i)); err != nil {
			t.Fatal(err)
		}
	}
	part, at := "", 0
	for i, c := range good {
		if name, ok := names[uint64(i)]; ok {
			part, at = name, i
		}
		put(i, c^1<<(i%8))
		err := tryRead(path)
		put(i, c)
		switch {
		case i < len(magic):
			if !errors.Is(err, ErrFormat) {
				t.Errorf("byte %d: %v", i, err)
			}
		case i < 12:
			if !errors.Is(err, ErrVersion) {
				t.Errorf("byte %d: %v", i, err)
			}
		case !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), path) ||
			!strings.Contains(err.Error(), part) || !strings.Contains(err.Error(), fmt.Sprintf("at offset %d:", at)) && part != "footer":
			t.Errorf("byte %d, of the %s at offset %d: %v", i, part, at, err)
		}
	}
	put(len(good), 0)
	if err := tryRead(path); !errors.Is(err, ErrDamaged) {
		t.Errorf("a byte more: %v", err)
	}
	for n := len(good) - 1; n >= 0; n-- {
		if err := f.Truncate(int64(n)); err != nil {
			t.Fatal(err)
		}
		if err := tryRead(path); !errors.Is(err, ErrDamaged) && (!errors.Is(err, ErrFormat) || n >= headerSize) {
			t.Errorf("%d of %d bytes: %v", n, len(good), err)
		}
	}
	// Bytes that were cut out of the middle.
	if err := tryRead(asFile(t, append(bytes.Clone(good[:headerSize]), good[headerSize+8:]...))); !errors.Is(err, ErrDamaged) {
		t.Errorf("8 bytes cut out: %v", err)
	}
}

// seal makes all checksums of a file right that it can find, as who writes a
// hostile file does. It changes b.
func seal(b []byte) {
	if len(b) < headerSize+footerSize {
		return
	}
	le.PutUint32(b[headerSize-4:], checksum(b[:headerSize-4]))
	foot := b[len(b)-footerSize:]
	le.PutUint64(foot[40:], uint64(len(b)))
	copy(foot[8:], b[40:56])
	end := uint64(len(b) - footerSize)
	at := le.Uint64(foot[24:])
	if at < headerSize || at > end {
		return
	}
	le.PutUint32(foot[32:], uint32(end-at))
	dir := b[at:end]
	sealExtent := func(e []byte) {
		offset, length := le.Uint64(e), uint64(le.Uint32(e[8:]))
		if offset <= at && length <= at-offset {
			le.PutUint32(e[12:], checksum(b[offset:offset+length]))
		}
	}
	if len(dir) >= 48 {
		sections, chunks := le.Uint32(dir), uint64(le.Uint32(dir[4:]))+uint64(le.Uint32(dir[8:]))
		rest := dir[48:]
		for range sections {
			if len(rest) < 1 || len(rest) < 1+int(rest[0])+9+extentSize {
				break
			}
			rest = rest[1+int(rest[0])+9:]
			sealExtent(rest[:extentSize])
			rest = rest[extentSize:]
		}
		for ; chunks > 0 && len(rest) >= extentSize; chunks-- {
			if !bytes.Equal(rest[:extentSize], make([]byte, extentSize)) {
				sealExtent(rest[:extentSize])
			}
			rest = rest[extentSize:]
		}
	}
	le.PutUint32(foot[36:], checksum(dir))
	le.PutUint32(foot[60:], checksum(foot[:60]))
}

// Somebody who makes the checksums right gets no further. Where a change is
// accepted, the file is another good one: with other contents of pages or
// sections, another name of a section, another id.
func TestSealedDamage(t *testing.T) {
	good := small(t)
	sealed := bytes.Clone(good)
	if seal(sealed); !bytes.Equal(sealed, good) {
		t.Fatal("seal changes a good file")
	}
	path := asFile(t, good)
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	accepted := map[string]int{}
	names := parts(t, path)
	part, at := "", 0
	for i := range good {
		if name, ok := names[uint64(i)]; ok {
			part, at = name, i
		}
		if part == "block" && i%64 != 0 || part == "header" && i > headerFixed+64 && i%64 != 0 {
			continue // one of many like it
		}
		b := bytes.Clone(good)
		b[i] ^= 1 << (i % 8)
		seal(b)
		if _, err := f.WriteAt(b, 0); err != nil {
			t.Fatal(err)
		}
		if err := readEverything(path, i%64 == 0); err == nil {
			accepted[part]++
			if bytes.Equal(b, good) { // it was a checksum, say
				continue
			}
			if part == "directory" && i-at < 48 || part == "footer" {
				t.Errorf("a change of byte %d of the %s is accepted", i-at, part)
			}
		} else if !errors.Is(err, ErrFormat) && !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrVersion) && !errors.Is(err, ErrParent) {
			t.Errorf("byte %d: %v", i, err)
		}
	}
	// In an index a change may, rarely, make another page zero or equal to one.
	if accepted["header"] < 16 || accepted["header"] > 100 || accepted["directory"] == 0 || accepted["page index"]+accepted["block index"] > 4 {
		t.Errorf("accepted: %v", accepted)
	}
}

// Blocks of which the index says what cannot be.
func TestHostileBlocks(t *testing.T) {
	l, err := newLayout(testRAM)
	if err != nil {
		t.Fatal(err)
	}
	const end = 1 << 20
	good := writtenBlock{extent: extent{offset: headerSize, length: 2 * PageSize}, shared: 3, codec: codecRaw, pfns: []uint32{5, 6}}
	for name, c := range map[string]struct {
		change func(e *writtenBlock)
		ok     bool
	}{
		"good":               {func(*writtenBlock) {}, true},
		"compressed":         {func(e *writtenBlock) { e.codec, e.length = codecS2, 10 }, true},
		"in the header":      {func(e *writtenBlock) { e.offset = headerSize - 1 }, false},
		"in the directory":   {func(e *writtenBlock) { e.offset = end - PageSize }, false},
		"far away":           {func(e *writtenBlock) { e.offset = 1<<64 - PageSize }, false},
		"codec":              {func(e *writtenBlock) { e.codec = 2 }, false},
		"raw and short":      {func(e *writtenBlock) { e.length-- }, false},
		"compressed to none": {func(e *writtenBlock) { e.codec, e.length = codecS2, 0 }, false},
		"compressed to more": {func(e *writtenBlock) { e.codec, e.length = codecS2, 3*PageSize }, false},
		"no pages":           {func(e *writtenBlock) { e.codec, e.length, e.shared, e.pfns = codecS2, 10, 0, nil }, false},
		"too many pages": {func(e *writtenBlock) {
			e.codec, e.pfns = codecS2, make([]uint32, BlockPages+1)
		}, false},
		"not RAM":             {func(e *writtenBlock) { e.pfns[1] = 3000 }, false},
		"a shared slot more":  {func(e *writtenBlock) { e.shared = 1 << 2 }, false},
		"the last slot of 64": {func(e *writtenBlock) { e.codec, e.shared, e.pfns = codecS2, 1<<63, make([]uint32, BlockPages) }, true},
	} {
		e := good
		e.pfns = []uint32{5, 6}
		c.change(&e)
		if _, err := decodeBlocks(e.append(nil), 1, l, end); (err == nil) != c.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
	b := good.append(nil)
	for n := range b {
		if _, err := decodeBlocks(b[:n], 1, l, end); err == nil {
			t.Errorf("%d of %d bytes are enough", n, len(b))
		}
	}
	if _, err := decodeBlocks(append(b, 0), 1, l, end); err == nil {
		t.Error("a byte too many is accepted")
	}
}

// Something in the file that nothing speaks of.
func TestUnusedBytes(t *testing.T) {
	path := filepath.Join(t.TempDir(), "c")
	w, err := Create(path, CreateOptions{Memory: testRAM})
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Block([]uint64{1}, page(1)); err != nil {
		t.Fatal(err)
	}
	w.mu.Lock()
	at := w.out.add(0, []byte("what is this?"))
	w.mu.Unlock()
	if err := w.Commit(); err != nil {
		t.Fatal(err)
	}
	if err := tryRead(path); !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), fmt.Sprintf("offset %d has no use", at.offset)) {
		t.Errorf("%v", err)
	}
}

// readEverything calls everything that a Reader can do. What verify finds good
// can be read and, if that is to be tried, flattened to a file that is good.
func readEverything(path string, flatten bool) error {
	r, err := Open(path)
	if err != nil {
		return err
	}
	defer r.Close()
	err = r.Verify(context.Background(), nil)
	buf := make([]byte, blockBytes)
	for b := range min(r.Blocks(), 100) {
		pfns, err1 := r.Pages(BlockID(b))
		pages, _, err2 := r.ReadBlock(BlockID(b), buf)
		if err == nil && (err1 != nil || err2 != nil || len(pages) != len(pfns)*PageSize) {
			return fmt.Errorf("verify finds block %d good: %w, %w", b, err1, err2)
		}
	}
	page := make([]byte, PageSize)
	for i := range min(r.layout.pages, 5000) {
		if readErr := r.Read(r.layout.pfn(i)*PageSize, page); readErr != nil && err == nil {
			return fmt.Errorf("verify finds page %d good: %w", i, readErr)
		}
	}
	for _, s := range r.Sections() {
		if _, _, sectionErr := r.Section(s.Name); sectionErr != nil && err == nil {
			return fmt.Errorf("verify finds section %q good: %w", s.Name, sectionErr)
		}
	}
	r.Info()
	if r.layout.pages > 5000 || !flatten {
		return err
	}
	flat := path + ".flat"
	defer os.Remove(flat)
	flatErr := r.Flatten(context.Background(), flat, nil)
	if err == nil && flatErr == nil {
		flatErr = tryRead(flat)
	}
	if err == nil && flatErr != nil {
		return fmt.Errorf("verify finds it good: %w", flatErr)
	}
	return err
}

// What is said of damage by Verify is also said by those who meet it by and by;
// and a page of which the index is damaged is not taken for another.
func TestDamagedIndex(t *testing.T) {
	good := small(t)
	r, err := Open(asFile(t, good))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	b := bytes.Clone(good)
	b[r.files[0].dir.pageChunks[0].offset] ^= 1
	r, err = Open(asFile(t, b))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	at := r.Find(7)
	if at.Kind != Data || int(at.Block) != r.Blocks()-1 {
		t.Fatalf("found at %+v", at)
	}
	if pfns, err := r.Pages(at.Block); len(pfns) > 0 || err != nil {
		t.Errorf("the index has pages: %v, %v", pfns, err)
	}
	for name, err := range map[string]error{
		"read block": func() error { _, _, err := r.ReadBlock(at.Block, nil); return err }(),
		"read":       r.Read(7*PageSize, make([]byte, 8)),
		"flatten":    r.Flatten(context.Background(), filepath.Join(t.TempDir(), "flat"), nil),
		"verify":     r.Verify(context.Background(), nil),
	} {
		if !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), "page index, chunk 0 at offset") {
			t.Errorf("%s: %v", name, err)
		}
	}
	r, err = Open(asFile(t, good))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if pages, stored, err := r.ReadBlock(BlockID(r.Blocks()-1), nil); err != nil || len(pages) != 0 || stored != 0 {
		t.Errorf("the index of a good file: %d bytes of %d, %v", len(pages), stored, err)
	}
	if _, _, err := r.ReadBlock(BlockID(r.Blocks()), nil); err == nil {
		t.Error("a block behind the last was read")
	}
}

// A file of a later format says what it needs.
func TestFeatures(t *testing.T) {
	h := header{id: newID(), ranges: testRAM, incompatible: 1<<3 | 1<<40, features: []feature{{featureCompatible, 3, "harmless"}, {featureIncompatible, 3, "holographic pages"}}}
	b, err := h.encode()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := decodeHeader(b); !errors.Is(err, ErrVersion) || !strings.Contains(err.Error(), `"holographic pages", bit 40`) {
		t.Errorf("%v", err)
	}
	h.incompatible, h.compatible, h.autoclear = 0, 1<<3, 1<<9
	if b, err = h.encode(); err != nil {
		t.Fatal(err)
	}
	if got, err := decodeHeader(b); err != nil || got.compatible != 1<<3 || len(got.features) != 2 {
		t.Errorf("%+v %v", got, err)
	}
}

// FuzzOpen reads what it is given, also with right checksums.
func FuzzOpen(f *testing.F) {
	parent := small(f)
	f.Add(parent, true)
	f.Add(parent, false)
	dir := f.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "parent"), parent, 0o600); err != nil {
		f.Fatal(err)
	}
	child := filepath.Join(dir, "child")
	writePages(f, child, filepath.Join(dir, "parent"), []uint64{2, 3, 1 << 20}, page)
	b, err := os.ReadFile(child)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b, true)
	w, err := Create(filepath.Join(dir, "empty"), CreateOptions{Memory: testRAM[:1]})
	if err != nil {
		f.Fatal(err)
	}
	if err := w.Commit(); err != nil {
		f.Fatal(err)
	}
	if b, err = os.ReadFile(filepath.Join(dir, "empty")); err != nil {
		f.Fatal(err)
	}
	f.Add(b, true)
	f.Fuzz(func(t *testing.T, b []byte, sealed bool) {
		if sealed {
			b = bytes.Clone(b)
			seal(b)
		}
		path := filepath.Join(dir, "fuzzed") // beside the parent
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := readEverything(path, false); err != nil && strings.Contains(err.Error(), "verify finds") {
			t.Error(err)
		}
	})
}

// A footer whose directory is said to be so far away that its end is near again.
func TestHostileFooter(t *testing.T) {
	const size = 1 << 20
	f := footer{directory: extent{offset: 1<<64 - 100, length: size - footerSize + 100}, size: size}
	if f.directory.end() != size-footerSize {
		t.Fatalf("it ends at %d", f.directory.end())
	}
	if _, err := decodeFooter(f.encode(), size); !errors.Is(err, ErrDamaged) {
		t.Errorf("%v", err)
	}
}

// A message about damage says each thing once, in a file of its own as in a parent.
func TestDamageIsToldOnce(t *testing.T) {
	dir := t.TempDir()
	parent, child := filepath.Join(dir, "parent"), filepath.Join(dir, "child")
	if err := os.WriteFile(parent, small(t), 0o600); err != nil {
		t.Fatal(err)
	}
	w, err := Create(child, CreateOptions{Memory: testRAM, Parent: parent})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Abort()
	if err := errors.Join(w.Section("cpu0", 1, nil), w.Block([]uint64{7}, make([]byte, PageSize)), w.Commit()); err != nil {
		t.Fatal(err)
	}
	told := map[string]bool{}
	tell := func(what string, err error) {
		if err == nil {
			t.Errorf("%s: it is good", what)
			return
		}
		seen := map[string]bool{}
		for _, said := range strings.Split(err.Error(), ": ") {
			if seen[said] {
				t.Errorf("%s: %q is said twice: %v", what, said, err)
			}
			seen[said] = true
		}
		for _, path := range []string{parent, child} {
			if strings.Count(err.Error(), path) > 1 {
				t.Errorf("%s: %s is named twice: %v", what, path, err)
			}
		}
		told[err.Error()] = true
	}
	for _, path := range []string{child, parent} {
		good, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for i := 12; i < len(good); i += 61 {
			bad := bytes.Clone(good)
			bad[i] ^= 1
			for how, b := range map[string][]byte{"changed": bad, "cut off": good[:i]} {
				if err := os.WriteFile(path, b, 0o600); err != nil {
					t.Fatal(err)
				}
				what := fmt.Sprintf("%s %s at %d", filepath.Base(path), how, i)
				err := tryRead(child)
				tell(what, err)
				if r, err := Open(child); err == nil {
					if err := r.Flatten(t.Context(), filepath.Join(dir, "flat"), nil); err != nil {
						tell(what+", flattened", err)
					}
					os.Remove(filepath.Join(dir, "flat"))
					r.Close()
				} else if _, err := Create(filepath.Join(dir, "grandchild"), CreateOptions{Memory: testRAM, Parent: child}); err != nil {
					tell(what+", continued", err)
				}
			}
		}
		if err := os.WriteFile(path, good, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if len(told) < 20 {
		t.Errorf("only %d messages were seen", len(told))
	}
}
