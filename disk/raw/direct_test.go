package raw

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/disk/aio"
	"github.com/gnomon-vmm/gnomon/disk/block"
)

// direct are the ways past the page cache.
var direct = []Options{{Direct: true, Engine: aio.Threads}, {Direct: true, Engine: aio.IOUring}}

func openWith(t *testing.T, path string, o Options) *Node {
	t.Helper()
	n, err := OpenWith(path, false, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.Close() })
	return n
}

// loop makes a block device of a file, with sectors of so many bytes.
func loop(t *testing.T, path string, sectorSize int) string {
	t.Helper()
	out, err := exec.Command("losetup", "--find", "--show", "--sector-size", strconv.Itoa(sectorSize), path).CombinedOutput()
	if err != nil {
		t.Skipf("no loop devices here: %s", out)
	}
	dev := strings.TrimSpace(string(out))
	t.Cleanup(func() { exec.Command("losetup", "--detach", dev).Run() })
	return dev
}

// Past the page cache a disk is what an array of bytes is, whatever a guest or a
// format asks for: of files, and of devices with sectors larger than requests.
func TestDirectModel(t *testing.T) {
	const size = 1 << 20
	for _, o := range direct {
		for _, sectors := range []int{0, 512, 4096} {
			t.Run(fmt.Sprintf("%s/device=%d", o.Engine, sectors), func(t *testing.T) {
				n, path, model := newDisk(t, size)
				n.Close()
				if sectors > 0 {
					path = loop(t, path, sectors)
				}
				n = openWith(t, path, o)
				operate(t, n, model, rand.New(rand.NewPCG(3, 4)), 300, false)
				if err := n.Close(); err != nil {
					t.Fatal(err)
				}
				again := open(t, path, false)
				got := make([]byte, size)
				if err := again.Readv([][]byte{got}, 0); err != nil || !bytes.Equal(got, model) {
					t.Errorf("%v: by way of the page cache it is not what was written", err)
				}
			})
		}
	}
}

// Parts of a block that several goroutines write and zero are all as their own
// wrote them.
func TestDirectNeighbours(t *testing.T) {
	const size, part, writers = 64 << 10, 128, 8
	for _, o := range direct {
		n, path, model := newDisk(t, size)
		n.Close()
		n = openWith(t, path, o)
		var all sync.WaitGroup
		for w := range writers {
			all.Go(func() {
				rng := rand.New(rand.NewPCG(uint64(w), 5))
				for i := range 20 {
					at := (rng.IntN(size/part/writers)*writers + w) * part
					area := model[at : at+part]
					var err error
					if i%2 == 0 {
						clear(area)
						err = n.WriteZeroes(int64(at), part, false)
					} else {
						for k := range area {
							area[k] = byte(i)
						}
						err = n.Writev([][]byte{bytes.Clone(area)}, int64(at))
					}
					if err != nil {
						t.Error(err)
					}
				}
			})
		}
		all.Wait()
		got := make([]byte, size)
		if err := n.Readv([][]byte{got}, 0); err != nil || !bytes.Equal(got, model) {
			t.Errorf("%s: %v: what one wrote was undone by another", o.Engine, err)
		}
	}
}

// A file system without space is told, and the disk goes on.
func TestDirectNoSpace(t *testing.T) {
	dir := t.TempDir()
	image, mount := filepath.Join(dir, "fs"), filepath.Join(dir, "mounted")
	if err := os.Mkdir(mount, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"truncate", "-s", "16M", image}, {"mkfs.ext4", "-q", "-O", "^has_journal", image}} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v: %s", args, err, out)
		}
	}
	if out, err := exec.Command("mount", "-o", "loop", image, mount).CombinedOutput(); err != nil {
		t.Skipf("no file systems can be mounted here: %s", out)
	}
	t.Cleanup(func() {
		if out, err := exec.Command("umount", mount).CombinedOutput(); err != nil {
			t.Errorf("umount: %v: %s", err, out)
		}
	})
	for _, o := range direct {
		path := filepath.Join(mount, string(o.Engine))
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(path, 64<<20); err != nil {
			t.Fatal(err)
		}
		n := openWith(t, path, o)
		data := noise(1 << 20)
		full := int64(-1)
		for off := int64(0); off < n.Size(); off += int64(len(data)) {
			if err := n.Writev([][]byte{data}, off); errors.Is(err, unix.ENOSPC) {
				full = off
				break
			} else if err != nil {
				t.Fatal(err)
			}
		}
		if full <= 0 {
			t.Fatalf("%s: 64 MiB were written to a file system of 16", o.Engine)
		}
		if err := n.Writev([][]byte{data[:10]}, 60<<20+5); !errors.Is(err, unix.ENOSPC) {
			t.Errorf("%s: write of part of a block where there is no space: %v", o.Engine, err)
		}
		got := make([]byte, len(data))
		for off := int64(0); off < full; off += int64(len(data)) {
			if err := n.Readv([][]byte{got}, off); err != nil || !bytes.Equal(got, data) {
				t.Fatalf("%s: at %d: %v: what was written is not there", o.Engine, off, err)
			}
		}
		if err := n.Discard(0, 1<<20); err != nil {
			t.Fatal(err)
		}
		if err := n.Writev([][]byte{data[:10]}, 60<<20+5); err != nil {
			t.Errorf("%s: with space again: %v", o.Engine, err)
		}
		if err := n.Close(); err != nil {
			t.Error(err)
		}
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
}

// What cannot be done past the page cache is refused by name.
func TestDirectRefused(t *testing.T) {
	// A regular file whose file system has no direct I/O.
	n, err := OpenWith("/proc/version", true, Options{Direct: true})
	if n != nil || !errors.Is(err, aio.ErrDirect) || !strings.Contains(err.Error(), "cache=writeback") {
		t.Errorf("%v, %v", n, err)
	}
	_, path, _ := newDisk(t, 4096)
	n, err = OpenWith(path, false, Options{Direct: true})
	if n != nil || !errors.Is(err, block.ErrInUse) {
		t.Errorf("%v, %v", n, err)
	}
}

// Writes that pass through make the device flush, each of them.
func TestWriteThrough(t *testing.T) {
	n, path, _ := newDisk(t, 1<<20)
	n.Close()
	dev := loop(t, path, 512)
	flushes := func() int {
		text, err := os.ReadFile("/sys/block/" + filepath.Base(dev) + "/stat")
		if err != nil {
			t.Fatal(err)
		}
		fields := strings.Fields(string(text))
		if len(fields) < 16 {
			t.Skip("the kernel does not count flushes of devices")
		}
		count, err := strconv.Atoi(fields[15])
		if err != nil {
			t.Fatal(err)
		}
		return count
	}
	for _, tt := range []struct {
		o    Options
		want int
	}{
		{Options{}, 0},
		{Options{Direct: true}, 0},
		{Options{WriteThrough: true}, 3},
		{Options{Direct: true, WriteThrough: true}, 3},
	} {
		n := openWith(t, dev, tt.o)
		before := flushes()
		for _, err := range []error{
			n.Writev([][]byte{[]byte("gnomon")}, 5000), n.Writev([][]byte{make([]byte, 4096)}, 8192), n.WriteZeroes(65536, 4096, false),
		} {
			if err != nil {
				t.Fatal(err)
			}
		}
		if got := flushes() - before; got < tt.want || tt.want == 0 && got > 0 {
			t.Errorf("%+v: the device was flushed %d times, not %d", tt.o, got, tt.want)
		}
		if err := n.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
