package boot

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/mm/guestmem"
)

func allocatedKiB(t *testing.T, mem *guestmem.Memory) int64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Fstat(mem.FD(), &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks / 2
}

// at returns a file of n zeroes with s at the given offset.
func at(n, off int, s string) []byte {
	b := make([]byte, n)
	copy(b[off:], s)
	return b
}

// TestWhatIsNoKernel has what users give by mistake, and the refusals of
// LoadKernel: each names what it saw, and what to do.
func TestWhatIsNoKernel(t *testing.T) {
	le := binary.LittleEndian
	elf := func(change func(*testELF)) []byte {
		e := linuxLike()
		change(&e)
		return e.build()
	}
	edit := func(image []byte, off int, b ...byte) []byte {
		image = bytes.Clone(image)
		copy(image[off:], b)
		return image
	}
	plain := linuxLike().build()
	bz := func(change func([]byte)) []byte { return bzImageOf(pack(t, gzipped, plain), change) }
	payload := func(s string) []byte { return bzImageOf([]byte(s+strings.Repeat("\x00", 100)), nil) }
	const firstPhdr = elfHeaderSize
	overlapping := linuxLike()
	overlapping.segments[1].gpa = testKernelGPA + 100
	// The second segment becomes notes, and the notes begin within them.
	notesAt := le.Uint64(plain[elfHeaderSize+programHdrSize+8:]) + 4
	overlappingNotes := edit(edit(plain, elfHeaderSize+programHdrSize, 4), elfHeaderSize+2*programHdrSize+8, byte(notesAt), byte(notesAt>>8))
	badNote, wideNote, hugeNote := probeLike(), probeLike(), probeLike()
	badNote.notes[0].desc = []byte{1, 2}
	wideNote.notes[0].desc = []byte{0, 0, 0, 0, 1, 0, 0, 0}
	hugeNote.notes[0].desc = make([]byte, maxNoteBytes+1)

	for _, x := range []struct {
		name  string
		image []byte
		err   error
		says  string
	}{
		{"empty file", nil, ErrNotKernel, "empty"},
		{"text", []byte("#!/bin/sh\n"), ErrNotKernel, "vmlinux"},
		{"zeroes", make([]byte, 10_000), ErrNotKernel, "bzImage"},
		{"cpio", []byte("070701" + strings.Repeat("0", 1000)), ErrNotKernel, "initial RAM disk"},
		{"tar", at(1024, 257, "ustar"), ErrNotKernel, "tar"},
		{"uImage", at(1024, 0, "\x27\x05\x19\x56"), ErrNotKernel, "U-Boot"},
		{"zboot", at(1024, 0, "MZ\x00\x00zimg"), ErrNotKernel, "zboot"},
		{"vmlinux.xz", at(1024, 0, "\xFD7zXZ\x00"), ErrNotKernel, "xz data: unpack it"},
		{"gzip of text", pack(t, gzipped, []byte(strings.Repeat("text ", 100))), ErrNotKernel, "vmlinux"},
		{"gzip of a cpio", pack(t, gzipped, []byte("070701"+strings.Repeat("0", 1000))), ErrNotKernel, "initial RAM disk"},

		{"ARM64 Image", at(1024, 56, "ARM\x64"), ErrArchitecture, "ARM64"},
		{"ARM64 Image, gzip", pack(t, gzipped, at(1024, 56, "ARM\x64")), ErrArchitecture, "ARM64"},
		{"RISC-V Image", at(1024, 56, "RSC\x05"), ErrArchitecture, "RISC-V"},
		{"aarch64 ELF", elf(func(e *testELF) { e.machine = 183 }), ErrArchitecture, "aarch64"},
		{"i386 ELF", elf(func(e *testELF) { e.machine = 3 }), ErrArchitecture, "i386"},
		{"i386 bzImage", bzImageOf(pack(t, xzed, elf(func(e *testELF) { e.machine = 3 })), nil), ErrArchitecture, "i386"},
		{"PowerPC ELF", edit(plain, 18, 21, 0), ErrArchitecture, "EM_PPC64"},
		{"big-endian ELF", edit(edit(plain, 5, 2), 18, 0, 43), ErrArchitecture, "EM_SPARCV9"},
		{"x32 ELF", edit(plain, 4, 1), ErrArchitecture, "ELFCLASS32"},

		{"object file", edit(plain, 16, 1), ErrNotKernel, "ET_REL"},
		{"no program headers", edit(plain, 56, 0, 0), ErrNotKernel, "program headers"},
		{"too many program headers", edit(plain, 56, 0xFF, 0xFF), ErrNotKernel, "65535"},
		{"odd program headers", edit(plain, 54, 32), ErrNotKernel, "32 bytes"},
		{"program headers far away", edit(plain, 32, 0, 0, 0, 0, 1), ErrNotKernel, "0x100000000"},
		{"program headers past the end", edit(plain, 32, 0xF0, 0xFF)[:0xFFF0-40000], ErrTruncated, "program headers"},
		{"nothing to load", edit(edit(plain, firstPhdr, 6), firstPhdr+programHdrSize, 6), ErrNotKernel, "nothing to load"},
		{"segment past the end", edit(plain, firstPhdr+8, 0, 0, 0, 0x7F), ErrTruncated, "segment 0"},
		{"segment with a huge size", edit(plain, firstPhdr+32, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF), ErrTruncated, "segment 0"},
		{"more in the file than in memory", edit(plain, firstPhdr+40, 1, 0), ErrNotKernel, "segment 0"},
		{"segment past all addresses", edit(plain, firstPhdr+24, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF), ErrNotKernel, "segment 0"},
		{"overlapping segments", overlapping.build(), ErrNotKernel, "overlap"},
		{"overlapping notes", overlappingNotes, ErrNotKernel, "notes"},
		{"PVH note too short", badNote.build(), ErrNotKernel, "PVH"},
		{"PVH entry above 4 GiB", wideNote.build(), ErrNotKernel, "PVH"},
		{"too many notes", hugeNote.build(), ErrNotKernel, "notes"},
		{"ELF cut in its header", plain[:40], ErrTruncated, "ELF header"},
		{"ELF cut in a segment", plain[:10_000], ErrTruncated, "segment"},

		{"old bzImage", bz(func(h []byte) { le.PutUint16(h[hdrVersion:], 0x207) }), ErrNotKernel, "2.07"},
		{"zImage", bz(func(h []byte) { h[hdrLoadFlags] = 0 }), ErrNotKernel, "zImage"},
		{"bzImage, short header", bz(func(h []byte) { h[hdrJumpDistance] = 0x10 }), ErrNotKernel, "header"},
		{"bzImage, cut in its header", bz(nil)[:0x250], ErrTruncated, "bzImage"},
		{"bzImage, cut in its payload", bz(nil)[:5000], ErrTruncated, "payload"},
		{"bzImage, payload far away", bz(func(h []byte) { le.PutUint32(h[hdrPayloadOffset:], 0xFFFF_FFFF) }), ErrTruncated, "payload"},
		{"bzImage, endless payload", bz(func(h []byte) { le.PutUint32(h[hdrPayloadLength:], 0xFFFF_FFFF) }), ErrTruncated, "payload"},
		{"bzImage, no payload", bz(func(h []byte) { le.PutUint32(h[hdrPayloadLength:], 0) }), ErrCompression, "none of"},
		{"bzImage, LZMA", payload("\x5D\x00\x00\x00\x01"), ErrCompression, "LZMA"},
		{"bzImage, bzip2", payload("BZh91AY"), ErrCompression, "bzip2"},
		{"bzImage, LZO", payload("\x89LZO\x00\r\n\x1A\n"), ErrCompression, "LZO"},
		{"bzImage, unknown", payload("what?"), ErrCompression, "none of"},
		{"bzImage, bigger than it needs", bz(func(h []byte) { le.PutUint32(h[hdrInitSize:], 1000) }), ErrTooBig, "1000 allowed"},
		{"bzImage, promises 4 GiB", bz(func(h []byte) {
			le.PutUint32(h[hdrInitSize:], 0)
			le.PutUint32(h[hdrPayloadLength:], le.Uint32(h[hdrPayloadLength:])+4)
		}), ErrTooBig, "536870912"},
		{"vmlinux.gz, promises 4 GiB", append(pack(t, gzipped, plain), 0xFF, 0xFF, 0xFF, 0xFF), ErrTooBig, "536870912"},
	} {
		t.Run(x.name, func(t *testing.T) {
			k, err := LoadKernel(bytes.NewReader(x.image), int64(len(x.image)))
			if k != nil || !errors.Is(err, x.err) || !strings.Contains(fmt.Sprint(err), x.says) {
				t.Errorf("kernel %v, error: %v", k, err)
			}
		})
	}
}

