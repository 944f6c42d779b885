package owner

import (
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/disk/block"
)

func open(t *testing.T, path string, o Options) *Disk {
	t.Helper()
	d, err := Open(t.Context(), path, openRaw(path), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

var someBytes = [][]byte{make([]byte, slotSize)}

// requests are all that a Disk passes on.
func requests(d *Disk) map[string]error {
	return map[string]error{
		"read": d.Readv(someBytes, 0), "write": d.Writev(someBytes, 0), "flush": d.Flush(),
		"discard": d.Discard(0, 512), "zeroes": d.WriteZeroes(0, 512, true),
	}
}

func TestOpenAndClose(t *testing.T) {
	path := newImage(t)
	if r, err := Status(path); err != nil || r.State != Unowned {
		t.Errorf("before: %v, %v", r.State, err)
	}
	if err := Release(t.Context(), path); !errors.Is(err, ErrNotOwned) {
		t.Errorf("release of a disk without an owner: %v", err)
	}
	d := open(t, path, Options{Name: "me\n"})
	r, err := Status(path)
	if err != nil || r.State != Owned || r.Epoch != 1 || r.Name != "me?" || r.Lease != DefaultLease || r.PID != uint32(os.Getpid()) {
		t.Errorf("owned: %+v, %v", r, err)
	}
	for name, err := range requests(d) {
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if d.Err() != nil || d.Size() != slots*slotSize || d.ReadOnly() || d.Info().Format != "raw" {
		t.Errorf("%v, %+v", d.Err(), d.Info())
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	<-d.Done()
	for name, err := range requests(d) {
		if !errors.Is(err, ErrClosed) {
			t.Errorf("%s after Close: %v", name, err)
		}
	}
	if d.Close() != nil || d.Size() != slots*slotSize || d.Info().Format != "raw" || d.Unwrap() != nil {
		t.Error("a closed disk forgets what it was")
	}
	if r, err := Status(path); err != nil || r.State != Released || r.Epoch != 1 {
		t.Errorf("after: %+v, %v", r, err)
	}
	if d := open(t, path, Options{}); d.Epoch() != 2 {
		t.Errorf("epoch %d", d.Epoch())
	}
}

// TestRelease: by the command, over both kinds of addresses, with the device's word.
func TestRelease(t *testing.T) {
	for _, address := range []string{"", "unix:" + filepath.Join(t.TempDir(), "s"), "tcp:127.0.0.1:0"} {
		path := newImage(t)
		busy := errors.New("the guest is being saved")
		keep, called := true, 0
		d := open(t, path, Options{Address: address, OnRelease: func(context.Context) error {
			if called++; keep {
				return busy
			}
			return nil
		}})
		if _, err := Open(t.Context(), path, openRaw(path), Options{}); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), busy.Error()) {
			t.Errorf("%s: %v", address, err)
		}
		if err := d.Writev(someBytes, 0); err != nil {
			t.Errorf("after a refusal: %v", err)
		}
		keep = false
		if err := Release(t.Context(), path); err != nil {
			t.Errorf("%s: %v", address, err)
		}
		if called != 2 || !errors.Is(d.Err(), ErrReleased) {
			t.Errorf("%d calls, %v", called, d.Err())
		}
		for name, err := range requests(d) {
			if !errors.Is(err, ErrReleased) {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
}

// TestPatience: an owner that answers, but does not come to an end, keeps its disk.
func TestPatience(t *testing.T) {
	path := newImage(t)
	stop := make(chan struct{})
	d := open(t, path, Options{Lease: 20 * time.Millisecond, OnRelease: func(context.Context) error { <-stop; return nil }})
	_, err := Open(t.Context(), path, openRaw(path), Options{Patience: 500 * time.Millisecond})
	if !errors.Is(err, ErrRefused) || d.Err() != nil {
		t.Errorf("%v, %v", err, d.Err())
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := Open(ctx, path, openRaw(path), Options{}); !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
	close(stop)
	<-d.Done()
}

// TestTokenIsAsked: over TCP the owner obeys only who has read its file.
func TestTokenIsAsked(t *testing.T) {
	path := newImage(t)
	d := open(t, path, Options{Address: "tcp:127.0.0.1:0"})
	r, err := Status(path)
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*Record){
		"token": func(r *Record) { r.token[3]++ },
		"epoch": func(r *Record) { r.Epoch++ },
		"owner": func(r *Record) { r.Owner[0]++ },
	} {
		wrong := r
		change(&wrong)
		if err := ask(t.Context(), &wrong); !errors.Is(err, ErrRefused) && !errors.Is(err, ErrSilent) || d.Err() != nil {
			t.Errorf("wrong %s: %v, %v", name, err, d.Err())
		}
	}
	if err := ask(t.Context(), &r); err != nil || !errors.Is(d.Err(), ErrReleased) {
		t.Errorf("right request: %v, %v", err, d.Err())
	}
}

// TestModes: who may not read the disk may not read the token.
func TestModes(t *testing.T) {
	for disk, want := range map[os.FileMode][2]os.FileMode{0o600: {0o700, 0o600}, 0o640: {0o750, 0o640}, 0o664: {0o775, 0o644}} {
		path := newImage(t)
		if err := os.Chmod(path, disk); err != nil {
			t.Fatal(err)
		}
		open(t, path, Options{})
		for i, p := range []string{path + Suffix, filepath.Join(path+Suffix, "1")} {
			if st, err := os.Stat(p); err != nil || st.Mode().Perm() != want[i] {
				t.Errorf("disk %o: %s has %v, %v", disk, p, st.Mode(), err)
			}
		}
	}
}

// TestFrozenAlone: an owner whose lease has run out goes on if nobody wanted the disk.
func TestFrozenAlone(t *testing.T) {
	d := open(t, newImage(t), Options{Lease: LeaseLimit})
	for range 3 {
		d.deadline.Store(0)
		for name, err := range requests(d) {
			if err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
}

// TestTakenBetween: the owner file goes away between the check of a write and its end.
func TestTakenBetween(t *testing.T) {
	path := newImage(t)
	other := elsewhere()
	var d *Disk
	node := &hookNode{}
	d, err := Open(t.Context(), path, func() (block.Node, error) {
		n, err := openRaw(path)()
		node.Node = n
		return node, err
	}, Options{Lease: 50 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	node.before = func() {
		node.before = nil
		d.server.listener.Close()
		next, err := Open(t.Context(), path, openRaw(path), Options{host: other, Lease: 50 * time.Millisecond})
		if err != nil {
			t.Error(err)
			return
		}
		defer next.Close()
		if err := next.Writev([][]byte{stampOfWrite{next.Epoch(), 1}.bytes()}, 0); err != nil {
			t.Error(err)
		}
	}
	if err := d.Writev([][]byte{stampOfWrite{d.Epoch(), 1}.bytes()}, 0); !errors.Is(err, ErrLost) {
		t.Errorf("a late write was acknowledged: %v", err)
	}
	<-d.Done()
	next := open(t, path, Options{})
	if s, err := readSlot(next, 0); err != nil || s != (stampOfWrite{2, 1}) {
		t.Errorf("%v, %v", s, err)
	}
}

type hookNode struct {
	block.Node
	before func()
}

func (n *hookNode) Writev(bufs [][]byte, off int64) error {
	if n.before != nil {
		n.before()
	}
	return n.Node.Writev(bufs, off)
}

// TestManyOpen: whoever opens, on whatever host, there is one owner at a time, and each has an
// epoch of its own.
func TestManyOpen(t *testing.T) {
	path := newImage(t)
	var active, opened atomic.Int64
	var epochs sync.Map
	var wg sync.WaitGroup
	for w := range 6 {
		o := Options{Lease: 10 * time.Second}
		if w%2 == 1 {
			o.host = elsewhere()
		}
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(w), 0))
			for range 15 {
				d, err := Open(t.Context(), path, func() (block.Node, error) {
					n, err := openRaw(path)()
					if c := active.Add(1); c != 1 {
						t.Errorf("%d owners at once", c)
					}
					return &countedNode{n, &active}, err
				}, o)
				if err != nil {
					t.Error(err)
					return
				}
				opened.Add(1)
				if _, twice := epochs.LoadOrStore(d.Epoch(), true); twice {
					t.Errorf("epoch %d twice", d.Epoch())
				}
				for d.Writev(someBytes, 0) == nil && rng.IntN(50) > 0 {
				}
				d.Close()
			}
		})
	}
	wg.Wait()
	if opened.Load() != 90 {
		t.Errorf("%d were owners", opened.Load())
	}
	names, err := os.ReadDir(path + Suffix)
	if err != nil || len(names) != 1 {
		t.Errorf("left in the directory: %v, %v", names, err)
	}
}

type countedNode struct {
	block.Node
	active *atomic.Int64
}

func (n *countedNode) Close() error {
	n.active.Add(-1)
	return n.Node.Close()
}

// TestProgramWithoutOwnerFile has the disk: it is not asked, and nothing happens to it.
func TestProgramWithoutOwnerFile(t *testing.T) {
	path := newImage(t)
	n, err := openRaw(path)()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Open(t.Context(), path, openRaw(path), Options{}); !errors.Is(err, block.ErrInUse) {
		t.Error(err)
	}
	if r, err := Status(path); err != nil || r.State != Released {
		t.Errorf("%v, %v", r.State, err)
	}
	n.Close()
	d := open(t, path, Options{})
	if err := os.RemoveAll(path + Suffix); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path+Suffix, nil, 0o600); err != nil { // d cannot write that it has ended
		t.Fatal(err)
	}
	if _, err := Open(t.Context(), path, openRaw(path), Options{}); !errors.Is(err, ErrDirectory) {
		t.Error(err)
	}
	d.Close()
}

func TestOptions(t *testing.T) {
	path := newImage(t)
	for _, o := range []Options{{Lease: time.Millisecond}, {Lease: 2 * LeaseLimit}, {Lease: -1}} {
		if _, err := Open(t.Context(), path, openRaw(path), o); !errors.Is(err, ErrOptions) {
			t.Errorf("%+v: %v", o, err)
		}
	}
	for _, a := range []string{"x", "unix:", "unix:relative", "tcp:localhost:1", "tcp:0.0.0.0:0", "unix:/" + strings.Repeat("a", 200)} {
		if _, err := Open(t.Context(), path, openRaw(path), Options{Address: a}); !errors.Is(err, ErrProtocol) {
			t.Errorf("%q: %v", a, err)
		}
	}
	if _, err := Open(t.Context(), filepath.Join(t.TempDir(), "none"), openRaw(path), Options{}); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}

// TestKeepFile: an owner that is frozen, and a file that may not be replaced.
func TestKeepFile(t *testing.T) {
	path := newImage(t)
	p := startChild(t, childOptions{Path: path, Lease: shortLease, Stuck: 5})
	p.take()
	p.expect("owned")
	waitStopped(t, p)
	inode := inodeOf(t, path)
	if _, err := Open(t.Context(), path, openRaw(path), Options{KeepFile: true, Lease: shortLease}); !errors.Is(err, ErrFence) {
		t.Error(err)
	}
	if err := os.Link(path, path+".2"); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(t.Context(), path, openRaw(path), Options{Lease: shortLease}); !errors.Is(err, ErrFence) {
		t.Errorf("a disk with two names: %v", err)
	}
	if inodeOf(t, path) != inode {
		t.Error("the file was replaced")
	}
	p.kill()
	open(t, path, Options{})
}

func TestClock(t *testing.T) {
	const second = int64(time.Second)
	r := reading{wall: 50 * second, monotonic: second, boot: 7 * second}
	if boot, ok := r.extrapolate(52*second, 3*second); boot != 9*second || !ok {
		t.Errorf("%d, %v", boot, ok)
	}
	for _, wall := range []int64{62 * second, 50 * second} { // the host slept, or the clock was set
		if _, ok := r.extrapolate(wall, 3*second); ok {
			t.Error("clocks that came apart were not noticed")
		}
	}
	for range 100 {
		before := bootTime()
		got := now()
		if after := bootTime(); got < before-clockSlack || got > after+clockSlack {
			t.Errorf("%d is not between %d and %d", got, before, after)
		}
	}
	old := lastReading.Load()
	lastReading.Store(&reading{wall: old.wall - 10*second, monotonic: old.monotonic, boot: old.boot - 10*second})
	if got := now(); distance(got, bootTime()) > second {
		t.Error("boot time is not asked for after a sleep")
	}
}

// TestCopyKeepsAttributes: mode, labels and holes.
func TestCopyKeepsAttributes(t *testing.T) {
	path := newImage(t)
	if err := os.Truncate(path, 64<<20); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	f.WriteAt([]byte("gnomon"), 40<<20)
	f.Chmod(0o640)
	if err := unix.Fsetxattr(int(f.Fd()), "user.gnomon", []byte("label"), 0); err != nil {
		t.Fatal(err)
	}
	d, err := directoryOf(path)
	if err == nil {
		err = d.create()
	}
	if err != nil {
		t.Fatal(err)
	}
	claim, err := d.makeClaim(1)
	if err != nil {
		t.Fatal(err)
	}
	g, err := replaceDisk(t.Context(), d, claim)
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	f.WriteAt([]byte("late  "), 40<<20)
	b := make([]byte, 6)
	value := make([]byte, 10)
	g.ReadAt(b, 40<<20)
	n, _ := unix.Getxattr(path, "user.gnomon", value)
	st, err := os.Stat(path)
	if err != nil || string(b) != "gnomon" || string(value[:max(n, 0)]) != "label" || st.Size() != 64<<20 || st.Mode().Perm() != 0o640 {
		t.Errorf("%q, %q, %v, %v", b, value, st, err)
	}
	if sys, _ := sysStat(st); sys.Blocks*512 > 1<<20 {
		t.Errorf("%d bytes allocated", sys.Blocks*512)
	}
}
