package aio

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/disk/block"
)

// ends collects the ends of requests.
type ends struct{ errs []error }

func (e *ends) Ended(_ *block.Request, _ int64, err error) { e.errs = append(e.errs, err) }

// testRing is a Ring and the eventfd that it signals.
type testRing struct {
	*Ring
	t     *testing.T
	event int
	count [8]byte // of the eventfd
}

func newTestRing(t *testing.T) *testRing {
	t.Helper()
	event, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	r, err := NewRing(event)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
		unix.Close(event)
	})
	return &testRing{Ring: r, t: t, event: event}
}

// wait submits, and reaps until nothing is under way, as a worker does.
func (r *testRing) wait() {
	r.t.Helper()
	r.Submit()
	for r.Reap(); r.UnderWay() > 0; r.Reap() {
		if !r.Arm() {
			if _, err := unix.Read(r.event, r.count[:]); err != nil {
				r.t.Fatal(err)
			}
		}
	}
}

// Requests of one goroutine that are under way together do what Readv and Writev do, or
// are left to these.
func TestRingModel(t *testing.T) {
	const size = 4 << 20
	for _, o := range []Options{{Engine: IOUring, Direct: true}, {Engine: IOUring}} {
		f, r := newFile(t, size, o), newTestRing(t)
		rng := rand.New(rand.NewPCG(3, 4))
		fill := rand.NewChaCha8([32]byte{8})
		started := 0
		for round := range 20 {
			var requests [ringEntries + 10]block.Request
			var e ends
			blocks := rng.Perm(size / 4096)
			begun := 0
			for i := range requests {
				q := &requests[i]
				*q = block.Request{Write: rng.IntN(2) == 0, Off: int64(blocks[i]) * 4096, Ring: r}
				n := 4096 >> rng.IntN(4)
				memory := alignedMemory(n)
				q.Bufs = [][]byte{memory}
				if cut := n / 2; rng.IntN(2) == 0 {
					q.Bufs = [][]byte{memory[:0], memory[:cut], memory[cut:]}
				}
				if q.Write {
					fill.Read(memory)
					copy(f.content[q.Off:], memory)
				}
				q.Enter(&e, 0)
				if f.Start(q) {
					begun++
					continue
				}
				q.Leave()
				var err error
				if q.Write {
					err = f.Writev(q.Bufs, q.Off, size)
				} else {
					_, err = f.Readv(q.Bufs, q.Off)
				}
				if err != nil {
					t.Fatal(err)
				}
			}
			if begun > ringEntries || r.UnderWay() != begun {
				t.Fatalf("%d requests begun, %d under way", begun, r.UnderWay())
			}
			r.wait()
			if len(e.errs) != begun || errors.Join(e.errs...) != nil {
				t.Fatalf("round %d: %d of %d ended: %v", round, len(e.errs), begun, errors.Join(e.errs...))
			}
			for i := range requests {
				if q := &requests[i]; !bytes.Equal(bytes.Join(q.Bufs, nil), f.content[q.Off:][:len(bytes.Join(q.Bufs, nil))]) {
					t.Fatalf("round %d: request %d: other data", round, i)
				}
			}
			started += begun
		}
		if started < 20*ringEntries/4 {
			t.Errorf("%d requests were started", started)
		}
		if len(f.writes.active) != 0 {
			t.Errorf("%d writes hold on to their ranges", len(f.writes.active))
		}
	}
}

