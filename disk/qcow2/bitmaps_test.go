package qcow2

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/gnomon-vmm/gnomon/disk/bitmap"
)

// stretch is a run of bits, in bytes of the disk.
type stretch struct{ start, length int64 }

func runs(b *bitmap.Bitmap) []stretch {
	var out []stretch
	for off := int64(0); ; {
		start, n := b.Next(off)
		if n == 0 {
			return out
		}
		out = append(out, stretch{start, n})
		off = start + n
	}
}

// bitmapByQEMU has QEMU serve a bitmap, and reads it as the map of that.
func bitmapByQEMU(t *testing.T, path, name string) []stretch {
	t.Helper()
	dir, err := os.MkdirTemp("", "nbd") // a name without commas
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	sock := filepath.Join(dir, "s")
	server := exec.Command("qemu-nbd", "-t", "-r", "-f", "qcow2", "-B", name, "-k", sock, path)
	var stderr bytes.Buffer
	server.Stderr = &stderr
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		_ = server.Wait()
		close(ended)
	}()
	defer func() {
		_ = server.Process.Kill()
		<-ended
	}()
	var out []byte
	for {
		out, err = exec.Command("qemu-img", "map", "--output=json", "--image-opts",
			"driver=nbd,server.type=unix,server.path="+sock+",x-dirty-bitmap=qemu:dirty-bitmap:"+name).Output()
		if err == nil {
			break
		}
		select {
		case <-ended:
			t.Fatalf("qemu-nbd: %s", &stderr)
		default: // it does not listen yet
		}
	}
	var all []mapped
	if err := json.Unmarshal(out, &all); err != nil {
		t.Fatal(err)
	}
	var dirty []stretch
	for _, m := range all {
		if m.Data { // QEMU's word for a clear bit
			continue
		}
		if k := len(dirty) - 1; k >= 0 && dirty[k].start+dirty[k].length == m.Start {
			dirty[k].length += m.Length
			continue
		}
		dirty = append(dirty, stretch{m.Start, m.Length})
	}
	return dirty
}

// TestBitmapsOfQEMU: bitmaps that QEMU made are read, kept up to date, and read by
// QEMU again.
func TestBitmapsOfQEMU(t *testing.T) {
	for _, options := range []string{"cluster_size=64k", "cluster_size=1k", "cluster_size=64k,backing_file=base.raw,backing_fmt=raw"} {
		t.Run(options, func(t *testing.T) {
			dir := t.TempDir()
			writeFile(t, filepath.Join(dir, "base.raw"), mixed(1, 1<<20))
			create(t, dir, "image.qcow2", "100M", options)
			path := filepath.Join(dir, "image.qcow2")
			qemuImg(t, "bitmap", "--add", "-g", "4k", path, "fine")
			qemuImg(t, "bitmap", "--add", "-g", "1M", path, "coarse")
			qemuImg(t, "bitmap", "--add", "--disable", path, "off")
			edit(t, dir, "image.qcow2", "write 1M 100k", "write 70M 10")
			want := map[string][]stretch{
				"fine":   {{1 << 20, 100 << 10}, {70 << 20, 4096}},
				"coarse": {{1 << 20, 1 << 20}, {70 << 20, 1 << 20}},
				"off":    nil,
			}
			compare := func() {
				t.Helper()
				n := mustOpen(t, path)
				defer n.Close()
				all, err := n.Bitmaps()
				if err != nil || len(all) != len(want) {
					t.Fatalf("%+v %v", all, err)
				}
				for _, info := range all {
					b, err := n.Bitmap(info.Name)
					if err != nil {
						t.Fatal(err)
					}
					if got := runs(b); !slices.Equal(got, want[info.Name]) {
						t.Errorf("%s: %v, want %v", info.Name, got, want[info.Name])
					}
					if b.Enabled() != (info.Name != "off") || info.Enabled != b.Enabled() || info.Inconsistent || b.Granularity() != info.Granularity {
						t.Errorf("%+v", info)
					}
				}
			}
			compare()

			n, err := Open(path, false)
			if err != nil {
				t.Fatal(err)
			}
			if err := n.WriteZeroes(99<<20, 1<<20, true); err != nil {
				t.Fatal(err)
			}
			mine, err := bitmap.New("mine", n.Size(), 0)
			if err != nil {
				t.Fatal(err)
			}
			mine.SetEnabled(false)
			mine.Set(5<<20, 1<<20)
			if err := errors.Join(n.AddBitmap(mine), n.RemoveBitmap("off"), n.Writev([][]byte{{1}}, 0), n.Close()); err != nil {
				t.Fatal(err)
			}
			delete(want, "off")
			want["fine"] = []stretch{{0, 4096}, {1 << 20, 100 << 10}, {70 << 20, 4096}, {99 << 20, 1 << 20}}
			want["coarse"] = []stretch{{0, 2 << 20}, {70 << 20, 1 << 20}, {99 << 20, 1 << 20}}
			clean(t, path)
			for name, w := range want {
				if got := bitmapByQEMU(t, path, name); !slices.Equal(got, w) {
					t.Errorf("%s by QEMU: %v, want %v", name, got, w)
				}
			}
			want["mine"] = []stretch{{5 << 20, 1 << 20}}
			if got := bitmapByQEMU(t, path, "mine"); !slices.Equal(got, want["mine"]) {
				t.Errorf("mine by QEMU: %v", got)
			}

			// And all are taken away.
			if n, err = Open(path, false); err != nil {
				t.Fatal(err)
			}
			for name := range want {
				if err := n.RemoveBitmap(name); err != nil {
					t.Error(err)
				}
			}
			if err := n.Close(); err != nil {
				t.Fatal(err)
			}
			clean(t, path)
			if out := qemuImg(t, "info", path); strings.Contains(out, "bitmaps") {
				t.Error(out)
			}
		})
	}
}

