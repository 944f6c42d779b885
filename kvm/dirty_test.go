package kvm_test

import (
	"encoding/binary"
	"errors"
	"os"
	"runtime"
	"slices"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/kvm"
	"github.com/gnomon-vmm/gnomon/kvm/internal/tinyguest"
)

// newWriter makes a guest that writes to the given pages, then to port 0x80,
// and over again.
func newWriter(t testing.TB, pages []uint32, prepare func(*kvm.VM) error) *tinyguest.Guest {
	t.Helper()
	var program []byte
	for _, page := range pages {
		program = append(program, store(page<<12|8, 1)...)
	}
	program = append(program, out(0x80)...)
	program = append(program, 0xe9) // jmp to the beginning
	program = binary.LittleEndian.AppendUint32(program, uint32(-(len(program) + 4)))
	return newGuest(t, tinyguest.Config{
		Mode: tinyguest.Ring3, Code: program, Memory: 200 << 12, MemFlags: kvm.MemLogDirtyPages, Prepare: prepare,
	})
}

// dirtyPages lists the bits that are set for pages that are the guest's to
// write: a host may count code and tables as written, too.
func dirtyPages(bitmap []uint64) (pages []uint32) {
	for i := range 64 * len(bitmap) {
		if bitmap[i/64]>>(i%64)&1 == 1 && i >= tinyguest.Data>>12 {
			pages = append(pages, uint32(i))
		}
	}
	return pages
}

var written = []uint32{8, 63, 64, 150, 199}

func TestDirtyLog(t *testing.T) {
	guest := newWriter(t, written, nil)
	bitmap := make([]uint64, 4)
	for range 3 {
		runToOut(t, guest, 0x80)
		if err := guest.VM.DirtyLog(0, bitmap); err != nil {
			t.Fatal(err)
		}
		if got := dirtyPages(bitmap); !slices.Equal(got, written) {
			t.Errorf("dirty pages %d, the guest wrote %d", got, written)
		}
		// Reading cleared it.
		if err := guest.VM.DirtyLog(0, bitmap); err != nil {
			t.Fatal(err)
		}
		if got := dirtyPages(bitmap); len(got) != 0 {
			t.Errorf("dirty pages %d after they were read", got)
		}
	}
}

func TestClearDirtyLog(t *testing.T) {
	guest := newWriter(t, written, func(vm *kvm.VM) error {
		return vm.EnableCap(kvm.CapManualDirtyLogProtect2, 1)
	})
	runToOut(t, guest, 0x80)
	read := func() []uint32 {
		t.Helper()
		bitmap := make([]uint64, 4)
		if err := guest.VM.DirtyLog(0, bitmap); err != nil {
			t.Fatal(err)
		}
		return dirtyPages(bitmap)
	}
	if got := read(); !slices.Equal(got, written) {
		t.Fatalf("dirty pages %d, the guest wrote %d", got, written)
	}
	// Pages 64 to 127 only, of which page 64 is dirty.
	if err := guest.VM.ClearDirtyLog(0, 64, 64, []uint64{^uint64(0)}); err != nil {
		t.Fatal(err)
	}
	if got, want := read(), []uint32{8, 63, 150, 199}; !slices.Equal(got, want) {
		t.Errorf("dirty pages %d, want %d", got, want)
	}
	runToOut(t, guest, 0x80)
	if got := read(); !slices.Equal(got, written) {
		t.Errorf("dirty pages %d after the guest wrote %d", got, written)
	}
}

