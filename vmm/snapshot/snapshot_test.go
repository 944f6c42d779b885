package snapshot_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/mm/checkpoint"
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
	r := start(t, "fill size=32M; wait by=mailbox; verify", nil)
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

// badOf adds up the bad pages that a guest reports.
func badOf(t testing.TB, results probe.Results) (bad uint64, reports int) {
	t.Helper()
	for _, line := range results.Lines {
		if _, ok := line.Values["bad"]; !ok {
			continue
		}
		n, err := line.Number("bad")
		if err != nil {
			t.Fatal(err)
		}
		bad, reports = bad+n, reports+1
	}
	return bad, reports
}

// A guest that rewrites its memory all the time is saved again and again, whole
// and by what changed; each checkpoint is an instant from which it goes on
// and finds every page as it last wrote it.
func TestSavedWhileItWrites(t *testing.T) {
	t.Run("copied early", func(t *testing.T) { testSavedWhileItWrites(t, 0) })
	// What a child holds is protected then, and the guest goes on to write other pages.
	t.Run("protected", func(t *testing.T) { testSavedWhileItWrites(t, 64) })
}

func testSavedWhileItWrites(t *testing.T, sideCopies int) {
	dir := t.TempDir()
	r := start(t, "touch size=32M op=write; wait by=mailbox; dirty size=32M seed=5 ms=3000", func(c *vmm.Config) { c.Memory = 64 << 20 })
	saver := snapshot.NewSaver(r.Machine, nil, nil)
	r.serial.waitFor(t, "wait for=line")
	r.release(t)
	faults := uint64(0)
	var paths []string
	parent := ""
	for i := range 6 {
		path := filepath.Join(dir, string(rune('a'+i)))
		o := snapshot.SaveOptions{Parent: parent, Stop: i == 4, SideCopies: sideCopies}
		if i == 3 {
			o.Parent = "" // and once more whole
		}
		report, err := saver.Save(context.Background(), path, o)
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%d: paused %v of %v; %d pages, %d by faults", i, report.Pause, report.Total, report.Written.Pages, report.Memory.CopiedByFault)
		paths, parent = append(paths, path), path
		faults += report.Memory.FaultsArming + report.Memory.FaultsSaving
	}
	if faults == 0 {
		t.Error("the guest did not write while it was saved")
	}
	if bad, reports := badOf(t, r.results(t)); bad != 0 || reports == 0 {
		t.Fatalf("the guest that was saved found %d bad pages in %d reports", bad, reports)
	}
	for i, path := range paths {
		next, _ := restored(t, path, snapshot.Options{Policy: pager.Locality})
		if bad, reports := badOf(t, next.results(t)); bad != 0 || reports == 0 {
			t.Errorf("checkpoint %d: %d bad pages in %d reports", i, bad, reports)
		}
	}
}

// A child must continue the machine's own last checkpoint.
func TestParentMustBeTheLast(t *testing.T) {
	dir := t.TempDir()
	r := start(t, "spin", nil)
	saver := snapshot.NewSaver(r.Machine, nil, nil)
	save := func(name, parent string) error {
		if parent != "" {
			parent = filepath.Join(dir, parent)
		}
		_, err := saver.Save(context.Background(), filepath.Join(dir, name), snapshot.SaveOptions{Parent: parent})
		return err
	}
	if err := save("a", ""); err != nil {
		t.Fatal(err)
	}
	if err := save("b", "a"); err != nil {
		t.Fatal(err)
	}
	if err := save("c", "a"); !errors.Is(err, checkpoint.ErrParent) {
		t.Errorf("a child of the last but one: %v", err)
	}
	if err := save("b", ""); !errors.Is(err, checkpoint.ErrExists) {
		t.Errorf("over a file that is there: %v", err)
	}
	if r.Status() != vmm.StatusRunning {
		t.Errorf("status %s", r.Status())
	}
	if err := save("c", "b"); err != nil {
		t.Error(err)
	}
	entries, _ := os.ReadDir(dir)
	if len(entries) != 3 {
		t.Errorf("left behind: %v", entries)
	}
	r.Quit()
	<-r.done
}