// A bitmap that was in use when its disk was not closed tells nothing.
func TestBitmapInUse(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "image.qcow2")
	if err := Create(path, CreateOptions{Size: 1 << 20, Backing: "base.qcow2", BackingFormat: "qcow2"}); err != nil {
		t.Fatal(err)
	}
	create(t, dir, "base.qcow2", "1M")
	n, err := Open(path, false)
	if err != nil {
		t.Fatal(err)
	}
	b, err := bitmap.New("b", n.Size(), 512)
	if err != nil {
		t.Fatal(err)
	}
	if err := n.AddBitmap(b); err != nil {
		t.Fatal(err)
	}
	for _, b := range []string{"b", "", strings.Repeat("x", 1024)} {
		bad, _ := bitmap.New(b, n.Size(), 512)
		if err := n.AddBitmap(bad); !errors.Is(err, ErrBitmap) {
			t.Errorf("%q: %v", b, err)
		}
	}
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if n, err = Open(path, false); err != nil {
		t.Fatal(err)
	}
	if err := n.Flush(); err != nil {
		t.Fatal(err)
	}
	if now, _ := os.ReadFile(path); string(now) != string(before) {
		t.Error("the image was changed by opening it")
	}
	if err := errors.Join(n.Writev([][]byte{{1}}, 0), n.Flush()); err != nil {
		t.Fatal(err)
	}
	killed, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	n.Close()
	writeFile(t, path, killed)
	for _, readOnly := range []bool{true, false} {
		n, err := Open(path, readOnly)
		if err != nil {
			t.Fatal(err)
		}
		if all, err := n.Bitmaps(); err != nil || len(all) != 1 || !all[0].Inconsistent || !all[0].Enabled {
			t.Errorf("%+v %v", all, err)
		}
		if _, err := n.Bitmap("b"); !errors.Is(err, ErrBitmap) || !strings.Contains(err.Error(), "remove it") {
			t.Errorf("%v", err)
		}
		if _, err := n.Bitmap("c"); !errors.Is(err, ErrBitmap) {
			t.Errorf("%v", err)
		}
		if !readOnly {
			if err := n.RemoveBitmap("b"); err != nil {
				t.Error(err)
			}
		}
		n.Close()
	}
	clean(t, path)
	// Another program wrote the disk that does not know of bitmaps.
	writeFile(t, path, before)
	patch(t, path, 88, be64(1<<40))
	if n, err = Open(path, false); err != nil {
		t.Fatal(err)
	}
	if all, err := n.Bitmaps(); err != nil || len(all) != 0 || n.header.Autoclear != 0 {
		t.Errorf("%+v %v", all, err)
	}
	n.Close()
	if r := checkByUs(t, path, RepairLeaks); r.LeaksFixed == 0 || !r.Clean() {
		t.Errorf("%+v", r)
	}
	clean(t, path)
}
