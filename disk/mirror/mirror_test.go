package mirror_test

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/mirror"
	"github.com/gnomon-vmm/gnomon/disk/qcow2"
	"github.com/gnomon-vmm/gnomon/disk/raw"
)

const size = 16<<20 + 4096 + 512

func rawDisk(t testing.TB, content []byte) block.Node {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	n, err := raw.Open(path, false)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.Close() })
	return n
}

func content(t testing.TB, n block.Node) []byte {
	t.Helper()
	b := make([]byte, n.Size())
	if err := n.Readv([][]byte{b}, 0); err != nil {
		t.Fatal(err)
	}
	return b
}

func random(seed uint64) []byte {
	b := make([]byte, size)
	r := rand.NewChaCha8([32]byte{byte(seed)})
	for at := 0; at+1<<20 < size; at += 2 << 20 { // half of it is zero
		r.Read(b[at : at+1<<20])
	}
	return b
}

// writers write to parts of a disk of their own, so that the model is certain,
// until stop is closed. wait returns how many bytes they wrote.
func writers(t testing.TB, root block.Node, model []byte, seed uint64, stop <-chan struct{}) (wait func() int64) {
	var all sync.WaitGroup
	const parts = 4
	var written [parts]int64
	for w := range int64(parts) {
		all.Go(func() {
			r := rand.New(rand.NewPCG(seed, uint64(w)))
			base, span := w*(size/parts), int64(size/parts)
			for {
				select {
				case <-stop:
					return
				default:
				}
				n := 512 + r.Int64N(8<<10)
				if r.IntN(20) == 0 {
					n = r.Int64N(300 << 10)
				}
				off := base + r.Int64N(span-n)
				var err error
				switch r.IntN(6) {
				case 0:
					err = root.WriteZeroes(off, n, r.IntN(2) == 0)
					clear(model[off : off+n])
				case 1:
					err = root.Flush()
					n = 0
				default:
					data := bytes.Repeat([]byte{byte(r.Uint32() | 1)}, int(n))
					err = root.Writev([][]byte{data[:n/3], data[n/3 : n/2], data[n/2:]}, off)
					copy(model[off:], data)
				}
				written[w] += n
				if err != nil {
					t.Errorf("%d bytes at %d: %v", n, off, err)
					return
				}
			}
		})
	}
	return func() (sum int64) {
		all.Wait()
		for _, w := range written {
			sum += w
		}
		return sum
	}
}

// A disk is copied while it is written, and both are equal from the pass's end on.
func TestCopy(t *testing.T) {
	for seed := range uint64(4) {
		model := random(seed)
		src, dst := rawDisk(t, model), rawDisk(t, make([]byte, size))
		root := block.NewRoot(src)
		stop := make(chan struct{})
		wait := writers(t, root, model, seed, stop)
		var f *mirror.Filter
		root.Drained(func(current block.Node) block.Node {
			var err error
			if f, err = mirror.New(current, dst, mirror.Options{TargetIsZero: true}); err != nil {
				t.Error(err)
				return current
			}
			return f
		})
		if err := f.Run(context.Background()); err != nil {
			t.Fatal(err)
		}
		close(stop)
		wait()
		for off := int64(0); off < size-512; off += 100 << 10 {
			if err := root.Writev([][]byte{model[:100], model[100:512]}, off); err != nil {
				t.Fatal(err)
			}
			copy(model[off:], model[:512])
		}
		root.Swap(dst)
		if !bytes.Equal(content(t, root), model) || !bytes.Equal(content(t, src), model) {
			t.Error("the disks are not what was written")
		}
		if g := f.Figures(); g.Copied > size || g.Diverted != 0 || g.Mirrored == 0 {
			t.Errorf("%+v", g)
		}
	}
}

