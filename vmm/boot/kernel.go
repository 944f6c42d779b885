package boot

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"

	"github.com/gnomon-vmm/gnomon/mm/guestmem"
)

// MaxImageSize bounds the decompressed image, in bytes. The biggest kernels
// that distributions ship have about 80 MiB.
const MaxImageSize = 512 << 20

// Kernel is a kernel image whose headers have been read and checked. Its
// contents stay in the file until Load.
type Kernel struct {
	file   io.Closer // nil unless OpenKernel opened it
	image  imageFile
	format string
	setup  *setupHeader // nil unless the image is a bzImage
	elf    elfHeader
	notes  elfNotes
}

// imageFile is where the ELF image is: a stretch of a file, compressed or not.
type imageFile struct {
	file        io.ReaderAt
	offset      int64 // of the stretch
	length      int64 // bytes of the stretch
	compression compression
	size        uint64 // bytes of the ELF image
}

// OpenKernel is LoadKernel on a file. Close closes it.
func OpenKernel(path string) (*Kernel, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // not to wait for a FIFO's writer
	if err != nil {
		return nil, fmt.Errorf("open kernel: %w", err)
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%w: not a regular file: name a bzImage or an ELF vmlinux", ErrNotKernel)
	}
	var k *Kernel
	if err == nil {
		k, err = LoadKernel(f, info.Size())
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("kernel %s: %w", path, err)
	}
	k.file = f
	return k, nil
}

// LoadKernel recognises the kernel image of the given size in bytes that r
// holds: a bzImage, an ELF x86-64 image, or the latter compressed with gzip. r
// is read again by each Load.
func LoadKernel(r io.ReaderAt, size int64) (*Kernel, error) {
	head := make([]byte, min(max(size, 0), setupHeaderEnd))
	if err := readAt(r, head, 0); err != nil {
		return nil, err
	}
	k := &Kernel{image: imageFile{file: r, length: size}}
	switch {
	case isELF(head):
		k.format = "vmlinux"
		k.image.size = uint64(size)
	case isBzImage(head):
		s, err := parseSetup(head)
		if err != nil {
			return nil, err
		}
		k.setup = s
		if err := k.image.findPayload(s, size); err != nil {
			return nil, err
		}
		k.format = "bzImage, " + k.image.compression.String()
	case detectCompression(head) == gzipped:
		k.format = "vmlinux, gzip"
		k.image.compression = gzipped
		if err := k.image.readSize(MaxImageSize); err != nil {
			return nil, err
		}
	default:
		return nil, explainForeign(head)
	}

	s, err := k.image.open()
	if err != nil {
		return nil, err
	}
	defer s.Close()
	if k.elf, err = readELFHeader(s, k.image.size); err != nil {
		return nil, err
	}
	if k.setup != nil {
		// Its notes lie deep in what has to be decompressed first, and are
		// needed only for PVH: see Load.
		k.notes.linux = true
		return k, nil
	}
	if k.notes, err = k.readNotes(); err != nil {
		return nil, err
	}
	return k, nil
}

// Close closes the file that OpenKernel opened; Load cannot be called after.
func (k *Kernel) Close() error {
	if k.file == nil {
		return nil
	}
	return k.file.Close()
}

// String says what kind of image k is: "bzImage, zstd".
func (k *Kernel) String() string { return k.format }

// Linux tells whether k is a Linux kernel: a bzImage, or ELF with Linux's notes.
func (k *Kernel) Linux() bool { return k.notes.linux }

// span is what the kernel occupies, from its first segment to its last.
func (k *Kernel) span() guestmem.Range {
	first, last := k.elf.segments[0], k.elf.segments[len(k.elf.segments)-1]
	return guestmem.Range{GPA: first.gpa, Size: last.gpa + last.memSize - first.gpa}
}

// commandLineMax is the longest command line in bytes, without the NUL.
func (k *Kernel) commandLineMax() uint64 {
	switch {
	case k.setup != nil:
		return min(uint64(k.setup.commandLineMax), CommandLineSize-1)
	case k.notes.linux:
		return linuxCommandLine
	}
	return CommandLineSize - 1
}

// initrdMax is the highest address the RAM disk may occupy.
func (k *Kernel) initrdMax() uint64 {
	if k.setup != nil {
		return uint64(k.setup.initrdMax)
	}
	return 1<<32 - 1
}

// readAt fills p from offset off of a file whose end is known to lie behind it.
func readAt(r io.ReaderAt, p []byte, off int64) error {
	n, err := r.ReadAt(p, off)
	switch {
	case n == len(p):
		return nil
	case err == nil || errors.Is(err, io.EOF):
		return fmt.Errorf("%w: no byte at offset %d", ErrTruncated, off+int64(n))
	}
	return fmt.Errorf("read kernel image: %w", err)
}

