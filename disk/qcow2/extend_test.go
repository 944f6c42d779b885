package qcow2

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// An image whose growth was cut off has its old size, and grows the next time; nobody
// sees what was written.
func TestExtendCutOff(t *testing.T) {
	const old, size = 3 << 10, 200 << 10
	for _, cluster := range []int64{512, 4096} {
		path, cut := filepath.Join(t.TempDir(), "image"), filepath.Join(t.TempDir(), "cut")
		if err := Create(path, CreateOptions{Size: old, ClusterSize: cluster}); err != nil {
			t.Fatal(err)
		}
		// fill writes zeroes, and copies the file as a kill would leave it.
		fill := func(n *Node, to string) func() error {
			return func() error {
				if err := n.Writev([][]byte{make([]byte, size-old)}, old); err != nil {
					return err
				}
				if err := n.Flush(); err != nil {
					return err
				}
				b, err := os.ReadFile(path)
				if err != nil {
					return err
				}
				return os.WriteFile(to, b, 0o600)
			}
		}
		grow := func(path, copied string) {
			t.Helper()
			n, err := Open(path, false)
			if err != nil {
				t.Fatal(err)
			}
			if n.Size() != old {
				t.Errorf("it has %d bytes", n.Size())
			}
			if err := n.Extend(size, fill(n, copied)); err != nil {
				t.Fatal(err)
			}
			if err := n.Close(); err != nil {
				t.Fatal(err)
			}
		}
		grow(path, cut)
		if out, err := exec.Command("qemu-img", "check", "-r", "leaks", cut).CombinedOutput(); err != nil {
			t.Errorf("cut off: %v\n%s", err, out)
		}
		grow(cut, filepath.Join(t.TempDir(), "again"))
		for _, p := range []string{path, cut} {
			if out, err := exec.Command("qemu-img", "check", p).CombinedOutput(); err != nil {
				t.Errorf("%v\n%s", err, out)
			}
			n, err := Open(p, true)
			if err != nil {
				t.Fatal(err)
			}
			if taken := n.Info().ActualSize; n.Size() != size || taken < size-old {
				t.Errorf("%d bytes, which take %d", n.Size(), taken)
			}
			n.Close()
		}
	}
}

// A shrink that is killed when the file has the new size leaves clusters behind the end. Who
// grows the disk again does not see them.
func TestShrinkCutOff(t *testing.T) {
	const old, size = 100 << 10, 1 << 20
	for _, cluster := range []int64{512, 65536} {
		path := filepath.Join(t.TempDir(), "image")
		if err := Create(path, CreateOptions{Size: size, ClusterSize: cluster}); err != nil {
			t.Fatal(err)
		}
		want := mixed(1, size)
		n, err := Open(path, false)
		if err != nil {
			t.Fatal(err)
		}
		if err := n.Writev([][]byte{want}, 0); err != nil {
			t.Fatal(err)
		}
		if err := n.Close(); err != nil {
			t.Fatal(err)
		}
		patch(t, path, 24, be64(old))
		if n, err = Open(path, false); err != nil {
			t.Fatal(err)
		}
		if err := n.Resize(size); err != nil {
			t.Fatal(err)
		}
		clear(want[old:])
		if got := readAll(t, n); !bytes.Equal(got, want) {
			t.Errorf("clusters of %d: it differs at %d", cluster, firstDifference(got, want))
		}
		if err := n.Close(); err != nil {
			t.Fatal(err)
		}
		clean(t, path)
		same(t, path, want)
	}
}
