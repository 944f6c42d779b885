// Package boot puts a kernel into guest memory and says in which state the
// first vCPU enters it. It reads bzImage and ELF kernels, decompresses them on
// the host (cheaper than in the guest everywhere, and much cheaper where the
// guest's ring 0 is interpreted), and speaks two protocols: the 64-bit Linux
// boot protocol (Documentation/arch/x86/boot.rst) and PVH
// (xen/docs/misc/pvh.pandoc). It also writes the machine's ACPI tables.
package boot

import (
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/gnomon-vmm/gnomon/mm/guestmem"
)

// Errors by stage; each is wrapped around what is wrong with which part.
var (
	ErrNotKernel    = errors.New("not a kernel image")
	ErrArchitecture = errors.New("kernel is for another architecture")
	ErrCompression  = errors.New("kernel compression")
	ErrTruncated    = errors.New("kernel image is cut short")
	ErrTooBig       = errors.New("kernel image is too big")
	ErrNoMemory     = errors.New("not enough guest memory")
	ErrCommandLine  = errors.New("kernel command line")
	ErrProtocol     = errors.New("boot protocol")
	ErrInitrd       = errors.New("initial RAM disk")
)

// Protocol is how a kernel is entered.
type Protocol string

// The protocols.
const (
	Auto    Protocol = ""        // PVH for ELF with a PVH note that is not Linux, else Linux64
	Linux64 Protocol = "linux64" // long mode, RSI = boot_params
	PVH     Protocol = "pvh"     // 32-bit protected mode, EBX = hvm_start_info
)

// Config is what a kernel is started with.
type Config struct {
	CommandLine string
	Initrd      io.ReaderAt // nil: none
	InitrdSize  int64       // bytes of Initrd
	RSDP        uint64      // GPA that ACPITables returned; 0: the guest has no ACPI
	Entry       Protocol
}

// Entry is the state in which the boot processor starts; Registers spells it
// out. The other processors wait for INIT and SIPI.
type Entry struct {
	Protocol Protocol
	RIP      uint64
	RSI      uint64 // Linux64: GPA of boot_params
	RBX      uint64 // PVH: GPA of hvm_start_info

	Kernel guestmem.Range // what the kernel's segments cover, .bss included
	Initrd guestmem.Range // zero when there is none
}

const pageSize = guestmem.PageSize

func pageUp(n uint64) uint64 { return (n + pageSize - 1) &^ (pageSize - 1) }

// Load writes k, its initial RAM disk, command line and start-up tables to mem.
// It may be called again, after a reset, while k is open. The image's own
// integrity is checked on the way, so ErrCompression and ErrTruncated can come
// from here as well as from LoadKernel; memory is then partly written.
func Load(mem *guestmem.Memory, k *Kernel, cfg Config) (Entry, error) {
	low, err := lowRAM(mem)
	if err != nil {
		return Entry{}, err
	}
	if err := checkCommandLine(cfg.CommandLine, k.commandLineMax()); err != nil {
		return Entry{}, err
	}
	e := Entry{Kernel: k.span()}
	notes := k.notes
	if k.setup != nil && cfg.Entry == PVH {
		if notes, err = k.readNotes(); err != nil {
			return Entry{}, err
		}
	}
	if e.Protocol, err = chooseProtocol(notes, cfg.Entry); err != nil {
		return Entry{}, err
	}
	if e.Initrd, err = placeInitrd(low, k, cfg); err != nil {
		return Entry{}, err
	}
	if err := k.loadSegments(mem); err != nil {
		return Entry{}, err
	}
	initrd := e.Initrd
	if initrd.Size > 0 {
		b, err := mem.Slice(initrd.GPA, initrd.Size)
		if err != nil {
			return Entry{}, fmt.Errorf("%w: %w", ErrInitrd, err)
		}
		if _, err := io.ReadFull(io.NewSectionReader(cfg.Initrd, 0, cfg.InitrdSize), b); err != nil {
			return Entry{}, fmt.Errorf("%w: read %d bytes: %w", ErrInitrd, initrd.Size, err)
		}
		mem.MarkDirty(initrd.GPA, initrd.Size)
	}

	w := writer{mem: mem}
	w.write(CommandLineAddr, append([]byte(cfg.CommandLine), 0))
	switch e.Protocol {
	case Linux64:
		e.RIP, e.RSI = k.elf.entry, ZeroPageAddr
		w.write(ZeroPageAddr, k.zeroPage(mem, cfg, initrd))
		w.write(PageTablesAddr, identityMap())
		w.write(GDTAddr, gdt(longModeCode))
	case PVH:
		e.RIP, e.RBX = uint64(notes.pvhEntry), StartInfoAddr
		w.write(StartInfoAddr, startInfo(mem, cfg, initrd))
		w.write(GDTAddr, gdt(protectedModeCode))
	}
	if w.err != nil {
		return Entry{}, fmt.Errorf("%w: tables below 1 MiB: %w", ErrNoMemory, w.err)
	}
	return e, nil
}

