package qcow2

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/raw"
)

// qemuImg runs qemu-img, which must succeed.
func qemuImg(t testing.TB, args ...string) string {
	t.Helper()
	out, err := exec.Command("qemu-img", args...).CombinedOutput()
	if err != nil {
		t.Fatalf("qemu-img %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// clean has qemu-img check find nothing wrong, not even a leak.
func clean(t testing.TB, path string) {
	t.Helper()
	if out := qemuImg(t, "check", path); !strings.Contains(out, "No errors were found") {
		t.Fatalf("%s: %s", path, out)
	}
}

// same has QEMU compare an image with a raw one of these bytes.
func same(t testing.TB, path string, want []byte) {
	t.Helper()
	model := filepath.Join(t.TempDir(), "model")
	if err := os.WriteFile(model, want, 0o600); err != nil {
		t.Fatal(err)
	}
	qemuImg(t, "compare", "-F", "raw", path, model)
}

// act does something at random to a disk and to its model.
func act(t testing.TB, r *rand.Rand, n block.Node, model []byte) {
	t.Helper()
	length := 1 + r.Int64N(64<<10)
	if r.IntN(4) == 0 {
		length = 1 + r.Int64N(1<<20)
	}
	off := r.Int64N(int64(len(model)))
	length = min(length, int64(len(model))-off)
	part := model[off : off+length]
	var err error
	switch r.IntN(8) {
	case 0:
		err = n.WriteZeroes(off, length, r.IntN(2) == 0)
		clear(part)
	case 1:
		if err = n.Discard(off, length); err == nil {
			// Zero or as it was: the disk says which.
			err = n.Readv([][]byte{part}, off)
		}
	case 2:
		err = n.Flush()
	case 3:
		got := make([]byte, length)
		if err = n.Readv([][]byte{got}, off); err == nil && !bytes.Equal(got, part) {
			t.Fatalf("%d bytes at %d are wrong", length, off)
		}
	default:
		for i := range part {
			part[i] = byte(r.Uint32())
		}
		cut := r.Int64N(length + 1)
		err = n.Writev([][]byte{part[:cut], part[cut:]}, off)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// Whatever is done to an image, it holds what its model holds, before and after
// it is closed, and QEMU finds nothing wrong with it.
func TestWritesAgainstModel(t *testing.T) {
	const size = 6<<20 + 512*3
	for _, create := range []struct{ name, options, backing string }{
		{"ours", "", ""},
		{"ours small clusters", "512", ""},
		{"ours over raw", "", "raw"},
		{"ours over qcow2", "4096", "qcow2"},
		{"QEMU's", "cluster_size=64k", ""},
		{"QEMU's of 512", "cluster_size=512", ""},
		{"QEMU's of 2M", "cluster_size=2M,preallocation=metadata", ""},
		{"QEMU's compressed", "compress", ""},
		{"QEMU's zstd", "compress zstd", ""},
	} {
		t.Run(create.name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, "image")
			r := rand.New(rand.NewPCG(7, uint64(len(create.name))))
			model := make([]byte, size)
			base := filepath.Join(dir, "base")
			if create.backing != "" || strings.HasPrefix(create.options, "compress") {
				copy(model[1<<20:], bytes.Repeat([]byte("what was there before "), 100000))
				if err := os.WriteFile(base+".raw", model, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			switch {
			case strings.HasPrefix(create.options, "compress"):
				kind := "zlib"
				if strings.HasSuffix(create.options, "zstd") {
					kind = "zstd"
				}
				qemuImg(t, "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", "compression_type="+kind, base+".raw", path)
			case strings.Contains(create.options, "="):
				qemuImg(t, "create", "-q", "-f", "qcow2", "-o", create.options, path, fmt.Sprint(size))
			default:
				o := CreateOptions{Size: size, BackingFormat: create.backing}
				fmt.Sscan(create.options, &o.ClusterSize)
				switch create.backing {
				case "raw":
					o.Backing = "base.raw"
				case "qcow2":
					qemuImg(t, "convert", "-f", "raw", "-O", "qcow2", base+".raw", base+".qcow2")
					o.Backing = "base.qcow2"
				}
				if err := Create(path, o); err != nil {
					t.Fatal(err)
				}
			}
			clean(t, path)
			for range 4 {
				n, err := Open(path, false)
				if err != nil {
					t.Fatal(err)
				}
				for range 60 {
					act(t, r, n, model)
				}
				got := make([]byte, size)
				if err := n.Readv([][]byte{got}, 0); err != nil || !bytes.Equal(got, model) {
					t.Fatalf("the image holds something else: %v", err)
				}
				if err := n.Close(); err != nil {
					t.Fatal(err)
				}
				clean(t, path)
				same(t, path, model)
			}
			if create.backing != "" {
				if err := Commit(context.Background(), path, nil); err != nil {
					t.Fatal(err)
				}
				same(t, base+"."+create.backing, model)
			}
		})
	}
}

// Several writers at once, each in its own places, clusters shared.
func TestWritersTogether(t *testing.T) {
	path := filepath.Join(t.TempDir(), "image")
	const size, writers, piece = 8 << 20, 4, 8 << 10
	if err := Create(path, CreateOptions{Size: size}); err != nil {
		t.Fatal(err)
	}
	n, err := Open(path, false)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			for at := w * piece; at < size; at += writers * piece {
				if err := n.Writev([][]byte{bytes.Repeat([]byte{byte(at / piece)}, piece)}, int64(at)); err != nil {
					t.Error(err)
				}
				if at%(1<<20) == w*piece {
					if err := n.Flush(); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	wg.Wait()
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	clean(t, path)
	want := make([]byte, size)
	for i := range want {
		want[i] = byte(i / piece)
	}
	same(t, path, want)
}

// A writer that is killed leaves what it flushed, and an image that the next
// writer, or QEMU, makes whole.
func TestKilledWriter(t *testing.T) {
	const size = 4 << 20
	if path := os.Getenv("QCOW2_TEST_WRITE"); path != "" {
		n, err := Open(path, false)
		if err != nil {
			t.Fatal(err)
		}
		for i := byte(1); ; i++ {
			for at := int64(0); at < size; at += 96 << 10 {
				if err := n.Writev([][]byte{bytes.Repeat([]byte{i}, 4096)}, at); err != nil {
					t.Fatal(err)
				}
			}
			if err := n.Flush(); err != nil {
				t.Fatal(err)
			}
			fmt.Println(i)
		}
	}
	dir := t.TempDir()
	base, path := filepath.Join(dir, "base"), filepath.Join(dir, "image")
	if err := os.WriteFile(base, bytes.Repeat([]byte{0xEE}, size), 0o600); err != nil {
		t.Fatal(err)
	}
	r := rand.New(rand.NewPCG(3, 3))
	for range 20 {
		if err := Create(path, CreateOptions{Size: size, Backing: "base", BackingFormat: "raw"}); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(os.Args[0], "-test.run=^TestKilledWriter$")
		cmd.Env = append(os.Environ(), "QCOW2_TEST_WRITE="+path)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		flushed := 0
		fmt.Fscan(out, &flushed)
		for range r.IntN(1 << 21) {
			flushed += 0 // some instructions
		}
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if flushed == 0 {
			t.Fatal("the writer flushed nothing")
		}
		n, err := Open(path, false)
		if err != nil {
			t.Fatal(err)
		}
		got := make([]byte, size)
		if err := n.Readv([][]byte{got}, 0); err != nil {
			t.Fatal(err)
		}
		for at := 0; at < size; at += 96 << 10 {
			if v := int(got[at]); v < flushed {
				t.Errorf("at %d stands %d, and %d was flushed", at, v, flushed)
			}
			if at+4096 < size && got[at+4096] != 0xEE {
				t.Errorf("at %d stands %#x, which nobody wrote", at+4096, got[at+4096])
			}
		}
		if err := n.Close(); err != nil {
			t.Fatal(err)
		}
		clean(t, path)
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
}

// An overlay is put on a disk that is in use, which others may read from then on.
func TestOverlay(t *testing.T) {
	dir := t.TempDir()
	base := filepath.Join(dir, "base")
	if err := os.WriteFile(base, bytes.Repeat([]byte("base"), 1<<18), 0o600); err != nil {
		t.Fatal(err)
	}
	disk, err := raw.Open(base, false)
	if err != nil {
		t.Fatal(err)
	}
	root := block.NewRoot(disk)
	if err := root.Writev([][]byte{[]byte("mine")}, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := raw.Open(base, true); !errors.Is(err, block.ErrInUse) {
		t.Fatalf("a disk that is written: %v", err)
	}
	for i, name := range []string{"a.qcow2", "b.qcow2"} {
		under := root.Current().(block.Freezer)
		if err := under.Freeze(); err != nil {
			t.Fatal(err)
		}
		if err := CreateOver(filepath.Join(dir, name), under); err != nil {
			t.Fatal(err)
		}
		over, err := OpenOver(filepath.Join(dir, name), under)
		if err != nil {
			t.Fatal(err)
		}
		root.Swap(over)
		if err := root.Writev([][]byte{{byte(i + 1)}}, int64(i+1)); err != nil {
			t.Fatal(err)
		}
	}
	other, err := raw.Open(base, true)
	if err != nil {
		t.Fatalf("a disk under an overlay: %v", err)
	}
	defer other.Close()
	if _, err := raw.Open(base, false); !errors.Is(err, block.ErrInUse) {
		t.Errorf("another writer of a disk under an overlay: %v", err)
	}
	got := make([]byte, 8)
	if err := root.Readv([][]byte{got}, 0); err != nil || string(got) != "m\x01\x02ebase" {
		t.Errorf("%q %v", got, err)
	}
	if err := other.Readv([][]byte{got}, 0); err != nil || string(got) != "minebase" {
		t.Errorf("the base holds %q: %v", got, err)
	}
	if err := root.Close(); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"a.qcow2", "b.qcow2"} {
		clean(t, filepath.Join(dir, name))
	}
	if err := CreateOver(base, disk); !errors.Is(err, fs.ErrExist) {
		t.Errorf("an overlay in place of a file that is there: %v", err)
	}
}
