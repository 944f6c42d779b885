package nbd

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/disk/aio"
	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/raw"
)

// direct is a disk past the page cache that tells how many requests were begun, and has
// them end with what is in ends, if there is something.
type direct struct {
	*raw.Node
	started atomic.Int64
	ends    chan error
	ended   func()                 // after an end that is not the ring's
	reads   atomic.Pointer[func()] // called before a read that is not the ring's
}

func (d *direct) Readv(bufs [][]byte, off int64) error {
	if before := d.reads.Load(); before != nil {
		(*before)()
	}
	return d.Node.Readv(bufs, off)
}

func (d *direct) Start(r *block.Request, _ block.Node) bool {
	select {
	case err := <-d.ends:
		d.started.Add(1)
		go func() {
			r.End(err)
			d.ended()
		}()
		return true
	default:
	}
	ok := d.Node.Start(r, d.Node)
	if ok {
		d.started.Add(1)
	}
	return ok
}

func newDirect(t *testing.T, size int64) *direct {
	t.Helper()
	if err := aio.Probe(); err != nil {
		t.Skip("io_uring: ", err)
	}
	path := filepath.Join(t.TempDir(), "disk.img")
	if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, size)); err != nil {
		t.Fatal(err)
	}
	n, err := raw.OpenWith(path, false, raw.Options{Direct: true})
	if errors.Is(err, aio.ErrDirect) {
		t.Skip("O_DIRECT: ", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.Close() })
	return &direct{Node: n, ends: make(chan error, 1)}
}

// Several goroutines write and read each its own part of a disk past the page cache.
// Most of it is done without a goroutine of the server's for each request.
func TestRing(t *testing.T) {
	const parts, part, steps = 8, 1 << 20, 200
	d := newDirect(t, parts*part)
	_, address := serve(t, ServerOptions{}, Export{Name: "a", Node: d})
	c := use(t, address, "a", ClientOptions{})
	model := make([]byte, parts*part)
	var writers sync.WaitGroup
	for p := range parts {
		writers.Go(func() {
			random := rand.New(rand.NewPCG(8, uint64(p)))
			for range steps {
				unit := []int64{512, 4096, 4096, 4096}[random.IntN(4)]
				n := unit * (1 + random.Int64N(min(40, part/unit/4)))
				off := int64(p*part) + random.Int64N((part-n)/unit)*unit
				own := model[off : off+n]
				if random.IntN(2) == 0 {
					for i := range own {
						own[i] = byte(random.Uint32())
					}
					if err := c.Writev([][]byte{own}, off); err != nil {
						t.Error(err)
					}
					continue
				}
				got := make([]byte, n)
				if err := c.Readv([][]byte{got}, off); err != nil || !bytes.Equal(got, own) {
					t.Errorf("%d bytes at %d are read wrong, %v", n, off, err)
				}
			}
		})
	}
	writers.Wait()
	got := make([]byte, len(model))
	if err := d.Readv([][]byte{got}, 0); err != nil || !bytes.Equal(got, model) {
		t.Errorf("the disk is not what was written, %v", err)
	}
	if n := d.started.Load(); n < parts*steps/10 {
		t.Errorf("%d of %d requests were begun by the ring", n, parts*steps)
	}
}

// Who has one request at a time is served without the ring, until there are more.
func TestOneAtATime(t *testing.T) {
	d := newDirect(t, 1<<20)
	_, address := serve(t, ServerOptions{}, Export{Name: "a", Node: d})
	c := use(t, address, "a", ClientOptions{})
	began := func(do func()) int64 {
		before := d.started.Load()
		do()
		return d.started.Load() - before
	}
	oneByOne := func(count int) func() {
		return func() {
			for i := range count {
				move := []func([][]byte, int64) error{c.Readv, c.Writev}[i%2]
				if err := move([][]byte{make([]byte, 4096)}, int64(i%256*4096)); err != nil {
					t.Error(err)
				}
			}
		}
	}
	several := func() {
		var users sync.WaitGroup
		for range 8 {
			users.Go(oneByOne(200))
		}
		users.Wait()
	}
	if n := began(oneByOne(minAlone)); n < minAlone/2 {
		t.Errorf("%d of the first requests were begun by the ring", n)
	}
	for range 3 {
		if n := began(several); n < 400 {
			t.Errorf("%d of 1600 requests, several at a time, were begun by the ring", n)
		}
		oneByOne(2 * minAlone)()
		if n := began(oneByOne(400)); n > 0 {
			t.Errorf("%d of 400 requests, one by one, were begun by the ring", n)
		}
	}
}

// A request that has come while the reader did another ends that.
func TestNotOneAtATime(t *testing.T) {
	d := newDirect(t, 1<<20)
	_, address := serve(t, ServerOptions{}, Export{Name: "a", Node: d})
	w := newWire(t, address)
	w.enter("a", false)
	read := header{command: cmdRead, length: 4096}
	answered := func() {
		if code, _ := w.simple(); code != 0 {
			t.Errorf("error %d", code)
		}
		w.read(4096)
	}
	for range 2 * minAlone {
		w.request(read)
		answered()
	}
	before := d.started.Load()
	begun, end := make(chan bool), make(chan bool)
	hold := func() {
		begun <- true
		<-end
	}
	d.reads.Store(&hold)
	w.request(read)
	<-begun
	d.reads.Store(nil)
	w.request(read)
	if n := d.started.Load() - before; n > 0 {
		t.Errorf("%d requests were begun by the ring where there was one", n)
	}
	end <- true
	answered()
	answered()
	if n := d.started.Load() - before; n != 1 {
		t.Errorf("%d requests were begun by the ring, the second alone should be", n)
	}
}

// What the ring could not do is done again, and what failed is told.
func TestRingEnds(t *testing.T) {
	d := newDirect(t, 1<<20)
	s, address := serve(t, ServerOptions{}, Export{Name: "a", Node: d})
	d.ended = func() { // the ring sends the replies to what it ends
		s.mu.Lock()
		defer s.mu.Unlock()
		for c := range s.connections {
			if c.out != nil {
				c.out.flush()
			}
		}
	}
	// Clients that leave at once have no ring left behind them.
	for range 20 {
		c, err := Dial(context.Background(), address, "a", ClientOptions{})
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
	}
	c := use(t, address, "a", ClientOptions{})
	p := bytes.Repeat([]byte{5}, 4096)
	d.ends <- block.ErrAgain
	if err := c.Writev([][]byte{p}, 4096); err != nil {
		t.Error(err)
	}
	d.ends <- block.ErrAgain
	got := make([]byte, 4096)
	if err := c.Readv([][]byte{got}, 4096); err != nil || !bytes.Equal(got, p) {
		t.Errorf("what was done again is not there, %v", err)
	}
	for _, do := range []func([][]byte, int64) error{c.Readv, c.Writev} {
		d.ends <- unix.EIO
		if err := do([][]byte{make([]byte, 4096)}, 4096); !errors.Is(err, unix.EIO) {
			t.Errorf("a disk's error: %v", err)
		}
	}
	if err := c.Readv([][]byte{got}, 4096); err != nil || !bytes.Equal(got, p) {
		t.Errorf("after the errors: %v", err)
	}
	if n := d.started.Load(); n < 4 {
		t.Errorf("%d requests were begun", n)
	}
}
