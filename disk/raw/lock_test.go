package raw

import (
	"bufio"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/gnomon-vmm/gnomon/disk/block"
)

func program(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("%s is not installed", name)
	}
	return path
}

// holder starts a program that holds an image open until its input ends, and
// waits until it says so in a line that contains ready.
func holder(t *testing.T, ready, input string, name string, args ...string) {
	t.Helper()
	cmd := exec.Command(program(t, name), args...)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = cmd.Stdout
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close() // ends qemu-io
		if name != "qemu-io" {
			cmd.Process.Kill()
		}
		cmd.Wait()
	})
	if _, err := io.WriteString(in, input); err != nil {
		t.Fatal(err)
	}
	r := bufio.NewReader(out)
	for {
		line, err := r.ReadString('\n')
		if err != nil {
			t.Fatalf("%s: %q, %v", name, line, err)
		}
		if strings.Contains(line, ready) {
			break
		}
	}
	go io.Copy(io.Discard, r)
}

func qemuIO(args ...string) func(*testing.T, string) {
	return func(t *testing.T, path string) {
		holder(t, "MiB", "length\n", "qemu-io", append(args, "-f", "raw", path)...)
	}
}

// qemuSystem starts a machine that never runs, with the image as its disk.
func qemuSystem(options string) func(*testing.T, string) {
	return func(t *testing.T, path string) {
		holder(t, `"return"`, `{"execute":"qmp_capabilities"}`, "qemu-system-x86_64", "-S", "-nodefaults", "-display", "none", "-accel", "tcg", "-qmp", "stdio",
			"-drive", "if=none,id=d,format=raw,file="+path+options, "-device", "virtio-blk-pci,drive=d")
	}
}

func image(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestLocksAmongUs: one writer, or any number of readers.
func TestLocksAmongUs(t *testing.T) {
	for _, tt := range []struct{ first, second, fits bool }{
		{true, true, true},
		{true, false, false},
		{false, true, false},
		{false, false, false},
	} {
		path := image(t)
		first := open(t, path, tt.first)
		second, err := Open(path, tt.second)
		if tt.fits != (err == nil) || !tt.fits && !errors.Is(err, block.ErrInUse) {
			t.Errorf("read-only %v, then %v: %v", tt.first, tt.second, err)
		}
		if err == nil {
			second.Close()
		}
		first.Close()
		third, err := Open(path, tt.second)
		if err != nil {
			t.Errorf("after the first has closed: %v", err)
			continue
		}
		third.Close()
	}
}

// An image is waited for that another is about to let go of.
func TestLockWaits(t *testing.T) {
	defer func(f func()) { pauseForLock = f }(pauseForLock)
	path := image(t)
	first := open(t, path, false)
	pauses := 0
	pauseForLock = func() {
		pauses++
		first.Close()
	}
	second, err := Open(path, false)
	if err != nil || pauses != 1 {
		t.Fatalf("%v after %d pauses", err, pauses)
	}
	second.Close()
}

// TestQEMUHoldsImage: what QEMU does with the image decides what we may do.
// Its tools, unlike its machines, let others write to a raw image they read.
func TestQEMUHoldsImage(t *testing.T) {
	for _, tt := range []struct {
		name          string
		hold          func(t *testing.T, path string)
		reads, writes bool // whether we can
	}{
		{"machine", qemuSystem(""), false, false},
		{"machine that reads", qemuSystem(",readonly=on"), true, false},
		{"qemu-io", qemuIO(), false, false},
		{"qemu-io that reads", qemuIO("-r"), true, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := image(t)
			tt.hold(t, path)
			for _, readOnly := range []bool{true, false} {
				want := tt.writes
				if readOnly {
					want = tt.reads
				}
				n, err := Open(path, readOnly)
				if want != (err == nil) || !want && !errors.Is(err, block.ErrInUse) {
					t.Errorf("read-only %v: %v", readOnly, err)
				}
				if err == nil {
					n.Close()
				}
			}
		})
	}
}

// TestWeHoldImage: QEMU's tools find our locks as they would find QEMU's.
func TestWeHoldImage(t *testing.T) {
	img, qio := program(t, "qemu-img"), program(t, "qemu-io")
	for _, tt := range []struct {
		name     string
		readOnly bool
		cmd      []string
		fits     bool
	}{
		{"writer, write", false, []string{qio, "-f", "raw", "-c", "write 0 4k"}, false},
		{"writer, read", false, []string{qio, "-r", "-f", "raw", "-c", "read 0 4k"}, true},
		{"writer, info -U", false, []string{img, "info", "-U", "-f", "raw"}, true},
		{"writer, convert", false, []string{img, "convert", "-f", "raw", "-O", "raw"}, false},
		{"writer, resize", false, []string{img, "resize", "-f", "raw"}, false},
		{"reader, write", true, []string{qio, "-f", "raw", "-c", "write 0 4k"}, false},
		{"reader, read", true, []string{qio, "-r", "-f", "raw", "-c", "read 0 4k"}, true},
		{"reader, info", true, []string{img, "info", "-f", "raw"}, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := image(t)
			n := open(t, path, tt.readOnly)
			args := append(tt.cmd[1:], path)
			switch {
			case strings.HasSuffix(tt.name, "resize"):
				args = append(args, "2M")
			case strings.HasSuffix(tt.name, "convert"):
				args = append(args, path+".copy")
			}
			out, err := exec.Command(tt.cmd[0], args...).CombinedOutput()
			if tt.fits != (err == nil) || !tt.fits && !strings.Contains(string(out), "lock") {
				t.Errorf("%v\n%s", err, out)
			}
			n.Close()
			if out, err := exec.Command(tt.cmd[0], args...).CombinedOutput(); err != nil {
				t.Errorf("after we have closed: %v\n%s", err, out)
			}
		})
	}
}
