package snapshot_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/gnomon-vmm/gnomon/disk"
	"github.com/gnomon-vmm/gnomon/disk/qcow2"
	"github.com/gnomon-vmm/gnomon/vmm"
	"github.com/gnomon-vmm/gnomon/vmm/snapshot"
)

// withDisk has a machine use an image.
func withDisk(t testing.TB, path string, o disk.Options) func(*vmm.Config) {
	t.Helper()
	node, err := disk.Open(path, o)
	if err != nil {
		t.Fatal(err)
	}
	return func(c *vmm.Config) { c.Disks, c.Memory = append(c.Disks, vmm.Disk{Node: node}), 16<<20 }
}

func newRaw(t testing.TB) string {
	t.Helper()
	img := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(img, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	return img
}

// Overlays are named after the disk that the machine began with, however many there
// are, and also when the machine is started from the last; none replaces a file.
func TestOverlayNamesDoNotGrow(t *testing.T) {
	ctx := context.Background()
	img := newRaw(t)
	dir := filepath.Dir(img)
	taken := img + ".t3.qcow2"
	if err := os.WriteFile(taken, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	current := img
	for run := range 2 {
		r := start(t, "spin", withDisk(t, current, disk.Options{}))
		s := snapshot.NewSaver(r.Machine, nil, nil)
		for i := range 12 {
			tag := fmt.Sprint("t", run*12+i)
			report, err := s.Save(ctx, filepath.Join(dir, tag), snapshot.SaveOptions{})
			if err != nil {
				t.Fatal(err)
			}
			want := img + "." + tag + ".qcow2"
			if want == taken {
				want = img + ".t3-1.qcow2"
			}
			if current = report.Disks[0].Overlay; current != want {
				t.Fatalf("the overlay is %s, want %s", current, want)
			}
		}
		for n := range 2 {
			if err := s.Revert(ctx, filepath.Join(dir, "t1"), snapshot.RevertOptions{}); err != nil {
				t.Fatal(err)
			}
			if got, want := r.Disks()[0].Node.Info().Filename, fmt.Sprintf("%s.t1-%d.qcow2", img, 2*run+n+1); got != want {
				t.Errorf("reverted to %s, want %s", got, want)
			}
		}
		current = r.Disks()[0].Node.Info().Filename
		r.Quit()
		<-r.done
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if b, err := os.ReadFile(taken); err != nil || string(b) != "precious" {
		t.Errorf("a file was replaced: %q, %v", b, err)
	}
	// One that lies on an image of another name keeps its own.
	other := filepath.Join(dir, "own.qcow2")
	if err := qcow2.Create(other, qcow2.CreateOptions{Size: 1 << 20, Backing: img, BackingFormat: "raw"}); err != nil {
		t.Fatal(err)
	}
	node, err := qcow2.Open(other, false)
	if err != nil {
		t.Fatal(err)
	}
	defer node.Close()
	if got, err := snapshot.Original(node.Info()); err != nil || got != other {
		t.Errorf("overlays of %s are named after %s, %v", strings.TrimPrefix(other, dir), got, err)
	}
}

// The error of a save that fails after the pause names the image in which the
// machine goes on, and that of one that fails before does not.
func TestFailedSaveNamesOverlays(t *testing.T) {
	img := newRaw(t)
	r := start(t, "spin", withDisk(t, img, disk.Options{}))
	s := snapshot.NewSaver(r.Machine, nil, nil)
	path := filepath.Join(filepath.Dir(img), "c")
	ctx, cancel := context.WithCancel(context.Background())
	_, err := s.Save(ctx, path, snapshot.SaveOptions{Progress: func(int64, int64) { cancel() }})
	var switched *snapshot.SwitchedError
	current := r.Disks()[0].Node.Info().Filename
	if !errors.As(err, &switched) || !errors.Is(err, context.Canceled) || switched.Disks[0].Overlay != current || current == img {
		t.Fatalf("%s goes on in %s: %v", img, current, err)
	}
	if text := err.Error(); !strings.Contains(text, "disk disk0 in "+current) {
		t.Errorf("the error is %q", text)
	}
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Save(context.Background(), path, snapshot.SaveOptions{}); err == nil || errors.As(err, &switched) {
		t.Errorf("before the pause: %v", err)
	}
	if got := r.Disks()[0].Node.Info().Filename; got != current {
		t.Errorf("the disk is %s now", got)
	}
}

// A save that would make a disk's chain too long to be opened is refused before
// anything is done, for all disks; one that copies the disks is not.
func TestSaveOfLongChain(t *testing.T) {
	ctx := context.Background()
	dir := t.TempDir()
	var top string
	for i := range 63 {
		o := qcow2.CreateOptions{Size: 1 << 20, Backing: top, BackingFormat: "qcow2"}
		top = filepath.Join(dir, fmt.Sprintf("%d.qcow2", i))
		if err := qcow2.Create(top, o); err != nil {
			t.Fatal(err)
		}
	}
	short, long := withDisk(t, newRaw(t), disk.Options{}), withDisk(t, top, disk.Options{})
	r := start(t, "spin", func(c *vmm.Config) { short(c); long(c) })
	s := snapshot.NewSaver(r.Machine, nil, nil)
	longest := filepath.Join(dir, "longest")
	if _, err := s.Save(ctx, longest, snapshot.SaveOptions{}); err != nil {
		t.Fatal(err)
	}
	var before []string
	for _, d := range r.Disks() {
		before = append(before, d.Node.Info().Filename)
	}
	refused := filepath.Join(dir, "refused")
	_, err := s.Save(ctx, refused, snapshot.SaveOptions{})
	if !errors.Is(err, qcow2.ErrBacking) || !strings.Contains(err.Error(), "gnomon disk consolidate") || !strings.Contains(err.Error(), "--disks copy") {
		t.Errorf("%v", err)
	}
	for i, d := range r.Disks() {
		if now := d.Node.Info().Filename; now != before[i] {
			t.Errorf("disk %s goes on in %s", d.ID, now)
		}
		if left, err := filepath.Glob(filepath.Join(filepath.Dir(before[i]), "*refused*")); err != nil || len(left) > 0 {
			t.Errorf("left behind: %v %v", left, err)
		}
	}
	if _, err := s.Save(ctx, filepath.Join(dir, "copied"), snapshot.SaveOptions{Disks: snapshot.CopyDisks}); err != nil {
		t.Error(err)
	}
	r.Quit()
	<-r.done
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	n, err := disk.Open(before[1], disk.Options{})
	if err != nil {
		t.Fatal(err)
	}
	n.Close()
}

// An image that is found at another place is checked with all that it lies on there.
func TestDiskAtAnotherPlace(t *testing.T) {
	base := newRaw(t)
	at := func(name string) string { return filepath.Join(filepath.Dir(base), name) }
	image := at("over.qcow2")
	if err := qcow2.Create(image, qcow2.CreateOptions{Size: 1 << 20, Backing: base, BackingFormat: "raw"}); err != nil {
		t.Fatal(err)
	}
	r := start(t, "spin", withDisk(t, image, disk.Options{}))
	report, err := snapshot.NewSaver(r.Machine, nil, nil).Save(context.Background(), at("c"), snapshot.SaveOptions{})
	if err != nil {
		t.Fatal(err)
	}
	saved := &report.Disks[0]
	moved, raw := at("moved"), at("raw")
	for path, from := range map[string]string{moved: image, raw: base} {
		if out, err := exec.Command("cp", "-p", from, path).CombinedOutput(); err != nil {
			t.Fatalf("cp: %v: %s", err, out)
		}
	}
	check := func(path, format string) error {
		d, err := saved.At(path, format)
		if err == nil {
			err = d.Unchanged()
		}
		if d != nil && (d.File != path || d.ID != saved.ID || d.Size != saved.Size) {
			t.Errorf("at %s the disk is %+v", path, d)
		}
		return err
	}
	if err := check(moved, ""); err != nil {
		t.Error(err)
	}
	for _, c := range []struct{ path, format, why string }{
		{raw, "raw", "is named as raw and was qcow2"},
		{raw, "", "does not start with a qcow2 header"},
		{at("none"), "", "does not exist"},
	} {
		if err := check(c.path, c.format); err == nil || !strings.Contains(err.Error(), c.why) {
			t.Errorf("%s as %q: %v", c.path, c.format, err)
		}
	}
	flat := at("flat.qcow2")
	if err := qcow2.Create(flat, qcow2.CreateOptions{Size: 1 << 20}); err != nil {
		t.Fatal(err)
	}
	if err := check(flat, ""); !errors.Is(err, snapshot.ErrDiskChanged) || !strings.Contains(err.Error(), "a chain of 1 files and was one of 2") {
		t.Errorf("an image that lies on none: %v", err)
	}
	if err := os.WriteFile(base, []byte{1}, 0); err != nil {
		t.Fatal(err)
	}
	if err := check(moved, ""); !errors.Is(err, snapshot.ErrDiskChanged) || !strings.Contains(err.Error(), base) {
		t.Errorf("when what it lies on was written to: %v", err)
	}
	if saved.File != image || saved.Files[0].File != image {
		t.Errorf("the disk itself became %+v", saved)
	}
}
