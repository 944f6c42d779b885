package boot

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/gnomon-vmm/gnomon/mm/guestmem"
	"github.com/gnomon-vmm/gnomon/vmm/device"
)

const mib = 1 << 20

// oldMemory is memory in which a guest has run: no byte of it is zero.
func oldMemory(t testing.TB, ranges ...guestmem.Range) *guestmem.Memory {
	mem := newMemory(t, ranges...)
	for _, r := range mem.Regions() {
		page := bytes.Repeat([]byte{0xA5}, pageSize)
		for b := r.Bytes(); len(b) > 0; b = b[pageSize:] {
			copy(b, page)
		}
	}
	return mem
}

func read(t testing.TB, mem *guestmem.Memory, gpa uint64, n int) []byte {
	t.Helper()
	b := make([]byte, n)
	if err := mem.Read(gpa, b); err != nil {
		t.Fatal(err)
	}
	return b
}

func loadKernel(t testing.TB, image []byte) *Kernel {
	t.Helper()
	k, err := LoadKernel(bytes.NewReader(image), int64(len(image)))
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// checkSegments compares guest memory with what e says lies there.
func checkSegments(t *testing.T, mem *guestmem.Memory, e testELF) {
	t.Helper()
	for i, s := range e.segments {
		if !bytes.Equal(read(t, mem, s.gpa, len(s.data)), s.data) {
			t.Errorf("segment %d is not what the image says", i)
		}
		end := s.gpa + max(s.memSize, uint64(len(s.data)))
		for j, b := range read(t, mem, s.gpa+uint64(len(s.data)), int(s.memSize)-min(int(s.memSize), len(s.data))) {
			if b != 0 {
				t.Fatalf("segment %d: byte %d of .bss is %#x", i, j, b)
			}
		}
		for off, name := range map[uint64]string{end: "behind", s.gpa - 1: "before"} {
			if b := read(t, mem, off, 1)[0]; b != 0xA5 {
				t.Errorf("segment %d: the byte %s it became %#x", i, name, b)
			}
		}
	}
}

// TestLoadEachImageKind loads the same kernel from everything it can come in.
func TestLoadEachImageKind(t *testing.T) {
	elf := linuxLike()
	elf.tail = 100_000
	plain := elf.build()
	images := map[string][]byte{
		"vmlinux":               plain,
		"vmlinux, gzip":         pack(t, gzipped, plain),
		"bzImage, uncompressed": bzImageOf(pack(t, uncompressed, plain), nil),
	}
	for _, c := range supported {
		images["bzImage, "+c.String()] = bzImageOf(pack(t, c, plain), nil)
	}
	for name, image := range images {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "kernel")
			if err := os.WriteFile(path, image, 0o600); err != nil {
				t.Fatal(err)
			}
			k, err := OpenKernel(path)
			if err != nil {
				t.Fatal(err)
			}
			if k.String() != name || !k.Linux() {
				t.Errorf("kernel is %q, Linux: %v", k, k.Linux())
			}
			for range 2 { // the second is what a reset does
				mem := oldMemory(t, guestmem.Range{Size: 32 * mib})
				e, err := Load(mem, k, Config{CommandLine: "quiet"})
				if err != nil {
					t.Fatal(err)
				}
				checkSegments(t, mem, elf)
				if e.Protocol != Linux64 || e.RIP != elf.entry || e.RSI != ZeroPageAddr {
					t.Errorf("entry %+v", e)
				}
				want := guestmem.Range{GPA: testKernelGPA, Size: 0x20_0000 + 5000 + testBSS}
				if e.Kernel != want || e.Initrd != (guestmem.Range{}) {
					t.Errorf("kernel at %+v, initrd at %+v", e.Kernel, e.Initrd)
				}
			}
			if err := k.Close(); err != nil {
				t.Error(err)
			}
			if _, err := Load(newMemory(t, guestmem.Range{Size: 32 * mib}), k, Config{}); !errors.Is(err, os.ErrClosed) {
				t.Errorf("load from a closed kernel: %v", err)
			}
		})
	}
}

func TestSegmentsInAnyOrder(t *testing.T) {
	elf := linuxLike()
	slices.Reverse(elf.segments)
	mem := oldMemory(t, guestmem.Range{Size: 32 * mib})
	e, err := Load(mem, loadKernel(t, elf.build()), Config{})
	if err != nil {
		t.Fatal(err)
	}
	checkSegments(t, mem, elf)
	if e.Kernel.GPA != testKernelGPA || e.Kernel.Size != 0x20_0000+5000+testBSS {
		t.Errorf("kernel at %+v", e.Kernel)
	}
}