// TestFoundWhileLoading has the damage that only shows on decompressing all.
func TestFoundWhileLoading(t *testing.T) {
	elf := linuxLike()
	elf.tail = 600
	plain := elf.build()
	for _, c := range supported {
		packed := pack(t, c, plain)
		image := bzImageOf(packed, nil)
		start := bytes.Index(image, packed)
		trailer := start + len(packed) - sizeTrailer

		damaged := bytes.Clone(image)
		damaged[start+len(packed)/2] ^= 0x10
		if c == lz4ed { // it has no checksum: make the block's length wrong
			damaged[start+4] ^= 0x10
		}
		more, fewer := bytes.Clone(image), bytes.Clone(image)
		binary.LittleEndian.PutUint32(more[trailer:], uint32(len(plain)+1))
		binary.LittleEndian.PutUint32(fewer[trailer:], uint32(len(plain)-1))
		for name, x := range map[string]struct {
			image []byte
			err   error
		}{
			"damaged":              {damaged, ErrCompression},
			"shorter than it says": {more, ErrTruncated},
			"longer than it says":  {fewer, ErrTooBig},
		} {
			k, err := LoadKernel(bytes.NewReader(x.image), int64(len(x.image)))
			if err == nil {
				_, err = Load(newMemory(t, guestmem.Range{Size: 32 * mib}), k, Config{})
			}
			want := x.err
			if c == gzipped && x.err == ErrTruncated { // its own trailer: it looks itself
				want = ErrCompression
			}
			if !errors.Is(err, want) {
				t.Errorf("%s, %s: %v", c, name, err)
			}
		}
	}
}

