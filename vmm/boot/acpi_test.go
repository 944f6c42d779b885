package boot

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/gnomon-vmm/gnomon/mm/guestmem"
	"github.com/gnomon-vmm/gnomon/vmm/device"
)

func newMemory(t testing.TB, ranges ...guestmem.Range) *guestmem.Memory {
	t.Helper()
	mem, err := guestmem.New(ranges)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { mem.Close() })
	return mem
}

// acpiTables follows the pointers from the RSDP as a guest does, and returns
// each table's bytes by signature, all checksums verified.
func acpiTables(t *testing.T, mem *guestmem.Memory, rsdp uint64) map[string][]byte {
	t.Helper()
	le := binary.LittleEndian
	read := func(gpa, n uint64) []byte {
		b := make([]byte, n)
		if gpa < ACPIAddr || gpa+n > ACPIAddr+ACPISize {
			t.Fatalf("%d bytes at %#x are outside the ACPI area", n, gpa)
		}
		if err := mem.Read(gpa, b); err != nil {
			t.Fatal(err)
		}
		return b
	}
	sumsToZero := func(name string, b []byte) {
		if checksum(b) != 0 {
			t.Errorf("%s: checksum is wrong", name)
		}
	}
	tables := map[string][]byte{}
	add := func(gpa uint64) []byte {
		b := read(gpa, uint64(le.Uint32(read(gpa, 8)[4:])))
		name := string(b[:4])
		if name == "FACS" {
			if gpa%64 != 0 {
				t.Errorf("FACS at %#x: must be aligned to 64", gpa)
			}
		} else {
			sumsToZero(name, b)
		}
		tables[name] = b
		return b
	}
	r := read(rsdp, 36)
	if !bytes.HasPrefix(r, []byte("RSD PTR ")) || rsdp%16 != 0 || r[15] != 2 {
		t.Fatalf("RSDP at %#x: % x", rsdp, r)
	}
	sumsToZero("RSDP's first part", r[:20])
	sumsToZero("RSDP", r)
	for x := add(le.Uint64(r[24:]))[36:]; len(x) > 0; x = x[8:] {
		add(le.Uint64(x))
	}
	f := tables["FACP"]
	if f == nil {
		t.Fatal("no FADT")
	}
	if x := le.Uint64(f[140:]); x != uint64(le.Uint32(f[40:])) {
		t.Errorf("FADT: DSDT at %#x and X_DSDT at %#x", le.Uint32(f[40:]), x)
	}
	add(uint64(le.Uint32(f[40:])))
	add(uint64(le.Uint32(f[36:])))
	return tables
}

// needIASL returns iasl's path. The tables are only worth something if others
// can read them, so a machine without iasl fails the test.
func needIASL(t *testing.T) string {
	t.Helper()
	path, err := exec.LookPath("iasl")
	if err != nil {
		t.Fatalf("%v: install it with `apt-get install acpica-tools`", err)
	}
	return path
}

