package chardev

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// pipes returns a stdio backend on two pipes: keys goes to its input, screen
// shows its output.
func pipes(t testing.TB, exit func()) (b Backend, keys *os.File, screen *os.File) {
	t.Helper()
	stdin, keys, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	screen, stdout, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, f := range []*os.File{stdin, keys, screen, stdout} {
			f.Close()
		}
	})
	return open(t, "stdio", Options{Label: "serial0", Exit: exit, Stdin: stdin, Stdout: stdout}), keys, screen
}

func TestStdioPipes(t *testing.T) {
	exited := make(chan struct{})
	b, keys, screen := pipes(t, func() { close(exited) })
	g := newGuest(t)
	if got, want := b.Info(), (Info{"serial0", "stdio", false}); got != want {
		t.Errorf("Info: %+v, want %+v", got, want)
	}
	if _, err := Open("stdio", Options{}); err == nil || !strings.Contains(err.Error(), "has the terminal already") {
		t.Errorf("second stdio: %v", err)
	}
	b.Connect(g.frontend())
	send(t, b, "login: ")
	want(t, screen, "login: ")
	send(t, keys, "root\n")
	if got := g.take(5); got != "root\n" {
		t.Errorf("guest got %q", got)
	}
	send(t, keys, "\x01h")
	want(t, screen, escapeHelp)
	send(t, keys, "\x01b")
	<-g.brk
	send(t, keys, "\x01") // an escape in two parts
	send(t, keys, "x")
	<-exited
	if err := b.Close(); err != nil {
		t.Error(err)
	}
	if n, err := b.Write([]byte("x")); n != 1 || err != nil {
		t.Errorf("Write after Close: %d, %v", n, err)
	}
	again, _, _ := pipes(t, nil) // the terminal is free again
	again.Close()
}

// The end of input is not the end of the machine.
func TestStdioEndOfInput(t *testing.T) {
	b, keys, screen := pipes(t, nil)
	g := newGuest(t)
	b.Connect(g.frontend())
	send(t, keys, "all there is")
	keys.Close()
	if got := g.take(12); got != "all there is" {
		t.Errorf("guest got %q", got)
	}
	b.(*stdio).reader.Wait()
	send(t, b, "still here")
	want(t, screen, "still here")
}

