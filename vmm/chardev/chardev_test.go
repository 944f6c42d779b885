package chardev

import (
	"bytes"
	"errors"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/disk/raw"
)

// guest is a Frontend that hands over what it gets when the test asks.
type guest struct {
	t   testing.TB
	got chan []byte
	brk chan struct{}
	end chan struct{}
}

func newGuest(t testing.TB) *guest {
	g := &guest{t: t, got: make(chan []byte), brk: make(chan struct{}, 8), end: make(chan struct{})}
	t.Cleanup(func() { close(g.end) })
	return g
}

func (g *guest) frontend() Frontend {
	return Frontend{
		Input: func(p []byte) {
			select {
			case g.got <- bytes.Clone(p):
			case <-g.end:
			}
		},
		Break: func() { g.brk <- struct{}{} },
	}
}

// take takes n bytes of input.
func (g *guest) take(n int) string {
	var b []byte
	for len(b) < n {
		b = append(b, <-g.got...)
	}
	if len(b) > n {
		g.t.Fatalf("got %q, more than %d bytes", b, n)
	}
	return string(b)
}

func open(t testing.TB, spec string, o Options) Backend {
	t.Helper()
	b, err := Open(spec, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.Close() })
	return b
}

// until waits for what another goroutine is about to bring about.
func until(cond func() bool) {
	for !cond() {
		runtime.Gosched()
	}
}

