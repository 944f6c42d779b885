package disk

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/gnomon-vmm/gnomon/disk/aio"
	"github.com/gnomon-vmm/gnomon/disk/qcow2"
)

func qemuImg(t *testing.T, args ...string) {
	t.Helper()
	if out, err := exec.Command("qemu-img", args...).CombinedOutput(); err != nil {
		t.Fatalf("qemu-img %v: %v: %s", args, err, out)
	}
}

// A disk is what an array of bytes is and its image is whole, however it is cached and
// its requests are made; clusters may be smaller than what direct I/O wants.
func TestCacheModes(t *testing.T) {
	const size = 2<<20 + 512
	for _, image := range []struct {
		format  string
		cluster int64
	}{{FormatRaw, 0}, {FormatQcow2, 512}, {FormatQcow2, 65536}} {
		for _, o := range []Options{
			{Cache: CacheNone},
			{Cache: CacheNone, Engine: aio.Threads},
			{Cache: CacheNone, Engine: aio.IOUring},
			{Cache: CacheWriteback, Engine: aio.IOUring},
			{Cache: CacheWriteThrough},
			{Cache: CacheDirectSync},
			{Cache: CacheUnsafe},
		} {
			t.Run(fmt.Sprintf("%s/%d/%s/%s", image.format, image.cluster, o.Cache, o.Engine), func(t *testing.T) {
				dir := t.TempDir()
				path, base := filepath.Join(dir, "image"), filepath.Join(dir, "base")
				model := make([]byte, size)
				rng := rand.New(rand.NewPCG(6, 7))
				rand.NewChaCha8([32]byte{1}).Read(model[:size/2])
				if err := os.WriteFile(base, model, 0o600); err != nil {
					t.Fatal(err)
				}
				if image.format == FormatQcow2 {
					err := qcow2.Create(path, qcow2.CreateOptions{Size: size, ClusterSize: image.cluster, Backing: "base", BackingFormat: FormatRaw})
					if err != nil {
						t.Fatal(err)
					}
				} else if err := os.Link(base, path); err != nil {
					t.Fatal(err)
				}
				o.Format = image.format
				n, err := Open(path, o)
				if err != nil {
					t.Fatal(err)
				}
				defer n.Close()
				for step := range 100 {
					off := rng.Int64N(size)
					length := 1 + rng.Int64N(min(size-off, 1<<(9+rng.IntN(9))))
					if rng.IntN(2) == 0 {
						off &^= 4095
					}
					area := model[off:min(size, off+length)]
					switch rng.IntN(5) {
					case 0, 1:
						got := make([]byte, len(area))
						if err = n.Readv([][]byte{got}, off); err == nil && !bytes.Equal(got, area) {
							t.Fatalf("step %d: read of %d at %d is not what was written", step, len(area), off)
						}
					case 2, 3:
						for i := range area {
							area[i] = byte(rng.Uint32())
						}
						err = n.Writev([][]byte{bytes.Clone(area)}, off)
					default:
						clear(area)
						err = n.WriteZeroes(off, int64(len(area)), true)
					}
					if err == nil && step%30 == 29 {
						err = n.Flush()
					}
					if err != nil {
						t.Fatalf("step %d: %v", step, err)
					}
				}
				if err := n.Close(); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(filepath.Join(dir, "model"), model, 0o600); err != nil {
					t.Fatal(err)
				}
				if image.format == FormatQcow2 {
					qemuImg(t, "check", "-q", "-f", image.format, path)
				}
				qemuImg(t, "compare", "-q", "-f", "raw", "-F", image.format, filepath.Join(dir, "model"), path)
			})
		}
	}
}

// What was written through is in the image's file, with all that leads to it,
// without a flush; else it is not.
func TestWriteThrough(t *testing.T) {
	for _, cache := range []Cache{CacheWriteback, CacheWriteThrough, CacheDirectSync} {
		path := filepath.Join(t.TempDir(), "image.qcow2")
		if err := qcow2.Create(path, qcow2.CreateOptions{Size: 1 << 30}); err != nil {
			t.Fatal(err)
		}
		n, err := Open(path, Options{Cache: cache})
		if err != nil {
			t.Fatal(err)
		}
		defer n.Close()
		want := bytes.Repeat([]byte("gnomon"), 1000)
		if err := n.Writev([][]byte{want}, 777); err != nil {
			t.Fatal(err)
		}
		file, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		now := filepath.Join(t.TempDir(), "now.qcow2")
		if err := os.WriteFile(now, file, 0o600); err != nil {
			t.Fatal(err)
		}
		reader, err := Open(now, Options{ReadOnly: true})
		if err != nil {
			t.Fatal(err)
		}
		defer reader.Close()
		got := make([]byte, len(want))
		if err := reader.Readv([][]byte{got}, 777); err != nil {
			t.Fatal(err)
		}
		if there := bytes.Equal(got, want); there != (cache != CacheWriteback) {
			t.Errorf("cache=%s: after a write without a flush it is there: %v", cache, there)
		}
	}
}
