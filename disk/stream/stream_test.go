package stream_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"

	"github.com/gnomon-vmm/gnomon/disk"
	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/qcow2"
	"github.com/gnomon-vmm/gnomon/disk/stream"
)

const size = 4 << 20

func qemuImg(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "qemu-img", args...).CombinedOutput()
	if err != nil {
		t.Fatalf("qemu-img %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// scribble makes n random changes of a disk and of its model.
func scribble(t *testing.T, n int, rng *rand.Rand, d block.Node, model []byte) {
	t.Helper()
	for range n {
		off, length := 512*rng.Int64N(int64(len(model))/512), 512*(1+rng.Int64N(200))
		length = min(length, int64(len(model))-off)
		p := model[off : off+length]
		var err error
		switch rng.IntN(6) {
		case 0:
			clear(p)
			err = d.WriteZeroes(off, length, rng.IntN(2) == 0)
		case 1: // whole clusters of any of the images read as zero afterwards
			if off, length = off&^0xFFFF, 0x10000; off+length > int64(len(model)) {
				continue
			}
			clear(model[off : off+length])
			err = d.Discard(off, length)
		default:
			for i := range p {
				p[i] = byte(off>>9) + byte(rng.Uint32()&1)
			}
			err = d.Writev([][]byte{p}, off)
		}
		if err != nil {
			t.Error(err)
		}
	}
}

// chain makes images that lie one on another, with holes in each of them, and
// returns the newest's path and what it reads as.
func chain(t *testing.T, dir string, rng *rand.Rand, sizes []int64) (string, []byte) {
	t.Helper()
	var model []byte
	under := ""
	for i, size := range sizes {
		path := filepath.Join(dir, fmt.Sprintf("%d.qcow2", i))
		args := []string{"create", "-q", "-f", "qcow2", "-o", []string{"cluster_size=64k", "cluster_size=4k", "cluster_size=32k"}[i%3]}
		if under != "" {
			args = append(args, "-b", under, "-F", "qcow2")
		}
		qemuImg(t, append(args, path, fmt.Sprint(size))...)
		d, err := disk.Open(path, disk.Options{})
		if err != nil {
			t.Fatal(err)
		}
		bigger := make([]byte, size)
		copy(bigger, model)
		model = bigger
		if i < len(sizes)-1 {
			scribble(t, 12, rng, d, model)
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		under = path
	}
	return under, model
}

func TestStream(t *testing.T) {
	for seed, c := range []struct {
		sizes []int64
		depth int
	}{
		{[]int64{size, size}, 0},
		{[]int64{size, size, size, size}, 0},
		{[]int64{size, size, size, size}, 2},
		{[]int64{size, size, size, size}, 3},
		{[]int64{size, size / 2, size}, 2}, // the base must not be seen behind the end of what goes
		{[]int64{size / 2, size, size + 512*7}, 2},
		{[]int64{size, size / 2, size}, 0},
	} {
		t.Run(fmt.Sprint(c.sizes, c.depth), func(t *testing.T) {
			dir := t.TempDir()
			rng := rand.New(rand.NewPCG(uint64(seed), 1))
			path, model := chain(t, dir, rng, c.sizes)
			top, err := qcow2.Open(path, false)
			if err != nil {
				t.Fatal(err)
			}
			root := block.NewRoot(top)
			var f *stream.Filter
			pauses := 0
			o := stream.Options{Depth: c.depth, Pause: func() error { // a guest writes before and behind the pass
				pauses++
				scribble(t, 3, rng, root, model)
				return nil
			}}
			root.Drained(func(block.Node) block.Node {
				if f, err = stream.New(top, o); err != nil {
					t.Fatal(err)
				}
				return f
			})
			if err := f.Run(t.Context()); err != nil {
				t.Fatal(err)
			}
			if pauses < size>>20 {
				t.Errorf("the pass paused %d times", pauses)
			}
			var gone block.Node
			root.Drained(func(block.Node) block.Node {
				gone, err = f.Finish()
				return top
			})
			if err != nil {
				t.Fatal(err)
			}
			if err := gone.Close(); err != nil {
				t.Error(err)
			}
			scribble(t, 10, rng, root, model)
			got := make([]byte, len(model))
			if err := root.Readv([][]byte{got}, 0); err != nil || !bytes.Equal(got, model) {
				t.Errorf("the disk has changed, %v", err)
			}
			if err := root.Close(); err != nil {
				t.Fatal(err)
			}
			// What goes is not needed any more.
			keep := 0
			if c.depth != 0 {
				keep = len(c.sizes) - c.depth
			}
			for i := keep; i < len(c.sizes)-1; i++ {
				os.Remove(filepath.Join(dir, fmt.Sprintf("%d.qcow2", i)))
			}
			want := filepath.Join(dir, "model")
			if err := os.WriteFile(want, model, 0o600); err != nil {
				t.Fatal(err)
			}
			if out := qemuImg(t, "check", path); !strings.Contains(out, "No errors were found") {
				t.Error(out)
			}
			qemuImg(t, "compare", "-f", "qcow2", "-F", "raw", path, want)
			if info := qemuImg(t, "info", path); strings.Contains(info, "backing file") != (c.depth != 0) {
				t.Error(info)
			}
		})
	}
}

// Writers and the pass at once.
func TestConcurrentWrites(t *testing.T) {
	rng := rand.New(rand.NewPCG(9, 9))
	path, model := chain(t, t.TempDir(), rng, []int64{size, size, size})
	top, err := qcow2.Open(path, false)
	if err != nil {
		t.Fatal(err)
	}
	defer top.Close()
	f, err := stream.New(top, stream.Options{})
	if err != nil {
		t.Fatal(err)
	}
	var ended sync.WaitGroup
	const writers = 4
	for w := range writers { // each has a part of the disk
		ended.Add(1)
		go func() {
			defer ended.Done()
			part := model[size/writers*w : size/writers*(w+1)]
			rng := rand.New(rand.NewPCG(uint64(w), 2))
			for i := range 400 {
				off := 512 * rng.Int64N(int64(len(part))/512-8)
				p := part[off : off+4096]
				for j := range p {
					p[j] = byte(i)
				}
				if err := f.Writev([][]byte{p}, int64(size/writers*w)+off); err != nil {
					t.Error(err)
				}
			}
		}()
	}
	if err := f.Run(t.Context()); err != nil {
		t.Error(err)
	}
	ended.Wait()
	if _, err := f.Finish(); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(model))
	if err := top.Readv([][]byte{got}, 0); err != nil || !bytes.Equal(got, model) {
		t.Errorf("a write was lost, %v", err)
	}
}

func TestErrors(t *testing.T) {
	path, _ := chain(t, t.TempDir(), rand.New(rand.NewPCG(3, 3)), []int64{size, size, size})
	top, err := qcow2.Open(path, false)
	if err != nil {
		t.Fatal(err)
	}
	defer top.Close()
	for _, depth := range []int{1, 3, 9} {
		if _, err := stream.New(top, stream.Options{Depth: depth}); !errors.Is(err, stream.ErrStream) {
			t.Errorf("depth %d: %v", depth, err)
		}
	}
	broken := errors.New("broken")
	base := top.SetBacking(nil)
	if _, err := stream.New(top, stream.Options{}); !errors.Is(err, stream.ErrStream) {
		t.Error(err)
	}
	calls := 0
	top.SetBacking(block.Failed(base, broken))
	f, err := stream.New(top, stream.Options{OnError: func(err error, reading bool) error {
		if calls++; !reading {
			t.Error("an error of reading passes for one of writing")
		}
		switch calls {
		case 1:
			return nil // again
		case 2:
			top.SetBacking(base)
			return nil
		}
		return err
	}})
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Run(t.Context()); err != nil || calls != 2 {
		t.Errorf("%v after %d errors", err, calls)
	}
	top.SetBacking(block.Failed(base, broken))
	f, err = stream.New(top, stream.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Run(t.Context()); !errors.Is(err, broken) && err != nil {
		t.Error(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := f.Run(ctx); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	top.SetBacking(base)
}

// intruder has somebody write to what the pass is just reading.
type intruder struct {
	block.Node
	once sync.Once
	at   func(off int64)
}

func (i *intruder) Readv(bufs [][]byte, off int64) error {
	err := i.Node.Readv(bufs, off)
	i.once.Do(func() { i.at(off) })
	return err
}

// What is written between the reading of a cluster and the writing of it stays.
func TestWritesWin(t *testing.T) {
	path, model := chain(t, t.TempDir(), rand.New(rand.NewPCG(4, 4)), []int64{size, size})
	top, err := qcow2.Open(path, false)
	if err != nil {
		t.Fatal(err)
	}
	defer top.Close()
	f, err := stream.New(top, stream.Options{})
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	backing := &intruder{Node: top.Backing()}
	backing.at = func(off int64) {
		off &^= 0xFFFF
		p := bytes.Repeat([]byte{0xA5}, 0x10000)
		copy(model[off:], p)
		go func() {
			defer close(ended)
			if err := f.Writev([][]byte{p}, off); err != nil {
				t.Error(err)
			}
		}()
		for range 10000 { // it must wait for the pass: here is time for one that does not
			select {
			case <-ended:
				return
			default:
				runtime.Gosched()
			}
		}
	}
	top.SetBacking(mapped{backing})
	if err := f.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	<-ended
	got := make([]byte, len(model))
	if err := top.Readv([][]byte{got}, 0); err != nil || !bytes.Equal(got, model) {
		t.Errorf("a write was lost, %v", err)
	}
}

// mapped tells what the node behind an intruder holds.
type mapped struct{ *intruder }

func (m mapped) Map(off, n int64) (block.Extent, error) {
	return m.Node.(block.Mapper).Map(off, n)
}