// A script that is piped in waits for the guest and loses nothing.
func TestStdioPipeWaitsForGuest(t *testing.T) {
	b, keys, _ := pipes(t, nil)
	g := newGuest(t)
	b.Connect(g.frontend())
	sent := strings.Repeat("a script that is longer than any buffer\n", 20000)
	done := make(chan error)
	go func() {
		_, err := io.WriteString(keys, sent)
		done <- err
	}()
	if got := g.take(len(sent)); got != sent {
		t.Error("input came out different")
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestStdioOutputStalls(t *testing.T) {
	b, _, screen := pipes(t, nil)
	for lost := 0; lost < 100; { // ends only if writes do not block
		if _, err := b.Write(bytes.Repeat([]byte{'x'}, 1000)); err != nil {
			lost++
		}
	}
	screen.Close() // as "gnomon run | head" does
	if _, err := b.Write([]byte("x")); err != unix.EPIPE {
		t.Errorf("write to a closed pipe: %v", err)
	}
}

// pty opens a terminal: user is where it is typed, terminal is the process's.
func pty(t testing.TB) (user, terminal *os.File) {
	t.Helper()
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	user = os.NewFile(uintptr(fd), "ptmx")
	t.Cleanup(func() { user.Close() })
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	terminal, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { terminal.Close() })
	return user, terminal
}

func termios(t *testing.T, f *os.File) unix.Termios {
	t.Helper()
	got, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	return *got
}

func TestStdioTerminal(t *testing.T) {
	for name, giveBack := range map[string]func(Backend) error{
		"Close":           Backend.Close,
		"RestoreTerminal": func(Backend) error { return RestoreTerminal() },
	} {
		user, terminal := pty(t)
		cooked := termios(t, terminal)
		b, err := Open("stdio", Options{Stdin: terminal, Stdout: terminal})
		if err != nil {
			t.Fatal(err)
		}
		if termios(t, terminal) != cooked {
			t.Errorf("%s: terminal changed before the machine runs", name)
		}
		g := newGuest(t)
		b.Connect(g.frontend())
		raw := termios(t, terminal)
		if raw.Lflag&(unix.ECHO|unix.ICANON|unix.ISIG) != 0 || raw.Iflag&(unix.ICRNL|unix.IXON) != 0 || raw.Oflag&unix.OPOST == 0 {
			t.Errorf("%s: terminal is not raw, or its output is: %+v", name, raw)
		}
		send(t, user, "\x03\r\x13\x1a") // Ctrl-c, Enter, Ctrl-s, Ctrl-z are the guest's
		if got := g.take(4); got != "\x03\r\x13\x1a" {
			t.Errorf("%s: guest got %q", name, got)
		}
		send(t, b, "prompt")
		want(t, user, "prompt")
		if err := giveBack(b); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if got := termios(t, terminal); got != cooked {
			t.Errorf("%s: terminal left as %+v, was %+v", name, got, cooked)
		}
		b.Close()
	}
	if err := RestoreTerminal(); err != nil {
		t.Errorf("RestoreTerminal with nothing to restore: %v", err)
	}
}

// A shell may have changed the terminal while the process was stopped.
func TestStdioContinued(t *testing.T) {
	_, terminal := pty(t)
	cooked := termios(t, terminal)
	b := open(t, "stdio", Options{Stdin: terminal, Stdout: terminal})
	b.Connect(newGuest(t).frontend())
	raw := termios(t, terminal)
	if err := unix.IoctlSetTermios(int(terminal.Fd()), unix.TCSETS, &cooked); err != nil {
		t.Fatal(err)
	}
	if err := unix.Kill(os.Getpid(), unix.SIGCONT); err != nil {
		t.Fatal(err)
	}
	until(func() bool { return termios(t, terminal) == raw })
	b.Close()
	if got := termios(t, terminal); got != cooked {
		t.Errorf("terminal left as %+v, was %+v", got, cooked)
	}
}

// Ctrl-a x works though the guest takes nothing and the buffer is full.
func TestStdioExitFromHungGuest(t *testing.T) {
	user, terminal := pty(t)
	exited := make(chan struct{})
	b := open(t, "stdio", Options{Exit: func() { close(exited) }, Stdin: terminal, Stdout: terminal})
	in := b.(*stdio).in
	b.Connect(Frontend{Input: func([]byte) { <-exited }})
	paste := bytes.Repeat([]byte{'x'}, 1000)
	for in.room() > 0 {
		if _, err := user.Write(paste); err != nil {
			t.Fatal(err)
		}
	}
	send(t, user, "\x01x")
	<-exited
}

func TestStdioWriteAllocatesNothing(t *testing.T) {
	b, _, screen := pipes(t, nil)
	p, buf := []byte("x"), make([]byte, 1)
	if n := testing.AllocsPerRun(200, func() {
		b.Write(p)
		screen.Read(buf)
	}); n != 0 {
		t.Errorf("%v allocations a write", n)
	}
}

// escapeModel filters byte by byte, the slow way.
func escapeModel(p []byte) (kept []byte, acts string) {
	for i := 0; i < len(p); i++ {
		if p[i] != ctrlA {
			kept = append(kept, p[i])
			continue
		}
		if i++; i == len(p) {
			break
		}
		switch p[i] {
		case 'a', ctrlA:
			kept = append(kept, ctrlA)
		case 'x', 'b':
			acts += string(p[i])
		case 'h', '?':
			acts += "h"
		}
	}
	return kept, acts
}

func FuzzEscape(f *testing.F) {
	for _, s := range []string{"", "ls\r", "\x01", "\x01x", "\x01\x01", "a\x01a\x01b\x01h\x01?\x01cz", "\x01\x01\x01x"} {
		f.Add([]byte(s), uint8(1))
		f.Add([]byte(s), uint8(3))
	}
	f.Fuzz(func(t *testing.T, p []byte, piece uint8) {
		wantKept, wantActs := escapeModel(p)
		var acts string
		e := escape{
			exit:      func() { acts += "x" },
			sendBreak: func() { acts += "b" },
			help:      func(string) { acts += "h" },
		}
		var kept []byte
		for rest := bytes.Clone(p); len(rest) > 0; {
			n := min(len(rest), int(piece)+1)
			kept = append(kept, e.filter(rest[:n])...)
			rest = rest[n:]
		}
		if !bytes.Equal(kept, wantKept) || acts != wantActs {
			t.Errorf("%q in pieces of %d: kept %q and did %q, want %q and %q", p, piece+1, kept, acts, wantKept, wantActs)
		}
	})
}