// A machine that ends while it is saved has its save fail, and nothing else.
func TestSaveOfMachineThatEnded(t *testing.T) {
	dir := t.TempDir()
	r := start(t, "spin", nil)
	saver := snapshot.NewSaver(r.Machine, nil, nil)
	r.PowerOff()
	<-r.done
	for _, stop := range []bool{false, true} {
		if _, err := saver.Save(context.Background(), filepath.Join(dir, "c"), snapshot.SaveOptions{Stop: stop}); !errors.Is(err, vmm.ErrState) {
			t.Errorf("stop %v: %v", stop, err)
		}
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 0 {
		t.Errorf("left behind: %v", entries)
	}
}

// A save that is cancelled, or whose disk is full, leaves nothing, and the
// machine goes on and can be saved again.
func TestSaveThatFails(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=8M"); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(dir, 0)
	r := start(t, "dirty size=32M seed=5 ms=4000", nil)
	saver := snapshot.NewSaver(r.Machine, nil, nil)
	for r.Dirty().Stats().Collected == 0 { // until there is more than fits
		if _, err := saver.Save(context.Background(), filepath.Join(dir, "c"), snapshot.SaveOptions{}); errors.Is(err, unix.ENOSPC) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		if err := os.Remove(filepath.Join(dir, "c")); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	good := filepath.Join(t.TempDir(), "c")
	if _, err := saver.Save(ctx, good, snapshot.SaveOptions{Progress: func(done, _ int64) {
		if done > 0 {
			cancel()
		}
	}}); !errors.Is(err, context.Canceled) {
		t.Errorf("a cancelled save: %v", err)
	}
	for _, d := range []string{dir, filepath.Dir(good)} {
		if entries, _ := os.ReadDir(d); len(entries) != 0 {
			t.Errorf("left behind: %v", entries)
		}
	}
	if s := r.Status(); s != vmm.StatusRunning {
		t.Errorf("status %s", s)
	}
	if _, err := saver.Save(context.Background(), good, snapshot.SaveOptions{}); err != nil {
		t.Fatal(err)
	}
	if bad, reports := badOf(t, r.results(t)); bad != 0 || reports == 0 {
		t.Errorf("%d bad pages in %d reports", bad, reports)
	}
	next, _ := restored(t, good, snapshot.Options{})
	if bad, reports := badOf(t, next.results(t)); bad != 0 || reports == 0 {
		t.Errorf("restored: %d bad pages in %d reports", bad, reports)
	}
}

// A block that is damaged while the guest runs on the file ends the machine with
// an error that names it, before the guest reads a wrong byte.
func TestDamagedBlock(t *testing.T) {
	path := filepath.Join(t.TempDir(), "c")
	r := start(t, "fill size=64M; wait by=mailbox; verify", nil)
	r.serial.waitFor(t, "wait for=line")
	if _, err := snapshot.NewSaver(r.Machine, nil, nil).Save(context.Background(), path, snapshot.SaveOptions{}); err != nil {
		t.Fatal(err)
	}
	r.Quit()
	<-r.done
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var b [1]byte
	const at = 40 << 20
	if _, err := f.ReadAt(b[:], at); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 4
	if _, err := f.WriteAt(b[:], at); err != nil {
		t.Fatal(err)
	}
	for _, policy := range []pager.Policy{0, pager.Locality} {
		next, _ := restored(t, path, snapshot.Options{Policy: policy})
		failed := make(chan error, 1)
		next.Observe(func(e vmm.Event) {
			if e, ok := e.(vmm.Failed); ok {
				failed <- e.Err
			}
		})
		next.release(t)
		<-next.done
		if !errors.Is(next.err, checkpoint.ErrDamaged) || !strings.Contains(next.err.Error(), path) || !strings.Contains(next.err.Error(), "offset") {
			t.Errorf("%s: the machine ended with %q, %v", policy, next.exit, next.err)
		}
		if err := <-failed; !errors.Is(err, checkpoint.ErrDamaged) {
			t.Errorf("%s: event %v", policy, err)
		}
		if bad, _ := badOf(t, probe.Parse(next.serial.String())); bad != 0 {
			t.Errorf("%s: the guest read %d wrong pages", policy, bad)
		}
	}
}

// A machine that cannot be made of a checkpoint, because its devices are others, is
// refused; nothing hangs, and nothing is left.
func TestRestoreOfOtherDevices(t *testing.T) {
	path := filepath.Join(t.TempDir(), "c")
	r := start(t, "fill size=16M; spin", nil)
	r.serial.waitFor(t, "probe: fill")
	if _, err := snapshot.NewSaver(r.Machine, nil, nil).Save(context.Background(), path, snapshot.SaveOptions{}); err != nil {
		t.Fatal(err)
	}
	for range 5 {
		image, err := snapshot.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := image.Restore(vmm.Config{Log: t.Logf, NoRNG: true}, snapshot.Options{Policy: pager.Locality}); !errors.Is(err, vmm.ErrRestore) {
			t.Errorf("got %v", err)
		}
		if err := image.Close(); err != nil {
			t.Error(err)
		}
	}
}

// A save of everything that fails does not have a child of the checkpoint before it
// lack what was written until then.
func TestChildAfterFailedSave(t *testing.T) {
	dir := t.TempDir()
	first, child := filepath.Join(dir, "first"), filepath.Join(dir, "child")
	r := start(t, "fill size=16M seed=1; wait by=mailbox; fill size=16M seed=2; wait by=mailbox; verify size=16M seed=2", nil)
	r.serial.waitFor(t, "wait for=line")
	s := snapshot.NewSaver(r.Machine, nil, nil)
	if _, err := s.Save(context.Background(), first, snapshot.SaveOptions{}); err != nil {
		t.Fatal(err)
	}
	r.release(t)
	for strings.Count(r.serial.String(), "wait for=line") < 2 {
		r.serial.waitFor(t, "probe: fill")
		time.Sleep(time.Millisecond) // the second is what is waited for
	}
	ctx, cancel := context.WithCancel(context.Background())
	if _, err := s.Save(ctx, filepath.Join(dir, "failed"), snapshot.SaveOptions{Progress: func(int64, int64) { cancel() }}); !errors.Is(err, context.Canceled) {
		t.Fatalf("got %v", err)
	}
	if _, err := s.Save(context.Background(), child, snapshot.SaveOptions{Parent: first}); err != nil {
		t.Fatal(err)
	}
	next, _ := restored(t, child, snapshot.Options{Policy: pager.Locality})
	next.release(t)
	results := next.results(t)
	if last := results.Lines[len(results.Lines)-1]; last.Values["bad"] != "0" {
		t.Errorf("%+v", last)
	}
}
