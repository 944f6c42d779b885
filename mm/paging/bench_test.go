package paging

import (
	"encoding/binary"
	"math/rand/v2"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/mm/guestmem"
)

// linuxLike is a guest whose user program maps 4 KiB pages, as many as size
// holds, scattered over RAM, and whose kernel maps all RAM in pages of 2 MiB.
// As many empty processes share the kernel's half.
func linuxLike(t testing.TB, size uint64, processes int) (*guest, Root) {
	tables := (size/(512*pageSize)*pageSize + uint64(processes+64)*pageSize + 2*mib) &^ (2*mib - 1)
	g := newGuest(t, guestmem.Range{GPA: 0, Size: min(size+tables, 3*gib)})
	if rest := size + tables - g.ranges[0].Size; rest > 0 {
		g.mem.Close()
		g = newGuest(t, g.ranges[0], guestmem.Range{GPA: 4 * gib, Size: rest})
	}
	root := g.root(false)
	for _, r := range g.ranges {
		for gpa := r.GPA; gpa < r.GPA+r.Size; gpa += 2 * mib {
			g.mapPage(root, 0xffff_8880_0000_0000+gpa, Translation{GPA: gpa, Size: 2 * mib})
		}
	}
	for range processes {
		other := g.root(false)
		for i := uint64(256); i < 512; i++ {
			g.set(other.GPA, i, g.get(root.GPA, i))
		}
		g.set(other.GPA, 0, g.table()|0x27)
	}
	frames := rand.New(rand.NewPCG(1, 1)).Perm(int(size / pageSize))
	var p [pageSize]byte
	const heap = 0x5555_0000_0000
	for i := range frames {
		gpa := tables + uint64(frames[i])*pageSize
		if low := g.ranges[0].Size; gpa >= low {
			gpa += 4*gib - low
		}
		binary.LittleEndian.PutUint64(p[i%512*8:], gpa|0x67)
		if i%512 == 511 {
			gva := heap + uint64(i&^511)*pageSize
			g.mapPage(root, gva, Translation{GPA: gpa, Size: pageSize}) // makes the tables
			if err := g.mem.Write(g.next-pageSize, p[:]); err != nil {
				t.Fatal(err)
			}
		}
	}
	return g, root
}

func BenchmarkOrder8GiB(b *testing.B) {
	g, root := linuxLike(b, 8*gib, 100)
	for b.Loop() {
		m, err := NewMap(g.mem, g.ranges, []Root{root})
		if err != nil {
			b.Fatal(err)
		}
		if len(m.Order()) < 2<<20 {
			b.Fatalf("%d pages", len(m.Order()))
		}
	}
}

func BenchmarkFindRoots1GiB(b *testing.B) {
	g, root := linuxLike(b, gib, 100)
	if err := unix.Madvise(g.mem.Regions()[0].Bytes(), unix.MADV_POPULATE_WRITE); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		roots, err := FindRoots(g.mem, g.ranges, root)
		if err != nil || len(roots) != 101 {
			b.Fatal(len(roots), err)
		}
	}
}

func BenchmarkPopulated8GiB(b *testing.B) {
	g, _ := linuxLike(b, 8*gib, 0)
	for b.Loop() {
		if _, err := Populated(g.mem); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkLookup(b *testing.B) {
	g, root := linuxLike(b, gib, 0)
	m, err := NewMap(g.mem, g.ranges, []Root{root})
	if err != nil {
		b.Fatal(err)
	}
	var gpa uint64
	for b.Loop() {
		gpa += 4097 * 331
		m.Lookup(gpa % gib)
	}
}