func TestOpenRefuses(t *testing.T) {
	dir := t.TempDir()
	regular := filepath.Join(dir, "regular")
	if err := os.WriteFile(regular, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	taken := filepath.Join(dir, "taken")
	l, err := net.Listen("unix", taken)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	disk := filepath.Join(dir, "disk")
	if err := os.WriteFile(disk, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	node, err := raw.Open(disk, true)
	if err != nil {
		t.Fatal(err)
	}
	defer node.Close()
	for spec, say := range map[string]string{
		"":                                      "stdio, file:PATH, unix:PATH and null are possible",
		"tcp::1234":                             "null are possible",
		"stdio:x":                               "takes no options",
		"null:x":                                "takes no options",
		"stdio:":                                "takes no options",
		"file:":                                 "path is missing",
		"file:" + fifo:                          "neither a regular file",
		"file:" + taken:                         "neither a regular file",
		"file:" + disk:                          "in use as a machine's disk",
		"file:" + disk + ",append=on":           "in use as a machine's disk",
		"file:" + dir:                           "is a directory",
		"file:" + dir + "/no/such":              "no such file or directory",
		"file:" + dir + "/f,color=on":           `unknown option "color"`,
		"file:" + dir + "/f,append=maybe":       "want on or off",
		"unix:":                                 "path is missing",
		"unix:" + dir + "/s,server=off":         "only server=on",
		"unix:" + dir + "/s,wait=on":            "only wait=off",
		"unix:" + dir + "/s,telnet":             `unknown option "telnet"`,
		"unix:" + strings.Repeat("x", 108):      "108 bytes",
		"unix:" + dir + "/no/such":              "no such file or directory",
		"unix:" + regular:                       "not a socket",
		"unix:" + taken:                         "another process listens there",
		"unix:" + taken + ",server=on,wait=off": "another process listens there",
	} {
		b, err := Open(spec, Options{})
		if !errors.Is(err, ErrOpen) || !strings.Contains(err.Error(), say) || strings.Contains(err.Error(), "\n") {
			t.Errorf("Open(%q) = %v, want one line with %q", spec, err, say)
		}
		if b != nil {
			b.Close()
		}
	}
	for _, path := range []string{regular, disk} {
		if b, err := os.ReadFile(path); err != nil || string(b) != "precious" {
			t.Errorf("a refused file holds %q, %v", b, err)
		}
	}
	if _, err := net.Dial("unix", taken); err != nil {
		t.Errorf("a refused socket does not work any more: %v", err)
	}
	left, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil || len(left) != 4 {
		t.Errorf("left behind: %q, %v", left, err)
	}
}

func TestNull(t *testing.T) {
	b := open(t, "null", Options{Label: "serial0"})
	if n, err := b.Write([]byte("abc")); n != 3 || err != nil {
		t.Errorf("Write: %d, %v", n, err)
	}
	if got, want := b.Info(), (Info{"serial0", "null", false}); got != want {
		t.Errorf("Info: %+v, want %+v", got, want)
	}
	b.Connect(Frontend{})
	if !b.Info().FrontendOpen {
		t.Error("frontend is connected, but not open")
	}
}

// A machine that does not come to run leaves no file and empties none.
func TestFileNeverConnected(t *testing.T) {
	dir := t.TempDir()
	made, kept := filepath.Join(dir, "made"), filepath.Join(dir, "kept")
	if err := os.WriteFile(kept, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{made, kept} {
		if err := open(t, "file:"+path, Options{}).Close(); err != nil {
			t.Error(err)
		}
	}
	if _, err := os.Lstat(made); err == nil {
		t.Error("the file that Open made is still there")
	}
	if b, err := os.ReadFile(kept); err != nil || string(b) != "precious" {
		t.Errorf("the file that was there holds %q, %v", b, err)
	}
}

func TestFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a,b")
	spec := "file:" + strings.ReplaceAll(path, ",", ",,")
	write := func(spec, text string) {
		b := open(t, spec, Options{Label: "serial0"})
		b.Connect(Frontend{})
		if got, want := b.Info(), (Info{"serial0", "file", true}); got != want {
			t.Errorf("Info: %+v, want %+v", got, want)
		}
		if n, err := b.Write([]byte(text)); n != len(text) || err != nil {
			t.Errorf("Write: %d, %v", n, err)
		}
		if err := b.Close(); err != nil {
			t.Error(err)
		}
	}
	for _, step := range []struct{ spec, text, want string }{
		{spec, "first", "first"},
		{spec, "2nd", "2nd"},
		{spec + ",append=on", " and on", "2nd and on"},
		{spec + ",append=off", "new", "new"},
	} {
		write(step.spec, step.text)
		if b, err := os.ReadFile(path); err != nil || string(b) != step.want {
			t.Errorf("%s: file holds %q, %v; want %q", step.spec, b, err, step.want)
		}
	}
}

func TestParse(t *testing.T) {
	for spec, want := range map[string]Spec{
		"stdio":                     {Kind: "stdio"},
		"null":                      {Kind: "null"},
		"file:a,,b":                 {Kind: "file", Path: "a,b"},
		"file:a,append":             {Kind: "file", Path: "a", Append: true},
		"file:a,append=off":         {Kind: "file", Path: "a"},
		"unix:a,server=on,wait=off": {Kind: "unix", Path: "a"},
	} {
		if got, err := Parse(spec); err != nil || got != want {
			t.Errorf("%s: %+v, %v, want %+v", spec, got, err, want)
		}
	}
}

// A device takes output; what it cannot take is told of, once.
func TestFailedOutput(t *testing.T) {
	var failed []error
	tell := func(err error) { failed = append(failed, err) }
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer full.Close()
	for spec, times := range map[string]int{"file:/dev/full": 1, "stdio": 1, "file:/dev/null": 0} {
		failed = nil
		b := open(t, spec, Options{Failed: tell, Stdin: os.Stdin, Stdout: full})
		b.Connect(Frontend{})
		for range 3 {
			b.Write([]byte("x"))
		}
		if len(failed) != times || times > 0 && !errors.Is(failed[0], unix.ENOSPC) {
			t.Errorf("%s: told %v", spec, failed)
		}
		if err := b.Close(); err != nil {
			t.Errorf("%s: %v", spec, err)
		}
	}
}

// What the file system says of a file that cannot be made is what is told.
func TestReadOnlyFileSystem(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("to mount a file system takes root")
	}
	dir := t.TempDir()
	if err := unix.Mount("none", dir, "tmpfs", unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(dir, 0)
	if _, err := Open("file:"+dir+"/x", Options{}); !errors.Is(err, unix.EROFS) {
		t.Errorf("%v", err)
	}
}
