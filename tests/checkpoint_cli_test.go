package tests

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/gnomon-vmm/gnomon/tests/guest/probe"
)

// saved is a checkpoint of a machine with a disk that can be written, one that
// cannot, and a serial port that goes to a file. Its guest, which has not run yet,
// ends by itself.
type saved struct {
	dir, file, disk, fixed, serial string
}

func saveMachine(ctx context.Context, t *testing.T, args ...string) *saved {
	t.Helper()
	kernel, err := probe.Path()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	s := &saved{dir: dir, file: at("checkpoint"), disk: at("disk.img"), fixed: at("fixed.img"), serial: at("serial")}
	for _, img := range []string{s.disk, s.fixed} {
		if err := os.WriteFile(img, make([]byte, 1<<20), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	p, _ := launch(t, "--kernel", kernel, "--append", "fill size=1M", "--memory", "16M", "--net", "none", "--paused",
		"--serial", "file:"+s.serial, "--disk", "file="+s.disk, "--disk", "readonly=on,file="+s.fixed)
	p.connect(ctx, t)
	command(ctx, t, append([]string{"checkpoint", p.name, "--to", s.file}, args...)...)
	p.do(ctx, t, "quit", nil, nil)
	p.status(ctx, t)
	return s
}

// gnomonOutput runs a command and returns its exit status and what it says on
// standard error.
func gnomonOutput(ctx context.Context, t *testing.T, args ...string) (status int, stderr string) {
	t.Helper()
	cmd := exec.CommandContext(ctx, gnomon, args...)
	var text strings.Builder
	cmd.Stderr = &text
	if err := cmd.Run(); err != nil && cmd.ProcessState == nil {
		t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), text.String()
}

// A restored machine adds to its output; what the one that was saved said stays.
func TestRestoreKeepsOutput(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	s := saveMachine(ctx, t)
	const before = "what it said\n"
	if err := os.WriteFile(s.serial, []byte(before), 0o600); err != nil {
		t.Fatal(err)
	}
	restore := func(serial, want string) {
		t.Helper()
		if status, stderr := gnomonOutput(ctx, t, "restore", s.file, "--snapshot", "--serial", serial); status != 0 {
			t.Fatalf("status %d: %s", status, stderr)
		}
		after, err := os.ReadFile(s.serial)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.HasPrefix(string(after), want) || !strings.Contains(string(after[len(want):]), "probe: done") {
			t.Errorf("--serial %s: before:\n%s\nafter:\n%s", serial, before, after)
		}
	}
	restore("file:"+s.serial, before)
	restore("file:"+s.serial+",append=off", "probe: fill")
}

// refusedRestore has a restore refused in one line that says all of want, and
// that makes no image.
func (s *saved) refusedRestore(ctx context.Context, t *testing.T, args []string, want ...string) {
	t.Helper()
	before, err := os.ReadDir(s.dir)
	if err != nil {
		t.Fatal(err)
	}
	status, stderr := gnomonOutput(ctx, t, append([]string{"restore", s.file, "--serial", "null"}, args...)...)
	if status == 0 || strings.Count(stderr, "\n") != 1 {
		t.Errorf("restore %s: status %d, %q", args, status, stderr)
	}
	for _, text := range want {
		if !strings.Contains(stderr, text) {
			t.Errorf("restore %s says %q, not %q", args, stderr, text)
		}
	}
	after, err := os.ReadDir(s.dir)
	if err != nil {
		t.Fatal(err)
	}
	if len(after) != len(before) {
		t.Errorf("restore %s left something behind: %v, then %v", args, before, after)
	}
}

func (s *saved) restores(ctx context.Context, t *testing.T, args ...string) {
	t.Helper()
	if status, stderr := gnomonOutput(ctx, t, append([]string{"restore", s.file, "--snapshot", "--serial", "null"}, args...)...); status != 0 {
		t.Errorf("restore %s: status %d: %s", args, status, stderr)
	}
}

// A disk that was written to since it was saved is refused, one that cannot be
// written too; copies that kept their times are not.
func TestRestoreOfChangedDisks(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	s := saveMachine(ctx, t)
	for _, img := range []string{s.disk, s.fixed} {
		copied := img + ".copy"
		for _, args := range [][]string{{"cp", "-p", img, copied}, {"cp", "-p", copied, img}} {
			if out, err := exec.CommandContext(ctx, args[0], args[1:]...).CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
		}
		f, err := os.OpenFile(img, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteAt([]byte{1}, 4096); err != nil {
			t.Fatal(err)
		}
		f.Close()
		s.refusedRestore(ctx, t, nil, img, "changed since", "--accept-changed-disks")
		if out, err := exec.CommandContext(ctx, "cp", "-p", copied, img).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	s.restores(ctx, t)
	if err := os.Truncate(s.disk, 2<<20); err != nil {
		t.Fatal(err)
	}
	s.refusedRestore(ctx, t, nil, s.disk, "2097152", "1048576", "--accept-changed-disks")
	s.restores(ctx, t, "--accept-changed-disks")
}

// Disks of other sizes than the guest knows, or that it knows as others, are refused
// by name, and so are they where the checkpoint leaves disks to the user.
func TestRestoreOfOtherDisks(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	for _, disks := range []string{"keep", "none"} {
		s := saveMachine(ctx, t, "--disks", disks)
		larger := filepath.Join(t.TempDir(), "larger.img")
		if err := os.WriteFile(larger, make([]byte, 2<<20), 0o600); err != nil {
			t.Fatal(err)
		}
		fixed := "readonly=on,file=" + s.fixed
		// Those of the checkpoint are known by their files, ahead of the machine.
		largerIs, unwritable := "has 2097152 bytes, and had 1048576 when it was saved: use one of that size", "file="+s.fixed
		if disks == "keep" {
			largerIs, unwritable = "has 2097152 bytes and had 1048576: it was changed since", "readonly=off,file="+s.fixed
		}
		for _, test := range []struct{ first, second, disk, why string }{
			{"file=" + larger, fixed, "disk0", largerIs},
			{"file=" + s.disk, "readonly=on,file=" + larger, "disk1", largerIs},
			{"readonly=on,file=" + s.disk, fixed, "virtio-blk:disk0", "can be written"},
			{"file=" + larger, "file=" + s.fixed, "disk", largerIs},
			{"file=" + s.disk, unwritable, "disk1", "cannot be written"},
		} {
			s.refusedRestore(ctx, t, []string{"--disk", test.first, "--disk", test.second}, test.disk, test.why)
		}
		s.refusedRestore(ctx, t, []string{"--disk", "file=" + s.disk}, "virtio-blk:disk1")
		s.restores(ctx, t, "--disk", "file="+s.disk, "--disk", fixed)
	}
}

// What was recorded and cannot be used, or cannot be kept, is told of; it ends no
// machine but one that has nothing else to go by.
func TestRecordedSetThatFails(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	s := saveMachine(ctx, t)
	recorded := s.file + ".recorded"
	if err := os.WriteFile(recorded, []byte("not that"), 0o600); err != nil {
		t.Fatal(err)
	}
	s.refusedRestore(ctx, t, []string{"--prefetch", "recorded"}, recorded, "remove the file")
	warned := func(want string, args ...string) {
		t.Helper()
		status, stderr := gnomonOutput(ctx, t, append([]string{"restore", s.file, "--snapshot", "--serial", "null"}, args...)...)
		if status != 0 || strings.Count(stderr, "\n") != 1 || !strings.Contains(stderr, recorded) || !strings.Contains(stderr, want) {
			t.Errorf("restore %s: status %d, %q; want one line with %q", args, status, stderr, want)
		}
	}
	warned("is not used", "--prefetch", "locality,recorded")
	if err := os.Remove(recorded); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(recorded, 0o700); err != nil {
		t.Fatal(err)
	}
	warned("is not kept", "--record")
}

// What cannot be done with checkpoints is refused on one line that says what, why,
// and what to do.
func TestBadUseOfCheckpoints(t *testing.T) {
	p := newPlace(t)
	for _, test := range []struct {
		name   string
		args   []string
		status int
		words  []string
	}{
		{"RestoreOfNothing", []string{"restore", "nowhere"}, 1, []string{"checkpoint nowhere", "no such file", "check the path"}},
		{"RestoreOfText", []string{"restore", "text"}, 1, []string{"text", "not a checkpoint", "gnomon checkpoint made"}},
		{"RestoreOfNone", []string{"restore"}, 2, []string{"0 arguments", "gnomon restore FILE"}},
		{"CommitOfNothing", []string{"checkpoint", "commit", "nowhere"}, 1, []string{"overlay nowhere", "no such file", "check the path"}},
		{"InfoOfNothing", []string{"checkpoint", "info", "nowhere"}, 1, []string{"checkpoint nowhere", "no such file", "check the path"}},
		{"VerifyOfNothing", []string{"checkpoint", "verify", "nowhere"}, 1, []string{"checkpoint nowhere", "no such file", "check the path"}},
		{"FlattenOfNothing", []string{"checkpoint", "flatten", "nowhere", "--to", "x"}, 1, []string{"checkpoint nowhere", "no such file", "check the path"}},
		{"ExtractOfNothing", []string{"checkpoint", "extract", "nowhere", "--to", "x"}, 1, []string{"checkpoint nowhere", "no such file", "check the path"}},
		{"NewlineInName", []string{"restore", "no\nwhere"}, 1, []string{`no\nwhere`}},
		{"NewlineInValue", boots("boot", "--serial=file:no\nwhere/x"), 1, []string{`no\nwhere/x`}},
		{"Prefetch", []string{"restore", "text", "--prefetch", "local"}, 2, []string{"--prefetch", `"local"`, "locality"}},
		{"PrefetchNoneAndAnother", []string{"restore", "text", "--prefetch", "none,locality"}, 2, []string{"--prefetch", "none,locality", "none goes with no other"}},
		{"MachineNamedAsCommand", boots("boot", "--name", "verify"), 2, []string{"--name", `"verify"`, "gnomon checkpoint verify", "another name"}},
		{"CommandNamedAsMachine", []string{"checkpoint", "info", "--to", "x"}, 2, []string{"--to"}},
	} {
		t.Run(test.name, func(t *testing.T) { p.refused(t, test.status, test.words, gnomon, test.args...) })
	}
}