// explainForeign names what can be named among the files that are no x86 Linux
// kernel but are likely to be given in place of one.
func explainForeign(head []byte) error {
	const advice = "give an x86-64 bzImage (vmlinuz) or vmlinux"
	at := func(off int, s string) bool { return len(head) >= off+len(s) && string(head[off:off+len(s)]) == s }
	switch c := detectCompression(head); {
	case len(head) == 0:
		return fmt.Errorf("%w: the file is empty: %s", ErrNotKernel, advice)
	case at(56, "ARM\x64"):
		return fmt.Errorf("%w: this is an ARM64 Image: %s", ErrArchitecture, advice)
	case at(56, "RSC\x05"):
		return fmt.Errorf("%w: this is a RISC-V Image: %s", ErrArchitecture, advice)
	case at(0, "\x27\x05\x19\x56"):
		return fmt.Errorf("%w: this is a U-Boot uImage: %s", ErrNotKernel, advice)
	case at(4, "zimg"):
		return fmt.Errorf("%w: this is an EFI zboot image: %s", ErrNotKernel, advice)
	case at(257, "ustar"):
		return fmt.Errorf("%w: this is a tar archive: %s", ErrNotKernel, advice)
	case at(0, "070701"), at(0, "070702"):
		return fmt.Errorf("%w: this is a cpio archive (an initial RAM disk?): %s", ErrNotKernel, advice)
	case c != uncompressed:
		return fmt.Errorf("%w: the file is %s data: unpack it, or %s", ErrNotKernel, c, advice)
	case len(head) < setupHeaderEnd:
		return fmt.Errorf("%w: %d bytes are no kernel: %s", ErrNotKernel, len(head), advice)
	}
	return fmt.Errorf("%w: neither a bzImage nor ELF: %s", ErrNotKernel, advice)
}

// findPayload locates the compressed ELF image in a bzImage of fileSize bytes.
func (f *imageFile) findPayload(s *setupHeader, fileSize int64) error {
	// All terms are below 2^33.
	f.offset = s.protectedModeOffset + int64(s.payloadOffset)
	f.length = int64(s.payloadLength)
	if f.offset+f.length > fileSize {
		return fmt.Errorf("%w: a bzImage payload at bytes %d-%d, but the file has %d", ErrTruncated, f.offset, f.offset+f.length, fileSize)
	}
	head := make([]byte, min(f.length, 16))
	if err := readAt(f.file, head, f.offset); err != nil {
		return err
	}
	f.compression = detectCompression(head)
	switch f.compression {
	case gzipped, lz4ed, zstded, xzed:
	case uncompressed:
		// CONFIG_KERNEL_UNCOMPRESSED: the ELF image and its size.
		if !isELF(head) {
			return fmt.Errorf("%w: the bzImage's payload begins with % x, which is none of gzip, LZ4, zstd, xz and ELF", ErrCompression, head)
		}
	default:
		return fmt.Errorf("%w: the bzImage's payload is %s, which is not supported: build the kernel with CONFIG_KERNEL_ZSTD, _LZ4, _XZ or _GZIP, or unpack vmlinux from it with the kernel's scripts/extract-vmlinux", ErrCompression, f.compression)
	}
	limit := uint64(MaxImageSize)
	if s.initSize != 0 {
		limit = min(limit, uint64(s.initSize))
	}
	if err := f.readSize(limit); err != nil {
		return err
	}
	if f.compression != gzipped {
		f.length -= sizeTrailer
	}
	return nil
}

const sizeTrailer = 4 // bytes

// readSize gets the image's size from the payload's last four bytes: for gzip
// that is part of the format, to the others the kernel's build appends it.
func (f *imageFile) readSize(limit uint64) error {
	if f.length <= sizeTrailer {
		return fmt.Errorf("%w: compressed image of %d bytes", ErrTruncated, f.length)
	}
	var b [sizeTrailer]byte
	if err := readAt(f.file, b[:], f.offset+f.length-sizeTrailer); err != nil {
		return err
	}
	f.size = uint64(binary.LittleEndian.Uint32(b[:]))
	if f.size > limit {
		return fmt.Errorf("%w: %d bytes when decompressed, more than the %d allowed", ErrTooBig, f.size, limit)
	}
	return nil
}

// open returns a stream of the ELF image.
func (f *imageFile) open() (io.ReadCloser, error) {
	return decompress(f.compression, io.NewSectionReader(f.file, f.offset, f.length), f.size)
}
