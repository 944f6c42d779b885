package changes

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/qcow2"
	"github.com/gnomon-vmm/gnomon/disk/raw"
)

const childEnv = "GNOMON_TEST_CHANGES_CHILD"

func TestMain(m *testing.M) {
	if path := os.Getenv(childEnv); path != "" {
		if err := child(path); err != nil {
			fmt.Println("error", err)
		}
		os.Exit(1)
	}
	os.Exit(m.Run())
}

const childBlock = 4 << 10

// child writes blocks of a disk, and says which, until it is killed.
func child(path string) error {
	n, err := raw.Open(path, false)
	if err != nil {
		return err
	}
	r, err := Open(Path(path), n, Options{BlockSize: childBlock})
	if err != nil {
		return err
	}
	root := block.NewRoot(n)
	root.SetRecorders([]block.Recorder{r})
	data := [][]byte{make([]byte, 512)}
	for i := 0; ; i++ {
		b := rand.Int64N(n.Size() / childBlock)
		fmt.Println("write", b) // before: what is said may have happened
		if err := root.Writev(data, b*childBlock); err != nil {
			return err
		}
		fmt.Println("wrote", b)
		if i%16 == 15 {
			r.op.Lock()
			r.patience = 0
			r.op.Unlock()
			r.tick()
		}
	}
}

// makeDisk makes a raw image.
func makeDisk(t testing.TB, size int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
	return path
}

func openBoth(t testing.TB, path string) (block.Node, *Recorder) {
	t.Helper()
	n, err := raw.Open(path, false)
	if err != nil {
		t.Fatal(err)
	}
	r, err := Open(Path(path), n, Options{BlockSize: childBlock})
	if err != nil {
		t.Fatal(err)
	}
	return n, r
}

// What a process had written is told after each of 20 kill -9.
func TestKilled(t *testing.T) {
	const size = 64 << 20
	path := makeDisk(t, size)
	n, r := openBoth(t, path)
	s, err := r.Since(n, "app")
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(s.Commit(), n.Close(), r.Close()); err != nil {
		t.Fatal(err)
	}
	wrote := map[int64]bool{}
	for kill := range 20 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), childEnv+"="+path)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		for left := 20 + rand.IntN(200); lines.Scan(); left-- {
			var b int64
			if _, err := fmt.Sscanf(lines.Text(), "wrote %d", &b); err == nil {
				wrote[b] = true
			} else if strings.HasPrefix(lines.Text(), "error") {
				t.Fatal(lines.Text())
			}
			if left == 0 {
				cmd.Process.Kill()
			}
		}
		io.Copy(io.Discard, out)
		cmd.Wait()
		n, r := openBoth(t, path)
		s, err := r.Since(n, "app")
		if err != nil {
			t.Fatal(err)
		}
		got := blocksIn(s, childBlock)
		for b := range wrote {
			if !got[b] {
				t.Fatalf("kill %d: block %d was written and is not told", kill, b)
			}
		}
		if s.Changed == nil {
			t.Fatalf("kill %d: %s", kill, s.Reason)
		}
		if kill%3 == 2 {
			if err := s.Commit(); err != nil {
				t.Fatal(err)
			}
			clear(wrote)
		}
		if err := errors.Join(n.Close(), r.Close()); err != nil {
			t.Fatal(err)
		}
	}
}