// What a ring cannot do as a whole ends with ErrAgain, what fails with its error; and what
// is in the way of a write is waited for by others.
func TestRingEnds(t *testing.T) {
	f, r := newFile(t, 8192, Options{Engine: IOUring, Direct: true}), newTestRing(t)
	var e ends
	start := func(q block.Request) bool {
		q.Ring = r
		q.Enter(&e, 0)
		p := &q
		return f.Start(p)
	}
	memory := alignedMemory(16384)
	if !start(block.Request{Off: 4096, Bufs: [][]byte{memory[:8192]}}) {
		t.Error("a read that passes the file's end did not start")
	}
	for name, q := range map[string]block.Request{
		"nothing":    {},
		"odd length": {Bufs: [][]byte{memory[:100]}},
		"odd place":  {Bufs: [][]byte{memory[:4096]}, Off: 100},
		"odd memory": {Bufs: [][]byte{memory[1:4097]}},
	} {
		if f.memory == 1 && name == "odd memory" {
			continue
		}
		if start(q) {
			t.Errorf("%s: started", name)
		}
	}
	f.writes.lock(0, 4096, true)
	write := block.Request{Write: true, Bufs: [][]byte{memory[:4096]}}
	if start(write) {
		t.Error("a write started in the midst of another")
	}
	f.writes.unlock(0, 4096, true)
	if !start(write) {
		t.Error("a write did not start")
	}
	r.wait()
	if len(e.errs) != 2 || e.errs[0] != block.ErrAgain && e.errs[1] != block.ErrAgain || e.errs[0] != nil && e.errs[1] != nil {
		t.Errorf("ended with %v", e.errs)
	}
	e.errs = nil
	q := block.Request{Bufs: [][]byte{memory}, Ring: r}
	q.Enter(&e, 0)
	if !r.Start(&q, r.event+1000) {
		t.Error("did not start")
	}
	r.wait()
	if len(e.errs) != 1 || e.errs[0] != unix.EBADF {
		t.Errorf("ended with %v", e.errs)
	}
}

func TestRingDoesNotAllocate(t *testing.T) {
	f, r := newFile(t, 1<<20, Options{Engine: IOUring, Direct: true}), newTestRing(t)
	e := ends{errs: make([]error, 0, 100000)}
	var requests [32]block.Request
	memory := alignedMemory(len(requests) * 4096)
	for i := range requests {
		requests[i] = block.Request{Write: i%2 == 0, Bufs: [][]byte{memory[i*4096:][:4096]}, Off: int64(i) * 4096, Ring: r}
	}
	if n := testing.AllocsPerRun(100, func() {
		for i := range requests {
			requests[i].Enter(&e, 0)
			if !f.Start(&requests[i]) {
				t.Fatal("did not start")
			}
		}
		r.wait()
	}); n >= 1 {
		t.Errorf("%v allocations", n)
	}
}

// A large buffer is given to the kernel in parts, which are one request that ends once,
// with what is wrong with any of them.
func TestRingParts(t *testing.T) {
	const size = 2*maxPart + 4096
	f, r := newFile(t, 4*maxPart, Options{Engine: IOUring, Direct: true}), newTestRing(t)
	var e ends
	do := func(q block.Request, want error) {
		t.Helper()
		q.Ring, e.errs = r, nil
		q.Enter(&e, 0)
		if !f.Start(&q) || r.UnderWay() != 3 {
			t.Fatalf("%d parts are under way, want 3", r.UnderWay())
		}
		r.wait()
		if len(e.errs) != 1 || e.errs[0] != want || len(r.free) != ringEntries {
			t.Fatalf("ended with %v, want %v; %d slots are free", e.errs, want, len(r.free))
		}
	}
	memory := alignedMemory(size)
	do(block.Request{Off: 4096, Bufs: [][]byte{memory}}, nil)
	if !bytes.Equal(memory, f.content[4096:][:size]) {
		t.Error("other data was read")
	}
	rand.NewChaCha8([32]byte{9}).Read(memory)
	do(block.Request{Write: true, Off: 8192, Bufs: [][]byte{memory}}, nil)
	got := make([]byte, size)
	if _, err := f.Readv([][]byte{got}, 8192); err != nil || !bytes.Equal(got, memory) {
		t.Errorf("other data was written (%v)", err)
	}
	do(block.Request{Off: 4*maxPart - 4096, Bufs: [][]byte{memory}}, block.ErrAgain)

	r.free = r.free[:2] // as if others were under way
	q := block.Request{Bufs: [][]byte{memory}, Ring: r}
	if f.Start(&q) || len(r.free) != 2 {
		t.Error("a request started that there is no room for")
	}
	r.free = r.free[:ringEntries]
}

