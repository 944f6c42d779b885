package boot

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/binary"
	"hash/crc32"
	"hash/crc64"
	"slices"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"github.com/ulikunitz/xz/lzma"
)

// testELF describes an ELF image to build.
type testELF struct {
	entry    uint64
	segments []testSegment
	notes    []testNote
	machine  uint16 // 0: x86-64
	kind     uint16 // 0: executable
	tail     int    // bytes behind everything, like debug information
}

type testSegment struct {
	gpa     uint64
	data    []byte
	memSize uint64 // 0: len(data)
}

type testNote struct {
	owner string
	kind  uint32
	desc  []byte
}

// build lays out header, program headers, segments and notes.
func (e testELF) build() []byte {
	le := binary.LittleEndian
	count := len(e.segments)
	if e.notes != nil {
		count++
	}
	b := make([]byte, elfHeaderSize+count*programHdrSize)
	copy(b, "\x7FELF\x02\x01\x01")
	le.PutUint16(b[16:], max(e.kind, 2))
	le.PutUint16(b[18:], 62)
	if e.machine != 0 {
		le.PutUint16(b[18:], e.machine)
	}
	le.PutUint32(b[20:], 1)
	le.PutUint64(b[24:], e.entry)
	le.PutUint64(b[32:], elfHeaderSize)
	le.PutUint16(b[52:], elfHeaderSize)
	le.PutUint16(b[54:], programHdrSize)
	le.PutUint16(b[56:], uint16(count))
	header := func(i int, kind uint32, gpa uint64, data []byte, memSize uint64) {
		h := b[elfHeaderSize+i*programHdrSize:]
		le.PutUint32(h, kind)
		le.PutUint64(h[8:], uint64(len(b)))
		le.PutUint64(h[16:], 0xFFFF_FFFF_8000_0000+gpa)
		le.PutUint64(h[24:], gpa)
		le.PutUint64(h[32:], uint64(len(data)))
		le.PutUint64(h[40:], max(memSize, uint64(len(data))))
		b = append(b, data...)
	}
	for i, s := range e.segments {
		header(i, 1, s.gpa, s.data, s.memSize)
	}
	if e.notes != nil {
		var data []byte
		for _, n := range e.notes {
			pad := func(p []byte) []byte { return append(p, make([]byte, -len(p)&3)...) }
			name := append([]byte(n.owner), 0)
			data = le.AppendUint32(data, uint32(len(name)))
			data = le.AppendUint32(data, uint32(len(n.desc)))
			data = le.AppendUint32(data, n.kind)
			data = append(data, pad(name)...)
			data = append(data, pad(slices.Clone(n.desc))...)
		}
		header(len(e.segments), 4, 0, data, 0)
	}
	return append(b, bytes.Repeat([]byte("debug "), e.tail/6)...)
}

const (
	testKernelGPA = 0x100_0000
	testBSS       = 3*pageSize + 100
)

// linuxLike is an image with what matters of a vmlinux: two segments, .bss,
// and notes, among them the entry for PVH.
func linuxLike() testELF {
	return testELF{
		entry: testKernelGPA + 0x40,
		segments: []testSegment{
			{gpa: testKernelGPA, data: codeLike(30_000, 1)},
			{gpa: testKernelGPA + 0x20_0000, data: codeLike(5000, 2), memSize: 5000 + testBSS},
		},
		notes: []testNote{
			{"GNU", 3, []byte("build id")},
			{"Linux", 0x100, []byte{0, 0, 0, 0}},
			{"Xen", noteXenPhys32Entry, []byte{0x50, 0, 0, 1, 0, 0, 0, 0}},
		},
	}
}

// probeLike is an image that is entered by PVH and is no Linux.
func probeLike() testELF {
	return testELF{
		segments: []testSegment{{gpa: 0x10_0000, data: codeLike(500, 3), memSize: 100_000}},
		notes:    []testNote{{"Xen", noteXenPhys32Entry, []byte{0x10, 0, 0x10, 0}}},
	}
}

// codeLike makes n bytes that the x86 filter has much to do with.
func codeLike(n int, seed uint32) []byte {
	alphabet := []byte{0xE8, 0xE9, 0xE8, 0x00, 0xFF, 0x00, 0xFF, 0x01, 0x7F, 0x90, 0xFE, 0x0F, 0x48, 0x89}
	b := make([]byte, n)
	for i := range b {
		seed = seed*1664525 + 1013904223
		b[i] = alphabet[(seed>>16)%uint32(len(alphabet))]
	}
	return b
}

