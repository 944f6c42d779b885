package kvm_test

import (
	"os"
	"os/signal"
	"runtime"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/kvm"
	"github.com/gnomon-vmm/gnomon/kvm/internal/tinyguest"
)

func TestRequestExitBeforeRun(t *testing.T) {
	guest := newGuest(t, tinyguest.Config{Mode: tinyguest.Ring3, Code: code(out(0x80), loop)})
	guest.VCPU.RequestExit(true)
	for range 3 {
		if err := guest.VCPU.Run(); err != unix.EINTR {
			t.Fatalf("Run with an exit requested: %v", err)
		}
	}
	guest.VCPU.RequestExit(false)
	runToOut(t, guest, 0x80)
}

// counter counts in guest memory for ever, so that the test sees it run.
var counter = []byte{
	0xff, 0x04, 0x25, 0x00, 0x80, 0x00, 0x00, // inc dword [0x8000]
	0xeb, 0xf7, // jmp back
}

// waitRunning returns when the guest has counted on.
func waitRunning(guest *tinyguest.Guest) {
	for before := guestCount(guest); guestCount(guest) == before; {
		runtime.Gosched()
	}
}

// vcpuThread runs a VCPU on a thread of its own until stop is set and
// something interrupts it, and returns how often it was interrupted before.
func vcpuThread(guest *tinyguest.Guest, stop *atomic.Bool) (tid int, done chan int) {
	tids := make(chan int)
	done = make(chan int, 1)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		tids <- unix.Gettid()
		early := 0
		for {
			err := guest.VCPU.Run()
			if err != unix.EINTR {
				done <- -1
				return
			}
			if stop.Load() {
				done <- early
				return
			}
			early++
		}
	}()
	return <-tids, done
}

// A signal together with RequestExit always stops a VCPU, whether it reaches
// the thread in the guest, just before it or just after it.
func TestKickFromAnotherThread(t *testing.T) {
	guest := newGuest(t, tinyguest.Config{Mode: tinyguest.Ring3, Code: counter})
	for i := range 200 {
		var stop atomic.Bool
		tid, done := vcpuThread(guest, &stop)
		if i%2 == 0 {
			waitRunning(guest)
		}
		stop.Store(true)
		guest.VCPU.RequestExit(true)
		if err := unix.Tgkill(os.Getpid(), tid, unix.SIGURG); err != nil {
			t.Fatal(err)
		}
		if got := <-done; got < 0 {
			t.Fatal("KVM_RUN failed")
		}
		guest.VCPU.RequestExit(false)
	}
}

// Signals that SetSignalMask blocks do not end Run; the one it does not, does.
func TestSignalMask(t *testing.T) {
	guest := newGuest(t, tinyguest.Config{Mode: tinyguest.Ring3, Code: counter})
	const kick = unix.SIGUSR1
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, kick)
	defer signal.Stop(signals)
	if err := guest.VCPU.SetSignalMask(^(uint64(1) << (kick - 1))); err != nil {
		t.Fatal(err)
	}
	var stop atomic.Bool
	tid, done := vcpuThread(guest, &stop)
	for range 50 {
		waitRunning(guest)
		if err := unix.Tgkill(os.Getpid(), tid, unix.SIGURG); err != nil {
			t.Fatal(err)
		}
	}
	waitRunning(guest)
	stop.Store(true)
	if err := unix.Tgkill(os.Getpid(), tid, kick); err != nil {
		t.Fatal(err)
	}
	if early := <-done; early != 0 {
		t.Errorf("interrupted %d times by a signal that is blocked", early)
	}
	if err := guest.VCPU.ClearSignalMask(); err != nil {
		t.Fatal(err)
	}
}

// Nothing on the way from an exit back into the guest allocates.
func TestExitDoesNotAllocate(t *testing.T) {
	guest := newGuest(t, tinyguest.Config{Mode: tinyguest.Ring3, Code: []byte{0xe6, 0x80, 0xeb, 0xfc}}) // out 0x80, al; again
	v := guest.VCPU
	v.EnableSyncRegs(uint64(guest.VM.Check(kvm.CapSyncRegs)))
	var regs kvm.Regs
	var sregs kvm.Sregs
	var events kvm.VCPUEvents
	sum := 0
	allocs := testing.AllocsPerRun(200, func() {
		err := v.Run()
		if err == unix.EINTR {
			return
		}
		if err != nil || v.ExitReason() != kvm.ExitIO {
			t.Fatalf("%v, %v", v.ExitReason(), err)
		}
		io := v.IO()
		sum += int(io.Port) + len(io.Data)
		sum += int(v.SyncRegs().Regs.RAX)
		v.RequestExit(false)
		for _, err := range []error{
			v.GetRegs(&regs), v.SetRegs(&regs), v.GetSregs(&sregs), v.SetSregs(&sregs),
			v.GetEvents(&events), v.SetEvents(&events),
		} {
			if err != nil {
				t.Fatal(err)
			}
		}
	})
	if allocs != 0 {
		t.Errorf("%v allocations an exit", allocs)
	}
	v.RequestExit(true)
	if allocs := testing.AllocsPerRun(200, func() {
		if v.Run() != unix.EINTR {
			t.Fatal("Run did not return EINTR")
		}
	}); allocs != 0 {
		t.Errorf("%v allocations an interrupted run", allocs)
	}
}

func TestInterruptsDoNotAllocate(t *testing.T) {
	guest := newIRQGuest(t)
	if allocs := testing.AllocsPerRun(100, func() {
		if guest.VM.SignalMSI(msiAddress, vector) != nil || guest.VM.IRQLine(3, true) != nil || guest.VM.IRQLine(3, false) != nil {
			t.Fatal("interrupt failed")
		}
	}); allocs != 0 {
		t.Errorf("%v allocations", allocs)
	}
}

func TestHarvestDoesNotAllocate(t *testing.T) {
	guest := newWriter(t, written, enableRing(t))
	if err := guest.VCPU.MapDirtyRing(ringEntries); err != nil {
		t.Fatal(err)
	}
	bitmap := make([]uint64, 4)
	harvested := 0
	page := func(_ uint32, offset uint64) { bitmap[offset/64] |= 1 << (offset % 64) }
	if allocs := testing.AllocsPerRun(50, func() {
		runToOut(t, guest, 0x80)
		harvested += guest.VCPU.HarvestDirty(page)
		if _, err := guest.VM.ResetDirtyRings(); err != nil {
			t.Fatal(err)
		}
	}); allocs != 0 || harvested < 50*len(written) {
		t.Errorf("%v allocations, %d pages", allocs, harvested)
	}
}

// BenchmarkExit is a guest's OUT handled: into the guest, out of it, and a look
// at what it wants.
func BenchmarkExit(b *testing.B) {
	guest := newGuest(b, tinyguest.Config{Mode: tinyguest.Ring3, Code: []byte{0xe6, 0x80, 0xeb, 0xfc}})
	b.ReportAllocs()
	for b.Loop() {
		if err := guest.VCPU.Run(); err != nil && err != unix.EINTR {
			b.Fatal(err)
		}
		if guest.VCPU.IO().Port != 0x80 {
			b.Fatal("no OUT")
		}
	}
}
