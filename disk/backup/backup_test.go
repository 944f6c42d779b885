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
