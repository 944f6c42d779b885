package boot

import (
	"bytes"
	"cmp"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/gnomon-vmm/gnomon/mm/guestmem"
)

const (
	elfHeaderSize  = 64
	programHdrSize = 56
	maxProgramHdrs = 64       // a kernel has about 5
	maxHeaderBytes = 64 << 10 // the program headers end within these
	maxNoteBytes   = 64 << 10 // of all PT_NOTE segments
)

// elfHeader is what loading needs of an ELF image.
type elfHeader struct {
	entry    uint64
	segments []segment   // PT_LOAD, at least one, by ascending gpa, disjoint
	notes    []fileRange // PT_NOTE, by ascending offset
}

// segment is a PT_LOAD: fileSize bytes to lie at gpa, zeroes up to memSize.
type segment struct {
	fileRange
	gpa, memSize uint64
}

type fileRange struct{ offset, fileSize uint64 }

// overlap is the part of p, which lies at offset off of the file, that belongs
// to r, and how far into r it begins.
func (r fileRange) overlap(off uint64, p []byte) (part []byte, into uint64) {
	from := max(off, r.offset)
	to := min(off+uint64(len(p)), r.offset+r.fileSize)
	if from >= to {
		return nil, 0
	}
	return p[from-off : to-off], from - r.offset
}

// fileEnd is where the segments' last byte ends.
func (h *elfHeader) fileEnd() uint64 {
	var end uint64
	for _, s := range h.segments {
		end = max(end, s.offset+s.fileSize)
	}
	return end
}

func isELF(head []byte) bool { return bytes.HasPrefix(head, []byte(elf.ELFMAG)) }

// readELFHeader reads the ELF and program headers from the start of an image of
// size bytes.
func readELFHeader(r io.Reader, size uint64) (elfHeader, error) {
	var h elfHeader
	head := make([]byte, elfHeaderSize)
	if n, err := io.ReadFull(r, head); err != nil {
		// Unwrapped it says that the image ended; wrapped, that its packing did.
		if err == io.ErrUnexpectedEOF && !isELF(head[:n]) {
			return h, explainForeign(head[:n])
		}
		return h, fmt.Errorf("ELF header: %w", eofIsTruncated(err))
	}
	if !isELF(head) {
		return h, explainForeign(head)
	}
	if err := checkMachine(head); err != nil {
		return h, err
	}

	le := binary.LittleEndian
	h.entry = le.Uint64(head[24:])
	phoff := le.Uint64(head[32:])
	entSize, count := int(le.Uint16(head[54:])), int(le.Uint16(head[56:]))
	switch {
	case count == 0:
		return h, fmt.Errorf("%w: ELF file without program headers (an object file or module?): give a linked vmlinux", ErrNotKernel)
	case entSize != programHdrSize || count > maxProgramHdrs:
		return h, fmt.Errorf("%w: %d ELF program headers of %d bytes", ErrNotKernel, count, entSize)
	case phoff < elfHeaderSize || phoff > maxHeaderBytes:
		return h, fmt.Errorf("%w: ELF program headers at offset %#x: they must follow the ELF header", ErrNotKernel, phoff)
	}
	if err := skip(r, phoff-elfHeaderSize); err != nil {
		return h, fmt.Errorf("ELF program headers: %w", eofIsTruncated(err))
	}
	table := make([]byte, count*programHdrSize)
	if _, err := io.ReadFull(r, table); err != nil {
		return h, fmt.Errorf("ELF program headers: %w", eofIsTruncated(err))
	}
	return h, h.addSegments(table, size)
}

// checkMachine tells whether an ELF header is an x86-64 program's.
func checkMachine(head []byte) error {
	order := binary.ByteOrder(binary.LittleEndian)
	if elf.Data(head[elf.EI_DATA]) == elf.ELFDATA2MSB {
		order = binary.BigEndian
	}
	kind, machine := elf.Type(order.Uint16(head[16:])), elf.Machine(order.Uint16(head[18:]))
	const advice = "give an x86-64 kernel"
	switch class := elf.Class(head[elf.EI_CLASS]); {
	case machine == elf.EM_AARCH64:
		return fmt.Errorf("%w: an ELF image for ARM64 (aarch64): %s", ErrArchitecture, advice)
	case machine == elf.EM_386:
		return fmt.Errorf("%w: an ELF image for 32-bit x86 (i386): %s (CONFIG_64BIT=y)", ErrArchitecture, advice)
	case machine != elf.EM_X86_64:
		return fmt.Errorf("%w: an ELF image for %s: %s", ErrArchitecture, machine, advice)
	case class != elf.ELFCLASS64 || order != binary.LittleEndian:
		return fmt.Errorf("%w: an ELF image of %s and %s byte order: %s", ErrArchitecture, class, order, advice)
	}
	if kind != elf.ET_EXEC && kind != elf.ET_DYN {
		return fmt.Errorf("%w: an ELF file of type %s: give a linked vmlinux", ErrNotKernel, kind)
	}
	return nil
}

