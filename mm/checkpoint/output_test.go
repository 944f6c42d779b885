package checkpoint

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/mm/guestmem"
)

// Blocks that are written from where they are come among others that are gathered: each
// is where the index has it, and calls stay few.
func TestBlocksOfAllKinds(t *testing.T) {
	t.Run("by way of the page cache", func(t *testing.T) { testBlocksOfAllKinds(t, 0) })
	t.Run("past the page cache", func(t *testing.T) {
		skipInMemory(t)
		path, cached := testBlocksOfAllKinds(t, cachedMemory+PageSize)
		if cached.Cache > 2*bufferSize/PageSize {
			t.Errorf("%d pages are in the page cache", cached.Cache)
		}
		testPadding(t, path)
	})
}

// testPadding has something in the zeros that fill up the pages of a file.
func testPadding(t *testing.T, path string) {
	r, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	places, err := r.files[0].extents()
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for i, p := range places[1:] {
		end := places[i].end()
		if end == p.offset {
			continue
		}
		found++
		at := end + uint64(rand.Int64N(int64(p.offset-end)))
		for _, c := range []byte{1, 0} {
			if _, err := f.WriteAt([]byte{c}, int64(at)); err != nil {
				t.Fatal(err)
			}
			if _, err := r.files[0].extents(); errors.Is(err, ErrDamaged) != (c != 0) || c != 0 && !strings.Contains(err.Error(), fmt.Sprintf("offset %d ", at)) {
				t.Errorf("byte %d, between %d and %d, is %d: %v", at, end, p.offset, c, err)
			}
		}
	}
	if found == 0 {
		t.Error("nothing is filled up")
	}
}

// testBlocksOfAllKinds writes a checkpoint of at least so much memory.
func testBlocksOfAllKinds(t *testing.T, memory uint64) (path string, cached unix.Cachestat_t) {
	const blocks = 200
	r := rand.New(rand.NewPCG(3, 3))
	data := content("random", blocks*blockBytes)
	for b := range blocks {
		block := data[b*blockBytes:][:blockBytes]
		switch r.IntN(4) {
		case 0: // compresses to little
			for p := range BlockPages {
				copy(block[p*PageSize:][:PageSize], bytes.Repeat([]byte(fmt.Sprintf("block %d, page %d. ", b, p)), 300))
			}
		case 1: // some of it need not be stored
			for range 20 {
				clear(block[r.IntN(BlockPages)*PageSize:][:PageSize])
			}
		}
	}
	path = filepath.Join(t.TempDir(), "c")
	w, err := Create(path, CreateOptions{Memory: []guestmem.Range{{Size: max(memory, uint64(len(data)))}}})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Abort()
	section := content("random", bufferSize+1) // larger than a buffer, and odd
	before := writeCalls(t)
	var next atomic.Int64
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			// What is given away may be used anew at once.
			room, pfns := make([]byte, blockBytes), make([]uint64, BlockPages)
			for b := next.Add(1) - 1; b < blocks; b = next.Add(1) - 1 {
				copy(room, data[b*blockBytes:])
				for i := range pfns {
					pfns[i] = uint64(b*BlockPages) + uint64(i)
				}
				if err := w.BlockAt(uint64(b), pfns, split(room)); err != nil {
					t.Error(err)
				}
				clear(room)
				if b == blocks/2 {
					if err := w.Section("large", 1, section); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	wg.Wait()
	if err := w.Commit(); err != nil {
		t.Fatal(err)
	}
	s, calls := w.Stats(), writeCalls(t)-before
	if most := s.Bytes/(256<<10) + 50; calls > most {
		t.Errorf("%d writes for %d bytes; at most %d", calls, s.Bytes, most)
	}
	cached = cacheState(t, path)
	m := model{}
	for pfn := range uint64(blocks * BlockPages) {
		m[pfn] = data[pfn*PageSize:][:PageSize]
	}
	check(t, path, m)
	reader, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	if _, got, err := reader.Section("large"); err != nil || !bytes.Equal(got, section) {
		t.Errorf("the section is wrong: %d bytes, %v", len(got), err)
	}
	return path, cached
}

// Pages that come again are found, though nothing compresses, where the first are on
// their way to the file and where they are in it; pages that almost equal others are not.
func TestDuplicatesOfRandomPages(t *testing.T) {
	const pages, blockPages = 64 * BlockPages, 40 // blocks of so many are gathered, not written at once
	r := rand.New(rand.NewPCG(4, 4))
	data := split(content("random", pages*PageSize))
	path := filepath.Join(t.TempDir(), "c")
	w, err := Create(path, CreateOptions{Memory: []guestmem.Range{{Size: 3 * pages * PageSize}}})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Abort()
	m := model{}
	add := func(first uint64, block [][]byte) {
		pfns := make([]uint64, len(block))
		for i := range pfns {
			pfns[i] = first + uint64(i)
			m[pfns[i]] = block[i]
		}
		if err := w.BlockAt(first, pfns, block); err != nil {
			t.Fatal(err)
		}
	}
	for at := 0; at < pages; at += blockPages { // each block, and the same at once
		block := data[at:min(at+blockPages, pages)]
		add(uint64(at), block)
		add(uint64(at+pages), block)
	}
	others := make([][]byte, pages) // and in another order
	almost := 0
	for i, from := range r.Perm(pages) {
		others[i] = data[from]
		if i%4 == 0 {
			others[i] = slices.Clone(data[from])
			others[i][r.IntN(PageSize)] ^= 1 << r.IntN(8)
			almost++
		}
	}
	for at := 0; at < pages; at += blockPages {
		add(uint64(at+2*pages), others[at:min(at+blockPages, pages)])
	}
	if err := w.Commit(); err != nil {
		t.Fatal(err)
	}
	// Few of them fall out of the table.
	if s, most := w.Stats(), int64(2*pages-almost); s.DuplicatePages < most*98/100 || s.DuplicatePages > most {
		t.Errorf("%d duplicates, at most %d: %+v", s.DuplicatePages, most, s)
	}
	check(t, path, m)
}

// With NoFlush nobody waits for the disk; without it all is there after Commit.
func TestNoFlush(t *testing.T) {
	skipInMemory(t)
	for _, noFlush := range []bool{false, true} {
		path := filepath.Join(t.TempDir(), "c")
		data := content("random", 32<<20)
		w, err := Create(path, CreateOptions{Memory: []guestmem.Range{{Size: uint64(len(data))}}, NoFlush: noFlush})
		if err != nil {
			t.Fatal(err)
		}
		addAll(t, w, data)
		if err := w.Commit(); err != nil {
			t.Fatal(err)
		}
		cached := cacheState(t, path)
		if waits := cached.Dirty + cached.Writeback; (waits > 0) != noFlush {
			t.Errorf("NoFlush %v: %d pages are not on disk", noFlush, waits)
		}
	}
}

// skipInMemory skips what needs files that are not the page cache alone.
func skipInMemory(t *testing.T) {
	var fs unix.Statfs_t
	if err := unix.Statfs(t.TempDir(), &fs); err == nil && fs.Type == unix.TMPFS_MAGIC {
		t.Skip("host feature missing: temporary files on a disk (TMPDIR is a tmpfs)")
	}
}

// cacheState tells what of a file is in the page cache.
func cacheState(t *testing.T, path string) (s unix.Cachestat_t) {
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	switch err := unix.Cachestat(uint(f.Fd()), &unix.CachestatRange{}, &s, 0); err {
	case nil:
	case unix.ENOSYS:
		t.Skip("host feature missing: cachestat (Linux 6.5)")
	default:
		t.Fatal(err)
	}
	return s
}
