package vmm_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gnomon-vmm/gnomon/disk/raw"
	"github.com/gnomon-vmm/gnomon/tests/guest/probe"
	"github.com/gnomon-vmm/gnomon/vmm"
	"github.com/gnomon-vmm/gnomon/vmm/boot"
	"github.com/gnomon-vmm/gnomon/vmm/chardev"
	"github.com/gnomon-vmm/gnomon/vmm/vsockhost"
)

// recorder is a serial port's host end that keeps what the guest prints.
type recorder struct {
	mu      sync.Mutex
	change  *sync.Cond
	buf     bytes.Buffer // guarded by mu
	closed  bool         // guarded by mu
	connect chardev.Frontend
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

func (r *recorder) Connect(f chardev.Frontend) { r.connect = f }
func (r *recorder) Info() chardev.Info         { return chardev.Info{Label: "test"} }

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

// waitFor returns when text has been printed n times.
func (r *recorder) waitFor(t *testing.T, text string, n int) {
	t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	for strings.Count(r.buf.String(), text) < n {
		if r.closed {
			t.Fatalf("the machine ended before it printed %q %d times:\n%s", text, n, r.buf.String())
		}
		r.change.Wait()
	}
}

// running is a machine under test whose Run was called.
type running struct {
	*vmm.Machine
	serial *recorder
	done   chan struct{}
	exit   vmm.Exit
	err    error

	mu     sync.Mutex
	events []vmm.Event // guarded by mu
}

// start runs the probe guest.
func start(t *testing.T, cmdline string, change func(*vmm.Config)) *running {
	t.Helper()
	r := build(t, cmdline, change)
	go func() {
		defer close(r.done)
		r.exit, r.err = r.Run(context.Background())
	}()
	return r
}

// build makes a machine for the probe guest. Whoever runs it closes r.done afterwards.
func build(t *testing.T, cmdline string, change func(*vmm.Config)) *running {
	t.Helper()
	r := &running{serial: newRecorder(), done: make(chan struct{})}
	cfg := vmm.Config{Kernel: probeKernel(t), Cmdline: cmdline, Serial: r.serial, Memory: 64 << 20, Log: t.Logf}
	if change != nil {
		change(&cfg)
	}
	var err error
	if r.Machine, err = vmm.New(cfg); err != nil {
		t.Fatal(err)
	}
	r.Observe(func(e vmm.Event) {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.events = append(r.events, e)
	})
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
		<-r.done
	})
	return r
}

func probeKernel(t testing.TB) *boot.Kernel {
	t.Helper()
	elf, err := probe.Path()
	if err != nil {
		t.Fatal(err)
	}
	kernel, err := boot.OpenKernel(elf)
	if err != nil {
		t.Fatal(err)
	}
	return kernel
}

// end waits for the machine's end and returns what the guest reported.
func (r *running) end(t *testing.T, want vmm.Exit) probe.Results {
	t.Helper()
	<-r.done
	if r.err != nil {
		t.Fatalf("run: %v\n%s", r.err, r.serial)
	}
	if r.exit != want {
		t.Fatalf("the machine ended by %q, want %q:\n%s", r.exit, want, r.serial)
	}
	return probe.Parse(r.serial.String())
}

// count reads the word that the probe's spin workload counts in.
func (r *running) count(t *testing.T) uint64 {
	t.Helper()
	var p [8]byte
	if err := r.Memory().Read(probe.MailboxAddr+probe.MailboxCounter, p[:]); err != nil {
		t.Fatal(err)
	}
	return binary.LittleEndian.Uint64(p[:])
}

func disk(t *testing.T, size int64) (vmm.Disk, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
	node, err := raw.Open(path, false)
	if err != nil {
		t.Fatal(err)
	}
	return vmm.Disk{Node: node}, path
}