// writer writes to guest memory until the first error.
type writer struct {
	mem *guestmem.Memory
	err error
}

func (w *writer) write(gpa uint64, p []byte) {
	if w.err == nil {
		w.err = w.mem.Write(gpa, p)
	}
}

// lowRAM is the RAM that begins at GPA 0. Kernel and RAM disk lie in it.
func lowRAM(mem *guestmem.Memory) (guestmem.Range, error) {
	regions := mem.Regions()
	if len(regions) == 0 || regions[0].GPA != 0 || regions[0].Size < legacyHoleEnd {
		return guestmem.Range{}, fmt.Errorf("%w: there must be RAM from address 0 to 1 MiB: give the machine more with --memory", ErrNoMemory)
	}
	return regions[0].Range, nil
}

// placeInitrd finds room for the RAM disk as high as the kernel can reach, and
// checks on the way that the kernel has room.
func placeInitrd(low guestmem.Range, k *Kernel, cfg Config) (guestmem.Range, error) {
	span := k.span()
	if span.GPA < legacyHoleEnd {
		return guestmem.Range{}, fmt.Errorf("%w: a segment is to be loaded at %#x: the first 1 MiB belongs to the machine, link it higher", ErrNotKernel, span.GPA)
	}
	const reach = 1 << 32 // of the identity map, and of 32-bit addresses
	if span.GPA+span.Size > reach {
		return guestmem.Range{}, fmt.Errorf("%w: the kernel wants to lie at %#x-%#x, above 4 GiB", ErrNotKernel, span.GPA, span.GPA+span.Size)
	}
	end := pageUp(span.GPA + span.Size)
	var size uint64
	if cfg.Initrd != nil {
		if cfg.InitrdSize < 0 {
			return guestmem.Range{}, fmt.Errorf("%w: size %d", ErrInitrd, cfg.InitrdSize)
		}
		size = uint64(cfg.InitrdSize)
	}
	if needed := end + pageUp(min(size, reach)); needed > low.Size {
		hint := fmt.Sprintf("start the machine with --memory %dM or more", (needed+(1<<20)-1)>>20)
		if needed > lowRAMLimit {
			hint = fmt.Sprintf("no machine has more than %d MiB below 4 GiB, where they must lie", lowRAMLimit>>20)
		}
		what := fmt.Sprintf("the kernel ends at %d MiB", (end+(1<<20)-1)>>20)
		if size > 0 {
			what += fmt.Sprintf(" and the initial RAM disk has %d MiB", (size+(1<<20)-1)>>20)
		}
		return guestmem.Range{}, fmt.Errorf("%w: %s, but the machine has %d MiB: %s", ErrNoMemory, what, low.Size>>20, hint)
	}
	if size == 0 {
		return guestmem.Range{}, nil
	}
	top := min(low.Size, k.initrdMax()+1)
	if top < end || size > top-end {
		return guestmem.Range{}, fmt.Errorf("%w: %d MiB do not fit between the kernel's end (%#x) and the highest address it reaches (%#x): make it smaller",
			ErrInitrd, size>>20, end, top)
	}
	gpa := (top - size) &^ (pageSize - 1)
	if gpa < end {
		return guestmem.Range{}, fmt.Errorf("%w: no room between %#x and %#x", ErrInitrd, end, top)
	}
	return guestmem.Range{GPA: gpa, Size: size}, nil
}

// chooseProtocol follows the rule that Auto documents.
func chooseProtocol(notes elfNotes, want Protocol) (Protocol, error) {
	switch {
	case want == Auto && notes.hasPVH && !notes.linux:
		return PVH, nil
	case want == Auto, want == Linux64:
		return Linux64, nil
	case want == PVH && notes.hasPVH:
		return PVH, nil
	case want == PVH:
		return "", fmt.Errorf("%w: the kernel has no PVH entry point (for Linux: build it with CONFIG_PVH=y, or use %q)", ErrProtocol, Linux64)
	}
	return "", fmt.Errorf("%w: %q is neither %q nor %q", ErrProtocol, want, Linux64, PVH)
}

// checkCommandLine refuses what the kernel would cut off without a word.
func checkCommandLine(s string, limit uint64) error {
	if i := strings.IndexByte(s, 0); i >= 0 {
		return fmt.Errorf("%w: byte %d is NUL", ErrCommandLine, i)
	}
	if uint64(len(s)) > limit {
		return fmt.Errorf("%w: %d bytes, but this kernel takes at most %d: shorten it", ErrCommandLine, len(s), limit)
	}
	return nil
}
