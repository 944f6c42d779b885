package guestmem

import (
	"bufio"
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// needCollapse skips the test where the kernel does not make huge pages on demand.
func needCollapse(t *testing.T) {
	t.Helper()
	m, err := New([]Range{{0, HugePage}})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	clear(m.regions[0].bytes)
	if err := unix.Madvise(m.regions[0].bytes, unix.MADV_COLLAPSE); err == unix.EINVAL {
		t.Skip("MADV_COLLAPSE of shared memory (Linux 6.1)")
	}
}

// hugeBytes is how much of b, which is a whole mapping, lies in huge pages.
func hugeBytes(t *testing.T, b []byte) (n int) {
	t.Helper()
	f, err := os.Open("/proc/self/smaps")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	ours := false
	for lines := bufio.NewScanner(f); lines.Scan(); {
		line := lines.Text()
		if strings.Contains(line, "-") && strings.Contains(line, "memfd:") {
			ours = strings.HasPrefix(line, fmt.Sprintf("%x-", unsafe.Pointer(&b[0])))
		}
		if ours && strings.HasPrefix(line, "ShmemPmdMapped:") {
			if _, err := fmt.Sscanf(line, "ShmemPmdMapped: %d kB", &n); err != nil {
				t.Fatal(err)
			}
			return n << 10
		}
	}
	t.Fatal("the mapping is not in smaps")
	return 0
}

func TestGather(t *testing.T) {
	needCollapse(t)
	const gap = 1 << 30
	m, err := New([]Range{{0, 5*HugePage + PageSize}, {gap, 2 * HugePage}})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	low, high := m.regions[0], m.regions[1]
	for _, r := range m.regions {
		for _, b := range [][]byte{r.bytes, r.guest} {
			if uintptr(unsafe.Pointer(&b[0]))%HugePage != 0 {
				t.Errorf("memory is mapped at %p", &b[0])
			}
		}
	}
	random := rand.New(rand.NewPCG(1, 2))
	fill := func(b []byte) {
		for i := range b {
			b[i] = byte(random.Uint32())
		}
	}
	fill(low.bytes[:2*HugePage])
	fill(low.bytes[2*HugePage:][:HugePage/2-PageSize]) // not half of it
	fill(low.bytes[3*HugePage:][:HugePage/2])
	want := bytes.Clone(low.bytes[:4*HugePage]) // and all is there by now
	for first := 2*HugePage + HugePage/2 - PageSize; first < 3*HugePage; first += PageSize {
		if err := m.Discard(uint64(first), PageSize); err != nil {
			t.Fatal(err)
		}
	}
	if err := m.Discard(3*HugePage+HugePage/2, HugePage/2); err != nil {
		t.Fatal(err)
	}

	pager := &touches{}
	m.AddPager(pager)
	m.Gather(0, 1)
	if n := hugeBytes(t, low.bytes); n != 0 {
		t.Errorf("%d bytes are gathered while a pager is asked for pages", n)
	}
	m.RemovePager(pager)
	m.gathering.last, m.gathering.budget = time.Now(), -time.Hour
	m.Gather(0, 1)
	if n := hugeBytes(t, low.bytes); n != 0 {
		t.Errorf("%d bytes are gathered after an hour of it", n)
	}
	m.gathering.last = time.Time{}
	m.Gather(HugePage+1, 1)
	if n := hugeBytes(t, low.bytes); n != HugePage {
		t.Errorf("%d bytes are gathered of one huge page", n)
	}
	m.Gather(0, 5*HugePage+PageSize)
	if n := hugeBytes(t, low.bytes); n != 3*HugePage {
		t.Errorf("%d bytes are gathered of three huge pages", n)
	}
	if !bytes.Equal(low.bytes[:4*HugePage], want) || !bytes.Equal(low.guest[:4*HugePage], want) {
		t.Error("the memory holds something else")
	}
	for _, at := range []uint64{gap - 1, gap + 2*HugePage, 1 << 60} { // no RAM
		m.Gather(at, 1)
	}
	fill(high.bytes) // which does not begin where a huge page does
	m.Gather(gap, 2*HugePage)
	if n := hugeBytes(t, high.bytes); n != 0 {
		t.Errorf("%d bytes are gathered", n)
	}
}

// While a page is in use the rest cannot be gathered, and is later; but not for ever.
func TestGatherInUse(t *testing.T) {
	needCollapse(t)
	m, err := New([]Range{{0, 2 * HugePage}})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	r := m.regions[0]
	for page := 0; page < len(r.bytes); page += PageSize {
		r.bytes[page] = 1 // it is there
	}
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pipe[0])
	defer unix.Close(pipe[1])
	use := func(page []byte) { // until it is read
		v := unix.Iovec{Base: &page[0], Len: PageSize}
		if n, err := unix.Vmsplice(pipe[1], []unix.Iovec{v}, 0); n != PageSize || err != nil {
			t.Fatal(n, err)
		}
	}
	use(r.bytes[HugePage-PageSize:])
	if m.Gather(0, PageSize) {
		t.Error("memory in use is gathered")
	}
	if !m.Gather(HugePage, PageSize) {
		t.Error("other memory is not gathered")
	}
	if _, err := unix.Read(pipe[0], make([]byte, PageSize)); err != nil {
		t.Fatal(err)
	}
	if !m.Gather(0, PageSize) || hugeBytes(t, r.bytes) != 2*HugePage {
		t.Errorf("%d bytes are gathered", hugeBytes(t, r.bytes))
	}
	if err := m.Discard(0, 2*PageSize); err != nil { // it is small pages again
		t.Fatal(err)
	}
	r.gathered[0].Store(0)
	use(r.bytes[PageSize:])
	for range gatherTries - 1 {
		if m.gathering.last = (time.Time{}); m.Gather(0, PageSize) {
			t.Error("memory in use is gathered")
		}
	}
	if m.gathering.last = (time.Time{}); !m.Gather(0, PageSize) {
		t.Error("it is tried for ever")
	}
}

// Nothing that is written meanwhile is lost, by whichever mapping.
func TestGatherWhileWritten(t *testing.T) {
	needCollapse(t)
	m, err := New([]Range{{0, HugePage}})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	r := m.regions[0]
	gathered := 0
	for round := range byte(20) {
		if err := m.Discard(0, HugePage); err != nil {
			t.Fatal(err)
		}
		for page := 0; page < HugePage; page += PageSize {
			r.bytes[page] = 0 // it is there
		}
		r.gathered[0].Store(0)
		m.gathering.last = time.Time{}
		var writers sync.WaitGroup
		for i, b := range [][]byte{r.bytes, r.guest} {
			writers.Go(func() {
				for pass := range byte(30) {
					for page := 0; page < HugePage; page += PageSize {
						b[page+1+i] = pass + round
					}
				}
			})
		}
		m.Gather(0, HugePage)
		writers.Wait()
		if r.gathered[0].Load() == gatherTries {
			gathered++
		}
		for page := 0; page < HugePage; page += PageSize {
			if b := r.bytes[page:]; b[0] != 0 || b[1] != 29+round || b[2] != 29+round {
				t.Fatalf("round %d, page at %#x: % x", round, page, b[:3])
			}
		}
	}
	if gathered == 0 {
		t.Error("nothing was gathered")
	}
}