// TestACPITablesThroughIASL lets ACPICA's disassembler read each table, and its
// compiler build each again from that: both must find nothing wrong, and the
// compiler's bytes must be ours where it does not fill in its own name.
func TestACPITablesThroughIASL(t *testing.T) {
	iasl := needIASL(t)
	for cpus, slots := range map[int]uint32{1: 0xFF00_0000, 2: 0, MaxCPUs: ^uint32(1)} {
		mem := newMemory(t, guestmem.Range{Size: 2 << 20})
		rsdp, err := ACPITables(mem, ACPIConfig{CPUs: cpus, HotplugSlots: slots})
		if err != nil {
			t.Fatal(err)
		}
		tables := acpiTables(t, mem, rsdp)
		for _, name := range []string{"XSDT", "FACP", "FACS", "APIC", "MCFG", "DSDT"} {
			table := tables[name]
			if table == nil {
				t.Errorf("no %s", name)
				continue
			}
			dir := t.TempDir()
			file := filepath.Join(dir, strings.ToLower(name)+".dat")
			if err := os.WriteFile(file, table, 0o600); err != nil {
				t.Fatal(err)
			}
			run := func(args ...string) string {
				cmd := exec.Command(iasl, args...)
				cmd.Dir = dir
				out, err := cmd.CombinedOutput()
				if err != nil {
					t.Fatalf("iasl %s: %v\n%s", strings.Join(args, " "), err, out)
				}
				return string(out)
			}
			if out := run("-d", file); regexp.MustCompile(`(?i)warning|error|invalid|unknown|incorrect`).MatchString(out) {
				t.Errorf("%s: disassembler:\n%s", name, out)
			}
			source := strings.TrimSuffix(file, ".dat") + ".dsl"
			text, err := os.ReadFile(source)
			if err != nil {
				t.Fatal(err)
			}
			if regexp.MustCompile(`(?i)incorrect|invalid|unknown|should be`).Match(text) {
				t.Errorf("%s: disassembled:\n%s", name, text)
			}
			out := run("-p", filepath.Join(dir, "again"), source)
			if !strings.Contains(out, "0 Errors, 0 Warnings") {
				t.Errorf("%s: compiler:\n%s", name, out)
			}
			again, err := os.ReadFile(filepath.Join(dir, "again.aml"))
			if err != nil {
				t.Fatal(err)
			}
			// The header's checksum and the compiler's name differ.
			if name != "FACS" {
				again[9], table[9] = 0, 0
				copy(again[28:36], table[28:36])
			}
			if !bytes.Equal(again, table) {
				t.Errorf("%s: recompiled to %d other bytes than our %d:\n% x\n% x", name, len(again), len(table), again, table)
			}
		}
	}
}

func TestMADTHasEveryProcessor(t *testing.T) {
	table := madt(3)
	var apics, overrides, ioapics, nmis int
	for b := table[44:]; len(b) > 0; b = b[b[1]:] {
		switch b[0] {
		case 0:
			if b[2] != byte(apics) || b[3] != byte(apics) || b[4] != 1 {
				t.Errorf("local APIC %d: % x", apics, b[:8])
			}
			apics++
		case 1:
			ioapics++
			if got := binary.LittleEndian.Uint32(b[4:]); got != device.IOAPICBase {
				t.Errorf("IOAPIC at %#x", got)
			}
		case 2:
			overrides++
			// ISA bus; PIT at GSI 2 as the bus says; SCI active high, level.
			pit, sci := []byte{2, 10, 0, 0, 2, 0, 0, 0, 0, 0}, []byte{2, 10, 0, 9, 9, 0, 0, 0, 0x0D, 0}
			if !bytes.Equal(b[:10], pit) && !bytes.Equal(b[:10], sci) {
				t.Errorf("override % x", b[:10])
			}
		case 4:
			nmis++
		}
	}
	if apics != 3 || overrides != 2 || ioapics != 1 || nmis != 1 {
		t.Errorf("%d local APICs, %d overrides, %d IOAPICs, %d NMIs", apics, overrides, ioapics, nmis)
	}
}

// TestFADTMeetsTheDevices compares the registers that the guest is told of with
// where package device has them, at the offsets of section 5.2.9.
func TestFADTMeetsTheDevices(t *testing.T) {
	le := binary.LittleEndian
	table := fadt(0x1000, 0x2000)
	for _, x := range []struct {
		name                   string
		legacy, length, gas    int
		port, bytes, accessors uint64
	}{
		{"PM1a event", 56, 88, 148, device.PortPM1Event, 4, 2},
		{"PM1a control", 64, 89, 172, device.PortPM1Control, 2, 2},
		{"PM timer", 76, 91, 208, device.PortPMTimer, 4, 3},
		{"GPE0", 80, 92, 220, device.PortGPE0, 4, 1},
	} {
		g := table[x.gas:]
		if uint64(le.Uint32(table[x.legacy:])) != x.port || uint64(table[x.length]) != x.bytes {
			t.Errorf("%s: %d bytes at %#x", x.name, table[x.length], le.Uint32(table[x.legacy:]))
		}
		if g[0] != 1 || uint64(g[1]) != 8*x.bytes || g[2] != 0 || uint64(g[3]) != x.accessors || le.Uint64(g[4:]) != x.port {
			t.Errorf("%s: generic address % x", x.name, g[:12])
		}
	}
	if g := table[116:]; g[0] != 1 || g[1] != 8 || le.Uint64(g[4:]) != device.PortReset || table[128] != device.ResetValue {
		t.Errorf("reset register % x, value %#x", g[:12], table[128])
	}
	if got := le.Uint16(table[46:]); got != device.GSISCI {
		t.Errorf("SCI is %d", got)
	}
	if got := le.Uint32(table[48:]); got != 0 {
		t.Errorf("SMI command port %#x: there is none", got)
	}
	const hardwareReduced, powerButtonIsDevice, timer32 = 1 << 20, 1 << 4, 1 << 8
	if flags := le.Uint32(table[112:]); flags&(hardwareReduced|powerButtonIsDevice|timer32) != 0 || flags&(1<<10) == 0 {
		t.Errorf("flags %#x", flags)
	}
}

