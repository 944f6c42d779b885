package snapshot_test

import (
	"context"
	"path/filepath"
	"testing"

	"github.com/gnomon-vmm/gnomon/vmm"
	"github.com/gnomon-vmm/gnomon/vmm/snapshot"
)

// What a machine is told while it stands still for a save is what becomes of it
// after; it does not move before.
func TestStoppedAndResumedWhileSaved(t *testing.T) {
	r := start(t, "spin", func(c *vmm.Config) { c.Memory = 16 << 20 })
	s := snapshot.NewSaver(r.Machine, nil, nil)
	stop, cont := r.Pause, r.Resume
	for i, step := range []struct {
		stop  bool // --mode stop: the machine is told while it stands still
		tell  []func() error
		after vmm.Status
	}{
		{true, nil, vmm.StatusRunning},
		{true, []func() error{stop}, vmm.StatusPaused},
		{true, nil, vmm.StatusPaused},
		{true, []func() error{cont}, vmm.StatusRunning},
		{true, []func() error{stop, cont}, vmm.StatusRunning},
		{false, []func() error{stop}, vmm.StatusPaused},
		{false, []func() error{cont}, vmm.StatusRunning},
	} {
		told := false
		o := snapshot.SaveOptions{Stop: step.stop, Progress: func(int64, int64) {
			if told {
				return
			}
			told = true
			for _, tell := range step.tell {
				if err := tell(); err != nil {
					t.Errorf("step %d: %v", i, err)
				}
			}
			if got := r.Status(); step.stop && got != vmm.StatusPaused {
				t.Errorf("step %d: it is %s before the file is complete", i, got)
			}
		}}
		if _, err := s.Save(context.Background(), filepath.Join(t.TempDir(), "c"), o); err != nil {
			t.Fatal(err)
		}
		if got := r.Status(); !told || got != step.after {
			t.Errorf("step %d: it is %s, want %s", i, got, step.after)
		}
	}
	// Who wants it to stand still need not be the only one.
	first, err := r.Suspend()
	if err != nil {
		t.Fatal(err)
	}
	second, err := r.Suspend()
	if err != nil {
		t.Fatal(err)
	}
	for i, end := range []func() error{first, first, second} {
		if err := end(); err != nil {
			t.Error(err)
		}
		if got, want := r.Status() == vmm.StatusRunning, i == 2; got != want {
			t.Errorf("end %d: running is %v", i, got)
		}
	}
}

// A machine that is saved while it is paused stays so; one that is made of the
// checkpoint runs, unless it is to be paused.
func TestSavedWhilePaused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "c")
	r := start(t, "fill size=1M; spin", func(c *vmm.Config) { c.Memory = 16 << 20 })
	r.serial.waitFor(t, "probe: fill")
	if err := r.Pause(); err != nil {
		t.Fatal(err)
	}
	if _, err := snapshot.NewSaver(r.Machine, nil, nil).Save(context.Background(), path, snapshot.SaveOptions{}); err != nil {
		t.Fatal(err)
	}
	if got := r.Status(); got != vmm.StatusPaused {
		t.Errorf("it is %s after the save", got)
	}
	for _, paused := range []bool{false, true} {
		image, err := snapshot.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer image.Close()
		m, err := image.Restore(vmm.Config{Serial: newRecorder(), Paused: paused, Log: t.Logf}, snapshot.Options{})
		if err != nil {
			t.Fatal(err)
		}
		resumed := make(chan struct{}, 1)
		m.Observe(func(e vmm.Event) {
			if _, ok := e.(vmm.Resumed); ok {
				resumed <- struct{}{}
			}
		})
		next := run(t, m.Machine, newRecorder(), m.Close)
		if paused {
			if got := next.Status(); got != vmm.StatusPrelaunch {
				t.Errorf("it is %s, not paused", got)
			}
			if err := next.Resume(); err != nil {
				t.Fatal(err)
			}
		}
		<-resumed
		next.Quit()
		<-next.done
	}
}
