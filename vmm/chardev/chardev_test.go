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
	for spec, say := range map[string]string{
		"":                                      "want stdio, file:PATH, unix:PATH or null",
		"tcp::1234":                             "want stdio",
		"stdio:x":                               "takes no options",
		"null:x":                                "takes no options",
		"file:":                                 "no such file",
		"file:" + dir:                           "is a directory",
		"file:" + dir + "/no/such":              "no such file or directory",
		"file:" + dir + "/f,color=on":           `unknown option "color"`,
		"file:" + dir + "/f,append=maybe":       "want on or off",
		"unix:":                                 "path is missing",
		"unix:" + dir + "/s,server=off":         "only server=on",
		"unix:" + dir + "/s,wait=on":            "only wait=off",
		"unix:" + dir + "/s,telnet":             `unknown option "telnet"`,
		"unix:" + strings.Repeat("x", 108):      "has 108 bytes",
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
	if b, err := os.ReadFile(regular); err != nil || string(b) != "precious" {
		t.Errorf("a refused file holds %q, %v", b, err)
	}
	if _, err := net.Dial("unix", taken); err != nil {
		t.Errorf("a refused socket does not work any more: %v", err)
	}
	left, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil || len(left) != 2 {
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
