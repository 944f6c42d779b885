package changes

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gnomon-vmm/gnomon/disk/block"
)

// host is a disk, its sidecar, and a clock, without files.
type host struct {
	store    *memoryStore
	disk     disk
	is       diskIdentity
	now      time.Time
	reported error
}

func newHost(size int64) *host {
	return &host{
		store: &memoryStore{}, disk: disk{size: size, name: "disk"}, now: time.Unix(1e9, 0),
		is: diskIdentity{identity: [32]byte{1}, stamp: [32]byte{1}, changed: time.Unix(1e9, 0)},
	}
}

func (h *host) open(t testing.TB, blockSize int64) *Recorder {
	t.Helper()
	r, err := Open("disk.changes", h.disk, Options{
		BlockSize: blockSize, Report: func(err error) { h.reported = err },
		store: h.store, identify: func(block.Node) diskIdentity { return h.is }, now: func() time.Time { return h.now }, still: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// written has the disk's files changed now.
func (h *host) written() {
	h.is.stamp[31]++
	h.is.changed = h.now
}

func since(t testing.TB, r *Recorder, h *host, app string) *Set {
	t.Helper()
	s, err := r.Since(h.disk, app)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// backup is since and Commit.
func backup(t testing.TB, r *Recorder, h *host, app string) *Set {
	t.Helper()
	s := since(t, r, h, app)
	if err := s.Commit(); err != nil {
		t.Fatal(err)
	}
	return s
}

func mustClose(t testing.TB, r *Recorder) {
	t.Helper()
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
}

// blocksIn is which blocks a set has.
func blocksIn(s *Set, blockSize int64) map[int64]bool {
	all := map[int64]bool{}
	for off, n := range s.Extents() {
		for b := off / blockSize; b*blockSize < off+n; b++ {
			all[b] = true
		}
	}
	return all
}

// Three applications with intervals of their own get exactly the blocks that changed
// since their own last backups, as a history of 100,000 random writes has them; after
// each of 20 power failures all of them, and besides only what was marked.
func TestExact(t *testing.T) {
	const (
		blockSize = 4 << 10
		size      = 64<<20 - 512
		writes    = 100_000
		crashes   = 20
	)
	h := newHost(size)
	rnd := rand.New(rand.NewPCG(7, 11))
	r := h.open(t, blockSize)
	type application struct {
		interval int
		last     int            // the write after which it was backed up; -1: never
		bound    map[int64]bool // what a crash may have added
	}
	apps := map[string]*application{"hourly": {interval: 701, last: -1}, "daily": {interval: 3203, last: -1}, "weekly": {interval: 17011, last: -1}}
	names := []string{"daily", "hourly", "weekly"}
	lastWrite := make([]int, (size+blockSize-1)/blockSize) // of each block; 0: none
	exact, over := 0, 0
	for w := 1; w <= writes; w++ {
		// Mostly near each other, now and then far away.
		n := 1 + rnd.Int64N(40<<10)
		off := rnd.Int64N(size)
		if rnd.IntN(10) > 0 {
			off = (int64(w/2000)*(1<<20) + rnd.Int64N(1<<20)) % size
		}
		if rnd.IntN(1000) > 0 {
			n = min(n, size-off)
		}
		r.Record(off, n)
		h.written()
		for b := off / blockSize; b <= (min(off+n, size)-1)/blockSize; b++ {
			lastWrite[b] = w
		}
		if w%97 == 0 {
			h.now = h.now.Add(tickEvery)
			r.tick()
		}
		if w%(writes/crashes) == writes/crashes/2 {
			marks := slices.Clone(r.state)
			h.store = h.store.crash(rnd)
			r = h.open(t, blockSize)
			for _, a := range apps {
				if a.bound == nil {
					a.bound = map[int64]bool{}
				}
				for region, s := range marks {
					if s == regionMarked {
						for b := range int64(regionBlocks) {
							a.bound[int64(region)*regionBlocks+b] = true
						}
					}
				}
			}
		}
		if w%7919 == 0 {
			mustClose(t, r)
			r = h.open(t, blockSize)
		}
		for _, name := range names {
			a := apps[name]
			if w%a.interval != 0 {
				continue
			}
			s := since(t, r, h, name)
			got := blocksIn(s, blockSize)
			if (s.Changed == nil) != (a.last < 0) {
				t.Fatalf("write %d: %s: all of the disk: %v, after a backup at write %d: %s", w, name, s.Changed == nil, a.last, s.Reason)
			}
			if rnd.IntN(8) == 0 {
				continue // the backup failed
			}
			if a.last >= 0 {
				for b, last := range lastWrite {
					b := int64(b)
					switch {
					case last > a.last && !got[b]:
						t.Fatalf("write %d: %s: block %d changed by write %d, and its last backup was at %d, but it is not told", w, name, b, last, a.last)
					case last <= a.last && got[b] && !a.bound[b]:
						t.Fatalf("write %d: %s: block %d changed last by write %d, and its last backup was at %d", w, name, b, last, a.last)
					case last <= a.last && got[b]:
						over++
					default:
						exact++
					}
				}
			}
			if err := s.Commit(); err != nil {
				t.Fatal(err)
			}
			a.last, a.bound = w, nil
		}
	}
	t.Logf("%d answers about blocks are exact, %d told after crashes that did not change; %d syncs", exact, over, h.store.syncs)
	if over > exact/4 {
		t.Errorf("%d of %d blocks were told that did not change", over, exact)
	}
	if h.reported != nil {
		t.Error(h.reported)
	}
}

// Writers, ticks that take marks away, backups and crashes at the same time: what a
// writer recorded before its write is told.
func TestConcurrent(t *testing.T) {
	const blockSize, size = 4 << 10, 32 << 20
	h := newHost(size)
	r := h.open(t, blockSize)
	backup(t, r, h, "app")
	var mu sync.Mutex
	changed := map[int64]bool{} // since the last backup
	for round := range 40 {
		var writers sync.WaitGroup
		for w := range 4 {
			writers.Go(func() {
				rnd := rand.New(rand.NewPCG(uint64(round), uint64(w)))
				var mine []int64
				for range 400 {
					b := rnd.Int64N(size / blockSize)
					r.Record(b*blockSize+rnd.Int64N(blockSize), 1)
					mine = append(mine, b)
				}
				mu.Lock()
				defer mu.Unlock()
				for _, b := range mine {
					changed[b] = true
				}
			})
		}
		for range 20 {
			r.op.Lock()
			r.meta.Lock()
			r.patience, r.marks = 0, 0 // regions lose their marks as soon as they can
			r.meta.Unlock()
			r.op.Unlock()
			r.tick()
		}
		writers.Wait()
		if round%3 == 0 {
			h.store = h.store.crash(rand.New(rand.NewPCG(uint64(round), 0)))
			r = h.open(t, blockSize)
		}
		got := blocksIn(backup(t, r, h, "app"), blockSize)
		for b := range changed {
			if !got[b] {
				t.Fatalf("round %d: block %d changed and is not told", round, b)
			}
		}
		if round%3 != 0 && len(got) != len(changed) {
			t.Errorf("round %d: %d blocks are told, %d changed", round, len(got), len(changed))
		}
		clear(changed)
	}
}

// Power fails before every single write and sync of a sidecar, while the disk is
// written to between any two of them where that is possible: nothing that was
// recorded is lost.
func TestPowerFailsAnywhere(t *testing.T) {
	const blockSize, blocks = 4 << 10, 8 * regionBlocks
	h := newHost(blocks * blockSize)
	rnd := rand.New(rand.NewPCG(5, 6))
	r := h.open(t, blockSize)
	last := make([]int, blocks) // the backup before which each block changed; 0: none
	backups, checked := 0, 0
	record := func() {
		b := rnd.Int64N(blocks)
		r.Record(b*blockSize, 1)
		last[b] = backups + 1
	}
	check := func(st *memoryStore) {
		h2 := &host{store: st, disk: h.disk, now: h.now, is: h.is}
		r2 := h2.open(t, blockSize)
		s := since(t, r2, h2, "app")
		got := blocksIn(s, blockSize)
		for b, changed := range last {
			if changed > backups && !got[int64(b)] {
				t.Fatalf("block %d changed and is not told after power failure %d", b, checked)
			}
		}
		if s.Changed == nil && backups > 0 {
			t.Fatalf("all of the disk is told after power failure %d: %s", checked, s.Reason)
		}
		checked++
	}
	each := func() {
		check(h.store.crash(rnd))
		if rnd.IntN(2) == 0 && r.meta.TryLock() {
			r.meta.Unlock()
			record()
		}
	}
	h.store.each = each
	for range 60 {
		for range rnd.IntN(6) {
			record()
		}
		r.patience, r.marks = 0, 0
		r.tick()
		if rnd.IntN(4) == 0 {
			h.store.each = nil // nobody writes to the disk meanwhile, and Commit counts only when it has returned
			s := since(t, r, h, "app")
			if s.Changed != nil {
				got := blocksIn(s, blockSize)
				for b, changed := range last {
					if (changed > backups) != got[int64(b)] {
						t.Fatalf("backup %d: block %d is told: %v", backups, b, got[int64(b)])
					}
				}
			}
			if err := s.Commit(); err != nil {
				t.Fatal(err)
			}
			backups++
			h.store.each = each
		}
	}
	if checked < 300 || backups < 5 {
		t.Errorf("%d power failures, %d backups", checked, backups)
	}
}

// A backup's raise and commit may be cut anywhere: before Commit returns, the next
// set has what this one had.
func TestPowerFailsWhileRaising(t *testing.T) {
	const blockSize = 4 << 10
	h := newHost(4 << 20)
	r := h.open(t, blockSize)
	backup(t, r, h, "app")
	backup(t, r, h, "other")
	rnd := rand.New(rand.NewPCG(8, 9))
	for round := range int64(30) {
		r.Record(round*blockSize, 1)
		at := round
		h.store.each = func() {
			h2 := &host{store: h.store.crash(rnd), disk: h.disk, now: h.now, is: h.is}
			r2 := h2.open(t, blockSize)
			if got := blocksIn(since(t, r2, h2, "app"), blockSize); !got[at] {
				t.Fatalf("round %d: the block is lost", at)
			}
			if got := blocksIn(since(t, r2, h2, "other"), blockSize); !got[0] || !got[at] {
				t.Fatalf("round %d: another application's block is lost", at)
			}
		}
		s := since(t, r, h, "app")
		if got := blocksIn(s, blockSize); len(got) != 1 || !got[round] {
			t.Fatalf("round %d: %v", round, got)
		}
		h.store.each = nil
		if err := s.Commit(); err != nil {
			t.Fatal(err)
		}
	}
}

// A disk to which nobody wrote for long, until just before a crash, has its changes
// known.
func TestCrashAfterIdling(t *testing.T) {
	h := newHost(1 << 30)
	r := h.open(t, 0)
	backup(t, r, h, "app")
	r.Record(0, 1)
	h.now = h.now.Add(time.Second)
	h.written()
	for range 3 {
		h.now = h.now.Add(tickEvery)
		r.tick()
	}
	h.now = h.now.Add(time.Hour)
	r.Record(64<<10, 1) // in a region that is marked
	h.now = h.now.Add(time.Second)
	h.written()
	h.store = h.store.crash(rand.New(rand.NewPCG(1, 1)))
	if s := since(t, h.open(t, 0), h, "app"); s.Changed == nil || s.Bytes() > 16<<20 {
		t.Errorf("%d bytes, %q", s.Bytes(), s.Reason)
	}
}

// A sidecar that does not know all of the disk's changes says that everything
// changed, and why.
func TestForeign(t *testing.T) {
	const size = 8 << 20
	for name, c := range map[string]struct {
		crash  bool
		change func(h *host)
		reason string // "": the changes are known
	}{
		"nothing":               {false, func(*host) {}, ""},
		"crash":                 {true, func(*host) {}, ""},
		"late":                  {true, func(h *host) { h.now = h.now.Add(time.Hour) }, ""},
		"written":               {false, (*host).written, "the disk was written while"},
		"written after a crash": {true, func(h *host) { h.now = h.now.Add(time.Minute); h.written() }, "the disk was written while"},
		"replaced":              {false, func(h *host) { h.is.identity[0]++ }, "the disk is another one"},
		"replaced after crash":  {true, func(h *host) { h.is.identity[0]++ }, "the disk is another one"},
		"resized":               {false, func(h *host) { h.disk.size *= 2 }, "the disk had 8388608 bytes"},
		"a device":              {false, func(h *host) { h.is = diskIdentity{} }, "not in regular files"},
		"no sidecar":            {false, func(h *host) { h.store = &memoryStore{} }, "the recording of changes began"},
		"cut": {false, func(h *host) {
			h.store.b = h.store.b[:100]
		}, "the changes file was damaged"},
		"both headers damaged": {false, func(h *host) {
			h.store.b[50]++
			h.store.b[slotSize+50]++
		}, "the changes file was damaged: "},
		"marks damaged":   {false, func(h *host) { h.store.b[marksAt+100]++ }, "superset"},
		"records damaged": {false, func(h *host) { h.store.b[recordsAt+100]++ }, "superset"},
		"records cut off": {false, func(h *host) { h.store.b = h.store.b[:recordsAt+100] }, "superset"},
		"an older header": {false, func(h *host) { h.store.b[slotSize+50]++ }, "superset or all"},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(size)
			r := h.open(t, 0)
			backup(t, r, h, "app")
			r.Record(size/2, 10)
			h.written()
			if c.crash {
				h.store = h.store.crash(rand.New(rand.NewPCG(1, 2)))
			} else {
				mustClose(t, r)
			}
			c.change(h)
			r = h.open(t, 0)
			s := since(t, r, h, "app")
			got := blocksIn(s, r.BlockSize())
			switch {
			case c.reason == "superset":
				if s.Changed == nil || !got[size/2/r.BlockSize()] {
					t.Errorf("%v, reason %q", got, s.Reason)
				}
			case c.reason == "superset or all":
				if !got[size/2/r.BlockSize()] {
					t.Errorf("%v, reason %q", got, s.Reason)
				}
			case c.reason == "" && (s.Changed == nil || !c.crash && len(got) != 1 || !got[size/2/r.BlockSize()]):
				t.Errorf("blocks %v, reason %q", got, s.Reason)
			case c.reason != "" && (s.Changed != nil || !strings.Contains(s.Reason, c.reason) || s.Bytes() != h.disk.size):
				t.Errorf("reason %q, want %q; %d bytes", s.Reason, c.reason, s.Bytes())
			}
			// From then on it is exact again.
			if err := s.Commit(); err != nil {
				t.Fatal(err)
			}
			r.Record(0, 1)
			if s := since(t, r, h, "app"); s.Changed == nil || s.Bytes() != r.BlockSize() {
				t.Errorf("later: %d bytes, reason %q", s.Bytes(), s.Reason)
			}
			mustClose(t, r)
		})
	}
}

// While a disk is in use its image may be replaced, and its size: then too
// everything has changed.
func TestReplacedInUse(t *testing.T) {
	h := newHost(8 << 20)
	r := h.open(t, 0)
	backup(t, r, h, "app")
	h.is.identity[0]++ // a snapshot
	if s := backup(t, r, h, "app"); s.Changed != nil || !strings.Contains(s.Reason, "another image") {
		t.Errorf("after a snapshot: %q", s.Reason)
	}
	if s := backup(t, r, h, "app"); s.Changed == nil || s.Bytes() != 0 {
		t.Errorf("after that: %d bytes, %q", s.Bytes(), s.Reason)
	}
	h.disk.size += 1 << 20
	r.Record(8<<20, 10) // in the new part
	old := since(t, r, h, "other")
	if s := backup(t, r, h, "app"); s.Changed != nil || s.Bytes() != 9<<20 {
		t.Errorf("after resizing: %d bytes, %q", s.Bytes(), s.Reason)
	}
	if err := old.Commit(); err != nil {
		t.Error(err)
	}
	stale := since(t, r, h, "other")
	h.is.identity[0]++
	backup(t, r, h, "app")
	if err := stale.Commit(); !errors.Is(err, ErrStale) {
		t.Errorf("commit of a set from before: %v", err)
	}
	r.Record(8<<20, 10)
	if s := backup(t, r, h, "app"); s.Changed == nil || s.Bytes() != 64<<10 {
		t.Errorf("in the new part: %d bytes, %q", s.Bytes(), s.Reason)
	}
}

// A sidecar that cannot be written does not stop the disk, is reported, and cannot
// be taken for a true one; the next backup begins a new one.
func TestBrokenStore(t *testing.T) {
	h := newHost(64 << 20)
	r := h.open(t, 4<<10)
	backup(t, r, h, "app")
	r.Record(0, 1)
	h.store.fail = errBroken
	r.Record(1<<20, 1) // a region that is not marked
	r.Record(2<<20, 1)
	if !errors.Is(h.reported, errBroken) || !errors.Is(r.Err(), errBroken) || !h.store.gone {
		t.Errorf("reported %v, error %v, invalidated %v", h.reported, r.Err(), h.store.gone)
	}
	if _, err := r.Since(h.disk, "app"); !errors.Is(err, errBroken) {
		t.Errorf("a backup: %v", err)
	}
	h.store.fail = nil
	if s := backup(t, r, h, "app"); s.Changed != nil || !strings.Contains(s.Reason, errBroken.Error()) {
		t.Errorf("a backup later: %q", s.Reason)
	}
	r.Record(3<<20, 1)
	if s := backup(t, r, h, "app"); s.Changed == nil || s.Bytes() != 4<<10 {
		t.Errorf("the one after it: %d bytes, %q", s.Bytes(), s.Reason)
	}
	h.store.fail = errBroken
	r.Record(5<<20, 1)
	mustClose(t, r)
	h.store = &memoryStore{b: h.store.b, durable: h.store.durable}
	if s := since(t, h.open(t, 4<<10), h, "app"); s.Changed != nil {
		t.Errorf("the broken sidecar tells of %d bytes", s.Bytes())
	}
}

func TestApplications(t *testing.T) {
	h := newHost(1 << 20)
	r := h.open(t, 0)
	for _, name := range []string{"", strings.Repeat("x", nameLimit+1), "a\nb", "\xff"} {
		if _, err := r.Prepare(h.disk, name); !errors.Is(err, ErrApplication) {
			t.Errorf("%q: %v", name, err)
		}
	}
	for i := range maxApps {
		backup(t, r, h, fmt.Sprint("app", i))
	}
	if _, err := r.Prepare(h.disk, "one more"); !errors.Is(err, ErrApplication) {
		t.Errorf("one too many: %v", err)
	}
	if err := r.Forget("app7"); err != nil {
		t.Fatal(err)
	}
	if err := r.Forget("app7"); !errors.Is(err, ErrApplication) {
		t.Errorf("forgotten twice: %v", err)
	}
	backup(t, r, h, "one more")
	want := r.Applications()
	mustClose(t, r)
	r = h.open(t, 0)
	got := r.Applications()
	if len(got) != maxApps || !slices.EqualFunc(got, want, func(a, b Application) bool { return a.Name == b.Name && a.Epoch == b.Epoch && a.Time.Equal(b.Time) }) {
		t.Errorf("%d applications after opening again, %d before", len(got), len(want))
	}
	mustClose(t, r)
	if err := r.Forget("app1"); !errors.Is(err, ErrClosed) {
		t.Errorf("forget after close: %v", err)
	}
	if _, err := r.Since(h.disk, "app1"); !errors.Is(err, ErrClosed) {
		t.Errorf("since after close: %v", err)
	}
}

// A disk that was only looked at leaves its sidecar as it was, and one in use whose
// guest writes nothing needs no syncs.
func TestIdle(t *testing.T) {
	h := newHost(1 << 30)
	r := h.open(t, 0)
	backup(t, r, h, "app")
	mustClose(t, r)
	before, syncs := string(h.store.b), h.store.syncs
	r = h.open(t, 0)
	for range 100 {
		r.tick()
	}
	mustClose(t, r)
	if string(h.store.b) != before || h.store.syncs != syncs {
		t.Errorf("the sidecar was written, with %d syncs", h.store.syncs-syncs)
	}
}

// Marks are rare whatever is written where: most syncs are the first minute's.
func TestMarksAreRare(t *testing.T) {
	h := newHost(2 << 40)
	r := h.open(t, 0)
	rnd := rand.New(rand.NewPCG(1, 2))
	begin := h.store.syncs
	var first int
	for tick := range 90 { // a quarter of an hour
		for range 1000 {
			r.Record(rnd.Int64N(2<<40), 4096)
		}
		h.now = h.now.Add(tickEvery)
		r.tick()
		if tick == 5 {
			first = h.store.syncs - begin
		}
	}
	all := h.store.syncs - begin
	t.Logf("%d syncs in the first minute, %d in a quarter of an hour of 90,000 writes all over 2 TiB", first, all)
	if first > 200 || all > 90*10 { // 10 syncs of 20 ms in 10 s are 2 %
		t.Errorf("%d syncs in the first minute, %d in a quarter of an hour", first, all)
	}
}
