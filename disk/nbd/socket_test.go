package nbd

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// socketPair returns a socket, and the other side of it.
func socketPair(t *testing.T) (*socket, net.Conn) {
	t.Helper()
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	other, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { other.Close() })
	conn, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	s, err := newSocket(conn)
	if err != nil || s == nil {
		t.Fatalf("no socket: %v", err)
	}
	t.Cleanup(func() {
		if err := s.close(); err != nil {
			t.Error(err)
		}
	})
	return s, other
}

// What is sent arrives, in however many calls and pieces.
func TestSocketSendsAll(t *testing.T) {
	s, other := socketPair(t)
	if err := unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_SNDBUF, 4096); err != nil {
		t.Fatal(err)
	}
	random := rand.New(rand.NewPCG(3, 4))
	var all []byte
	var bufs [][]byte
	for range 500 {
		b := make([]byte, []int{0, 1, 16, 3000, 70_000}[random.IntN(5)])
		for i := range b {
			b[i] = byte(random.Uint32())
		}
		all, bufs = append(all, b...), append(bufs, b)
	}
	var sending sync.WaitGroup
	sending.Go(func() {
		if err := s.writev(bufs); err != nil {
			t.Error(err)
		}
		s.hangUp()
	})
	got, err := io.ReadAll(other)
	sending.Wait()
	if err != nil || !bytes.Equal(got, all) {
		t.Errorf("%d bytes arrived of %d, or others (%v)", len(got), len(all), err)
	}
}

// Who waits in a read or a write returns when the socket is hung up; and who comes later.
func TestHangUpEndsWaits(t *testing.T) {
	s, other := socketPair(t)
	var waiting sync.WaitGroup
	waiting.Go(func() {
		if n, err := s.Read(make([]byte, 1)); n != 0 || err != net.ErrClosed {
			t.Errorf("read: %d, %v", n, err)
		}
	})
	waiting.Go(func() {
		if err := s.writev([][]byte{make([]byte, 64<<20)}); err != net.ErrClosed {
			t.Errorf("write: %v", err)
		}
	})
	if _, err := io.ReadFull(other, make([]byte, 1<<20)); err != nil { // so it is being written
		t.Fatal(err)
	}
	s.hangUp()
	waiting.Wait()
	s.hangUp()
	if _, err := s.Read(make([]byte, 1)); err != net.ErrClosed {
		t.Errorf("read: %v", err)
	}
	if err := s.writev([][]byte{{1}}); err != net.ErrClosed {
		t.Errorf("write: %v", err)
	}
}

func TestSocketTellsOfTheOtherSide(t *testing.T) {
	s, other := socketPair(t)
	if s.pending() {
		t.Error("something has arrived that was not sent")
	}
	if _, err := other.Write([]byte{1, 2}); err != nil {
		t.Fatal(err)
	}
	if !s.pending() {
		t.Error("what was sent has not arrived")
	}
	if n, err := s.Read(make([]byte, 9)); n != 2 || err != nil || s.pending() {
		t.Errorf("%d bytes, %v", n, err)
	}
	other.Close()
	if n, err := s.Read(make([]byte, 9)); n != 0 || err != io.EOF {
		t.Errorf("after the end: %d bytes, %v", n, err)
	}
	if err := s.writev([][]byte{{1}}); !errors.Is(err, unix.EPIPE) {
		t.Errorf("after the end: %v", err)
	}
}

// A socket is polled where that was of use, and nothing comes for another.
func TestWhoIsPolled(t *testing.T) {
	if runtime.NumCPU() == 1 {
		t.Skip("a second processor")
	}
	s, other := socketPair(t)
	s2, other2 := socketPair(t)
	send := func(to net.Conn) {
		if _, err := to.Write([]byte{1}); err != nil {
			t.Error(err)
		}
	}
	receive := func(from *socket) {
		if _, err := from.Read(make([]byte, 1)); err != nil {
			t.Error(err)
		}
	}
	receive1 := func() {
		send(other)
		receive(s)
	}
	receive1()
	if s.poll() || !s.window.Idle() {
		t.Error("it is polled though that was of no use yet")
	}
	eventually(t, "it is polled after a short sleep", func() bool {
		s.poll()
		receive1()
		return s.window.Length > 0
	})
	s.window.Length = time.Hour
	if send(other); !s.poll() || s.window.Idle() {
		t.Error("what has arrived is not seen")
	}
	receive(s)
	s.window.Length = 1
	if s.poll() || !s.window.Idle() {
		t.Error("something has arrived that was not sent")
	}
	receive1()
	s.window.Length = time.Hour
	send(other2)
	receive(s2)
	receive1()
	if s.window.Length > 0 {
		t.Error("it is polled where there is another")
	}
}

// Connections leave no descriptors behind, however they end.
func TestDescriptorsAreClosed(t *testing.T) {
	s, address := serve(t, ServerOptions{}, Export{Node: newMemory(1 << 20)})
	open := func() int {
		d, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(d)
	}
	before := open()
	for i := range 30 {
		w := newWire(t, address)
		if i%3 > 0 {
			w.enter("", false)
			w.request(header{command: cmdRead, length: 4096})
			w.read(simpleSize + 4096)
		}
		if i%3 > 1 {
			w.request(header{command: cmdDisconnect})
			w.ends()
		}
		w.conn.Close()
	}
	eventually(t, "the server's sides are closed", func() bool { return s.Connections() == 0 && open() == before })
}

// A connection that is no socket of the kernel's is served.
func TestServePipe(t *testing.T) {
	s, _ := serve(t, ServerOptions{}, Export{Node: newMemory(1 << 20)})
	ours, theirs := net.Pipe()
	defer ours.Close()
	s.ServeConn(theirs)
	w := wire{t, negotiate(t.Context(), ours)}
	if err := w.greet(); err != nil {
		t.Fatal(err)
	}
	w.enter("", false)
	w.request(header{command: cmdRead, cookie: 5, length: 512})
	if code, cookie := w.simple(); code != 0 || cookie != 5 {
		t.Errorf("error %d of request %d", code, cookie)
	}
	w.read(512)
}
