package monitor_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/raw"
	"github.com/gnomon-vmm/gnomon/qmp"
	"github.com/gnomon-vmm/gnomon/qmp/client"
	"github.com/gnomon-vmm/gnomon/tests/guest/probe"
	"github.com/gnomon-vmm/gnomon/vmm"
	"github.com/gnomon-vmm/gnomon/vmm/boot"
	"github.com/gnomon-vmm/gnomon/vmm/chardev"
	"github.com/gnomon-vmm/gnomon/vmm/monitor"
	"github.com/gnomon-vmm/gnomon/vmm/snapshot"
)

// guard is how long a test waits for something that should come, before it gives up.
const guard = 60 * time.Second

// console is a serial port's host end that keeps what the guest prints.
type console struct {
	mu      sync.Mutex
	printed bytes.Buffer // guarded by mu
	change  chan struct{}
}

func newConsole() *console { return &console{change: make(chan struct{}, 1)} }

func (c *console) Write(p []byte) (int, error) {
	c.mu.Lock()
	c.printed.Write(p)
	c.mu.Unlock()
	select {
	case c.change <- struct{}{}:
	default:
	}
	return len(p), nil
}

func (c *console) Connect(chardev.Frontend) {}
func (c *console) Info() chardev.Info {
	return chardev.Info{Label: "serial0", Filename: "test", FrontendOpen: true}
}
func (c *console) Close() error { return nil }

func (c *console) String() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.printed.String()
}

// waitFor returns the guest's results when text has been printed.
func (c *console) waitFor(t *testing.T, text string) probe.Results {
	t.Helper()
	give := time.After(guard)
	for {
		s := c.String()
		if strings.Contains(s, text) {
			return probe.Parse(s)
		}
		select {
		case <-c.change:
		case <-give:
			t.Fatalf("the guest never printed %q:\n%s", text, s)
		}
	}
}

// peer is a machine with QMP: ours or QEMU's.
type peer struct {
	*client.Client
	path   string // of the socket
	serial *console
	events <-chan client.Event
}

// ours is a machine of this repository, run as gnomon run does it.
type ours struct {
	peer
	m    *vmm.Machine
	done chan struct{} // closed when the machine and the server have ended
	exit vmm.Exit
}

// socketDir is a directory whose name is short enough for a socket in it.
func socketDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "qmp")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func dial(t *testing.T, path string, serial *console) peer {
	t.Helper()
	c, err := client.Dial(t.Context(), "unix:"+path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return peer{Client: c, path: path, serial: serial, events: c.Subscribe(t.Context())}
}

// start runs the probe guest.
func start(t *testing.T, cmdline string, change func(*vmm.Config)) *ours {
	t.Helper()
	elf, err := probe.Path()
	if err != nil {
		t.Fatal(err)
	}
	kernel, err := boot.OpenKernel(elf)
	if err != nil {
		t.Fatal(err)
	}
	serial := newConsole()
	cfg := vmm.Config{Name: "test", Kernel: kernel, Cmdline: cmdline, Serial: serial, Memory: 64 << 20, Log: t.Logf}
	if change != nil {
		change(&cfg)
	}
	m, err := vmm.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(socketDir(t), "q")
	server, err := monitor.Listen(m, []string{"unix:" + path}, monitor.WithSaver(snapshot.NewSaver(m, nil, nil)))
	if err != nil {
		m.Close()
		t.Fatal(err)
	}
	o := &ours{m: m, done: make(chan struct{})}
	o.peer = dial(t, path, serial)
	running := make(chan struct{})
	if !cfg.Paused {
		var once sync.Once
		m.Observe(func(e vmm.Event) {
			if _, ok := e.(vmm.Resumed); ok {
				once.Do(func() { close(running) })
			}
		})
	} else {
		close(running)
	}
	go func() {
		defer close(o.done)
		var err error
		if o.exit, err = m.Run(context.Background()); err != nil {
			t.Errorf("run: %v", err)
		}
		server.Close()
	}()
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
		<-o.done
	})
	<-running
	if !cfg.Paused {
		o.event(t, "RESUME")
	}
	return o
}