func TestGuestPowersOff(t *testing.T) {
	r := start(t, "boot", nil)
	r.end(t, vmm.ExitPowerOff)
	if got := r.Status(); got != vmm.StatusShutdown {
		t.Errorf("status %q", got)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if n := len(r.events); n != 2 {
		t.Fatalf("%d events: %v", n, r.events)
	}
	if want := (vmm.Shutdown{Guest: true, Reason: "guest-shutdown"}); r.events[1] != want {
		t.Errorf("event %+v, want %+v", r.events[1], want)
	}
}

// Under disk I/O, 1,000 pauses: while paused neither the guest nor its disk
// moves, and afterwards nothing is missing.
func TestPauseResumeUnderIO(t *testing.T) {
	const pauses = 1000
	var d vmm.Disk
	r := start(t, "blk op=seqwrite bs=4k qd=8 count=60000 seed=3 blk op=seqread verify=1 seed=3 bs=64k total=16M", func(c *vmm.Config) {
		d, _ = disk(t, 16<<20)
		c.Disks = []vmm.Disk{d}
	})
	dev := r.Disks()[0].Device
	for i := range pauses {
		if err := r.Pause(); err != nil {
			t.Fatal(err)
		}
		if r.Status() == vmm.StatusShutdown {
			t.Fatalf("the guest was done after %d pauses: give it more requests", i)
		}
		before, regs := dev.Stats(), instructionPointer(t, r)
		runtime.Gosched()
		if after := dev.Stats(); after != before {
			t.Fatalf("pause %d: the disk went from %+v to %+v", i, before, after)
		}
		if now := instructionPointer(t, r); now != regs {
			t.Fatalf("pause %d: the vCPU went from %#x to %#x", i, regs, now)
		}
		if err := r.Resume(); err != nil {
			t.Fatal(err)
		}
		for n := dev.Stats().Write.Ops; dev.Stats().Write.Ops == n && i%10 == 0; {
			select {
			case <-r.done:
				t.Fatalf("the guest was done after %d pauses: give it more requests", i)
			default:
				runtime.Gosched()
			}
		}
	}
	results := r.end(t, vmm.ExitPowerOff)
	if err := results.Err(); err != nil {
		t.Fatalf("%v:\n%s", err, r.serial)
	}
	for _, line := range results.Lines {
		for _, key := range []string{"failed", "bad"} {
			if v, ok := line.Values[key]; ok && v != "0" {
				t.Errorf("%s %s=%s", line.Name, key, v)
			}
		}
	}
}

func instructionPointer(t *testing.T, r *running) (rip uint64) {
	t.Helper()
	if err := r.Stopped(func() error {
		s, err := r.CPUState(0)
		if err == nil {
			rip = s.Regs.RIP
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return rip
}

func TestPausedGuestStandsStill(t *testing.T) {
	r := start(t, "spin", nil)
	for r.count(t) == 0 {
		runtime.Gosched()
	}
	if err := r.Pause(); err != nil {
		t.Fatal(err)
	}
	before := r.count(t)
	time.Sleep(50 * time.Millisecond) // what must not happen has this long to happen
	if after := r.count(t); after != before {
		t.Errorf("a paused guest counted from %d to %d", before, after)
	}
	if err := r.Resume(); err != nil {
		t.Fatal(err)
	}
	for r.count(t) == before {
		runtime.Gosched()
	}
	r.Quit()
	r.end(t, vmm.ExitQuit)
}

// Operators find and pin a vCPU's thread by the name that QEMU gives it.
func TestThreadNames(t *testing.T) {
	m := start(t, "boot spin", func(c *vmm.Config) { c.CPUs = 2 })
	m.serial.waitFor(t, "probe: boot", 1)
	for i, cpu := range m.CPUs() {
		for cpu.ThreadID == 0 { // the second need not have run when the first has
			runtime.Gosched()
			cpu = m.CPUs()[i]
		}
		path, want := fmt.Sprintf("/proc/self/task/%d/comm", cpu.ThreadID), fmt.Sprintf("CPU %d/KVM\n", i)
		name, err := os.ReadFile(path)
		for start := time.Now(); err == nil && string(name) != want && time.Since(start) < 10*time.Second; {
			name, err = os.ReadFile(path)
		}
		if err != nil || string(name) != want {
			t.Errorf("vCPU %d: its thread is %q, %v", i, name, err)
		}
	}
}

func TestSystemReset(t *testing.T) {
	r := start(t, "boot wait for=go", nil)
	r.serial.waitFor(t, "probe: boot", 1)
	for i := range 5 {
		r.SystemReset()
		r.serial.waitFor(t, "probe: boot", i+2)
	}
	r.Quit()
	<-r.done
}

func TestPausedFromTheStart(t *testing.T) {
	r := start(t, "boot", func(c *vmm.Config) { c.Paused = true })
	if s := r.Status(); s != vmm.StatusPrelaunch {
		t.Errorf("status %q", s)
	}
	if err := r.Resume(); err != nil {
		t.Fatal(err)
	}
	r.end(t, vmm.ExitPowerOff)
	if err := r.Resume(); !errors.Is(err, vmm.ErrState) {
		t.Errorf("resume of a machine that has ended: %v", err)
	}
}

// A pause that comes before Run has begun holds all the same.
func TestPausedBeforeRun(t *testing.T) {
	r := build(t, "boot", nil)
	if err := r.Pause(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if exit, err := r.Run(ctx); exit != vmm.ExitQuit || err != nil {
		t.Fatalf("exit %q: %v", exit, err)
	}
	close(r.done)
	for _, e := range r.events {
		if _, ok := e.(vmm.Resumed); ok {
			t.Error("Run resumed a machine that had been paused")
		}
	}
}

// A machine that is paused for a reason does not go on, before Run and after it; it can be quit.
func TestPausedForAReason(t *testing.T) {
	reason := errors.New("its disk is another's")
	r := start(t, "spin", nil)
	for r.count(t) == 0 {
		runtime.Gosched()
	}
	if err := errors.Join(r.PauseFor(reason), r.Pause()); err != nil {
		t.Fatal(err)
	}
	if err := r.Resume(); !errors.Is(err, vmm.ErrState) || !errors.Is(err, reason) || r.Status() != vmm.StatusPaused {
		t.Errorf("resume: %v, status %q", err, r.Status())
	}
	r.Quit()
	<-r.done
}

func TestCloseEndsARunningMachine(t *testing.T) {
	r := start(t, "spin", nil)
	for r.count(t) == 0 {
		runtime.Gosched()
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	<-r.done
	if r.exit != vmm.ExitQuit {
		t.Errorf("exit %q, %v", r.exit, r.err)
	}
	if err := r.Pause(); !errors.Is(err, vmm.ErrClosed) {
		t.Errorf("pause of a closed machine: %v", err)
	}
}

func TestCloseBeforeRun(t *testing.T) {
	elf, err := probe.Path()
	if err != nil {
		t.Fatal(err)
	}
	kernel, err := boot.OpenKernel(elf)
	if err != nil {
		t.Fatal(err)
	}
	m, err := vmm.New(vmm.Config{Kernel: kernel, CPUs: 2})
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Run(context.Background()); !errors.Is(err, vmm.ErrState) {
		t.Errorf("run after close: %v", err)
	}
}

// What New refuses leaves nothing behind.
func TestNewRefuses(t *testing.T) {
	elf, err := probe.Path()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name   string
		change func(*vmm.Config)
		want   error
	}{
		{"no kernel", func(c *vmm.Config) { c.Kernel = nil }, vmm.ErrConfig},
		{"too many vCPUs", func(c *vmm.Config) { c.CPUs = 65 }, vmm.ErrConfig},
		{"memory of no whole MiB", func(c *vmm.Config) { c.Memory = 1<<20 + 1 }, vmm.ErrConfig},
		{"too little memory", func(c *vmm.Config) { c.Memory = 1 << 20; c.Initrd = strings.NewReader(""); c.InitrdSize = 2 << 20 }, boot.ErrNoMemory},
		{"host CID", func(c *vmm.Config) { c.Vsock = &vmm.Vsock{CID: 2, Host: new(vsockhost.Host)} }, vmm.ErrConfig},
		{"no KVM", func(c *vmm.Config) { c.KVM = "/nonexistent/kvm" }, os.ErrNotExist},
	} {
		kernel, err := boot.OpenKernel(elf)
		if err != nil {
			t.Fatal(err)
		}
		cfg := vmm.Config{Kernel: kernel}
		c.change(&cfg)
		before := openFiles(t)
		if _, err := vmm.New(cfg); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
		if after := openFiles(t); after != before {
			t.Errorf("%s: %d descriptors before, %d after", c.name, before, after)
		}
		kernel.Close()
	}
}

func openFiles(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// An OUT that the guest makes costs this process no allocation.
func TestExitsDoNotAllocate(t *testing.T) {
	const exits = 20000
	r := start(t, "wait for=go out count=20000 wait for=stop", nil)
	r.serial.waitFor(t, "go", 1)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	r.serial.connect.Input([]byte("x\n"))
	r.serial.waitFor(t, "stop", 1)
	runtime.ReadMemStats(&after)
	if n := after.Mallocs - before.Mallocs; n > exits/100 {
		t.Errorf("%d allocations in %d exits", n, exits)
	}
	r.serial.connect.Input([]byte("x\n"))
	r.end(t, vmm.ExitPowerOff)
}

// Whatever a driver puts in its rings, the device is marked broken or refuses
// the request, an event tells, and machine and device go on after a reset.
func TestHostileDriver(t *testing.T) {
	kinds := []string{ // what the probe guest calls them
		"loop", "self", "next", "length", "readonly", "bare", "indirect", "head", "jump",
		"range", "wrap", "device", "mmio", "beyond", "short",
	}
	const refused = "short" // a well-formed chain that is no request
	var words strings.Builder
	for _, kind := range kinds {
		words.WriteString("blk evil=" + kind + "; ")
	}
	r := start(t, words.String(), func(c *vmm.Config) {
		d, _ := disk(t, 1<<20)
		c.Disks = []vmm.Disk{d}
	})
	results := r.end(t, vmm.ExitPowerOff)
	for i, kind := range kinds {
		line, err := results.Find("evil", i)
		if err != nil {
			t.Fatal(err)
		}
		if line.Values["kind"] != kind || line.Values["read_after"] != "ok" {
			t.Errorf("%s: %v", kind, line)
		}
		if broken := line.Values["needs_reset"] == "1"; broken != (kind != refused) {
			t.Errorf("%s: needs_reset %v", kind, broken)
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	events := 0
	for _, e := range r.events {
		if e, ok := e.(vmm.DeviceBroken); ok {
			events++
			if e.Device != "disk0" || e.Err == nil {
				t.Errorf("event %+v", e)
			}
		}
	}
	if events != len(kinds)-1 {
		t.Errorf("%d events for %d ways to break the device", events, len(kinds)-1)
	}
}