func TestOpenKernelRefuses(t *testing.T) {
	dir := t.TempDir()
	if _, err := OpenKernel(filepath.Join(dir, "none")); !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), "none") {
		t.Errorf("missing file: %v", err)
	}
	if _, err := OpenKernel(dir); !errors.Is(err, ErrNotKernel) {
		t.Errorf("directory: %v", err)
	}
	if _, err := OpenKernel("/dev/null"); !errors.Is(err, ErrNotKernel) {
		t.Errorf("device: %v", err)
	}
}

// TestReadErrorsAreNotTruncation: a failing disk is told from a short file.
func TestReadErrorsAreNotTruncation(t *testing.T) {
	broken := errors.New("broken disk")
	for _, c := range supported {
		image := bzImageOf(pack(t, c, linuxLike().build()), nil)
		for _, good := range []int64{0, 0x200, 3000} {
			r := failing{bytes.NewReader(image), good, broken}
			k, err := LoadKernel(r, int64(len(image)))
			if err == nil {
				_, err = Load(newMemory(t, guestmem.Range{Size: 32 * mib}), k, Config{})
			}
			if !errors.Is(err, broken) || errors.Is(err, ErrTruncated) {
				t.Errorf("%s, error at %d: %v", c, good, err)
			}
		}
	}
}

// failing fails from an offset on.
type failing struct {
	io.ReaderAt
	good int64
	err  error
}

func (f failing) ReadAt(p []byte, off int64) (int, error) {
	if off+int64(len(p)) > f.good {
		return 0, f.err
	}
	return f.ReaderAt.ReadAt(p, off)
}

// TestMemoryIsBounded decompresses a small file that promises, and delivers,
// 32 MiB: it must pass through a small buffer.
func TestMemoryIsBounded(t *testing.T) {
	elf := probeLike()
	elf.segments[0].data = make([]byte, 32*mib)
	plain := elf.build()
	for _, c := range []compression{gzipped, lz4ed, zstded} {
		image := bzImageOf(pack(t, c, plain), func(head []byte) { binary.LittleEndian.PutUint32(head[hdrInitSize:], 0) })
		mem := newMemory(t, guestmem.Range{Size: 64 * mib})
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		if _, err := Load(mem, loadKernel(t, image), Config{}); err != nil {
			t.Fatal(err)
		}
		runtime.ReadMemStats(&after)
		if n := after.TotalAlloc - before.TotalAlloc; n > 20*mib {
			t.Errorf("%s: %d MiB allocated on the way", c, n/mib)
		}
	}
}

func FuzzLoadKernel(f *testing.F) {
	small := linuxLike()
	small.segments[0].data = small.segments[0].data[:600]
	small.segments[1] = testSegment{gpa: testKernelGPA + 0x1000, data: []byte("data"), memSize: 5000}
	for _, plain := range [][]byte{small.build(), probeLike().build()} {
		f.Add(plain)
		f.Add(pack(f, gzipped, plain))
		f.Add(bzImageOf(pack(f, uncompressed, plain), nil))
		for _, c := range supported {
			f.Add(bzImageOf(pack(f, c, plain), nil))
		}
	}
	f.Fuzz(func(t *testing.T, image []byte) {
		k, err := LoadKernel(bytes.NewReader(image), int64(len(image)))
		if err != nil {
			for _, stage := range []error{ErrNotKernel, ErrArchitecture, ErrCompression, ErrTruncated, ErrTooBig} {
				if errors.Is(err, stage) {
					return
				}
			}
			t.Fatalf("error without a stage: %v", err)
		}
		mem := newMemory(t, guestmem.Range{Size: 32 * mib})
		defer mem.Close()
		for _, p := range []Protocol{Auto, PVH} {
			e, err := Load(mem, k, Config{Entry: p})
			if err == nil && (e.Kernel.GPA < legacyHoleEnd || e.Kernel.GPA+e.Kernel.Size > 32*mib) {
				t.Fatalf("kernel at %+v", e.Kernel)
			}
		}
	})
}