// startQEMU runs the probe guest in QEMU, stopped as -S leaves it.
func startQEMU(t *testing.T, machine, cmdline string, args ...string) peer {
	t.Helper()
	binary, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		t.Skip("host feature missing: qemu-system-x86_64 (Debian's qemu-system-x86)")
	}
	elf, err := probe.Path()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(socketDir(t), "q")
	serial := newConsole()
	cmd := exec.Command(binary, append([]string{
		"-machine", machine, "-accel", "kvm", "-bios", "qboot.rom", "-m", "64", "-nodefaults", "-display", "none",
		"-serial", "stdio", "-kernel", elf, "-append", cmdline, "-S", "-qmp", "unix:" + path + ",server=on,wait=off",
	}, args...)...)
	cmd.Stdout = serial
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	exited := make(chan struct{})
	go func() {
		cmd.Wait()
		close(exited)
	}()
	t.Cleanup(func() {
		cmd.Process.Kill()
		<-exited
	})
	for {
		// The first session of a socket is the one QEMU serves.
		if c, err := net.Dial("unix", path); err == nil {
			c.Close()
			return dial(t, path, serial)
		}
		select {
		case <-exited:
			t.Fatalf("QEMU ended: %v", cmd.ProcessState)
		default:
			runtime.Gosched()
		}
	}
}

// do runs a command that must succeed.
func (p peer) do(t *testing.T, command string, args map[string]any, result any) {
	t.Helper()
	if err := p.Execute(t.Context(), command, arguments(args), result); err != nil {
		t.Fatalf("%s %v: %v", command, args, err)
	}
}

// arguments makes no map nil.
func arguments(args map[string]any) any {
	if args == nil {
		return nil
	}
	return args
}

// refuse runs a command that must be refused.
func (p peer) refuse(t *testing.T, command string, args map[string]any) qmp.Error {
	t.Helper()
	err := p.Execute(t.Context(), command, arguments(args), nil)
	var refusal *qmp.Error
	if !errors.As(err, &refusal) {
		t.Fatalf("%s %v: %v, want a refusal", command, args, err)
	}
	return *refusal
}

// next waits for the next event.
func (p peer) next(t *testing.T) client.Event {
	t.Helper()
	select {
	case e, ok := <-p.events:
		if !ok {
			t.Fatal("the session ended, and no event came")
		}
		return e
	case <-time.After(guard):
		t.Fatal("no event came")
		return client.Event{}
	}
}

// event waits for the next event, which must be of that name.
func (p peer) event(t *testing.T, name string) client.Event {
	t.Helper()
	e := p.next(t)
	if e.Event != name {
		t.Fatalf("event %q %v, want %s", e.Event, e.Data, name)
	}
	return e
}

// happening is an event without its time.
type happening struct {
	Name string
	Data map[string]any
}

// rest takes the events that come until the session ends.
func (p peer) rest(t *testing.T) (all []happening) {
	t.Helper()
	for {
		select {
		case e, ok := <-p.events:
			if !ok {
				return all
			}
			all = append(all, happening{e.Event, e.Data})
		case <-time.After(guard):
			t.Fatalf("the session did not end; events %v", all)
		}
	}
}

func (p peer) status(t *testing.T) string {
	t.Helper()
	var s struct{ Status string }
	p.do(t, "query-status", nil, &s)
	return s.Status
}

// image makes a disk image of zeroes.
func image(t *testing.T, size int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
	return path
}

func openImage(t *testing.T, size int64) block.Node {
	t.Helper()
	node, err := raw.Open(image(t, size), false)
	if err != nil {
		t.Fatal(err)
	}
	return node
}

// cable is a network backend that leads nowhere.
type cable struct{}

func (cable) Offloads() uint64                   { return 0 }
func (cable) Start(uint64, func(), func()) error { return nil }
func (cable) Stop()                              {}
func (cable) Send([][]byte) error                { return nil }
func (cable) Receive([][]byte) (int, error)      { return 0, errNothing }
func (cable) Describe() string                   { return "nowhere" }
func (cable) Close() error                       { return nil }

// decode reads JSON into generic values, integers as json.Number.
func decode(t *testing.T, data []byte) (v any) {
	t.Helper()
	d := json.NewDecoder(bytes.NewReader(data))
	d.UseNumber()
	if err := d.Decode(&v); err != nil {
		t.Fatal(err)
	}
	return v
}