// overlay makes a disk of an overlay on a raw disk, both with something in them.
func overlay(t testing.TB, seed uint64, format string) (n *qcow2.Node, model []byte, dir string) {
	t.Helper()
	dir = t.TempDir()
	model = random(seed)
	base := filepath.Join(dir, "base."+format)
	if format == "raw" {
		if err := os.WriteFile(base, model, 0o600); err != nil {
			t.Fatal(err)
		}
	} else {
		if err := qcow2.Create(base, qcow2.CreateOptions{Size: size}); err != nil {
			t.Fatal(err)
		}
		b, err := qcow2.Open(base, false)
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(b.Writev([][]byte{model}, 0), b.Close()); err != nil {
			t.Fatal(err)
		}
	}
	path := filepath.Join(dir, "overlay.qcow2")
	if err := qcow2.Create(path, qcow2.CreateOptions{Size: size, Backing: base, BackingFormat: format}); err != nil {
		t.Fatal(err)
	}
	n, err := qcow2.Open(path, false)
	if err != nil {
		t.Fatal(err)
	}
	r := rand.New(rand.NewPCG(seed, 99))
	for range 40 {
		length := 512 + r.Int64N(100<<10)
		off := r.Int64N(size - length)
		data := bytes.Repeat([]byte{byte(r.Uint32() | 1)}, int(length))
		if err := n.Writev([][]byte{data}, off); err != nil {
			t.Fatal(err)
		}
		copy(model[off:], data)
	}
	return n, model, dir
}

// held is how many bytes an image holds itself.
func held(t testing.TB, n block.Mapper) (sum int64) {
	t.Helper()
	for off := int64(0); off < n.Size(); {
		e, err := n.Map(off, n.Size()-off)
		if err != nil {
			t.Fatal(err)
		}
		if e.Present && e.Depth == 0 {
			sum += e.Length
		}
		off += e.Length
	}
	return sum
}

// The newest snapshot of a disk in use goes in one pass, and what is written
// meanwhile goes where it belongs.
func TestConsolidate(t *testing.T) {
	for _, format := range []string{"raw", "qcow2"} {
		for seed := range uint64(4) {
			n, model, dir := overlay(t, seed, format)
			before := held(t, n)
			root := block.NewRoot(n)
			c, err := mirror.Consolidate(root, mirror.Options{})
			if err != nil {
				t.Fatal(err)
			}
			stop := make(chan struct{})
			wait := writers(t, root, model, seed, stop)
			if err := c.Run(context.Background()); err != nil {
				t.Fatal(err)
			}
			if err := c.Finish(); err != nil {
				t.Fatal(err)
			}
			// As a job does whose end is known not to be durable: the disk stays.
			if err := c.Cancel(); err != nil {
				t.Fatal(err)
			}
			close(stop)
			written := wait()
			if !bytes.Equal(content(t, root), model) {
				t.Error("the disk is not what was written")
			}
			g := c.Figures()
			if sent := g.Copied + g.Mirrored + g.Diverted; sent > before+written {
				t.Errorf("%d bytes were sent to the backing file; the overlay held %d, and %d were written: %+v", sent, before, written, g)
			}
			if err := root.Close(); err != nil {
				t.Fatal(err)
			}
			// The old name is the disk's still.
			again, err := qcow2.Open(filepath.Join(dir, "overlay.qcow2"), false)
			if err != nil {
				t.Fatal(err)
			}
			if got := held(t, again); got != 0 {
				t.Errorf("the overlay holds %d bytes", got)
			}
			if !bytes.Equal(content(t, again), model) {
				t.Error("by its old name the disk is not what was written")
			}
			if err := again.Close(); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// At every instant the overlay on its backing file is the disk: a consolidation
// that is given up, or whose process ends, loses nothing.
func TestConsolidateCancelled(t *testing.T) {
	for _, format := range []string{"raw", "qcow2"} {
		n, model, dir := overlay(t, 7, format)
		root := block.NewRoot(n)
		for round := range uint64(5) {
			stop := make(chan struct{})
			wait := writers(t, root, model, round, stop)
			ctx, cancel := context.WithCancel(context.Background())
			c, err := mirror.Consolidate(root, mirror.Options{Progress: func(done, total int64) {
				if done > total/2 {
					cancel()
				}
			}})
			if err != nil {
				t.Fatal(err)
			}
			if err := c.Run(ctx); !errors.Is(err, context.Canceled) {
				t.Fatalf("run: %v", err)
			}
			if round%2 == 0 {
				close(stop)
				wait()
				if !bytes.Equal(content(t, root), model) {
					t.Error("with the filter the disk is not what was written")
				}
			}
			if err := c.Cancel(); err != nil {
				t.Fatal(err)
			}
			if round%2 == 1 {
				close(stop)
				wait()
			}
			if !bytes.Equal(content(t, root), model) {
				t.Error("the disk is not what was written")
			}
		}
		if err := root.Close(); err != nil {
			t.Fatal(err)
		}
		again, err := qcow2.Open(filepath.Join(dir, "overlay.qcow2"), false)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(content(t, again), model) {
			t.Error("opened anew the disk is not what was written")
		}
		if err := again.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
