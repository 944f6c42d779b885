package kvm_test

import (
	"bytes"
	"encoding/binary"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/kvm"
	"github.com/gnomon-vmm/gnomon/kvm/internal/tinyguest"
)

func openKVM(t testing.TB) *kvm.System {
	t.Helper()
	sys, err := kvm.Open()
	if err != nil {
		t.Skipf("needs /dev/kvm: %v", err)
	}
	t.Cleanup(func() { sys.Close() })
	return sys
}

func newGuest(t testing.TB, config tinyguest.Config) *tinyguest.Guest {
	t.Helper()
	guest, err := tinyguest.New(openKVM(t), config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := guest.Close(); err != nil {
			t.Error(err)
		}
	})
	return guest
}

// runTo runs the guest and wants a certain exit.
func runTo(t testing.TB, guest *tinyguest.Guest, want kvm.Exit) {
	t.Helper()
	exit, err := guest.Run()
	if err != nil {
		t.Fatalf("KVM_RUN: %v", err)
	}
	if exit == want {
		return
	}
	var regs kvm.Regs
	if err := guest.VCPU.GetRegs(&regs); err != nil {
		t.Error(err)
	}
	suberror, data := guest.VCPU.InternalError()
	t.Fatalf("exit %v, not %v; RIP %#x; if internal error: %d %#x", exit, want, regs.RIP, suberror, data)
}

// runToOut runs the guest until it writes to a port, and wants that port.
func runToOut(t testing.TB, guest *tinyguest.Guest, port uint16) []byte {
	t.Helper()
	runTo(t, guest, kvm.ExitIO)
	io := guest.VCPU.IO()
	if !io.Write || io.Port != port {
		t.Fatalf("port I/O %+v, not an OUT to %#x", io, port)
	}
	return io.Data
}

// code puts pieces of machine code together.
func code(pieces ...[]byte) []byte { return bytes.Join(pieces, nil) }

// at pads code so that the next piece is at offset.
func at(offset int, before []byte) []byte {
	return append(bytes.Clone(before), bytes.Repeat([]byte{0x90}, offset-len(before))...)
}

// out is out port, al.
func out(port byte) []byte { return []byte{0xe6, port} }

// store is mov byte [address], value in 64-bit mode.
func store(address uint32, value byte) []byte {
	return append(binary.LittleEndian.AppendUint32([]byte{0xc6, 0x04, 0x25}, address), value)
}

// loop is jmp to itself.
var loop = []byte{0xeb, 0xfe}

const (
	hlt = 0xf4
	sti = 0xfb
)

// everyMode runs a test on the guest modes whose code it is good for.
func everyMode(t *testing.T, test func(t *testing.T, mode tinyguest.Mode)) {
	for mode, name := range map[tinyguest.Mode]string{tinyguest.Ring0: "ring 0", tinyguest.Ring3: "ring 3", tinyguest.Real: "real"} {
		t.Run(name, func(t *testing.T) { test(t, mode) })
	}
}

func TestPortIO(t *testing.T) {
	everyMode(t, func(t *testing.T, mode tinyguest.Mode) {
		guest := newGuest(t, tinyguest.Config{Mode: mode, Code: []byte{
			0xb0, 'A', // mov al, 'A'
			0xe6, 0x40, // out 0x40, al
			0xe4, 0x41, // in al, 0x41
			0xe6, 0x42, // out 0x42, al
			0xe5, 0x43, // in eax, 0x43; in ax, 0x43 in real mode
			0xe7, 0x44, // out 0x44, eax
		}})
		if data := runToOut(t, guest, 0x40); string(data) != "A" {
			t.Errorf("OUT wrote %q", data)
		}
		runTo(t, guest, kvm.ExitIO)
		if io := guest.VCPU.IO(); io.Write || io.Port != 0x41 || io.Size != 1 || io.Count != 1 || len(io.Data) != 1 {
			t.Fatalf("IN exits with %+v", io)
		}
		guest.VCPU.IO().Data[0] = 0x5a
		if data := runToOut(t, guest, 0x42); data[0] != 0x5a {
			t.Errorf("the guest read %#x from the port", data[0])
		}
		runTo(t, guest, kvm.ExitIO)
		wide := 4
		if mode == tinyguest.Real {
			wide = 2
		}
		copy(guest.VCPU.IO().Data, "wide")
		if data := runToOut(t, guest, 0x44); string(data) != "wide"[:wide] {
			t.Errorf("the guest read %q from the port", data)
		}
	})
}

