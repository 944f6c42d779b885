package snapshot_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/gnomon-vmm/gnomon/mm/pager"
	"github.com/gnomon-vmm/gnomon/tests/guest/probe"
	"github.com/gnomon-vmm/gnomon/vmm"
	"github.com/gnomon-vmm/gnomon/vmm/boot"
	"github.com/gnomon-vmm/gnomon/vmm/chardev"
	"github.com/gnomon-vmm/gnomon/vmm/snapshot"
)

// recorder is a serial port's host end that keeps what the guest prints.
type recorder struct {
	mu     sync.Mutex
	change *sync.Cond
	buf    bytes.Buffer // guarded by mu
	closed bool         // guarded by mu
}

func newRecorder() *recorder {
	r := &recorder{}
	r.change = sync.NewCond(&r.mu)
	return r
}

func (r *recorder) Write(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.buf.Write(p)
	r.change.Broadcast()
	return len(p), nil
}

func (r *recorder) Connect(chardev.Frontend) {}
func (r *recorder) Info() chardev.Info       { return chardev.Info{Label: "test"} }

func (r *recorder) Close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.closed = true
	r.change.Broadcast()
	return nil
}

func (r *recorder) String() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.buf.String()
}

// waitFor returns when text has been printed.
func (r *recorder) waitFor(t testing.TB, text string) {
	t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	for !strings.Contains(r.buf.String(), text) {
		if r.closed {
			t.Fatalf("the machine ended before it printed %q:\n%s", text, r.buf.String())
		}
		r.change.Wait()
	}
}

// running is a machine whose Run was called.
type running struct {
	*vmm.Machine
	serial *recorder
	done   chan struct{}
	exit   vmm.Exit // after done
	err    error    // after done
}

func run(t testing.TB, m *vmm.Machine, serial *recorder, close_ func() error) *running {
	r := &running{Machine: m, serial: serial, done: make(chan struct{})}
	go func() {
		defer close(r.done)
		r.exit, r.err = m.Run(context.Background())
	}()
	t.Cleanup(func() {
		if err := close_(); err != nil {
			t.Errorf("close: %v", err)
		}
		<-r.done
	})
	return r
}

// start runs the probe guest.
func start(t testing.TB, words string, change func(*vmm.Config)) *running {
	t.Helper()
	elf, err := probe.Path()
	if err != nil {
		t.Fatal(err)
	}
	kernel, err := boot.OpenKernel(elf)
	if err != nil {
		t.Fatal(err)
	}
	serial := newRecorder()
	cfg := vmm.Config{Kernel: kernel, Cmdline: words, Serial: serial, Memory: 128 << 20, Log: t.Logf}
	if change != nil {
		change(&cfg)
	}
	m, err := vmm.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return run(t, m, serial, m.Close)
}

// results waits until the guest has powered off.
func (r *running) results(t testing.TB) probe.Results {
	t.Helper()
	<-r.done
	if r.err != nil || r.exit != vmm.ExitPowerOff {
		t.Fatalf("%s %v\n%s", r.exit, r.err, r.serial)
	}
	results := probe.Parse(r.serial.String())
	if err := results.Err(); err != nil {
		t.Fatalf("%v\n%s", err, r.serial)
	}
	return results
}

// release lets a guest in wait by=mailbox go on.
func (r *running) release(t testing.TB) {
	t.Helper()
	if err := r.Memory().Write(probe.MailboxAddr+probe.MailboxStop, binary.LittleEndian.AppendUint64(nil, 1)); err != nil {
		t.Fatal(err)
	}
}

// restored makes and runs a machine of a checkpoint.
func restored(t testing.TB, path string, o snapshot.Options) (*running, *snapshot.Machine) {
	t.Helper()
	image, err := snapshot.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	serial := newRecorder()
	m, err := image.Restore(vmm.Config{Serial: serial, Log: t.Logf}, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { image.Close() })
	return run(t, m.Machine, serial, m.Close), m
}

// A guest saved while it waits, restored by each policy, finds its memory as it was.
func TestRestoredMemoryIsWhole(t *testing.T) {
	path := filepath.Join(t.TempDir(), "c")
	r := start(t, "fill size=64M; wait by=mailbox; verify", nil)
	r.serial.waitFor(t, "wait for=line")
	report, err := snapshot.NewSaver(r.Machine, nil, nil).Save(context.Background(), path, snapshot.SaveOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%+v", report)
	r.release(t)
	r.results(t)
	for _, policy := range []pager.Policy{0, pager.Physical, pager.Locality} {
		t.Run(policy.String(), func(t *testing.T) {
			next, m := restored(t, path, snapshot.Options{Policy: policy, NoBackground: true})
			next.release(t)
			for _, line := range next.results(t).Lines {
				if line.Name == "verify" && line.Values["bad"] != "0" {
					t.Errorf("%+v", line)
				}
			}
			t.Logf("%+v", m.Pager.Stats())
		})
	}
}
