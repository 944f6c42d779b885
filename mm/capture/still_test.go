package capture

import (
	"errors"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/gnomon-vmm/gnomon/mm/internal/memguest"
)

// A machine that stands still is saved without protecting anything; a device that writes
// nevertheless waits while what it writes to is being saved, and else has it kept.
func TestStill(t *testing.T) {
	m := newMachine(t, layout)
	m.store(memguest.Free/pageSize, 500, 1)
	m.store(1<<20+3, 300, 2)
	c := newCapture(t, m.mem, Options{Still: true})
	if err := c.Arm(nil); err != nil {
		t.Fatal(err)
	}
	m.store(memguest.Free/pageSize+7, 100, 3) // it is running yet
	if err := errors.Join(c.Rearm(), c.Freeze(nil)); err != nil {
		t.Fatal(err)
	}
	want := m.content()

	const first = 1<<20 + 5
	index, _ := c.indexOf(first)
	var device sync.WaitGroup
	var written atomic.Bool
	write := func(pfn uint64) {
		if err := m.mem.Touch(pfn*pageSize, pageSize); err != nil {
			t.Error(err)
		}
		i, _ := c.indexOf(pfn)
		c.hostPage(i)[pfn%pageSize]++
	}
	var once sync.Once
	w := newWriter()
	w.before = func() error {
		once.Do(func() {
			device.Go(func() {
				write(first)
				written.Store(true)
				for _, pfn := range allPages(layout) {
					write(pfn)
				}
			})
			for !written.Load() && c.pages.state[index].Load() != busyWanted {
				runtime.Gosched()
			}
			if written.Load() {
				t.Error("a device wrote to a page that was being saved")
			}
		})
		return nil
	}
	if err := c.Save(t.Context(), w, []uint64{first}, nil); err != nil {
		t.Fatal(err)
	}
	device.Wait()
	w.compare(t, want, nil)
	if n := c.count.protectCalls.Load(); n != 0 {
		t.Errorf("%d calls to protect memory", n)
	}
}
