package paging

import (
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/mm/guestmem"
)

// kernelAndProcesses is a root with a kernel's half and a user page, and others
// that share the half, with a user page of their own.
func kernelAndProcesses(g *guest, five bool, processes int) []Root {
	roots := []Root{g.root(five)}
	for i, gva := range []uint64{0xffff_8880_0000_0000, 0xffff_c900_0000_0000, 0xffff_ea00_0000_0000, 0xffff_fe00_0000_0000, 0xffff_ffff_8100_0000} {
		g.mapPage(roots[0], gva, Translation{GPA: uint64(i+200) * pageSize, Size: pageSize})
	}
	for range processes {
		roots = append(roots, g.root(five))
		g.shareKernel(roots[0], roots[len(roots)-1])
	}
	for _, root := range roots {
		g.mapPage(root, 0x40_0000, Translation{GPA: 0, Size: pageSize})
	}
	return roots
}

func (g *guest) findRoots(known ...Root) []Root {
	g.t.Helper()
	roots, err := FindRoots(g.mem, g.ranges, known...)
	if err != nil {
		g.t.Fatal(err)
	}
	return roots
}

func TestFindRoots(t *testing.T) {
	for _, five := range []bool{false, true} {
		g := newGuest(t, guestmem.Range{GPA: 0, Size: mib}, guestmem.Range{GPA: 4 * mib, Size: mib})
		want := kernelAndProcesses(g, five, 9)
		if got := g.findRoots(want[0]); !slices.Equal(got, want) {
			t.Errorf("5 levels %v: %+v, want %+v", five, got, want)
		}
		// What the vCPUs use comes first, and once.
		want = slices.Concat([]Root{want[7], want[3]}, slices.Delete(slices.Clone(want), 7, 8))
		want = slices.Delete(want, 5, 6)
		if got := g.findRoots(want[0], want[1], want[0]); !slices.Equal(got, want) {
			t.Errorf("5 levels %v: %+v, want %+v", five, got, want)
		}
	}
}

func TestFindRootsJudgesPages(t *testing.T) {
	for _, test := range []struct {
		name   string
		change func(g *guest, root uint64)
		found  bool
	}{
		{"as it is", func(*guest, uint64) {}, true},
		{"accessed and ignored bits", func(g *guest, root uint64) {
			for i := uint64(256); i < 512; i++ {
				if e := g.get(root, i); e&1 != 0 {
					g.set(root, i, e^0x20|1<<10|1<<55)
				}
			}
		}, true},
		{"one entry more", func(g *guest, root uint64) { g.set(root, 300, 0x8003) }, true},
		{"one entry different", func(g *guest, root uint64) { g.set(root, 402, 0x8003) }, true},
		{"two of five entries missing", func(g *guest, root uint64) { g.set(root, 273, 0); g.set(root, 402, 0) }, false},
		{"many other entries", func(g *guest, root uint64) {
			for i := range uint64(5) {
				g.set(root, 300+i, 0x8003)
			}
		}, false},
		{"no user half", func(g *guest, root uint64) { g.set(root, 0, 0) }, false},
		{"a large page", func(g *guest, root uint64) { g.set(root, 7, 0x80e7) }, false},
		{"a table outside RAM", func(g *guest, root uint64) { g.set(root, 7, 0x1000_0003) }, false},
	} {
		g := newGuest(t, guestmem.Range{GPA: 0, Size: mib})
		roots := kernelAndProcesses(g, false, 1)
		test.change(g, roots[1].GPA)
		got := g.findRoots(roots[0])
		if found := slices.Contains(got, roots[1]); found != test.found || len(got) > 2 {
			t.Errorf("%s: %+v", test.name, got)
		}
	}
}