// addSegments reads the program headers of an image of size bytes.
func (h *elfHeader) addSegments(table []byte, size uint64) error {
	le := binary.LittleEndian
	var noteBytes uint64
	for i := 0; len(table) > 0; i, table = i+1, table[programHdrSize:] {
		s := segment{
			fileRange: fileRange{offset: le.Uint64(table[8:]), fileSize: le.Uint64(table[32:])},
			gpa:       le.Uint64(table[24:]),
			memSize:   le.Uint64(table[40:]),
		}
		kind := elf.ProgType(le.Uint32(table))
		if kind != elf.PT_LOAD && kind != elf.PT_NOTE {
			continue
		}
		if s.offset > size || s.fileSize > size-s.offset {
			return fmt.Errorf("%w: ELF segment %d has %d bytes at offset %d, but the image has %d bytes", ErrTruncated, i, s.fileSize, s.offset, size)
		}
		if kind == elf.PT_NOTE {
			if noteBytes += s.fileSize; noteBytes > maxNoteBytes {
				return fmt.Errorf("%w: more than %d bytes of ELF notes", ErrNotKernel, maxNoteBytes)
			}
			h.notes = append(h.notes, s.fileRange)
			continue
		}
		if s.memSize == 0 {
			continue
		}
		if s.fileSize > s.memSize || s.gpa+s.memSize < s.gpa {
			return fmt.Errorf("%w: ELF segment %d puts %d bytes of %d at %#x", ErrNotKernel, i, s.fileSize, s.memSize, s.gpa)
		}
		h.segments = append(h.segments, s)
	}
	slices.SortFunc(h.notes, func(a, b fileRange) int { return cmp.Compare(a.offset, b.offset) })
	if len(h.segments) == 0 {
		return fmt.Errorf("%w: ELF file with nothing to load", ErrNotKernel)
	}
	slices.SortFunc(h.segments, func(a, b segment) int { return cmp.Compare(a.gpa, b.gpa) })
	for i, s := range h.segments[1:] {
		if before := h.segments[i]; s.gpa < before.gpa+before.memSize {
			return fmt.Errorf("%w: ELF segments at %#x and %#x overlap", ErrNotKernel, before.gpa, s.gpa)
		}
	}
	return nil
}

// eofIsTruncated gives a stream that ended too early its sentinel.
func eofIsTruncated(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("%w: %w", ErrTruncated, err)
	}
	return err
}

// loadSegments streams the image once, from its first byte to its last, and
// writes what belongs to a segment to guest memory.
func (k *Kernel) loadSegments(mem *guestmem.Memory) error {
	// Zeroes first: one segment's bytes may lie in another's last page.
	for i, s := range k.elf.segments {
		if err := zero(mem, s.gpa+s.fileSize, s.memSize-s.fileSize); err != nil {
			return fmt.Errorf("%w: segment %d: %w", ErrNoMemory, i, err)
		}
	}

	r, err := k.image.open()
	if err != nil {
		return err
	}
	defer r.Close()
	end := k.image.size
	if k.image.compression == uncompressed {
		end = k.elf.fileEnd() // debug information may follow
	}
	buf := make([]byte, 256<<10)
	for off := uint64(0); off < end; {
		p := buf[:min(uint64(len(buf)), end-off)]
		if _, err := io.ReadFull(r, p); err != nil {
			return fmt.Errorf("in the %d bytes from %d on of the image's %d: %w", len(p), off, k.image.size, eofIsTruncated(err))
		}
		for i, s := range k.elf.segments {
			part, into := s.overlap(off, p)
			if err := mem.Write(s.gpa+into, part); err != nil {
				return fmt.Errorf("%w: segment %d: %w", ErrNoMemory, i, err)
			}
		}
		off += uint64(len(p))
	}
	if k.image.compression == uncompressed {
		return nil
	}
	return expectEnd(r)
}

// readNotes streams the image up to its notes and reads them.
func (k *Kernel) readNotes() (elfNotes, error) {
	r, err := k.image.open()
	if err != nil {
		return elfNotes{}, err
	}
	defer r.Close()
	var notes elfNotes
	var off uint64
	for _, n := range k.elf.notes {
		if n.offset < off {
			return notes, fmt.Errorf("%w: ELF notes at offset %d overlap or are out of order", ErrNotKernel, n.offset)
		}
		if err := skip(r, n.offset-off); err != nil {
			return notes, fmt.Errorf("up to the ELF notes at offset %d: %w", n.offset, eofIsTruncated(err))
		}
		p := make([]byte, n.fileSize)
		if _, err := io.ReadFull(r, p); err != nil {
			return notes, fmt.Errorf("ELF notes at offset %d: %w", n.offset, eofIsTruncated(err))
		}
		if err := notes.add(p); err != nil {
			return notes, err
		}
		off = n.offset + n.fileSize
	}
	return notes, nil
}

// skip drops n bytes, by seeking where r can.
func skip(r io.Reader, n uint64) error {
	if s, ok := r.(io.Seeker); ok {
		_, err := s.Seek(int64(n), io.SeekCurrent)
		return err
	}
	_, err := io.CopyN(io.Discard, r, int64(n))
	return err
}

// expectEnd reads the end of a decompressed stream, where its checksum is.
func expectEnd(r io.Reader) error {
	switch _, err := io.ReadFull(r, make([]byte, 1)); {
	case err == nil:
		return fmt.Errorf("%w: it decompresses to more than it promised", ErrTooBig)
	case errors.Is(err, io.EOF):
		return nil
	default:
		return err
	}
}

// zero clears n bytes from gpa on. Whole pages go back to the host, so that
// clearing fresh memory does not allocate it.
func zero(mem *guestmem.Memory, gpa, n uint64) error {
	end := gpa + n
	first, last := pageUp(gpa), end&^(pageSize-1)
	if first >= last {
		return mem.Write(gpa, make([]byte, n))
	}
	if err := mem.Discard(first, last-first); err != nil {
		return err
	}
	if err := mem.Write(gpa, make([]byte, first-gpa)); err != nil {
		return err
	}
	return mem.Write(last, make([]byte, end-last))
}
