package backup_test

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/gnomon-vmm/gnomon/disk/backup"
	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/qcow2"
	"github.com/gnomon-vmm/gnomon/disk/raw"
)

const size = 8<<20 + 12345*512

func disk(t *testing.T, content []byte) block.Node {
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

func content(n block.Node) []byte {
	b := make([]byte, n.Size())
	if err := n.Readv([][]byte{b}, 0); err != nil {
		panic(err)
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

// What is copied is the disk of the instant in which the filter was put in,
// whatever is written meanwhile; and what is written is there.
func TestCopiesTheInstant(t *testing.T) {
	for seed := range uint64(8) {
		old := random(seed)
		src := disk(t, old)
		path := filepath.Join(t.TempDir(), "copy.qcow2")
		if err := qcow2.Create(path, qcow2.CreateOptions{Size: size}); err != nil {
			t.Fatal(err)
		}
		target, err := qcow2.Open(path, false)
		if err != nil {
			t.Fatal(err)
		}
		f, err := backup.New(src, target, backup.Options{})
		if err != nil {
			t.Fatal(err)
		}
		root := block.NewRoot(f)
		want := bytes.Clone(old)
		var writers sync.WaitGroup
		const parts = 4
		for w := range int64(parts) { // each on a part of its own, so that the model is certain
			writers.Go(func() {
				r := rand.New(rand.NewPCG(seed, uint64(w)))
				base, span := w*(size/parts), int64(size/parts)
				for range 300 {
					n := r.Int64N(100 << 10)
					off := base + r.Int64N(span-n)
					var err error
					switch r.IntN(4) {
					case 0:
						err = root.WriteZeroes(off, n, r.IntN(2) == 0)
						clear(want[off : off+n])
					default:
						data := bytes.Repeat([]byte{byte(r.Uint32() | 1)}, int(n))
						err = root.Writev([][]byte{data[:n/2], data[n/2:]}, off)
						copy(want[off:], data)
					}
					if err != nil {
						t.Error(err)
					}
				}
			})
		}
		var last int64
		if err := f.Copy(context.Background(), func(done, total int64) {
			if done <= last || total != size {
				t.Errorf("progress %d of %d after %d", done, total, last)
			}
			last = done
		}); err != nil {
			t.Fatal(err)
		}
		root.Swap(src)
		writers.Wait()
		if !bytes.Equal(content(target), old) {
			t.Error("the copy is not the disk of that instant")
		}
		if !bytes.Equal(content(src), want) {
			t.Error("the disk does not hold what was written")
		}
		if f.Copied() > size*3/4 {
			t.Errorf("%d bytes were written to the target; half of %d are zero", f.Copied(), size)
		}
		if err := target.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

type failing struct{ block.Node }

var errFull = errors.New("no space")

func (failing) Writev([][]byte, int64) error { return errFull }

// A target that fails ends the copy and not the disk.
func TestTargetFails(t *testing.T) {
	src := disk(t, random(1))
	f, err := backup.New(src, failing{disk(t, make([]byte, size))}, backup.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Writev([][]byte{[]byte("new")}, 10); err != nil {
		t.Errorf("a write failed: %v", err)
	}
	if err := f.Copy(context.Background(), nil); !errors.Is(err, errFull) || !errors.Is(err, backup.ErrCopy) {
		t.Errorf("copy: %v", err)
	}
	if got := content(src)[10:13]; string(got) != "new" {
		t.Errorf("read %q", got)
	}
	if _, err := backup.New(src, disk(t, make([]byte, 512)), backup.Options{}); !errors.Is(err, backup.ErrCopy) {
		t.Errorf("a small target: %v", err)
	}
}

// A copy that is cancelled leaves the disk to go on.
func TestCancel(t *testing.T) {
	src := disk(t, random(2))
	f, err := backup.New(src, disk(t, make([]byte, size)), backup.Options{})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := f.Copy(ctx, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("copy: %v", err)
	}
	if err := f.Writev([][]byte{[]byte("new")}, 10); err != nil || f.Copied() != 0 {
		t.Errorf("write: %v; %d bytes copied", err, f.Copied())
	}
}

// A target that held something else holds the disk's zeroes too.
func TestOverwrites(t *testing.T) {
	sparse := disk(t, nil).(block.Resizer)
	if err := sparse.Resize(size); err != nil {
		t.Fatal(err)
	}
	for _, src := range []block.Node{disk(t, random(1)), sparse} {
		target := disk(t, bytes.Repeat([]byte{7}, size))
		f, err := backup.New(src, target, backup.Options{Overwrite: true})
		if err != nil {
			t.Fatal(err)
		}
		if err := f.Copy(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(content(target), content(src)) {
			t.Error("the copy is another")
		}
	}
}

// An instant reads as the disk was, while the disk is written, until it ends; and it
// says so when what is about to change cannot be kept.
func TestInstant(t *testing.T) {
	for seed := range uint64(4) {
		old := random(seed)
		root := block.NewRoot(disk(t, old))
		i := backup.NewInstant(root, disk(t, make([]byte, size)))
		if err := i.Readv([][]byte{make([]byte, 512)}, 0); !errors.Is(err, backup.ErrNoInstant) {
			t.Errorf("before the instant: %v", err)
		}
		var f *backup.Filter
		root.Drained(func(current block.Node) block.Node {
			var err error
			if f, err = i.Begin(current, backup.Options{}); err != nil {
				t.Fatal(err)
			}
			return f
		})
		var all sync.WaitGroup
		for w := range uint64(3) {
			all.Go(func() {
				r := rand.New(rand.NewPCG(seed, w))
				for range 300 {
					n := 1 + r.Int64N(200<<10)
					off := r.Int64N(size - n)
					var err error
					switch r.IntN(8) {
					case 0:
						err = root.WriteZeroes(off, n, true)
					case 1:
						err = root.Discard(off, n)
					default:
						err = root.Writev([][]byte{bytes.Repeat([]byte{byte(r.Uint32())}, int(n))}, off)
					}
					if err != nil {
						t.Error(err)
					}
				}
			})
		}
		for w := range uint64(2) {
			all.Go(func() {
				r := rand.New(rand.NewPCG(seed, 10+w))
				for range 300 {
					got := make([]byte, 1+r.Int64N(300<<10))
					off := r.Int64N(size - int64(len(got)))
					if err := i.Readv([][]byte{got[:len(got)/2], got[len(got)/2:]}, off); err != nil || !bytes.Equal(got, old[off:][:len(got)]) {
						t.Errorf("%d bytes at %d are not those of the instant: %v", len(got), off, err)
					}
				}
			})
		}
		all.Wait()
		if !bytes.Equal(content(i), old) {
			t.Error("the instant changed")
		}
		if bytes.Equal(content(root), old) {
			t.Error("nothing was written")
		}
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		if err := f.Wait(ctx); !errors.Is(err, context.Canceled) {
			t.Errorf("cancelled: %v", err)
		}
		if err := i.Readv([][]byte{make([]byte, 512)}, 0); !errors.Is(err, backup.ErrCopy) {
			t.Errorf("after the instant: %v", err)
		}
		if err := i.Close(); err != nil {
			t.Error(err)
		}
	}
	root := block.NewRoot(disk(t, random(1)))
	i := backup.NewInstant(root, failing{disk(t, make([]byte, size))})
	f, err := i.Begin(root.Current(), backup.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Writev([][]byte{{1}}, 5); err != nil {
		t.Errorf("the disk does not go on: %v", err)
	}
	if err := errors.Join(f.Wait(context.Background())); !errors.Is(err, errFull) {
		t.Errorf("what could not be kept: %v", err)
	}
	if err := i.Readv([][]byte{make([]byte, 512)}, 1<<20); !errors.Is(err, errFull) {
		t.Errorf("an instant of which something was not kept: %v", err)
	}
}
