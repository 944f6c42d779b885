package boot

import (
	"encoding/binary"
	"fmt"
	"slices"
	"testing"

	"github.com/gnomon-vmm/gnomon/kvm"
	"github.com/gnomon-vmm/gnomon/mm/guestmem"
)

// TestIdentityMap walks the tables as a processor does.
func TestIdentityMap(t *testing.T) {
	mem := newMemory(t, guestmem.Range{Size: mib})
	if err := mem.Write(PageTablesAddr, identityMap()); err != nil {
		t.Fatal(err)
	}
	walk := func(va uint64) (uint64, error) {
		table := uint64(PageTablesAddr)
		for _, shift := range []int{39, 30, 21} {
			entry := binary.LittleEndian.Uint64(read(t, mem, table+va>>shift%512*8, 8))
			if entry&3 != 3 {
				return 0, fmt.Errorf("entry %#x for bit %d is not present and writable", entry, shift)
			}
			table = entry &^ 0xFFF
			if shift == 21 && entry&0x80 == 0 {
				return 0, fmt.Errorf("entry %#x is no large page", entry)
			}
		}
		return table + va%(2*mib), nil
	}
	for _, va := range []uint64{0, 0x7000, 2*mib - 1, 2 * mib, 0x4000_0000, 0xBFFF_FFFF, 0xFEE0_0030, 0xFFFF_FFFF} {
		if pa, err := walk(va); pa != va || err != nil {
			t.Errorf("%#x is mapped to %#x, %v", va, pa, err)
		}
	}
	for _, va := range []uint64{1 << 32, 1 << 39, 1 << 47} {
		if pa, err := walk(va); err == nil {
			t.Errorf("%#x is mapped to %#x", va, pa)
		}
	}
}

// TestPlacesAreDisjoint: nothing that this package puts below 1 MiB overlaps
// with anything else of it, or with the legacy hole's video memory.
func TestPlacesAreDisjoint(t *testing.T) {
	places := []guestmem.Range{
		{GPA: GDTAddr, Size: uint64(len(gdt(0)))},
		{GPA: StartInfoAddr, Size: startInfoSize + moduleSize + bpE820Max*mapEntrySize},
		{GPA: ZeroPageAddr, Size: zeroPageSize},
		{GPA: PageTablesAddr, Size: uint64(len(identityMap()))},
		{GPA: CommandLineAddr, Size: CommandLineSize},
		{GPA: ACPIAddr, Size: ACPISize},
		{GPA: GenerationIDAddr, Size: GenerationIDSize},
		{GPA: legacyHoleEnd, Size: 1},
	}
	for i, p := range places[1:] {
		if before := places[i]; p.GPA < before.GPA+before.Size {
			t.Errorf("%+v begins before %+v ends", p, before)
		}
	}
	// What the guest must read before it may be overwritten is told as RAM,
	// what must stay is not.
	mem := newMemory(t, guestmem.Range{Size: 16 * mib})
	for _, p := range places[:len(places)-1] {
		want := uint32(mapRAM)
		if p.GPA >= legacyHoleStart {
			want = mapReserved
		}
		ok := slices.ContainsFunc(memoryMap(mem), func(m mapEntry) bool {
			return m.kind == want && p.GPA >= m.gpa && p.GPA+p.Size <= m.gpa+m.size
		})
		if !ok {
			t.Errorf("%+v is not of kind %d", p, want)
		}
	}
}

// TestManyRegions: more RAM regions than E820 has room for must not overflow.
func TestManyRegions(t *testing.T) {
	var ranges []guestmem.Range
	for i := range uint64(200) {
		ranges = append(ranges, guestmem.Range{GPA: i * 4 * mib, Size: 2 * mib})
	}
	mem := newMemory(t, ranges...)
	entries := memoryMap(mem)
	if len(entries) > bpE820Max || len(entries) < bpE820Max-1 {
		t.Errorf("%d entries", len(entries))
	}
	if n := len(startInfo(mem, Config{}, guestmem.Range{Size: 1})); n > ZeroPageAddr-StartInfoAddr {
		t.Errorf("start info has %d bytes", n)
	}
}

