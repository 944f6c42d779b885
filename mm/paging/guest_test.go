package paging_test

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/gnomon-vmm/gnomon/mm/guestmem"
	"github.com/gnomon-vmm/gnomon/mm/paging"
	"github.com/gnomon-vmm/gnomon/tests/guest/probe"
	"github.com/gnomon-vmm/gnomon/vmm"
	"github.com/gnomon-vmm/gnomon/vmm/boot"
	"github.com/gnomon-vmm/gnomon/vmm/chardev"
)

// serial is a serial port's host end that keeps what the guest prints.
type serial struct {
	mu     sync.Mutex
	change *sync.Cond
	text   bytes.Buffer // guarded by mu
	closed bool         // guarded by mu
}

func (s *serial) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.change.Broadcast()
	return s.text.Write(p)
}

func (s *serial) Connect(chardev.Frontend) {}
func (s *serial) Info() chardev.Info       { return chardev.Info{Label: "test"} }

func (s *serial) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	s.change.Broadcast()
	return nil
}

// until returns all text once it holds what is waited for.
func (s *serial) until(t *testing.T, what string) probe.Results {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	for !strings.Contains(s.text.String(), what) {
		if s.closed {
			t.Fatalf("the machine ended before it printed %q:\n%s", what, s.text.String())
		}
		s.change.Wait()
	}
	return probe.Parse(s.text.String())
}

// TestGuest walks the tables of a guest that runs on KVM, whose heap is
// scattered over its RAM in a way that the host can compute, and compares the
// result with that, and with KVM's own walk.
func TestGuest(t *testing.T) {
	if _, err := os.Stat("/dev/kvm"); err != nil {
		t.Skipf("host feature missing: KVM (%v)", err)
	}
	elf, err := probe.Path()
	if err != nil {
		t.Fatal(err)
	}
	kernel, err := boot.OpenKernel(elf)
	if err != nil {
		t.Fatal(err)
	}
	const heapSize, scatter = 24 << 20, 9
	out := &serial{}
	out.change = sync.NewCond(&out.mu)
	m, err := vmm.New(vmm.Config{
		Kernel: kernel, Serial: out, Memory: 64 << 20, Log: t.Logf,
		Cmdline: fmt.Sprintf("map size=%d scatter=%d; fill seed=5; wait by=mailbox; touch op=sum", heapSize, scatter),
	})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() {
		_, err := m.Run(context.Background())
		done <- err
	}()
	defer m.Close()
	results := out.until(t, "probe: wait for=line\r\n")
	va, err1 := results.Number("map", "va")
	heap, err2 := results.Number("map", "heap")
	if err1 != nil || err2 != nil {
		t.Fatal(err1, err2)
	}

	if err := m.Stopped(func() error {
		compareWithGuest(t, m, va, heap, probe.Shuffled(heapSize/guestmem.PageSize, scatter))
		return nil
	}); err != nil {
		t.Fatal(err)
	}

	// The walk has done no harm.
	if err := m.Memory().Write(probe.MailboxAddr+probe.MailboxStop, []byte{1}); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	results = out.until(t, "probe: done\r\n")
	want := make([]byte, heapSize)
	probe.Pattern(want, 5, 0)
	if sum, err := results.Number("touch", "sum"); err != nil || sum != probe.Checksum(0, want) {
		t.Errorf("the guest summed up %#x (%v), want %#x", sum, err, probe.Checksum(0, want))
	}
}

func compareWithGuest(t *testing.T, m *vmm.Machine, va, heap uint64, frames []uint32) {
	state, err := m.CPUState(0)
	if err != nil {
		t.Fatal(err)
	}
	root, ok := paging.RootOfCPU(state.Sregs.CR0, state.Sregs.CR3, state.Sregs.CR4, state.Sregs.EFER)
	if !ok {
		t.Fatalf("the guest does not use paging: %+v", state.Sregs)
	}
	populated, err := paging.Populated(m.Memory())
	if err != nil {
		t.Fatal(err)
	}
	roots, err := paging.FindRoots(m.Memory(), populated, root)
	if err != nil || !slices.Equal(roots, []paging.Root{root}) {
		t.Fatalf("roots %+v, %v; the guest has %+v only", roots, err, root)
	}
	var ram []guestmem.Range
	var pages uint64
	for _, r := range m.Memory().Regions() {
		ram = append(ram, r.Range)
		pages += r.Size / guestmem.PageSize
	}
	mapped, err := paging.NewMap(m.Memory(), ram, roots)
	if err != nil {
		t.Fatal(err)
	}

	// The heap comes first, in its virtual order. What only the mapping of all
	// addresses to themselves holds follows, in physical order.
	order := mapped.Order()
	if uint64(len(order)) != pages {
		t.Fatalf("%d pages in order, want %d", len(order), pages)
	}
	walker := paging.NewWalker(m.Memory())
	for i, frame := range frames {
		gpa, gva := heap+uint64(frame)*guestmem.PageSize, va+uint64(i)*guestmem.PageSize
		if order[i] != gpa/guestmem.PageSize {
			t.Fatalf("page %d of the order is %#x, want %#x", i, order[i], gpa/guestmem.PageSize)
		}
		if got, err := walker.Walk(root, gva+123); err != nil || got.GPA != gpa+123 || got.Size != guestmem.PageSize || !got.User || !got.Writable {
			t.Fatalf("GVA %#x: %+v, %v; want GPA %#x", gva, got, err, gpa)
		}
		if got, ok := mapped.Lookup(gpa + 123); !ok || got != (paging.Place{Space: 0, GVA: gva + 123}) {
			t.Fatalf("GPA %#x is seen at %+x, %v; want %#x", gpa, got, ok, gva)
		}
		if i%256 == 0 { // each is a system call
			if got, err := m.Translate(0, gva+123); err != nil || got != gpa+123 {
				t.Fatalf("KVM has GVA %#x at %#x (%v), want %#x", gva, got, err, gpa)
			}
		}
	}
	if rest := order[len(frames):]; !slices.IsSorted(rest) {
		t.Error("what the heap does not hold is not in physical order")
	}
	for _, gva := range []uint64{0, state.Regs.RIP, state.Regs.RSP, probe.MailboxAddr, 0xfec0_0000} {
		want, err := m.Translate(0, gva)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := walker.Walk(root, gva); err != nil || got.GPA != want || got.Size != 2<<20 {
			t.Errorf("GVA %#x: %+v, %v; KVM has it at %#x", gva, got, err, want)
		}
	}
	for _, gva := range []uint64{4 << 30, va - 1, va + uint64(len(frames))*guestmem.PageSize, 1 << 63, ^uint64(0)} {
		if got, err := walker.Walk(root, gva); err == nil {
			t.Errorf("GVA %#x: %+v; it is not mapped", gva, got)
		}
	}
}