// The kernel is told of a large request by itself, so that it does not make one of several.
func TestRingTellsOfLargeRequests(t *testing.T) {
	f, r := newFile(t, 4*large, Options{Engine: IOUring, Direct: true}), newTestRing(t)
	var e ends
	for _, length := range []int{4096, large - 4096, large, 3 * large} {
		memory := alignedMemory(length)
		for _, bufs := range [][][]byte{{memory}, {memory[:512], nil, memory[512:]}} {
			q := block.Request{Bufs: bufs, Ring: r}
			q.Enter(&e, 0)
			if !f.Start(&q) || r.unpushed != (length < large) || r.unsubmitted() != r.unpushed {
				t.Errorf("%d bytes in %d buffers: the kernel has to be told of it: %v", length, len(bufs), r.unpushed)
			}
			r.wait()
		}
	}
	if len(e.errs) != 8 || slices.ContainsFunc(e.errs, func(err error) bool { return err != nil }) {
		t.Errorf("ended with %v", e.errs)
	}
}

// However close a request's end comes to Arm: either Arm tells of it or the event does.
func TestRingMissesNoEnd(t *testing.T) {
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pipe[0])
	defer unix.Close(pipe[1])
	const rounds = 8000
	r := newTestRing(t)
	var turn atomic.Int32 // rounds that the other side may end
	var other sync.WaitGroup
	defer other.Wait()
	defer turn.Store(rounds)
	pause := func(rng *rand.Rand, atLeast time.Duration) {
		for end := time.Now().Add(atLeast + time.Duration(rng.IntN(10))*time.Microsecond); time.Now().Before(end); {
		}
	}
	other.Go(func() {
		rng := rand.New(rand.NewPCG(5, 6))
		for n := int32(0); n < rounds; n++ {
			for turn.Load() <= n {
				runtime.Gosched()
			}
			pause(rng, 0)
			_, _ = unix.Write(pipe[1], []byte{1})
		}
	})
	rng := rand.New(rand.NewPCG(7, 8))
	var e ends
	q := block.Request{Bufs: [][]byte{make([]byte, 1)}, Ring: r}
	slept, seen := 0, 0
	lead := time.Duration(0) // of the end over Arm; the one that was late gets more of it, so they meet
	for n := range int32(rounds) {
		q.Enter(&e, 0)
		if !r.Start(&q, pipe[0]) {
			t.Fatal("did not start")
		}
		r.Submit()
		turn.Store(n + 1)
		if n%64 == 0 { // also where the other side has no processor of its own
			for !r.Ended() {
				runtime.Gosched()
			}
			if !r.Arm() {
				t.Fatalf("round %d: Arm does not tell of what has ended", n)
			}
			seen++
		}
		for r.Reap(); r.UnderWay() > 0; r.Reap() {
			pause(rng, lead)
			if r.Arm() {
				seen++
				lead = max(0, lead-2*time.Microsecond)
				continue
			}
			slept++
			lead = min(lead+2*time.Microsecond, 100*time.Microsecond)
			patience := []unix.PollFd{{Fd: int32(r.event), Events: unix.POLLIN}}
			for {
				ready, err := unix.Poll(patience, 10000)
				if err == unix.EINTR {
					continue
				}
				if ready != 1 {
					t.Fatalf("round %d: nobody told of the end (%v); it is there: %v", n, err, r.Ended())
				}
				break
			}
			if _, err := unix.Read(r.event, r.count[:]); err != nil {
				t.Fatal(err)
			}
		}
	}
	if slept == 0 || seen == 0 {
		t.Errorf("the event told of %d ends, Arm of %d", slept, seen)
	}
	if len(e.errs) != rounds || errors.Join(e.errs...) != nil {
		t.Errorf("%d of %d ended: %v", len(e.errs), rounds, errors.Join(e.errs...))
	}
}
