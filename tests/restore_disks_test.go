package tests

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/gnomon-vmm/gnomon/tests/guest/probe"
)

// writer runs a machine with a disk that can be written and one that cannot, named
// as its user would from their directory. Its guest, which has not run yet, writes
// to the first disk and ends.
func writer(ctx context.Context, t *testing.T) (*saved, *process) {
	t.Helper()
	kernel, err := probe.Path()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	s := &saved{dir: dir, file: at("checkpoint"), disk: image(t, at("disk.img"), 1<<20), fixed: image(t, at("fixed.img"), 1<<20)}
	t.Chdir(dir)
	p, _ := launch(t, "--kernel", kernel, "--append", "blk op=seqwrite bs=4k total=64k seed=5; blk op=flush", "--memory", "16M", "--net", "none",
		"--paused", "--disk", "file=disk.img", "--disk", "readonly=on,file=fixed.img")
	p.connect(ctx, t)
	t.Chdir(t.TempDir())
	return s, p
}

func copyFile(ctx context.Context, t *testing.T, args ...string) {
	t.Helper()
	if out, err := exec.CommandContext(ctx, "cp", args...).CombinedOutput(); err != nil {
		t.Fatalf("cp %s: %v: %s", args, err, out)
	}
}

// leaves has a restore end well and write to none of the files, nor make others
// than those in made, which it removes.
func (s *saved) leaves(ctx context.Context, t *testing.T, files []string, made []string, args ...string) {
	t.Helper()
	before := map[string][]byte{}
	for _, f := range files {
		before[f] = contents(t, f)
	}
	there, err := os.ReadDir(s.dir)
	if err != nil {
		t.Fatal(err)
	}
	if status, stderr := gnomonOutput(ctx, t, append([]string{"restore", s.file, "--serial", "null"}, args...)...); status != 0 {
		t.Errorf("restore %s: status %d: %s", args, status, stderr)
	}
	for _, f := range files {
		if !bytes.Equal(contents(t, f), before[f]) {
			t.Errorf("restore %s wrote to %s", args, f)
		}
	}
	for _, f := range made {
		if err := os.Remove(f); err != nil {
			t.Errorf("restore %s: %v", args, err)
		}
	}
	if after, err := os.ReadDir(s.dir); err != nil || len(after) != len(there) {
		t.Errorf("restore %s left something behind: %v, then %v, %v", args, there, after, err)
	}
}

func contents(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// --disk tells where the image of a checkpoint's disk lies now. It is checked like
// the one that the checkpoint names, and no more written to.
func TestRestoreOfMovedDisks(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	for _, kind := range []string{"keep", "copy"} {
		s, p := writer(ctx, t)
		command(ctx, t, "checkpoint", p.name, "--to", s.file, "--disks", kind)
		p.do(ctx, t, "quit", nil, nil)
		p.status(ctx, t)
		img := s.disk
		if kind == "copy" {
			img = s.file + ".disk0.qcow2"
		}
		moved := filepath.Join(s.dir, "moved")
		copyFile(ctx, t, "-p", img, moved)
		overlay := s.file + ".again.disk0.qcow2"
		for _, path := range []string{img, moved} {
			disks := []string{"--name", "again", "--disk", "cache=unsafe,file=" + path, "--disk", "file=" + s.fixed}
			s.leaves(ctx, t, []string{img, moved}, []string{overlay}, disks...)
			s.leaves(ctx, t, []string{img, moved}, nil, append(disks, "--snapshot")...)
		}
		byID := []string{"--disk", "id=disk1,file=" + s.fixed, "--disk", "id=disk0,file=" + moved}
		s.leaves(ctx, t, []string{img, moved}, nil, append(byID, "--snapshot")...)

		s.refusedRestore(ctx, t, append(byID, "--disk", "file="+moved), "3 disks", "2")
		s.refusedRestore(ctx, t, []string{"--disk", "id=disk0,file=" + moved, "--disk", "id=disk0,file=" + s.fixed}, "disk0", "twice")
		s.refusedRestore(ctx, t, []string{"--disk", "id=other,file=" + moved}, `"other"`, "disk0, disk1")

		// Without -p it may be anything.
		copyFile(ctx, t, img, moved)
		disks := []string{"--disk", "file=" + moved, "--disk", "file=" + s.fixed}
		s.refusedRestore(ctx, t, disks, "disk0", moved, "changed since", "--accept-changed-disks")
		s.leaves(ctx, t, []string{img, moved}, nil, append(disks, "--accept-changed-disks", "--snapshot")...)
		s.leaves(ctx, t, []string{img}, nil, "--snapshot")
	}
}

// A disk that a checkpoint leaves to the user is that which the machine had when it
// was saved, not that which it began with; --snapshot leaves also that as it is.
func TestRestoreOfLeftDisks(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	s, p := writer(ctx, t)
	first := filepath.Join(s.dir, "first")
	command(ctx, t, "checkpoint", p.name, "--to", first)
	plugged := image(t, filepath.Join(s.dir, "plugged.img"), 1<<20)
	p.plugIn(ctx, t, "plugged", "raw", plugged)
	command(ctx, t, "checkpoint", p.name, "--to", s.file, "--disks", "none")
	p.do(ctx, t, "quit", nil, nil)
	p.status(ctx, t)
	overlay := s.disk + ".first.qcow2"
	moved := filepath.Join(s.dir, "moved")
	copyFile(ctx, t, overlay, moved)
	named := []string{"--disk", "format=qcow2,file=" + moved, "--disk", "readonly=on,file=" + s.fixed, "--disk", "id=plugged,file=" + plugged}
	all := []string{s.disk, overlay, moved}
	s.leaves(ctx, t, all, nil, "--snapshot")
	s.leaves(ctx, t, all, nil, append(named, "--snapshot")...)

	empty := contents(t, overlay)
	s.leaves(ctx, t, []string{s.disk, moved}, nil)
	if bytes.Equal(contents(t, overlay), empty) {
		t.Error("the guest did not write to the disk that its machine had")
	}
	s.leaves(ctx, t, []string{s.disk, overlay}, nil, named...)
	if bytes.Equal(contents(t, moved), empty) {
		t.Error("the guest did not write to the disk that was named")
	}
	// The earlier checkpoint is as it was.
	s.file = first
	s.leaves(ctx, t, all, nil, "--snapshot")
}