// The kernel writes a bitmap of the slot's size wherever it is told to.
func TestDirtyBitmapTooShort(t *testing.T) {
	guest := newWriter(t, written, nil)
	for name, err := range map[string]error{
		"short bitmap":   guest.VM.DirtyLog(0, make([]uint64, 3)),
		"no bitmap":      guest.VM.DirtyLog(0, nil),
		"no such slot":   guest.VM.DirtyLog(5, make([]uint64, 4)),
		"clear too many": guest.VM.ClearDirtyLog(0, 0, 65, make([]uint64, 1)),
		"clear nothing":  guest.VM.ClearDirtyLog(0, 0, 0, nil),
	} {
		if !errors.Is(err, kvm.ErrBitmap) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

const ringEntries = 1024

func enableRing(t testing.TB) func(vm *kvm.VM) error {
	return func(vm *kvm.VM) error {
		if vm.Check(kvm.CapDirtyLogRingAcqRel) == 0 {
			t.Skip("needs KVM_CAP_DIRTY_LOG_RING_ACQ_REL")
		}
		return vm.EnableCap(kvm.CapDirtyLogRingAcqRel, ringEntries*kvm.DirtyRingEntrySize)
	}
}

func TestDirtyRing(t *testing.T) {
	guest := newWriter(t, written, enableRing(t))
	if n := guest.VCPU.HarvestDirty(func(uint32, uint64) { t.Error("harvest before the ring is mapped") }); n != 0 {
		t.Errorf("harvested %d before the ring is mapped", n)
	}
	if err := guest.VCPU.MapDirtyRing(ringEntries); err != nil {
		t.Fatal(err)
	}
	// More rounds than the ring has room for, so that it comes round.
	for round := range 2*ringEntries/len(written) + 1 {
		runToOut(t, guest, 0x80)
		var got []uint32
		n := guest.VCPU.HarvestDirty(func(slot uint32, offset uint64) {
			if slot != 0 {
				t.Errorf("slot %d", slot)
			}
			if offset >= tinyguest.Data>>12 {
				got = append(got, uint32(offset))
			}
		})
		slices.Sort(got)
		if !slices.Equal(got, written) {
			t.Fatalf("round %d: harvested %d: %d, the guest wrote %d", round, n, got, written)
		}
		if reset, err := guest.VM.ResetDirtyRings(); err != nil || reset != n {
			t.Fatalf("round %d: reset %d of %d entries, %v", round, reset, n, err)
		}
	}
}

// Signals, of which the Go runtime sends its own, cut the kernel's reset short.
func TestResetDirtyRingsUnderSignals(t *testing.T) {
	guest := newWriter(t, written, enableRing(t))
	if err := guest.VCPU.MapDirtyRing(ringEntries); err != nil {
		t.Fatal(err)
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	tid := unix.Gettid()
	var stop atomic.Bool
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		for !stop.Load() {
			if err := unix.Tgkill(os.Getpid(), tid, unix.SIGURG); err != nil {
				t.Error(err)
				return
			}
		}
	}()
	defer func() { stop.Store(true); <-stopped }()
	for range 200 {
		runToOut(t, guest, 0x80)
		n := guest.VCPU.HarvestDirty(func(uint32, uint64) {})
		if reset, err := guest.VM.ResetDirtyRings(); err != nil || reset != n {
			t.Fatalf("reset %d of %d entries, %v", reset, n, err)
		}
	}
}

// A guest that writes more pages than the ring takes exits until they are
// harvested, and none is lost.
func TestDirtyRingFull(t *testing.T) {
	const pages = 3 * ringEntries
	guest := newGuest(t, tinyguest.Config{
		Mode: tinyguest.Ring3,
		Code: code(
			[]byte{0xbb, 0x00, 0x00, 0x01, 0x00},                       // mov ebx, 0x10000
			[]byte{0xb9}, binary.LittleEndian.AppendUint32(nil, pages), // mov ecx, pages
			[]byte{
				0xc6, 0x03, 0x01, // mov byte [rbx], 1
				0x81, 0xc3, 0x00, 0x10, 0x00, 0x00, // add ebx, 0x1000
				0xff, 0xc9, // dec ecx
				0x75, 0xf3, // jnz back to the mov
			}, out(0x80),
		),
		Memory: 0x10000 + pages<<12, MemFlags: kvm.MemLogDirtyPages, Prepare: enableRing(t),
	})
	if err := guest.VCPU.MapDirtyRing(ringEntries); err != nil {
		t.Fatal(err)
	}
	seen := make(map[uint64]bool)
	full := 0
	for done := false; !done; {
		exit, err := guest.Run()
		if err != nil {
			t.Fatal(err)
		}
		switch exit {
		case kvm.ExitDirtyRingFull:
			full++
		case kvm.ExitIO:
			done = true
		default:
			t.Fatalf("exit %v", exit)
		}
		guest.VCPU.HarvestDirty(func(_ uint32, offset uint64) { seen[offset] = true })
		if _, err := guest.VM.ResetDirtyRings(); err != nil {
			t.Fatal(err)
		}
	}
	if full < 2 {
		t.Errorf("the ring of %d was full %d times over %d pages", ringEntries, full, pages)
	}
	for page := range uint64(pages) {
		if !seen[0x10+page] {
			t.Fatalf("page %d was lost", page)
		}
	}
}

func TestMapDirtyRingRefuses(t *testing.T) {
	guest := newWriter(t, written, enableRing(t))
	for _, entries := range []int{0, -1, 1000, 2 * ringEntries * 1024} {
		if err := guest.VCPU.MapDirtyRing(entries); !errors.Is(err, kvm.ErrDirtyRing) {
			t.Errorf("%d entries: %v", entries, err)
		}
	}
}