// TestEntryState runs guest code from its first instruction, by both protocols:
// it reports what its parameter points to, reloads CS, DS and SS from the GDT,
// reports again and halts.
func TestEntryState(t *testing.T) {
	const gpa = 0x10_0000
	linux := []byte{
		0x66, 0xBA, 0xF8, 0x03, // mov dx, 0x3f8
		0x8B, 0x86, 0x02, 0x02, 0, 0, // mov eax, [rsi+0x202]
		0xEF,                               // out dx, eax
		0x48, 0xC7, 0xC4, 0x00, 0, 0x08, 0, // mov rsp, 0x80000
		0x6A, 0x10, // push 0x10
		0x48, 0x8D, 0x05, 3, 0, 0, 0, // lea rax, [rip+3]
		0x50,       // push rax
		0x48, 0xCB, // lretq
		0xB8, 0x18, 0, 0, 0, // mov eax, 0x18
		0x8E, 0xD8, // mov ds, eax
		0x8E, 0xD0, // mov ss, eax
		0xB8, 0x00, 0x00, 0x02, 0x00, // mov eax, CommandLineAddr
		0x48, 0x8B, 0x00, // mov rax, [rax], which is another thing in 32-bit code
		0xEF, // out dx, eax
		0xF4, // hlt
	}
	pvh := []byte{
		0x66, 0xBA, 0xF8, 0x03, // mov dx, 0x3f8
		0x8B, 0x03, // mov eax, [ebx]
		0xEF,                             // out dx, eax
		0xEA, 14, 0x00, 0x10, 0, 0x10, 0, // jmp 0x10:gpa+14
		0xB8, 0x18, 0, 0, 0, // mov eax, 0x18
		0x8E, 0xD8, // mov ds, eax
		0x8E, 0xD0, // mov ss, eax
		0x8B, 0x43, 0x18, // mov eax, [ebx+24], the command line's address
		0x8B, 0x00, // mov eax, [eax]
		0xEF, // out dx, eax
		0xF4, // hlt
	}
	note := []testNote{{"Xen", noteXenPhys32Entry, []byte{0, 0, 0x10, 0}}}
	for _, x := range []struct {
		protocol Protocol
		code     []byte
		notes    []testNote
		first    string
	}{
		{Linux64, linux, nil, "HdrS"},
		{PVH, pvh, note, "\x78\xC5\x6E\x33"},
	} {
		t.Run(string(x.protocol), func(t *testing.T) {
			mem := newMemory(t, guestmem.Range{Size: 2 * mib})
			image := testELF{entry: gpa, segments: []testSegment{{gpa: gpa, data: x.code}}, notes: x.notes}.build()
			e, err := Load(mem, loadKernel(t, image), Config{CommandLine: "boot=ok"})
			if err != nil || e.Protocol != x.protocol {
				t.Fatalf("%+v, %v", e, err)
			}
			vcpu := newVCPU(t, mem)
			regs, sregs := e.Registers()
			if err := vcpu.SetSregs(&sregs); err != nil {
				t.Fatal(err)
			}
			if err := vcpu.SetRegs(&regs); err != nil {
				t.Fatal(err)
			}
			var reported []string
			for range 4 {
				if err := vcpu.Run(); err != nil {
					t.Fatal(err)
				}
				if vcpu.ExitReason() != kvm.ExitIO {
					break
				}
				reported = append(reported, string(vcpu.IO().Data))
			}
			if err := vcpu.GetRegs(&regs); err != nil {
				t.Fatal(err)
			}
			if vcpu.ExitReason() != kvm.ExitHLT || regs.RIP != gpa+uint64(len(x.code)) || regs.RFlags&0x200 != 0 {
				t.Errorf("ended with %s at %#x, RFLAGS %#x", vcpu.ExitReason(), regs.RIP, regs.RFlags)
			}
			if want := []string{x.first, "boot"}; !slices.Equal(reported, want) {
				t.Errorf("reported %q, want %q", reported, want)
			}
		})
	}
}

func newVCPU(t *testing.T, mem *guestmem.Memory) *kvm.VCPU {
	t.Helper()
	sys, err := kvm.Open()
	if err != nil {
		t.Skipf("no KVM on this host: %v", err)
	}
	t.Cleanup(func() { sys.Close() })
	vm, err := sys.CreateVM()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { vm.Close() })
	if err := vm.SetTSSAddr(0xFEFF_D000); err != nil {
		t.Fatal(err)
	}
	for i, r := range mem.Regions() {
		if err := vm.SetMemory(uint32(i), 0, r.GPA, r.Bytes()); err != nil {
			t.Fatal(err)
		}
	}
	vcpu, err := vm.CreateVCPU(0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { vcpu.Close() })
	cpuid, err := sys.SupportedCPUID()
	if err == nil {
		err = vcpu.SetCPUID(cpuid)
	}
	if err != nil {
		t.Fatal(err)
	}
	return vcpu
}