// TestFreshMemoryStaysUnallocated: clearing .bss must not touch its pages.
func TestFreshMemoryStaysUnallocated(t *testing.T) {
	elf := probeLike()
	elf.segments[0].memSize = 100 * mib
	mem := newMemory(t, guestmem.Range{Size: 128 * mib})
	if _, err := Load(mem, loadKernel(t, elf.build()), Config{}); err != nil {
		t.Fatal(err)
	}
	if kib := allocatedKiB(t, mem); kib > 256 {
		t.Errorf("%d KiB of guest memory are allocated", kib)
	}
}

func TestZeroPage(t *testing.T) {
	le := binary.LittleEndian
	initrd := bytes.Repeat([]byte("initrd! "), 3000)
	image := bzImageOf(pack(t, lz4ed, linuxLike().build()), func(head []byte) {
		copy(head[0x258:], "pref_add") // a field that only passes through
		head[hdrJumpDistance] = 0x6A   // header ends at 0x26C
		copy(head[0x26C:], "code, not header")
	})
	mem := oldMemory(t, guestmem.Range{Size: 64 * mib}, guestmem.Range{GPA: device.HighRAMBase, Size: 16 * mib})
	e, err := Load(mem, loadKernel(t, image), Config{
		CommandLine: "console=ttyS0",
		Initrd:      bytes.NewReader(initrd),
		InitrdSize:  int64(len(initrd)),
		RSDP:        ACPIAddr,
	})
	if err != nil {
		t.Fatal(err)
	}

	p := read(t, mem, ZeroPageAddr, zeroPageSize)
	if got := string(read(t, mem, uint64(le.Uint32(p[0x228:])), 14)); got != "console=ttyS0\x00" {
		t.Errorf("command line %q", got)
	}
	at, n := uint64(le.Uint32(p[0x218:])), int(le.Uint32(p[0x21C:]))
	if e.Initrd != (guestmem.Range{GPA: at, Size: uint64(n)}) || at%pageSize != 0 || at+uint64(n) > 64*mib || 64*mib-at > 2*pageSize+uint64(n) {
		t.Errorf("initrd of %d bytes at %#x, entry says %+v", n, at, e.Initrd)
	}
	if !bytes.Equal(read(t, mem, at, n), initrd) {
		t.Error("initrd differs")
	}
	if got := le.Uint64(p[0x070:]); got != ACPIAddr {
		t.Errorf("acpi_rsdp_addr %#x", got)
	}
	if p[0x210] != 0xFF || p[0x1EF] != 0 {
		t.Errorf("type_of_loader %#x, sentinel %#x", p[0x210], p[0x1EF])
	}
	if !bytes.Equal(p[0x1F1:0x202], image[0x1F1:0x202]) || string(p[0x202:0x206]) != "HdrS" || string(p[0x258:0x260]) != "pref_add" {
		t.Error("the setup header is not the image's")
	}
	if !bytes.Equal(p[0x26C:0x2D0], make([]byte, 0x2D0-0x26C)) {
		t.Error("what is behind the header was copied too")
	}
	type entry struct {
		gpa, size uint64
		kind      uint32
	}
	var got []entry
	for i := range int(p[0x1E8]) {
		b := p[0x2D0+20*i:]
		got = append(got, entry{le.Uint64(b), le.Uint64(b[8:]), le.Uint32(b[16:])})
	}
	want := []entry{
		{0, 0xA0000, 1},
		{0xE0000, 0x20000, 2},
		{0x100000, 63 * mib, 1},
		{0xE000_0000, mib, 2},
		{0xFEFF_C000, 0x4000, 2},
		{0x1_0000_0000, 16 * mib, 1},
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("E820 map\n%x, want\n%x", got, want)
	}
}

// TestZeroPageForVmlinux: without a bzImage the header is ours.
func TestZeroPageForVmlinux(t *testing.T) {
	mem := oldMemory(t, guestmem.Range{Size: 64 * mib})
	if _, err := Load(mem, loadKernel(t, linuxLike().build()), Config{}); err != nil {
		t.Fatal(err)
	}
	p := read(t, mem, ZeroPageAddr, zeroPageSize)
	le := binary.LittleEndian
	if le.Uint16(p[0x1FE:]) != 0xAA55 || string(p[0x202:0x206]) != "HdrS" || le.Uint16(p[0x206:]) < 0x20C || p[0x210] != 0xFF || p[0x211]&1 == 0 {
		t.Errorf("header % x", p[0x1F1:0x260])
	}
}