// TestDSDTRoutesEachSlot looks for the _PRT's entries as they are encoded.
func TestDSDTRoutesEachSlot(t *testing.T) {
	table := dsdt(0)
	for slot := byte(1); slot < 32; slot++ {
		entry := []byte{0x12, 0x0B, 4, 0x0C, 0xFF, 0xFF, slot, 0, 0, 0, 0x0A, 16 + slot%8}
		if !bytes.Contains(table, entry) {
			t.Errorf("slot %d: no % x", slot, entry)
		}
	}
}

// TestDSDTOfSlotsThatFill reads by ACPICA's disassembler what the guest is told of
// slots that devices can be plugged into.
func TestDSDTOfSlotsThatFill(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "dsdt.dat")
	if err := os.WriteFile(file, dsdt(1<<5|1<<31), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(needIASL(t), "-d", file).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	text, err := os.ReadFile(filepath.Join(dir, "dsdt.dsl"))
	if err != nil {
		t.Fatal(err)
	}
	got := regexp.MustCompile(`\s+`).ReplaceAllString(regexp.MustCompile(`//.*`).ReplaceAllString(string(text), ""), " ")
	for _, want := range []string{
		"OperationRegion (PCST, SystemIO, 0xAE00, 0x0C)",
		"Field (PCST, DWordAcc, NoLock, WriteAsZeros) { PCIU, 32, PCID, 32, B0EJ, 32 }",
		"Device (S05) { Name (_ADR, 0x00050000) Name (_SUN, 0x05) Method (_EJ0, 1, Serialized) { B0EJ = 0x20 } }",
		"Device (S1F) { Name (_ADR, 0x001F0000) Name (_SUN, 0x1F) Method (_EJ0, 1, Serialized) { B0EJ = 0x80000000 } }",
		"Method (_E01, 0, Serialized) { Local0 = \\_SB.PCI0.PCID If ((Local0 & 0x20)) { Notify (\\_SB.PCI0.S05, 0x03) } If ((Local0 & 0x80000000)) { Notify (\\_SB.PCI0.S1F, 0x03) } " +
			"Local0 = \\_SB.PCI0.PCIU If ((Local0 & 0x20)) { Notify (\\_SB.PCI0.S05, One) } If ((Local0 & 0x80000000)) { Notify (\\_SB.PCI0.S1F, One) } }",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in\n%s", want, text)
		}
	}
}

func TestACPITablesRefuses(t *testing.T) {
	mem := newMemory(t, guestmem.Range{Size: 2 << 20})
	for _, n := range []int{-1, 0, MaxCPUs + 1} {
		if _, err := ACPITables(mem, ACPIConfig{CPUs: n}); !errors.Is(err, ErrACPI) {
			t.Errorf("%d CPUs: %v", n, err)
		}
	}
	tiny := newMemory(t, guestmem.Range{Size: 64 << 10})
	if _, err := ACPITables(tiny, ACPIConfig{CPUs: 1}); !errors.Is(err, guestmem.ErrOutOfBounds) {
		t.Errorf("64 KiB of memory: %v", err)
	}
}
