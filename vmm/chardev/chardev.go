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
	"sync/atomic"
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
	// Stdin and Stdout are what "stdio" uses; nil: the process's own.
	Stdin, Stdout *os.File
}

// Open opens the backend that spec names:
//
//	stdio                  this process's terminal, or standard input and output
//	file:PATH[,append=on]  output goes to a file, which Connect empties first
//	unix:PATH[,server=on]  a socket that one client at a time can connect to
//	null                   nothing
//
// As in QEMU, a comma in PATH is written twice, and unix: takes wait=off.
func Open(spec string, o Options) (Backend, error) {
	kind, rest, _ := strings.Cut(spec, ":")
	path, options, err := parseSpec(rest)
	if err != nil {
		return nil, fmt.Errorf("%w: %q: %w", ErrOpen, spec, err)
	}
	var b Backend
	switch kind {
	case "stdio":
		if rest != "" {
			return nil, fmt.Errorf("%w: %q: stdio takes no options", ErrOpen, spec)
		}
		b, err = openStdio(o)
	case "null":
		if rest != "" {
			return nil, fmt.Errorf("%w: %q: null takes no options", ErrOpen, spec)
		}
		b = &null{label: o.Label}
	case "file":
		b, err = openFile(path, options, o)
	case "unix":
		b, err = openUnix(path, options, o)
	default:
		err = errors.New("want stdio, file:PATH, unix:PATH or null")
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %q: %w", ErrOpen, spec, err)
	}
	return b, nil
}

// parseSpec splits PATH[,key=value...]; a key alone means on.
func parseSpec(s string) (path string, options map[string]string, err error) {
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

// unknown tells of an option that nobody took.
func unknown(options map[string]string) error {
	for key := range options {
		return fmt.Errorf("unknown option %q", key)
	}
	return nil
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

// file is a file that takes output. There is no input. Until it is connected
// the file keeps what it held, and one that Open made goes with Close: a machine
// that does not come to run leaves no trace.
type file struct {
	label     string
	f         *os.File
	made      bool // by openFile
	empty     bool // the file is to be emptied
	connected atomic.Bool
}

func openFile(path string, options map[string]string, o Options) (Backend, error) {
	b := &file{label: o.Label, empty: take(options, "append", "off") != "on"}
	if err := unknown(options); err != nil {
		return nil, err
	}
	flags := os.O_WRONLY | os.O_APPEND
	var err error
	if b.f, err = os.OpenFile(path, flags|os.O_CREATE|os.O_EXCL, 0o666); err == nil {
		b.made = true
		return b, nil
	}
	if b.f, err = os.OpenFile(path, flags, 0); err != nil {
		return nil, err
	}
	return b, nil
}

func (f *file) Write(p []byte) (int, error) { return f.f.Write(p) }

func (f *file) Connect(Frontend) {
	if f.empty {
		// What cannot be emptied, such as a pipe, holds nothing to lose.
		_ = f.f.Truncate(0)
	}
	f.connected.Store(true)
}

func (f *file) Info() Info { return Info{f.label, "file", f.connected.Load()} }

func (f *file) Close() error {
	var err error
	if f.made && !f.connected.Load() {
		err = os.Remove(f.f.Name())
	}
	return errors.Join(err, f.f.Close())
}
