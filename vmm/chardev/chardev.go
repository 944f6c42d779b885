// Package chardev holds the host ends of a machine's serial port and console:
// the terminal, a file, a unix socket, or nothing.
//
// Output never holds the machine up for long. A file is written at once. A
// terminal, pipe or socket whose other end does not read fills the kernel's
// buffer for it; then the writer waits up to 200 ms, once, and after that
// output is lost until the other end reads again. Output to a socket nobody is
// connected to is lost, too.
package chardev

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/gnomon-vmm/gnomon/internal/unixsock"
)

// Errors, wrapped with what they concern.
var (
	ErrOpen    = errors.New("open character device")
	ErrStalled = errors.New("nobody reads the output: some of it is lost")
)

// Backend is the host end of a character device. Write takes the guest's
// output; it may be called from any goroutine.
type Backend interface {
	io.Writer
	// Connect starts delivering input to f. It is called at most once.
	Connect(f Frontend)
	// Info describes the backend, as query-chardev shows it.
	Info() Info
	// Close gives the host's side back: it restores the terminal, removes the
	// socket. No input is delivered after, except by a call of Frontend.Input
	// that is under way and that Close does not wait for.
	Close() error
}

// Frontend is a guest's device, as far as its backend knows it.
type Frontend struct {
	// Input takes input, all of p, and waits for room as long as it needs to.
	// It does not retain p. Calls come one at a time.
	Input func(p []byte)
	// Break is what a break does; nil: nothing.
	Break func()
}

// Info is what query-chardev tells of a character device.
type Info struct {
	Label        string // what the user calls it: "serial0"
	Filename     string // what it is, in QEMU's notation
	FrontendOpen bool   // a device of the guest is connected
}

// Options are what a specification does not tell.
type Options struct {
	Label string
	// Exit is called when the user types Ctrl-a x; nil: nothing happens. It
	// runs on a goroutine of its own.
	Exit func()
	// Failed is called, once, when output to a file, or to what standard output
	// is, could not be written and is lost; nil: nobody. Output that nobody
	// reads is not meant (ErrStalled).
	Failed func(error)
	// Stdin and Stdout are what "stdio" uses; nil: the process's own.
	Stdin, Stdout *os.File
}

// Spec is what a specification asks for.
type Spec struct {
	Kind   string // "stdio", "file", "unix" or "null"
	Path   string // of the file or socket
	Append bool   // what the file holds stays
}

// Parse reads a specification and opens nothing:
//
//	stdio                  this process's terminal, or standard input and output
//	file:PATH[,append=on]  output goes to a file, which Connect empties first
//	unix:PATH[,server=on]  a socket that one client at a time can connect to
//	null                   nothing
//
// As in QEMU, a comma in PATH is written twice, and unix: takes wait=off.
func Parse(spec string) (Spec, error) {
	s, err := parse(spec)
	if err != nil {
		return Spec{}, fmt.Errorf("%q: %w", spec, err)
	}
	return s, nil
}

func parse(spec string) (Spec, error) {
	kind, rest, _ := strings.Cut(spec, ":")
	path, options, err := parsePath(rest)
	if err != nil {
		return Spec{}, err
	}
	s := Spec{Kind: kind, Path: path}
	switch kind {
	case "stdio", "null":
		if spec != kind {
			return Spec{}, fmt.Errorf("%s takes no options", kind)
		}
		return s, nil
	case "file":
		s.Append = take(options, "append", "off") == "on"
	case "unix":
		switch {
		case take(options, "server", "on") == "off":
			return Spec{}, errors.New("only server=on is supported: gnomon listens, and you connect")
		case take(options, "wait", "off") == "on":
			return Spec{}, errors.New("only wait=off is supported: the machine does not wait for a client")
		case len(path) > unixsock.MaxPath:
			return Spec{}, fmt.Errorf("the path of a socket has %d bytes: up to %d are possible", len(path), unixsock.MaxPath)
		}
	default:
		return Spec{}, errors.New("stdio, file:PATH, unix:PATH and null are possible")
	}
	if path == "" {
		return Spec{}, fmt.Errorf("the path is missing: write %s:PATH", kind)
	}
	for key := range options {
		return Spec{}, fmt.Errorf("unknown option %q", key)
	}
	return s, nil
}

// Open opens the backend that spec, as Parse describes it, names.
func Open(spec string, o Options) (Backend, error) {
	s, err := Parse(spec)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrOpen, err)
	}
	var b Backend
	switch s.Kind {
	case "stdio":
		b, err = openStdio(o)
	case "null":
		b = &null{label: o.Label}
	case "file":
		b, err = openFile(s, o)
	case "unix":
		b, err = openUnix(s.Path, o)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %q: %w", ErrOpen, spec, err)
	}
	return b, nil
}

// parsePath splits PATH[,key=value...]; a key alone means on.
func parsePath(s string) (path string, options map[string]string, err error) {
	const comma = "\x00" // no path holds it
	parts := strings.Split(strings.ReplaceAll(s, ",,", comma), ",")
	options = map[string]string{}
	for _, part := range parts[1:] {
		key, value, ok := strings.Cut(strings.ReplaceAll(part, comma, ","), "=")
		if !ok {
			value = "on"
		}
		if key == "nowait" {
			key, value = "wait", "off"
		}
		if value != "on" && value != "off" {
			return "", nil, fmt.Errorf("option %q: want on or off", part)
		}
		options[key] = value
	}
	return strings.ReplaceAll(parts[0], comma, ","), options, nil
}

// take removes an option and returns its value, or absent.
func take(options map[string]string, key, absent string) string {
	v, ok := options[key]
	if !ok {
		return absent
	}
	delete(options, key)
	return v
}

// failure tells of the first output that could not be written.
type failure struct {
	tell func(error) // nil: nobody
	once sync.Once
}

func (f *failure) check(err error) {
	if err != nil && f.tell != nil && !errors.Is(err, ErrStalled) {
		f.once.Do(func() { f.tell(err) })
	}
}

// null is the backend that is not there.
type null struct {
	label     string
	connected atomic.Bool
}

func (n *null) Write(p []byte) (int, error) { return len(p), nil }
func (n *null) Connect(Frontend)            { n.connected.Store(true) }
func (n *null) Info() Info                  { return Info{n.label, "null", n.connected.Load()} }
func (n *null) Close() error                { return nil }