func TestStringIO(t *testing.T) {
	everyMode(t, func(t *testing.T, mode tinyguest.Mode) {
		setup := []byte{
			0xbe, 0x00, 0x80, 0x00, 0x00, // mov esi, 0x8000
			0xb9, 0x05, 0x00, 0x00, 0x00, // mov ecx, 5
		}
		if mode == tinyguest.Real {
			setup = []byte{0xbe, 0x00, 0x80, 0xb9, 0x05, 0x00} // the same with si and cx
		}
		guest := newGuest(t, tinyguest.Config{Mode: mode, Code: code(setup, []byte{
			0x66, 0xba, 0x40, 0x00, // mov dx, 0x40
			0x90,
			0xfc,       // cld
			0xf3, 0x6e, // rep outsb
			0xe6, 0x41, // out 0x41, al
		})})
		if mode == tinyguest.Real {
			// Without the 66 prefix DX is 16 bits wide there.
			copy(guest.Memory[tinyguest.Code+len(setup):], []byte{0xba, 0x40, 0x00, 0x90, 0x90})
		}
		copy(guest.Memory[tinyguest.Data:], "hello")
		var got []byte
		for {
			runTo(t, guest, kvm.ExitIO)
			io := guest.VCPU.IO()
			if io.Port == 0x41 {
				break
			}
			if len(io.Data) != int(io.Size)*int(io.Count) {
				t.Fatalf("%d bytes for %d items of %d", len(io.Data), io.Count, io.Size)
			}
			got = append(got, io.Data...)
		}
		if string(got) != "hello" {
			t.Errorf("OUTS wrote %q", got)
		}
	})
}

func TestMMIO(t *testing.T) {
	guest := newGuest(t, tinyguest.Config{Mode: tinyguest.Ring3, Code: []byte{
		0xb8, 0xdd, 0xcc, 0xbb, 0xaa, // mov eax, 0xaabbccdd
		0x89, 0x04, 0x25, 0x10, 0x00, 0x20, 0x00, // mov [0x200010], eax
		0x48, 0x8b, 0x04, 0x25, 0x18, 0x00, 0x20, 0x00, // mov rax, [0x200018]
		0x48, 0x89, 0x04, 0x25, 0x00, 0x80, 0x00, 0x00, // mov [0x8000], rax
		0xe6, 0x80, // out 0x80, al
	}})
	runTo(t, guest, kvm.ExitMMIO)
	mmio := guest.VCPU.MMIO()
	if !mmio.IsWrite || mmio.Addr != 0x200010 || mmio.Len != 4 || binary.LittleEndian.Uint32(mmio.Data[:]) != 0xaabbccdd {
		t.Fatalf("write exits with %+v", mmio)
	}
	runTo(t, guest, kvm.ExitMMIO)
	mmio = guest.VCPU.MMIO()
	if mmio.IsWrite || mmio.Addr != 0x200018 || mmio.Len != 8 {
		t.Fatalf("read exits with %+v", mmio)
	}
	copy(mmio.Data[:], "12345678")
	runToOut(t, guest, 0x80)
	if got := guest.Memory[tinyguest.Data:][:8]; string(got) != "12345678" {
		t.Errorf("the guest read %q", got)
	}
}

