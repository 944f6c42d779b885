package chardev

import (
	"errors"
	"fmt"
	"os"
	ossignal "os/signal"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
	"golang.org/x/term"
)

// stdioTaken: there is one standard input.
var stdioTaken atomic.Pointer[stdio]

// stdio is the process's terminal, or whatever standard input and output are.
type stdio struct {
	label    string
	exit     func()
	in       *input
	out      output
	failure  failure // of out
	stdin    *os.File
	terminal bool // stdin is one
	reader   sync.WaitGroup
	resumed  chan os.Signal // SIGCONT: somebody may have changed the terminal

	mu    sync.Mutex
	saved *term.State // guarded by mu: terminal to restore; nil: not raw
}

func openStdio(o Options) (Backend, error) {
	stdin, stdout := o.Stdin, o.Stdout
	if stdin == nil {
		stdin = os.Stdin
	}
	if stdout == nil {
		stdout = os.Stdout
	}
	s := &stdio{label: o.Label, exit: o.Exit, stdin: stdin, terminal: term.IsTerminal(int(stdin.Fd())), failure: failure{tell: o.Failed}}
	if !stdioTaken.CompareAndSwap(nil, s) {
		return nil, errors.New("another device has the terminal already: give this one a file or a socket")
	}
	in, err := newInput()
	if err != nil {
		stdioTaken.Store(nil)
		return nil, err
	}
	s.in = in
	piece := outputPiece
	if term.IsTerminal(int(stdout.Fd())) {
		piece = terminalPiece
	}
	s.out.use(int(stdout.Fd()), piece)
	return s, nil
}

func (s *stdio) Write(p []byte) (int, error) {
	n, err := s.out.Write(p)
	s.failure.check(err)
	return n, err
}

func (s *stdio) Info() Info { return Info{s.label, "stdio", s.in.connected()} }

// Connect begins to read, and makes the terminal raw. A terminal that cannot
// be made raw is used as it is.
func (s *stdio) Connect(f Frontend) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.in.isClosed() || s.in.connected() {
		return
	}
	if s.terminal {
		if saved, err := makeRaw(int(s.stdin.Fd())); err == nil {
			s.saved = saved
			s.resumed = make(chan os.Signal, 1)
			ossignal.Notify(s.resumed, unix.SIGCONT)
			go s.keepRaw(s.resumed)
		}
	}
	s.in.connect(f)
	s.reader.Add(1)
	go s.read()
}

// makeRaw makes the terminal raw but for output: a host's message in between
// still starts its lines on the left.
func makeRaw(fd int) (saved *term.State, err error) {
	saved, err = term.MakeRaw(fd)
	if err != nil {
		return nil, err
	}
	t, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return saved, nil
	}
	t.Oflag |= unix.OPOST
	unix.IoctlSetTermios(fd, unix.TCSETS, t) // or else lines start where the last ended
	return saved, nil
}

// keepRaw makes the terminal raw again after a shell had it.
func (s *stdio) keepRaw(resumed <-chan os.Signal) {
	for range resumed {
		s.mu.Lock()
		if s.saved != nil {
			makeRaw(int(s.stdin.Fd())) // as in Connect
		}
		s.mu.Unlock()
	}
}

// restore gives the terminal back as it was.
func (s *stdio) restore() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.saved == nil {
		return nil
	}
	err := term.Restore(int(s.stdin.Fd()), s.saved)
	s.saved = nil
	if err != nil {
		return fmt.Errorf("restore the terminal (\"stty sane\" does it by hand): %w", err)
	}
	return nil
}

// RestoreTerminal gives the terminal back as it was before "stdio" took it, if
// it did. It is for paths that end the process without Backend.Close; any
// goroutine may call it, at any time.
func RestoreTerminal() error {
	if s := stdioTaken.Load(); s != nil {
		return s.restore()
	}
	return nil
}

// read reads until the end of input or Close. What a user types is read even
// when the guest takes nothing, so that Ctrl-a x always works, and what does
// not fit is lost; a pipe or file waits.
func (s *stdio) read() {
	defer s.reader.Done()
	esc := escape{
		exit: func() {
			if s.exit != nil {
				go s.exit()
			}
		},
		sendBreak: s.in.sendBreak,
		help:      func(text string) { s.out.Write([]byte(text)) }, // lost if nobody reads
	}
	fd := int(s.stdin.Fd())
	buf := make([]byte, 4096)
	for !s.in.isClosed() {
		room := len(buf)
		if !s.terminal {
			room = min(room, s.in.room())
		}
		if room == 0 {
			s.in.signal.wait(-1, 0)
			continue
		}
		if s.in.signal.wait(fd, unix.POLLIN) == 0 {
			continue
		}
		n, err := unix.Read(fd, buf[:room])
		switch {
		case err == unix.EINTR || err == unix.EAGAIN:
		case err != nil || n == 0:
			return
		default:
			s.in.push(esc.filter(buf[:n]), inputLimit)
		}
	}
}

func (s *stdio) Close() error {
	s.in.close()
	s.reader.Wait()
	err := s.restore()
	s.mu.Lock()
	if s.resumed != nil {
		ossignal.Stop(s.resumed)
		close(s.resumed)
		s.resumed = nil
	}
	s.mu.Unlock()
	s.out.use(-1, 0)
	if stdioTaken.CompareAndSwap(s, nil) {
		s.in.signal.close()
	}
	return err
}
