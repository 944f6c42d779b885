package convert_test

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/convert"
	"github.com/gnomon-vmm/gnomon/disk/qcow2"
	"github.com/gnomon-vmm/gnomon/disk/raw"
)

// patchy is content with data, zeroes and holes of all kinds.
func patchy(seed uint64, size int) []byte {
	r := rand.New(rand.NewPCG(seed, 1))
	b := make([]byte, size)
	for range 60 {
		n := 1 + r.IntN(300<<10)
		at := r.IntN(size - n)
		fill := byte(r.Uint32())
		if r.IntN(3) == 0 {
			fill = 0
		}
		copy(b[at:], bytes.Repeat([]byte{fill}, n))
	}
	return b
}

func rawFile(t testing.TB, content []byte) (block.Node, string) {
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
	return n, path
}

func qcow2File(t testing.TB, size int64) (*qcow2.Node, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.qcow2")
	if err := qcow2.Create(path, qcow2.CreateOptions{Size: size}); err != nil {
		t.Fatal(err)
	}
	n, err := qcow2.Open(path, false)
	if err != nil {
		t.Fatal(err)
	}
	return n, path
}

// What is copied is equal, by our reader and by qemu-img.
func TestCopy(t *testing.T) {
	for seed := range uint64(4) {
		want := patchy(seed, 9<<20+512*7)
		src, from := rawFile(t, want)
		dst, to := qcow2File(t, int64(len(want)))
		var last int64
		if err := convert.Copy(context.Background(), dst, src, convert.Options{TargetIsZero: true, Workers: 3, Progress: func(done, total int64) {
			if done <= last || total != int64(len(want)) {
				t.Errorf("progress %d of %d after %d", done, total, last)
			}
			last = done
		}}); err != nil {
			t.Fatal(err)
		}
		if d, err := convert.Compare(context.Background(), src, dst, true, nil); d != nil || err != nil {
			t.Errorf("%+v, %v", d, err)
		}
		// A target that is not zero before.
		over, _ := rawFile(t, bytes.Repeat([]byte{0xee}, len(want)))
		if err := convert.Copy(context.Background(), over, dst, convert.Options{}); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, len(want))
		if err := over.Readv([][]byte{got}, 0); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%v; equal: %t", err, bytes.Equal(got, want))
		}
		if err := dst.Close(); err != nil {
			t.Fatal(err)
		}
		src.Close()
		if out, err := exec.Command("qemu-img", "compare", from, to).CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
		if out, err := exec.Command("qemu-img", "check", to).CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
	}
}

func TestCompare(t *testing.T) {
	base := patchy(9, 5<<20)
	a, _ := rawFile(t, base)
	for _, at := range []int{0, 1, 64<<10 - 1, 2 << 20, 5<<20 - 1} {
		other := bytes.Clone(base)
		other[at] ^= 1
		b, _ := rawFile(t, other)
		if d, err := convert.Compare(context.Background(), a, b, false, nil); err != nil || d == nil || d.Offset != int64(at) || d.Size {
			t.Errorf("at %d: %+v, %v", at, d, err)
		}
	}
	longer, _ := rawFile(t, append(bytes.Clone(base), make([]byte, 1<<20)...))
	if d, err := convert.Compare(context.Background(), a, longer, false, nil); err != nil || d != nil {
		t.Errorf("zeroes behind: %+v, %v", d, err)
	}
	if d, err := convert.Compare(context.Background(), a, longer, true, nil); err != nil || d == nil || !d.Size {
		t.Errorf("strictly: %+v, %v", d, err)
	}
	tail := append(bytes.Clone(base), make([]byte, 1<<20)...)
	tail[5<<20+700] = 1
	longer, _ = rawFile(t, tail)
	if d, err := convert.Compare(context.Background(), longer, a, false, nil); err != nil || d == nil || !d.Size || d.Offset != 5<<20+700 {
		t.Errorf("data behind: %+v, %v", d, err)
	}
}

type failing struct{ block.Node }

var errFull = errors.New("no space")

func (failing) Writev([][]byte, int64) error { return errFull }

func TestCopyFails(t *testing.T) {
	src, _ := rawFile(t, patchy(3, 4<<20))
	dst, _ := rawFile(t, make([]byte, 4<<20))
	if err := convert.Copy(context.Background(), failing{dst}, src, convert.Options{}); !errors.Is(err, errFull) || !errors.Is(err, convert.ErrConvert) {
		t.Errorf("%v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := convert.Copy(ctx, dst, src, convert.Options{}); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	// At so low a rate each worker writes one piece, and hears of the end.
	ctx, cancel = context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	full, _ := rawFile(t, bytes.Repeat([]byte{1}, 4<<20))
	if err := convert.Copy(ctx, dst, full, convert.Options{Rate: 1, Workers: 2}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v", err)
	}
	got := make([]byte, 4<<20)
	if err := dst.Readv([][]byte{got}, 0); err != nil || bytes.Count(got, []byte{1}) > 512<<10 {
		t.Errorf("%d bytes were written, %v", bytes.Count(got, []byte{1}), err)
	}
	small, _ := rawFile(t, make([]byte, 512))
	if err := convert.Copy(context.Background(), small, src, convert.Options{}); !errors.Is(err, convert.ErrConvert) {
		t.Errorf("%v", err)
	}
}