func TestPVHStartInfo(t *testing.T) {
	le := binary.LittleEndian
	elf := probeLike()
	for _, initrd := range []string{"", "module"} {
		mem := oldMemory(t, guestmem.Range{Size: 16 * mib})
		e, err := Load(mem, loadKernel(t, elf.build()), Config{
			CommandLine: "run=all",
			Initrd:      strings.NewReader(initrd),
			InitrdSize:  int64(len(initrd)),
			RSDP:        0xE0000,
		})
		if err != nil {
			t.Fatal(err)
		}
		checkSegments(t, mem, elf)
		if e.Protocol != PVH || e.RIP != 0x10_0010 || e.RBX != StartInfoAddr {
			t.Fatalf("entry %+v", e)
		}
		p := read(t, mem, e.RBX, 56)
		if le.Uint32(p) != 0x336EC578 || le.Uint32(p[4:]) != 1 || le.Uint32(p[8:]) != 0 || le.Uint64(p[32:]) != 0xE0000 {
			t.Errorf("start info % x", p)
		}
		if got := string(read(t, mem, le.Uint64(p[24:]), 8)); got != "run=all\x00" {
			t.Errorf("command line %q", got)
		}
		modules := le.Uint32(p[12:])
		if initrd == "" && modules != 0 || initrd != "" && modules != 1 {
			t.Errorf("%d modules for initrd %q", modules, initrd)
		}
		if modules == 1 {
			m := read(t, mem, le.Uint64(p[16:]), 32)
			if got := string(read(t, mem, le.Uint64(m), int(le.Uint64(m[8:])))); got != initrd {
				t.Errorf("module %q", got)
			}
			if le.Uint64(m[16:]) != 0 || le.Uint64(m[24:]) != 0 {
				t.Errorf("module's command line and reserved field: % x", m[16:])
			}
		}
		var ram uint64
		entries := read(t, mem, le.Uint64(p[40:]), 24*int(le.Uint32(p[48:])))
		for b := entries; len(b) > 0; b = b[24:] {
			if le.Uint32(b[16:]) == 1 {
				ram += le.Uint64(b[8:])
			}
		}
		if ram != 16*mib-0x6_0000 {
			t.Errorf("memory map has %#x bytes of RAM", ram)
		}
	}
}

func TestProtocolChoice(t *testing.T) {
	linux, probe, plain := linuxLike(), probeLike(), probeLike()
	plain.notes = nil
	xenLinux := probeLike()
	xenLinux.notes = append(xenLinux.notes, testNote{"Xen", noteXenGuestOS, []byte("linux\x00")})
	otherOS := probeLike()
	otherOS.notes = append(otherOS.notes, testNote{"Xen", noteXenGuestOS, []byte("xtf\x00")}, testNote{"LinuxNot", 1, nil})
	bz := bzImageOf(pack(t, zstded, linux.build()), nil)
	bzNoPVH := bzImageOf(pack(t, gzipped, plain.build()), nil)
	for _, x := range []struct {
		name  string
		image []byte
		ask   Protocol
		want  Protocol // "": refused
	}{
		{"Linux", linux.build(), Auto, Linux64},
		{"Linux by PVH", linux.build(), PVH, PVH},
		{"bzImage", bz, Auto, Linux64},
		{"bzImage by PVH", bz, PVH, PVH},
		{"bzImage without note by PVH", bzNoPVH, PVH, ""},
		{"probe", probe.build(), Auto, PVH},
		{"probe as Linux", probe.build(), Linux64, Linux64},
		{"Linux known by Xen's note", xenLinux.build(), Auto, Linux64},
		{"other OS with Xen's note", otherOS.build(), Auto, PVH},
		{"no notes", plain.build(), Auto, Linux64},
		{"no notes by PVH", plain.build(), PVH, ""},
		{"unknown protocol", linux.build(), "multiboot", ""},
	} {
		e, err := Load(newMemory(t, guestmem.Range{Size: 32 * mib}), loadKernel(t, x.image), Config{Entry: x.ask})
		if e.Protocol != x.want || (x.want == "") != errors.Is(err, ErrProtocol) {
			t.Errorf("%s: %q, %v", x.name, e.Protocol, err)
		}
		if want := uint64(testKernelGPA + 0x50); x.want == PVH && x.ask == PVH && e.RIP != want {
			t.Errorf("%s: enters at %#x, the note says %#x", x.name, e.RIP, want)
		}
	}
}

