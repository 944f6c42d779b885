package chardev

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// dial connects to the socket and sees to it that the server serves us.
func dial(t testing.TB, path string, g *guest) *net.UnixConn {
	t.Helper()
	c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	send(t, c, "hello")
	if got := g.take(5); got != "hello" {
		t.Fatalf("guest got %q", got)
	}
	return c
}

func send(t testing.TB, w io.Writer, s string) {
	t.Helper()
	if _, err := io.WriteString(w, s); err != nil {
		t.Fatal(err)
	}
}

// want reads exactly s.
func want(t testing.TB, r io.Reader, s string) {
	t.Helper()
	b := make([]byte, len(s))
	if _, err := io.ReadFull(r, b); err != nil || string(b) != s {
		t.Fatalf("read %q, %v; want %q", b, err, s)
	}
}

func openSocket(t testing.TB) (b Backend, path string, g *guest) {
	path, g = filepath.Join(t.TempDir(), "sock"), newGuest(t)
	b = open(t, "unix:"+path+",server=on,wait=off", Options{Label: "serial0"})
	b.Connect(g.frontend())
	return b, path, g
}

func TestUnixTalk(t *testing.T) {
	b, path, g := openSocket(t)
	if n, err := b.Write([]byte("nobody is there")); n != 15 || err != nil {
		t.Errorf("Write without a client: %d, %v", n, err)
	}
	away := Info{"serial0", "disconnected:unix:" + path + ",server=on", true}
	if got := b.Info(); got != away {
		t.Errorf("Info: %+v, want %+v", got, away)
	}
	for range 3 { // and again
		c := dial(t, path, g)
		if got := b.Info().Filename; got != "unix:"+path+",server=on" {
			t.Errorf("with a client the filename is %q", got)
		}
		send(t, b, "login: ")
		want(t, c, "login: ")
		send(t, c, "root\x01x\r") // no escapes here
		if got := g.take(7); got != "root\x01x\r" {
			t.Errorf("guest got %q", got)
		}
		c.Close()
		until(func() bool { return b.Info() == away })
	}
	if err := b.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("socket after Close: %v", err)
	}
	if err := b.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
}

// The second client waits until the first is gone.
func TestUnixOneClientAtATime(t *testing.T) {
	b, path, g := openSocket(t)
	first := dial(t, path, g)
	second, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	send(t, second, "second")
	send(t, b, "for the first")
	want(t, first, "for the first")
	first.Close()
	if got := g.take(6); got != "second" {
		t.Errorf("guest got %q", got)
	}
	send(t, b, "for the second")
	want(t, second, "for the second")
}

// A client that ends its sending ("echo reboot | socat - unix:...") still gets
// output.
func TestUnixHalfClosed(t *testing.T) {
	b, path, g := openSocket(t)
	c := dial(t, path, g)
	send(t, c, "last words")
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got := g.take(10); got != "last words" {
		t.Errorf("guest got %q", got)
	}
	send(t, b, "answer")
	want(t, c, "answer")
	c.Close()
	dial(t, path, g) // and it can be replaced
}

// However slow the guest is, it gets everything.
func TestUnixInputWaitsForGuest(t *testing.T) {
	_, path, g := openSocket(t)
	c := dial(t, path, g)
	sent := make([]byte, 20*inputLimit)
	rng := rand.New(rand.NewPCG(1, 2))
	for i := range sent {
		sent[i] = byte(rng.Uint32())
	}
	done := make(chan error)
	go func() {
		_, err := c.Write(sent)
		done <- err
	}()
	if got := g.take(len(sent)); got != string(sent) {
		t.Error("input came out different")
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// A guest that takes nothing keeps neither a client from going, nor the next
// one from coming; what waits for the guest stays bounded.
func TestUnixGuestTakesNothing(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sock")
	b := open(t, "unix:"+path, Options{})
	in := b.(*unixServer).in
	for range 20 {
		c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		fillSocket(t, c)
		until(func() bool { return in.room() == 0 && b.Info().Filename[0] == 'u' })
		send(t, b, "you are served")
		want(t, c, "you are served")
		c.Close()
		until(func() bool { return b.Info().Filename[0] == 'd' })
	}
	in.mu.Lock()
	waiting := len(in.buf)
	in.mu.Unlock()
	if waiting != inputHardLimit {
		t.Errorf("%d bytes wait for the guest, want as much as may: %d", waiting, inputHardLimit)
	}
}

// fillSocket writes until the socket takes no more.
func fillSocket(t testing.TB, c *net.UnixConn) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	junk := make([]byte, 16<<10)
	var full error
	err = raw.Write(func(fd uintptr) bool {
		for full == nil {
			_, full = unix.Write(int(fd), junk)
		}
		return true
	})
	if err != nil || !errors.Is(full, unix.EAGAIN) {
		t.Fatalf("fill socket: %v, %v", err, full)
	}
}

// A client that does not read costs output, not time; once it reads again
// output flows again.
func TestUnixClientStalls(t *testing.T) {
	b, path, g := openSocket(t)
	c := dial(t, path, g)
	line := []byte("a line of output, and more of it\n")
	lost := 0
	for n := 0; lost < 1000; n++ { // ends only if writes do not block
		if _, err := b.Write(line); errors.Is(err, ErrStalled) {
			lost++
		} else if err != nil || n > 1<<20 {
			t.Fatalf("write %d: %v", n, err)
		}
	}
	if b.(*unixServer).out.stalled = true; b.(*unixServer).out.writable() {
		t.Error("socket has room though it was filled")
	}
	got := make(chan []byte)
	go func() {
		all, _ := io.ReadAll(c)
		got <- all
	}()
	until(func() bool {
		_, err := b.Write([]byte("back again"))
		return err == nil
	})
	b.Close()
	if all := <-got; !bytes.HasSuffix(all, []byte("back again")) || !bytes.HasPrefix(all, line) {
		t.Errorf("client read %d bytes that end in %q", len(all), all[max(0, len(all)-20):])
	}
}

func TestUnixStaleSocketIsReplaced(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	g := newGuest(t)
	b := open(t, "unix:"+path, Options{})
	b.Connect(g.frontend())
	dial(t, path, g)

	if _, err := Open("unix:"+path, Options{}); err == nil || !strings.Contains(err.Error(), "another process listens") {
		t.Errorf("a socket in use by ourselves: %v", err)
	}
}

// Close removes the socket it made, not one that came in its place.
func TestUnixCloseRemovesOnlyItsOwn(t *testing.T) {
	b, path, _ := openSocket(t)
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := b.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(path); err != nil {
		t.Errorf("another's socket: %v", err)
	}
}

// Input that came before the guest's device did is not lost.
func TestUnixInputBeforeConnect(t *testing.T) {
	path, g := filepath.Join(t.TempDir(), "sock"), newGuest(t)
	b := open(t, "unix:"+path, Options{})
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	send(t, c, "early")
	if b.Info().FrontendOpen {
		t.Error("frontend is open before it is there")
	}
	b.Connect(g.frontend())
	if got := g.take(5); got != "early" || !b.Info().FrontendOpen {
		t.Errorf("guest got %q", got)
	}
}

func TestUnixWriteAllocatesNothing(t *testing.T) {
	b, path, g := openSocket(t)
	c := dial(t, path, g)
	p, buf := []byte("x"), make([]byte, 1)
	if n := testing.AllocsPerRun(200, func() {
		b.Write(p)
		c.Read(buf)
	}); n != 0 {
		t.Errorf("%v allocations a write", n)
	}
}