func TestReadonlyMemory(t *testing.T) {
	rom, err := unix.Mmap(-1, 0, 0x1000, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(rom) })
	rom[0] = 0x77
	guest := newGuest(t, tinyguest.Config{
		Mode: tinyguest.Ring3,
		Code: code(
			[]byte{0x8a, 0x04, 0x25, 0x00, 0x00, 0x20, 0x00}, // mov al, [0x200000]
			out(0x80),
			store(0x200001, 0x55),
			store(0x200002, 0x66),
		),
		Prepare: func(vm *kvm.VM) error { return vm.SetMemory(1, kvm.MemReadonly, 0x200000, rom) },
	})
	if got := runToOut(t, guest, 0x80); got[0] != 0x77 {
		t.Errorf("the guest read %#x", got[0])
	}
	runTo(t, guest, kvm.ExitMMIO)
	if mmio := guest.VCPU.MMIO(); !mmio.IsWrite || mmio.Addr != 0x200001 || rom[1] != 0 {
		t.Errorf("write to a read-only slot exits with %+v and leaves %#x there", mmio, rom[1])
	}
	// Once the slot is gone, there is no memory.
	if err := guest.VM.SetMemory(1, 0, 0x200000, nil); err != nil {
		t.Fatal(err)
	}
	runTo(t, guest, kvm.ExitMMIO)
	if err := guest.VM.SetMemory(1, 0, 0x200001, rom); err == nil {
		t.Error("a slot that is not page-aligned was accepted")
	}
}

func TestHLT(t *testing.T) {
	for _, mode := range []tinyguest.Mode{tinyguest.Real, tinyguest.Ring0} {
		guest := newGuest(t, tinyguest.Config{Mode: mode, Code: []byte{hlt}})
		runTo(t, guest, kvm.ExitHLT)
	}
}

func TestTripleFault(t *testing.T) {
	guest := newGuest(t, tinyguest.Config{Mode: tinyguest.Ring3, Code: []byte{0x0f, 0x0b}}) // ud2, no gate
	runTo(t, guest, kvm.ExitShutdown)
}

// INT3 in ring 0 is an instruction that PVM's interpreter lacks.
func TestEmulationFailure(t *testing.T) {
	guest := newGuest(t, tinyguest.Config{
		Mode: tinyguest.Ring0, Code: at(0x10, code([]byte{0xcc}, out(0x80))),
		Prepare: func(vm *kvm.VM) error { return vm.EnableCap(kvm.CapExitOnEmulationFailure, 1) },
	})
	if exit, err := guest.Run(); err != nil || exit != kvm.ExitInternalError {
		t.Skipf("needs a host that interprets ring 0: exit %v, %v", exit, err)
	}
	if suberror, data := guest.VCPU.InternalError(); suberror != kvm.InternalErrorEmulation || len(data) < 3 {
		t.Errorf("suberror %d, data %#x", suberror, data)
	}
	if insn := guest.VCPU.EmulationBytes(); !bytes.HasPrefix(insn, []byte{0xcc, 0xe6, 0x80, 0x90}) {
		t.Errorf("instruction bytes % x", insn)
	}
}

func TestMSRWriteExits(t *testing.T) {
	const lstar = 0xc0000082
	guest := newGuest(t, tinyguest.Config{
		Mode: tinyguest.Ring0,
		Code: code([]byte{
			0xb9, 0x82, 0x00, 0x00, 0xc0, // mov ecx, LSTAR
			0xb8, 0x78, 0x56, 0x34, 0x12, // mov eax, 0x12345678
			0x31, 0xd2, // xor edx, edx
			0x0f, 0x30, // wrmsr
		}, out(0x80)),
		Prepare: func(vm *kvm.VM) error { return vm.ExitOnMSRWrite(0xc0000084, lstar) },
	})
	runTo(t, guest, kvm.ExitX86WRMSR)
	if msr := guest.VCPU.MSR(); msr.Index != lstar || msr.Data != 0x12345678 || msr.Reason != kvm.MSRExitFilter {
		t.Errorf("exit with %+v", msr)
	}
	entries := []kvm.MSREntry{{Index: lstar}}
	if _, err := guest.VCPU.GetMSRs(entries); err != nil || entries[0].Data != 0 {
		t.Errorf("LSTAR = %#x, %v: the write took effect", entries[0].Data, err)
	}
	runToOut(t, guest, 0x80)
	if err := guest.VM.ExitOnMSRWrite(make([]uint32, 17)...); err == nil {
		t.Error("17 MSRs were accepted")
	}
}