// Images in files: what is written with a recorder is told, what is written without one
// makes everything told, and a sidecar in use is refused.
func TestFiles(t *testing.T) {
	const size = 8 << 20
	for _, format := range []string{"raw", "qcow2"} {
		t.Run(format, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, "disk."+format)
			open := func() block.Node {
				var n block.Node
				var err error
				if format == "raw" {
					n, err = raw.Open(path, false)
				} else {
					n, err = qcow2.Open(path, false)
				}
				if err != nil {
					t.Fatal(err)
				}
				return n
			}
			if format == "raw" {
				if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, size)); err != nil {
					t.Fatal(err)
				}
			} else if err := qcow2.Create(path, qcow2.CreateOptions{Size: size}); err != nil {
				t.Fatal(err)
			}
			step := func(write func(n block.Node, r *Recorder)) *Set {
				t.Helper()
				n := open()
				r, err := Open(Path(path), n, Options{})
				if err != nil {
					t.Fatal(err)
				}
				s, err := r.Since(n, "app")
				if err == nil {
					err = s.Commit()
				}
				if err != nil {
					t.Fatal(err)
				}
				write(n, r)
				if err := errors.Join(n.Close(), r.Close(), r.Close()); err != nil {
					t.Fatal(err)
				}
				return s
			}
			write := func(off int64) func(n block.Node, r *Recorder) {
				return func(n block.Node, r *Recorder) {
					root := block.NewRoot(n)
					root.SetRecorders([]block.Recorder{r})
					if err := root.Writev([][]byte{[]byte("x")}, off); err != nil {
						t.Fatal(err)
					}
				}
			}
			if s := step(write(5 << 20)); s.Changed != nil {
				t.Error("the first backup is not of all of the disk")
			}
			if s := step(func(n block.Node, _ *Recorder) {
				if _, err := Open(Path(path), n, Options{}); !errors.Is(err, block.ErrInUse) {
					t.Errorf("a second recorder: %v", err)
				}
			}); s.Changed == nil || s.Bytes() != 64<<10 || !s.Changed.Get(5<<20) {
				t.Errorf("%d bytes changed: %s", s.Bytes(), s.Reason)
			}
			if s := step(func(block.Node, *Recorder) {}); s.Changed == nil || s.Bytes() != 0 {
				t.Errorf("%d bytes changed: %s", s.Bytes(), s.Reason)
			}
			n := open()
			if err := errors.Join(n.Writev([][]byte{[]byte("x")}, 0), n.Close()); err != nil {
				t.Fatal(err)
			}
			if s := step(func(block.Node, *Recorder) {}); s.Changed != nil || !strings.Contains(s.Reason, "was written while") {
				t.Errorf("after a foreign write: %d bytes, %q", s.Bytes(), s.Reason)
			}
			b, err := os.ReadFile(path)
			if err == nil {
				err = errors.Join(os.WriteFile(path+".other", b, 0o600), os.Rename(path+".other", path))
			}
			if err != nil {
				t.Fatal(err)
			}
			if s := step(func(block.Node, *Recorder) {}); s.Changed != nil || !strings.Contains(s.Reason, "another one") {
				t.Errorf("after replacing it: %d bytes, %q", s.Bytes(), s.Reason)
			}
			left, err := os.ReadDir(dir)
			if err != nil || len(left) != 2 {
				t.Errorf("files left: %v, %v", left, err)
			}
		})
	}
	if _, err := Open(t.TempDir(), disk{size: size}, Options{}); err == nil {
		t.Error("a directory was taken for a sidecar")
	}
}

// Whatever a sidecar holds, opening it and asking ends, and what is recorded later is
// told.
func FuzzSidecar(f *testing.F) {
	const size = 3<<20 + 512
	h := newHost(size)
	r := h.open(f, 4<<10)
	add := func(b []byte) {
		part := func(at, n int) []byte {
			return slices.Clone(b[min(at, len(b)):min(at+n, len(b))])
		}
		f.Add(part(0, headerFixed+4+4*appSize), part(slotSize, headerFixed+4+4*appSize), part(marksAt, markSize), part(recordsAt, 4*recordSize))
	}
	add(h.store.b)
	backup(f, r, h, "app")
	r.Record(1<<20, 100)
	add(h.store.b) // as a crash leaves it
	backup(f, r, h, "other")
	mustClose(f, r)
	add(h.store.b)
	add(h.store.b[:recordsAt+100])
	add(h.store.b[:100])
	add(nil)
	big := newHost(2 << 40)
	big.open(f, 0)
	add(big.store.b)
	f.Fuzz(func(t *testing.T, first, second, marks, records []byte) {
		h := newHost(size)
		for at, b := range map[int64][]byte{0: fix(first), slotSize: fix(second), marksAt: marks, recordsAt: records} {
			if len(b) > 0 {
				h.store.b = put(h.store.b, at, b)
			}
		}
		r, err := Open("", h.disk, Options{
			store: h.store, identify: func(block.Node) diskIdentity { return h.is }, still: true,
		})
		if err != nil {
			if !errors.Is(err, ErrNewer) {
				t.Fatal(err)
			}
			return
		}
		r.Record(2<<20, 1)
		s, err := r.Since(h.disk, "app")
		if err != nil {
			if errors.Is(err, ErrApplication) {
				return
			}
			t.Fatal(err)
		}
		if !blocksIn(s, 4<<10)[(2<<20)/(4<<10)] {
			t.Fatal("what was recorded is not told")
		}
		end := int64(0)
		for off, n := range s.Extents() {
			if off < end || n <= 0 || off+n > size {
				t.Fatalf("%d bytes at %d, after %d", n, off, end)
			}
			end = off + n
		}
		if err := errors.Join(s.Commit(), r.Close()); err != nil {
			t.Fatal(err)
		}
	})
}

// fix makes a header's checksum right, so that what is behind it is tried too.
func fix(b []byte) []byte {
	b = slices.Clone(b[:min(len(b), slotSize)])
	if len(b) < headerFixed+4 {
		return b
	}
	if size := binary.LittleEndian.Uint32(b[12:]); size >= headerFixed+4 && int64(size) <= int64(len(b)) {
		binary.LittleEndian.PutUint32(b[size-4:], crc32.Checksum(b[:size-4], castagnoli))
	}
	return b
}
