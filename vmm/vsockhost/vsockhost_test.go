package vsockhost

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/vmm/virtio"
)

const patience = 30 * time.Second

// guest stands for the device: it keeps the calls it gets.
type guest struct {
	calls chan opened
	err   error
}

type opened struct {
	port uint32
	call virtio.VsockCall
}

func (g *guest) Open(port uint32, call virtio.VsockCall) error {
	if g.err != nil {
		return g.err
	}
	g.calls <- opened{port, call}
	return nil
}

func listen(t *testing.T, g *guest) *Host {
	t.Helper()
	h, err := Listen(filepath.Join(t.TempDir(), "v.sock"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := h.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	h.Serve(g)
	return h
}

func dial(t *testing.T, path string) net.Conn {
	t.Helper()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(patience))
	return c
}

// signals are a stream's callbacks as channels.
func signals() (readable, writable chan struct{}, onReadable, onWritable func()) {
	readable, writable = make(chan struct{}, 1), make(chan struct{}, 1)
	f := func(c chan struct{}) func() {
		return func() {
			select {
			case c <- struct{}{}:
			default:
			}
		}
	}
	return readable, writable, f(readable), f(writable)
}

// read reads n bytes, waiting as a device does.
func read(t *testing.T, s virtio.VsockStream, readable chan struct{}, n int) string {
	t.Helper()
	var got []byte
	for len(got) < n {
		buf := make([]byte, n-len(got))
		k, err := s.Readv([][]byte{buf[:len(buf)/2], buf[len(buf)/2:]})
		if errors.Is(err, virtio.ErrAgain) {
			<-readable
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, buf[:k]...)
	}
	return string(got)
}

func TestConnectFromHost(t *testing.T) {
	g := &guest{calls: make(chan opened, 1)}
	h := listen(t, g)
	c := dial(t, h.Path())
	// What follows the line is the guest's, though it comes at once.
	if _, err := c.Write([]byte("CONNECT 80\nGET /")); err != nil {
		t.Fatal(err)
	}
	call := <-g.calls
	if call.port != 80 {
		t.Fatalf("port %d", call.port)
	}
	readable, _, onReadable, onWritable := signals()
	s, err := call.call.Accepted(1<<30, onReadable, onWritable)
	if err != nil {
		t.Fatal(err)
	}
	r := bufio.NewReader(c)
	if line, err := r.ReadString('\n'); err != nil || line != "OK 1073741824\n" {
		t.Fatalf("answer %q, %v", line, err)
	}
	if got := read(t, s, readable, 5); got != "GET /" {
		t.Errorf("stream has %q", got)
	}
	if n, err := s.Writev([][]byte{[]byte("20"), nil, []byte("0 OK")}); n != 6 || err != nil {
		t.Fatalf("wrote %d, %v", n, err)
	}
	if s.HungUp() {
		t.Error("hung up")
	}
	if err := s.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(r); err != nil || string(got) != "200 OK" {
		t.Errorf("client read %q, %v", got, err)
	}
	c.Close()
	for {
		_, err := s.Readv([][]byte{make([]byte, 1)})
		if errors.Is(err, io.EOF) {
			break
		}
		if !errors.Is(err, virtio.ErrAgain) {
			t.Fatal(err)
		}
		<-readable
	}
	if !s.HungUp() {
		t.Error("not hung up")
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Readv([][]byte{make([]byte, 1)}); err == nil || errors.Is(err, virtio.ErrAgain) {
		t.Errorf("read of a closed stream: %v", err)
	}
}

// TestRefused: bad requests and calls nobody takes end in a hang-up.
func TestRefused(t *testing.T) {
	g := &guest{calls: make(chan opened, 1)}
	h := listen(t, g)
	for _, line := range []string{"HELLO\n", "CONNECT\n", "CONNECT x\n", "CONNECT 4294967296\n", "CONNECT -1\n", strings.Repeat("C", 100)} {
		c := dial(t, h.Path())
		if _, err := c.Write([]byte(line)); err != nil {
			t.Fatal(err)
		}
		if got, _ := io.ReadAll(c); len(got) != 0 {
			t.Errorf("%q is answered %q", line, got)
		}
	}
	c := dial(t, h.Path())
	fmt.Fprintf(c, "CONNECT 5\n")
	(<-g.calls).call.Refused()
	if got, err := io.ReadAll(c); len(got) != 0 || err != nil {
		t.Errorf("a refused call is answered %q, %v", got, err)
	}
	g.err = errors.New("no driver")
	c = dial(t, h.Path())
	fmt.Fprintf(c, "CONNECT 5\n")
	if got, err := io.ReadAll(c); len(got) != 0 || err != nil {
		t.Errorf("an impossible call is answered %q, %v", got, err)
	}
}

func TestDial(t *testing.T) {
	h := listen(t, &guest{})
	_, _, onReadable, onWritable := signals()
	if s, err := h.Dial(52, onReadable, onWritable); err == nil {
		t.Errorf("dialled nobody: %v", s)
	}
	l, err := net.Listen("unix", h.Path()+"_52")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	readable, writable, onReadable, onWritable := signals()
	s, err := h.Dial(52, onReadable, onWritable)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(patience))
	if _, err := c.Write([]byte("ping")); err != nil {
		t.Fatal(err)
	}
	if got := read(t, s, readable, 4); got != "ping" {
		t.Errorf("stream has %q", got)
	}
	// Fill the socket: the stream says so, and says when there is room again.
	block := make([]byte, 1<<16)
	total := 0
	for {
		n, err := s.Writev([][]byte{block})
		if errors.Is(err, virtio.ErrAgain) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		total += n
	}
	if _, err := io.ReadFull(c, make([]byte, total)); err != nil {
		t.Fatal(err)
	}
	<-writable
	if _, err := s.Writev([][]byte{block}); err != nil {
		t.Error(err)
	}
}

func TestPaths(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "v.sock")
	h, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if _, err := Listen(path); !errors.Is(err, ErrListen) || !strings.Contains(err.Error(), "in use") {
		t.Errorf("taken path: %v", err)
	}
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(path); !os.IsNotExist(err) {
		t.Errorf("socket is left: %v", err)
	}
	// A socket left by a killed process is replaced.
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		t.Fatal(err)
	}
	unix.Close(fd)
	h, err = Listen(path)
	if err != nil {
		t.Fatalf("stale socket: %v", err)
	}
	if err := h.Close(); err != nil {
		t.Error(err)
	}
	// A file is not.
	file := filepath.Join(dir, "precious")
	if err := os.WriteFile(file, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(file); !errors.Is(err, ErrListen) || !strings.Contains(err.Error(), "not a socket") {
		t.Errorf("a file: %v", err)
	}
	if got, _ := os.ReadFile(file); string(got) != "x" {
		t.Error("the file is gone")
	}
	for _, bad := range []string{"", strings.Repeat("p", 200), filepath.Join(dir, "no", "such")} {
		if _, err := Listen(bad); !errors.Is(err, ErrListen) {
			t.Errorf("path %q: %v", bad, err)
		}
	}
}

// TestCloseWithClients: clients that said nothing, or wait for the guest, are hung up on.
func TestCloseWithClients(t *testing.T) {
	g := &guest{calls: make(chan opened, 1)}
	h, err := Listen(filepath.Join(t.TempDir(), "v.sock"))
	if err != nil {
		t.Fatal(err)
	}
	h.Serve(g)
	silent, waiting := dial(t, h.Path()), dial(t, h.Path())
	fmt.Fprintf(waiting, "CONNECT 5\n")
	<-g.calls
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}
	for _, c := range []net.Conn{silent, waiting} {
		if _, err := c.Read(make([]byte, 1)); err == nil {
			t.Error("client is still connected")
		}
	}
}