// bzImageOf puts an already packed payload, its size trailer included, into a
// bzImage. change, if any, edits the first sectors.
func bzImageOf(payload []byte, change func(head []byte)) []byte {
	le := binary.LittleEndian
	const setupSects, gap = 3, 0x2CC // real bzImages have 27 to 39 sectors, and code before the payload
	b := make([]byte, (setupSects+1)*sectorSize+gap)
	b[hdrSetupSects] = setupSects
	le.PutUint16(b[hdrBootFlag:], bootFlag)
	b[0x200], b[hdrJumpDistance] = 0xEB, 0x6A
	copy(b[hdrMagic:], headerMagic)
	le.PutUint16(b[hdrVersion:], 0x20F)
	b[hdrLoadFlags] = loadedHigh
	le.PutUint32(b[hdrInitrdMax:], 0x7FFF_FFFF)
	le.PutUint32(b[hdrAlignment:], 0x20_0000)
	le.PutUint32(b[hdrCommandLineMax:], 2047)
	le.PutUint32(b[hdrPayloadOffset:], gap)
	le.PutUint32(b[hdrPayloadLength:], uint32(len(payload)))
	le.PutUint32(b[hdrInitSize:], 64<<20)
	if change != nil {
		change(b)
	}
	return append(append(b, payload...), "and what follows it"...)
}

// pack compresses data as the kernel's build does and appends its size where
// the format does not have it at its end.
func pack(t testing.TB, c compression, data []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	switch c {
	case uncompressed:
		b.Write(data)
	case gzipped:
		w := gzip.NewWriter(&b)
		_, err := w.Write(data)
		check(err)
		check(w.Close())
		return b.Bytes()
	case zstded:
		w, err := zstd.NewWriter(&b, zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(1<<20))
		check(err)
		_, err = w.Write(data)
		check(err)
		check(w.Close())
	case lz4ed:
		b.Write(binary.LittleEndian.AppendUint32(nil, lz4LegacyMagic))
		for chunk := range slices.Chunk(data, lz4LegacyBlock) {
			block := make([]byte, lz4.CompressBlockBound(len(chunk)))
			n, err := lz4.CompressBlock(chunk, block, nil)
			check(err)
			b.Write(binary.LittleEndian.AppendUint32(nil, uint32(n)))
			b.Write(block[:n])
		}
	case xzed:
		b.Write(packXZ(t, data, xzCheckCRC32))
	}
	return binary.LittleEndian.AppendUint32(b.Bytes(), uint32(len(data)))
}

// packXZ makes a .xz stream of one block with the x86 filter and the given
// check, without the parts that xzReader does not look at: index and footer.
func packXZ(t testing.TB, data []byte, check byte) []byte {
	t.Helper()
	le := binary.LittleEndian
	withCRC := func(p []byte) []byte { return le.AppendUint32(p, crc32.ChecksumIEEE(p)) }
	flags := []byte{0, check}
	b := append([]byte(compressions[xzed].magic), flags...)
	b = le.AppendUint32(b, crc32.ChecksumIEEE(flags))
	// 12 bytes in all, two filters; a dictionary of 1 MiB.
	b = append(b, withCRC([]byte{2, 1, xzFilterX86, 0, xzFilterLZMA2, 1, 16, 0})...)
	var packed bytes.Buffer
	w, err := lzma.Writer2Config{DictCap: 1 << 20}.NewWriter2(&packed)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(encodeX86(data)); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	b = append(b, packed.Bytes()...)
	b = append(b, make([]byte, -packed.Len()&3)...)
	switch check {
	case xzCheckCRC32:
		b = le.AppendUint32(b, crc32.ChecksumIEEE(data))
	case xzCheckCRC64:
		b = le.AppendUint64(b, crc64.Checksum(data, crc64.MakeTable(crc64.ECMA)))
	case xzCheckSHA256:
		sum := sha256.Sum256(data)
		b = append(b, sum[:]...)
	}
	return append(b, xzIndexIndicator)
}

// encodeX86 is the encoder to x86Filter, written another way: it has all bytes
// at hand, and looks back instead of keeping track.
func encodeX86(plain []byte) []byte {
	b := slices.Clone(plain)
	topByte := func(c byte) bool { return c == 0x00 || c == 0xFF }
	alone := map[int]bool{} // opcode-like bytes that were not converted
	for i := 0; i+5 <= len(b); i++ {
		if b[i] != 0xE8 && b[i] != 0xE9 {
			continue
		}
		neighbours, distance := 0, 0
		for back := 1; back <= 3; back++ {
			if alone[i-back] {
				neighbours, distance = neighbours+1, back
			}
		}
		if !topByte(b[i+4]) || neighbours > 1 || neighbours == 1 && topByte(b[i+4-distance]) {
			alone[i] = true
			continue
		}
		next := uint32(i + 5)
		v := binary.LittleEndian.Uint32(b[i+1:]) + next
		if neighbours == 1 {
			shift := 24 - 8*distance
			if topByte(byte(v >> shift)) {
				v = (v ^ (1<<(shift+8) - 1)) + next
			}
		}
		v &= 0x1FF_FFFF
		if v&0x100_0000 != 0 {
			v |= 0xFE00_0000
		}
		binary.LittleEndian.PutUint32(b[i+1:], v)
		i += 4
	}
	return b
}
