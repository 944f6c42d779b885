package nbio

import (
	"bytes"
	"errors"
	"io"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/internal/iovec"
)

// pair is a File on one end of a socket pair, its callbacks, and the other end.
func pair(t testing.TB) (f *File, readable, writable chan struct{}, other int) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	signal := func(c chan struct{}) func() {
		return func() {
			select {
			case c <- struct{}{}:
			default:
			}
		}
	}
	readable, writable = make(chan struct{}, 1), make(chan struct{}, 1)
	f, err = New(fds[0], "test", signal(readable), signal(writable))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
		_ = unix.Close(fds[1])
	})
	return f, readable, writable, fds[1]
}

func TestReadv(t *testing.T) {
	f, readable, _, other := pair(t)
	buf := make([]byte, 10)
	for round := range 1000 {
		if n, err := f.Readv([][]byte{buf}); !errors.Is(err, ErrAgain) {
			t.Fatalf("%d, %v with nothing there", n, err)
		}
		want := []byte{byte(round), 2, 3, 4, 5}
		if _, err := unix.Write(other, want); err != nil {
			t.Fatal(err)
		}
		for got := 0; got < len(want); {
			n, err := f.Readv([][]byte{nil, buf[got : got+1], {}, buf[got+1 : 5]})
			if errors.Is(err, ErrAgain) {
				<-readable
				continue
			}
			if err != nil {
				t.Fatal(err)
			}
			got += n
		}
		if !bytes.Equal(buf[:5], want) {
			t.Fatalf("read %v", buf[:5])
		}
	}
	if n, err := f.Readv([][]byte{nil}); n != 0 || err != nil {
		t.Errorf("no room: %d, %v", n, err)
	}
	if err := unix.Shutdown(other, unix.SHUT_WR); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Readv([][]byte{buf}); !errors.Is(err, io.EOF) {
		t.Errorf("at the end: %v", err)
	}
}

func TestWritev(t *testing.T) {
	f, _, writable, other := pair(t)
	block := bytes.Repeat([]byte("x"), 1<<14)
	for range 100 {
		total := 0
		for {
			n, err := f.Writev([][]byte{block[:100], block[100:]})
			if errors.Is(err, ErrAgain) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			total += n
		}
		for sink := make([]byte, 1<<16); total > 0; {
			n, err := unix.Read(other, sink)
			if err != nil {
				t.Fatal(err)
			}
			total -= n
		}
		<-writable
	}
}

// TestManyPieces: more than the kernel takes at once are a short write.
func TestManyPieces(t *testing.T) {
	f, _, _, _ := pair(t)
	pieces := make([][]byte, iovec.Max+10)
	for i := range pieces {
		pieces[i] = []byte{1}
	}
	if n, err := f.Writev(pieces); n != iovec.Max || err != nil {
		t.Errorf("wrote %d, %v", n, err)
	}
}

// TestClose: calls after it, and while it runs, fail and touch nothing else.
func TestClose(t *testing.T) {
	f, _, _, other := pair(t)
	stop := make(chan struct{})
	go func() {
		defer close(stop)
		for {
			if _, err := f.Writev([][]byte{{1}}); err != nil && !errors.Is(err, ErrAgain) {
				return
			}
		}
	}()
	if _, err := unix.Read(other, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	<-stop
	if _, err := f.Readv([][]byte{make([]byte, 1)}); err == nil || errors.Is(err, ErrAgain) {
		t.Errorf("read after Close: %v", err)
	}
}

func TestAllocates(t *testing.T) {
	f, _, _, other := pair(t)
	out, in := [][]byte{make([]byte, 10), make([]byte, 90)}, [][]byte{make([]byte, 100)}
	back := make([]byte, 100)
	if n := testing.AllocsPerRun(100, func() {
		if _, err := f.Writev(out); err != nil {
			t.Fatal(err)
		}
		if _, err := unix.Read(other, back); err != nil {
			t.Fatal(err)
		}
		if _, err := unix.Write(other, back); err != nil {
			t.Fatal(err)
		}
		if _, err := f.Readv(in); err != nil {
			t.Fatal(err)
		}
		if _, err := f.Readv(in); !errors.Is(err, ErrAgain) {
			t.Fatal(err)
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
