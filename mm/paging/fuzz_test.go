package paging

import (
	"encoding/binary"
	"errors"
	"fmt"
	"testing"

	"github.com/gnomon-vmm/gnomon/mm/guestmem"
)

// The RAM of the fuzzed guest. The second range begins within a large page and
// within a word of a bitmap.
var fuzzRanges = []guestmem.Range{{GPA: 0, Size: 64 * pageSize}, {GPA: 2*mib + 24*pageSize, Size: 24 * pageSize}}

// fuzzRAM is that RAM.
type fuzzRAM [2][]byte

func newFuzzRAM() *fuzzRAM {
	return &fuzzRAM{make([]byte, fuzzRanges[0].Size), make([]byte, fuzzRanges[1].Size)}
}

func (f *fuzzRAM) at(gpa uint64) []byte {
	for i, r := range fuzzRanges {
		if gpa-r.GPA < r.Size {
			return f[i][gpa-r.GPA:]
		}
	}
	return nil
}

func (f *fuzzRAM) Read(gpa uint64, p []byte) error {
	b := f.at(gpa)
	if len(b) < len(p) {
		return fmt.Errorf("%w: %#x", guestmem.ErrOutOfBounds, gpa)
	}
	copy(p, b)
	return nil
}

// put is one fuzzed write of table entries, 12 bytes of input: the page (1), the
// first entry (2), how many there are (1), and the first one's value (8); each
// further one points a page further.
type put struct {
	page, entry, count int
	value              uint64
}

func (p put) encode() []byte {
	b := []byte{byte(p.page), byte(p.entry), byte(p.entry >> 8), byte(p.count)}
	return binary.LittleEndian.AppendUint64(b, p.value)
}

func decodePut(b []byte) put {
	return put{
		page: int(b[0] % 64), entry: int(binary.LittleEndian.Uint16(b[1:]) % 512), count: int(b[3]),
		value: binary.LittleEndian.Uint64(b[4:]),
	}
}

func (f *fuzzRAM) write(p put) {
	for i := range p.count {
		if p.entry+i < 512 {
			binary.LittleEndian.PutUint64(f[0][p.page*pageSize+(p.entry+i)*8:], p.value+uint64(i)*pageSize)
		}
	}
}

func FuzzTables(f *testing.F) {
	seed := func(roots uint64, puts ...put) {
		b := binary.LittleEndian.AppendUint64(nil, roots)
		for _, p := range puts {
			b = append(b, p.encode()...)
		}
		f.Add(b)
	}
	// The first 8 bytes: four roots by page, and which of them have 5 levels.
	const four, five = 0x0000_0000_0201_0000, 0x00ff_0000_0201_0000
	for _, roots := range []uint64{four, five} {
		// A process: program, heap and stack; a kernel that maps all RAM, and its text.
		seed(roots,
			put{0, 0, 1, 0x3027}, put{0, 255, 1, 0x4027}, put{3, 0, 1, 0x5027}, put{5, 2, 1, 0x6027}, put{6, 0, 20, 0x1e067}, put{6, 40, 1, 0x2f067},
			put{4, 511, 1, 0x7027}, put{7, 511, 1, 0x8027}, put{8, 500, 12, 0x800000000003a067},
			put{0, 273, 1, 0x9063}, put{9, 0, 1, 0xa063}, put{10, 0, 2, 0x80000000000000e3}, put{10, 1, 1, 0x80000000002000e3},
			put{0, 511, 1, 0xb063}, put{11, 510, 1, 0xc063}, put{12, 8, 1, 0xd063}, put{13, 0, 16, 0x10063},
			put{1, 273, 1, 0x9063}, put{1, 511, 1, 0xb063}, put{1, 0, 1, 0x3027})
		// A boot loader's identity mapping in pages of 2 MiB, and of 1 GiB.
		seed(roots, put{0, 0, 1, 0x1003}, put{1, 0, 1, 0x2003}, put{2, 0, 1, 0x83}, put{2, 1, 1, 0x200083}, put{1, 1, 1, 0x83})
		// A root that contains itself; tables in a circle; one that all entries share.
		seed(roots, put{0, 510, 1, 0x63}, put{0, 1, 1, 0x1063}, put{1, 0, 200, 0x63}, put{2, 0, 255, 0x3063}, put{3, 7, 1, 0x2063})
		// Reserved bits, tables and pages outside RAM.
		seed(roots, put{0, 0, 1, 0x10e7}, put{0, 1, 1, 0x1067}, put{1, 0, 1, 0x40e7}, put{1, 1, 1, 0x2067}, put{2, 0, 1, 0x2047}, put{2, 1, 1, 0x20_50e7}, put{2, 2, 1, 0xf_ffff_ffff_f067}, put{2, 3, 200, 0x67})
	}
	f.Fuzz(func(t *testing.T, input []byte) {
		if len(input) < 8 {
			return
		}
		mem := newFuzzRAM()
		for b := input[8:]; len(b) >= 12; b = b[12:] {
			mem.write(decodePut(b))
		}
		var roots []Root
		for i, page := range input[1:5] {
			roots = append(roots, Root{uint64(page%80) * pageSize, input[6]>>i&1 != 0})
		}
		roots, err := FindRoots(mem, fuzzRanges, roots...)
		if err != nil {
			t.Fatal(err)
		}

		r, err := newRAM(fuzzRanges)
		if err != nil {
			t.Fatal(err)
		}
		l := limitsFor(r)
		l.linearPages = 12
		m, err := newMap(mem, r, roots, l)
		if err != nil {
			t.Fatal(err)
		}
		sane(t, m)
		pages := readTables(mem, fuzzRanges, roots)
		want := modelOf(pages, int(l.linearPages))
		want.check(t, m)

		w := NewWalker(mem)
		for _, p := range pages {
			if got, err := w.Walk(roots[p.Space], p.GVA); err != nil || got.GPA != p.pfn*pageSize {
				t.Fatalf("%+x: %+v, %v; want page %#x", p.Place, got, err, p.pfn)
			}
		}
		for i := 0; i+8 <= len(input); i++ {
			gva := binary.LittleEndian.Uint64(input[i:])
			_, err := w.Walk(roots[0], gva)
			known := errors.Is(err, ErrNotCanonical) || errors.Is(err, ErrNotPresent) || errors.Is(err, ErrReserved) || errors.Is(err, ErrTable)
			if err != nil && !known {
				t.Fatalf("GVA %#x: %v", gva, err)
			}
		}
	})
}
