package archive

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/gnomon-vmm/gnomon/disk"
	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/changes"
	"github.com/gnomon-vmm/gnomon/disk/qcow2"
)

const (
	size     = 4<<20 + 512
	childEnv = "GNOMON_TEST_ARCHIVE_CHILD"
	app      = "backup"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(childEnv); dir != "" {
		if err := child(dir, filepath.Base(dir)); err != nil {
			fmt.Println(err)
		}
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// tracked is a disk whose changes are recorded.
type tracked struct {
	block.Node
	root     *block.Root
	recorder *changes.Recorder
}

func openTracked(path string) (*tracked, error) {
	n, err := disk.Open(path, disk.Options{})
	if err != nil {
		return nil, err
	}
	r, err := changes.Open(changes.Path(path), n, changes.Options{BlockSize: 4 << 10})
	if err != nil {
		return nil, errors.Join(err, n.Close())
	}
	root := block.NewRoot(n)
	root.RecordAlways(r)
	return &tracked{n, root, r}, nil
}

func (d *tracked) close() error { return errors.Join(d.Close(), d.recorder.Close()) }

// change writes what the disk has new at its n-th backup.
func change(root block.Node, n int) error {
	r := rand.New(rand.NewPCG(uint64(n), 1))
	for range 1 + r.IntN(12) {
		length := 1 + r.Int64N(100<<10)
		off := r.Int64N(root.Size() - length)
		var err error
		if r.IntN(4) == 0 {
			err = root.WriteZeroes(off, length, r.IntN(2) == 0)
		} else {
			err = root.Writev([][]byte{bytes.Repeat([]byte{byte(r.Uint32())}, int(length))}, off)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// step changes the disk and backs it up.
func step(a *Archive, d *tracked) (Step, error) {
	n := 1
	if last := a.Last(); last != nil {
		n = last.Number + 1
	}
	if err := change(d.root, n); err != nil {
		return Step{}, err
	}
	set, err := d.recorder.Since(d.Node, app)
	if err != nil {
		return Step{}, err
	}
	s, err := a.Add(context.Background(), d.Node, set, nil)
	if err != nil {
		return Step{}, err
	}
	return s, set.Commit()
}

// content is what a node reads as.
func content(t *testing.T, n block.Node) []byte {
	t.Helper()
	b := make([]byte, n.Size())
	if err := n.Readv([][]byte{b}, 0); err != nil {
		t.Fatal(err)
	}
	return b
}

func contentOf(t *testing.T, a *Archive, number int) []byte {
	t.Helper()
	n, err := a.OpenStep(number)
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	return content(t, n)
}

func sound(t *testing.T, a *Archive) {
	t.Helper()
	problems, err := a.Verify(context.Background(), nil)
	if err != nil || len(problems) > 0 {
		t.Fatalf("verify: %v, %v", problems, err)
	}
}

func makeDisk(t *testing.T, dir, format string) string {
	t.Helper()
	path := filepath.Join(dir, "disk."+format)
	var err error
	if format == "raw" {
		err = errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, size))
	} else {
		err = qcow2.Create(path, qcow2.CreateOptions{Size: size})
	}
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// Twenty backups, of which all but the first have only what changed, are each the disk
// as it was, to qemu-img too; and those that are kept are it after the others have
// been removed.
func TestChain(t *testing.T) {
	for _, tt := range [][2]string{{"raw", FormatQcow2}, {"qcow2", FormatQcow2}, {"raw", FormatRaw}, {"qcow2", FormatRaw}} {
		t.Run(tt[0]+" in "+tt[1], func(t *testing.T) {
			dir := t.TempDir()
			path := makeDisk(t, dir, tt[0])
			a, err := Create(filepath.Join(dir, "backups"), tt[1])
			if err != nil {
				t.Fatal(err)
			}
			var want [][]byte
			for i := range 20 {
				d, err := openTracked(path)
				if err != nil {
					t.Fatal(err)
				}
				s, err := step(a, d)
				if err != nil {
					t.Fatal(err)
				}
				if s.Full != (i == 0) || s.Number != i+1 || s.Bytes > 3<<20 && i > 0 {
					t.Fatalf("backup %d: %+v", i+1, s)
				}
				want = append(want, content(t, d.Node))
				if err := d.close(); err != nil {
					t.Fatal(err)
				}
			}
			check := func(first int) {
				t.Helper()
				sound(t, a)
				for i := first; i < 20; i++ {
					if !bytes.Equal(contentOf(t, a, i+1), want[i]) {
						t.Fatalf("backup %d is not the disk as it was", i+1)
					}
				}
			}
			check(0)
			if tt[1] == FormatQcow2 {
				for _, i := range []int{0, 7, 19} {
					image := filepath.Join(dir, "want.img")
					if err := os.WriteFile(image, want[i], 0o600); err != nil {
						t.Fatal(err)
					}
					if out, err := exec.Command("qemu-img", "compare", "-f", "raw", "-F", "qcow2", image, a.path(a.File(a.catalog.Steps[i]))).CombinedOutput(); err != nil {
						t.Errorf("qemu-img compare: %v: %s", err, out)
					}
				}
			} else {
				restoredByHand(t, a, want)
			}
			if removed, err := a.Prune(context.Background(), 12, nil); removed != 8 || err != nil {
				t.Errorf("prune: %d, %v", removed, err)
			}
			check(8)
			if _, err := a.OpenStep(8); !errors.Is(err, ErrNoStep) || !strings.Contains(err.Error(), "from 9 to 20") {
				t.Errorf("a backup that was removed: %v", err)
			}
			if removed, err := a.Prune(context.Background(), 12, nil); removed != 0 || err != nil {
				t.Errorf("prune again: %d, %v", removed, err)
			}
			if removed, err := a.Prune(context.Background(), 0, nil); removed != 11 || err != nil {
				t.Errorf("prune all: %d, %v", removed, err)
			}
			check(19)
			names, err := os.ReadDir(a.dir)
			if err != nil || len(names) != 1+len(a.files.names(a.Last())) {
				t.Errorf("files left: %v, %v", names, err)
			}
			if err := a.Close(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// A backup is full where the changes are not those since the newest one.
func TestContinues(t *testing.T) {
	dir := t.TempDir()
	path := makeDisk(t, dir, "raw")
	d, err := openTracked(path)
	if err != nil {
		t.Fatal(err)
	}
	defer d.close()
	var both [2]*Archive
	for i := range both {
		if both[i], err = Create(filepath.Join(dir, fmt.Sprint(i)), ""); err != nil {
			t.Fatal(err)
		}
		defer both[i].Close()
	}
	for i, full := range []bool{true, true, true, false, true} {
		s, err := step(both[[]int{0, 1, 0, 0, 1}[i]], d)
		if err != nil {
			t.Fatal(err)
		}
		if s.Full != full {
			t.Errorf("backup %d: full %v", i, s.Full)
		}
	}
	// A set that is never committed is in the next one.
	if err := change(d.root, 100); err != nil {
		t.Fatal(err)
	}
	if _, err := d.recorder.Since(d.Node, app); err != nil {
		t.Fatal(err)
	}
	if s, err := step(both[1], d); err != nil || s.Full {
		t.Errorf("%+v, %v", s, err)
	}
	if !bytes.Equal(contentOf(t, both[1], 0), content(t, d.Node)) {
		t.Error("the backup is not the disk")
	}
	sound(t, both[0])
	sound(t, both[1])
	if _, err := Create(both[0].dir, ""); err == nil || !strings.Contains(err.Error(), "another command") {
		t.Errorf("opened twice: %v", err)
	}
	if _, err := Create(dir, ""); err == nil || !strings.Contains(err.Error(), catalogName) {
		t.Errorf("a directory with other things: %v", err)
	}
	if _, err := Open(filepath.Join(dir, "none")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no directory: %v", err)
	}
}

// Damage to any image is told of it and of those that lie on it, such backups are not
// restored, and pruning does not make sound images of them.
func TestDamage(t *testing.T) {
	for _, format := range []string{FormatQcow2, FormatRaw} {
		t.Run(format, func(t *testing.T) {
			testDamage(t, format)
		})
	}
}

func testDamage(t *testing.T, format string) {
	ctx := context.Background()
	dir := t.TempDir()
	d, err := openTracked(makeDisk(t, dir, "raw"))
	if err != nil {
		t.Fatal(err)
	}
	defer d.close()
	a, err := Create(filepath.Join(dir, "backups"), format)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	for range 6 {
		if _, err := step(a, d); err != nil {
			t.Fatal(err)
		}
	}
	rnd := rand.New(rand.NewPCG(3, 4))
	n := len(a.files.names(a.Last()))
	for k := range 6 * n {
		i := k / n
		path := a.path(a.files.names(&a.catalog.Steps[i])[k%n])
		if err := os.Chmod(path, 0o600); err != nil {
			t.Fatal(err)
		}
		good, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, damage := range []func() error{
			func() error {
				b := bytes.Clone(good)
				b[rnd.IntN(len(b))] ^= 1 << rnd.IntN(8)
				return os.WriteFile(path, b, 0o600)
			},
			func() error { return os.Truncate(path, int64(len(good))/2) },
			func() error { return os.Remove(path) },
		} {
			if err := damage(); err != nil {
				t.Fatal(err)
			}
			problems, err := a.Verify(ctx, nil)
			if err != nil || len(problems) != 6-i || problems[0].Number != i+1 {
				t.Errorf("damage to backup %d: %v, %v", i+1, problems, err)
			}
			if err := a.VerifyStep(ctx, 0); !errors.Is(err, ErrDamaged) {
				t.Errorf("the newest backup, with damage to %d: %v", i+1, err)
			}
			if i > 0 {
				if err := a.VerifyStep(ctx, i); err != nil {
					t.Errorf("backup %d, with damage to the next: %v", i, err)
				}
			}
			if i < 5 {
				if _, err := a.Prune(ctx, 1, nil); !errors.Is(err, ErrDamaged) {
					t.Errorf("prune with damage to backup %d: %v", i+1, err)
				}
			}
			if err := os.WriteFile(path, good, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	sound(t, a)
	if len(a.Steps()) != 6 {
		t.Errorf("%d backups are left", len(a.Steps()))
	}
}

// child backs up and prunes until it is killed.
func child(dir, format string) error {
	a, err := Create(filepath.Join(dir, "backups"), format)
	if err != nil {
		return err
	}
	d, err := openTracked(filepath.Join(dir, "disk.raw"))
	if err != nil {
		return err
	}
	for {
		s, err := step(a, d)
		if err != nil {
			return err
		}
		fmt.Println(s.Number)
		if s.Number%3 == 0 {
			if _, err := a.Prune(context.Background(), 3, nil); err != nil {
				return err
			}
		}
	}
}

// Killed anywhere, 20 times: all backups that the catalog names are sound and the disk as
// it was, and the next ones go on from them.
func TestKilled(t *testing.T) {
	for _, format := range []string{FormatQcow2, FormatRaw} {
		t.Run(format, func(t *testing.T) {
			testKilled(t, format)
		})
	}
}

func testKilled(t *testing.T, format string) {
	dir := filepath.Join(t.TempDir(), format)
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	makeDisk(t, dir, "raw")
	model, err := disk.Open(makeDisk(t, t.TempDir(), "raw"), disk.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer model.Close()
	want := map[int][]byte{}
	full, slow := 0, 1
	for kill := 0; kill < 20 || len(want) < 10; kill++ {
		if kill == 100 {
			t.Fatalf("only %d backups were made", len(want))
		}
		before := len(want)
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), childEnv+"="+dir)
		var out bytes.Buffer
		cmd.Stdout = &out
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		timer := time.AfterFunc(time.Duration(slow*(30+rand.IntN(150)))*time.Millisecond, func() { cmd.Process.Kill() })
		cmd.Wait()
		timer.Stop()
		a, err := Create(filepath.Join(dir, "backups"), format)
		if err != nil {
			t.Fatalf("kill %d: %v\n%s", kill, err, &out)
		}
		for _, s := range a.Steps() {
			for n := len(want) + 1; n <= s.Number; n++ {
				if err := change(model, n); err != nil {
					t.Fatal(err)
				}
				want[n] = content(t, model)
			}
			if !bytes.Equal(contentOf(t, a, s.Number), want[s.Number]) {
				t.Fatalf("kill %d: backup %d is not the disk as it was", kill, s.Number)
			}
			if s.Full {
				full++
			}
		}
		sound(t, a)
		if err := a.Close(); err != nil {
			t.Fatal(err)
		}
		if len(want) == before { // a slow host gets to more before the next kill
			slow = min(2*slow, 64)
		}
	}
	t.Logf("%d backups, of those seen after kills %d full", len(want), full)
}

func FuzzCatalog(f *testing.F) {
	f.Add([]byte(`{"version":1,"id":"0123456789abcdef","steps":[{"number":1,"full":true,"size":512,"sha256":"00"},{"number":2,"size":512,"point":{"recording":"aa","epoch":3},"merged":"11"}]}`))
	f.Add([]byte(`{"version":1,"id":"0123456789abcdef","steps":[]}`))
	f.Add([]byte(`{"version":2,"format":"raw","id":"0123456789abcdef","steps":[{"number":7,"full":true,"size":512,"sha256":"00"},{"number":9,"size":512}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, catalogName), b, 0o600); err != nil {
			t.Fatal(err)
		}
		a, err := Open(dir)
		if err != nil {
			return
		}
		defer a.Close()
		problems, err := a.Verify(context.Background(), nil)
		if err != nil || len(problems) != len(a.Steps()) {
			t.Errorf("%d backups without images: %v, %v", len(a.Steps()), problems, err)
		}
		if _, err := a.OpenStep(0); err == nil {
			t.Error("a backup without an image was opened")
		}
	})
}