// Some kernels keep an entry in each root that points to the root itself.
func TestFindRootsThatContainThemselves(t *testing.T) {
	g := newGuest(t, guestmem.Range{GPA: 0, Size: mib})
	want := kernelAndProcesses(g, false, 5)
	for _, root := range want {
		g.set(root.GPA, 511, root.GPA|0x63)
	}
	if got := g.findRoots(want[0]); !slices.Equal(got, want) {
		t.Errorf("%+v, want %+v", got, want)
	}
}

func TestRootsWithoutKernelHalf(t *testing.T) {
	g := newGuest(t, guestmem.Range{GPA: 0, Size: mib})
	one, two := g.root(false), g.root(false)
	g.mapPage(one, 0x1000, Translation{GPA: 0, Size: pageSize})
	g.mapPage(two, 0x1000, Translation{GPA: 0, Size: pageSize})
	outside := Root{GPA: 1 << 40}
	if got := g.findRoots(one, outside); !slices.Equal(got, []Root{one, outside}) {
		t.Errorf("%+v", got)
	}
}

// A guest that fills its RAM with roots gets MaxRoots of them.
func TestRootsAreBounded(t *testing.T) {
	g := newGuest(t, guestmem.Range{GPA: 0, Size: MaxRoots*pageSize + 16*mib})
	known := kernelAndProcesses(g, false, 0)[0]
	ram := g.mem.Regions()[0].Bytes()
	for i := 2 * mib; i < len(ram); i += pageSize {
		copy(ram[i:], ram[known.GPA:known.GPA+pageSize])
	}
	got := g.findRoots(known)
	if len(got) != MaxRoots {
		t.Fatalf("%d roots", len(got))
	}
	m := g.newMap(got...)
	sane(t, m)
	if !m.Stats().Truncated {
		t.Errorf("%+v", m.Stats())
	}
	many := make([]Root, MaxRoots+10)
	for i := range many {
		many[i].GPA = uint64(i) * pageSize
	}
	if got := g.findRoots(many...); len(got) != MaxRoots {
		t.Errorf("%d of %d given roots", len(got), len(many))
	}
}

func TestPopulated(t *testing.T) {
	ranges := []guestmem.Range{{GPA: 0, Size: 8 * mib}, {GPA: 4 * gib, Size: 64 * mib}}
	g := newGuest(t, ranges...)
	if got, err := Populated(g.mem); err != nil || len(got) != 0 {
		t.Fatalf("of empty memory: %x, %v", got, err)
	}
	written := []uint64{0, 0x1000, 0x5000, 8*mib - 0x1000, 4 * gib, 4*gib + 30*mib}
	for _, gpa := range written {
		if err := g.mem.Write(gpa, []byte{1}); err != nil {
			t.Fatal(err)
		}
	}
	got, err := Populated(g.mem)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := newRAM(got); err != nil {
		t.Errorf("%x: %v", got, err)
	}
	for _, gpa := range written {
		if !slices.ContainsFunc(got, func(r guestmem.Range) bool { return gpa-r.GPA < r.Size }) {
			t.Errorf("%#x was written, and is not among %x", gpa, got)
		}
	}
	if slices.Equal(got, ranges) {
		t.Error("all of memory counts as populated")
	}
}

// Looking for roots leaves memory that nobody wrote unallocated.
func TestFindRootsLeavesHoles(t *testing.T) {
	g := newGuest(t, guestmem.Range{GPA: 0, Size: 256 * mib})
	want := kernelAndProcesses(g, false, 3)
	allocated := func() int64 {
		var st unix.Stat_t
		if err := unix.Fstat(g.mem.FD(), &st); err != nil {
			t.Fatal(err)
		}
		return st.Blocks
	}
	ranges, err := Populated(g.mem)
	if err != nil {
		t.Fatal(err)
	}
	before := allocated()
	got, err := FindRoots(g.mem, ranges, want[0])
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("%+v, %v; want %+v", got, err, want)
	}
	if after := allocated(); after != before {
		t.Errorf("%d blocks were allocated before, %d after", before, after)
	}
}