// TestWhatDoesNotFit has the refusals of Load, each with what to do.
func TestWhatDoesNotFit(t *testing.T) {
	elf := linuxLike().build() // ends at 18.02 MiB
	ram := func(n uint64) []guestmem.Range { return []guestmem.Range{{Size: n}} }
	lowInitrd := bzImageOf(pack(t, gzipped, elf), func(head []byte) {
		binary.LittleEndian.PutUint32(head[hdrInitrdMax:], 20*mib-1)
	})
	atZero, atTop := probeLike(), probeLike()
	atZero.segments[0].gpa = 0x8000
	atTop.segments[0].gpa = 1 << 40
	huge := probeLike()
	huge.segments[0].memSize = 3500 * mib
	for _, x := range []struct {
		name   string
		image  []byte
		ranges []guestmem.Range
		initrd int64
		args   string
		err    error
		says   string
	}{
		{"kernel", elf, ram(16 * mib), 0, "", ErrNoMemory, "--memory 19M"},
		{"initrd", elf, ram(32 * mib), 40 * mib, "", ErrNoMemory, "--memory 59M"},
		{"initrd by a hair", elf, ram(59 * mib), 41 * mib, "", ErrNoMemory, "--memory 60M"},
		{"initrd above what the kernel reaches", lowInitrd, ram(64 * mib), 3 * mib, "", ErrInitrd, "smaller"},
		{"initrd is shorter than said", elf, ram(64 * mib), -1, "", ErrInitrd, "size"},
		{"RAM only high up", elf, []guestmem.Range{{GPA: device.HighRAMBase, Size: 64 * mib}}, 0, "", ErrNoMemory, "--memory"},
		{"a little RAM", elf, ram(64 << 10), 0, "", ErrNoMemory, "--memory"},
		{"segment in the first MiB", atZero.build(), ram(64 * mib), 0, "", ErrNotKernel, "link it higher"},
		{"segment above 4 GiB", atTop.build(), ram(64 * mib), 0, "", ErrNotKernel, "4 GiB"},
		{"more than can be below the PCI hole", huge.build(), ram(64 * mib), 0, "", ErrNoMemory, "3072 MiB below 4 GiB"},
		{"command line", elf, ram(64 * mib), 0, strings.Repeat("x", 2048), ErrCommandLine, "2047"},
		{"command line with NUL", elf, ram(64 * mib), 0, "a\x00b", ErrCommandLine, "byte 1"},
	} {
		cfg := Config{CommandLine: x.args}
		if x.initrd != 0 {
			cfg.Initrd, cfg.InitrdSize = zeroes{}, x.initrd
		}
		_, err := Load(newMemory(t, x.ranges...), loadKernel(t, x.image), cfg)
		if !errors.Is(err, x.err) || !strings.Contains(fmt.Sprint(err), x.says) {
			t.Errorf("%s: %v", x.name, err)
		}
	}

	mem := newMemory(t, ram(64*mib)...)
	if _, err := Load(mem, loadKernel(t, elf), Config{Initrd: strings.NewReader("short"), InitrdSize: 6}); !errors.Is(err, ErrInitrd) {
		t.Errorf("initrd shorter than its size: %v", err)
	}
	// What just fits.
	if _, err := Load(mem, loadKernel(t, elf), Config{CommandLine: strings.Repeat("x", 2047)}); err != nil {
		t.Errorf("longest command line: %v", err)
	}
	e, err := Load(newMemory(t, ram(59*mib)...), loadKernel(t, elf), Config{Initrd: zeroes{}, InitrdSize: 40 * mib})
	if err != nil || e.Initrd.GPA != 19*mib {
		t.Errorf("initrd that just fits: %+v, %v", e.Initrd, err)
	}
	e, err = Load(newMemory(t, ram(64*mib)...), loadKernel(t, lowInitrd), Config{Initrd: zeroes{}, InitrdSize: mib})
	if err != nil || e.Initrd.GPA != 19*mib {
		t.Errorf("initrd below initrd_addr_max: %+v, %v", e.Initrd, err)
	}
}

// zeroes is a file without end.
type zeroes struct{}

func (zeroes) ReadAt(p []byte, _ int64) (int, error) { clear(p); return len(p), nil }
