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
// cannot, and a serial port that goes to a file. Its guest ends by itself.
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
	p, _ := launch(t, "--kernel", kernel, "--append", "fill size=1M; dirty size=1M seed=5 ms=700", "--memory", "16M", "--net", "none",
		"--serial", "file:"+s.serial, "--disk", "file="+s.disk, "--disk", "readonly=on,file="+s.fixed)
	p.connect(ctx, t)
	for text := ""; !strings.Contains(text, "probe: fill"); {
		b, err := os.ReadFile(s.serial)
		if err != nil {
			t.Fatal(err)
		}
		text = string(b)
	}
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
	before, err := os.ReadFile(s.serial)
	if err != nil {
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
	restore("file:"+s.serial, string(before))
	restore("file:"+s.serial+",append=off", "probe: dirty")
}
