package device

import (
	"bytes"
	"errors"
	"testing"

	"github.com/gnomon-vmm/gnomon/mm/guestmem"
)

func TestGUID(t *testing.T) {
	const text = "324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87"
	g, err := ParseGUID(text)
	if err != nil {
		t.Fatal(err)
	}
	// As QEMU's vmgenid test expects it in memory.
	want := []byte{0xaf, 0x6e, 0x4e, 0x32, 0xd1, 0xd1, 0xf6, 0x4b, 0xbf, 0x41, 0xb9, 0xbb, 0x6c, 0x91, 0xfb, 0x87}
	if !bytes.Equal(g[:], want) {
		t.Errorf("in memory % x, want % x", g, want)
	}
	if g.String() != text {
		t.Errorf("text is %s", g)
	}
	for _, bad := range []string{"", "324e6eafd1d14bf6bf41b9bb6c91fb87", text + "0", "324e6eaf-d1d1-4bf6-bf41-b9bb6c91fbxx", "324e6eaf-d1d1-4bf6-bf41+b9bb6c91fb87"} {
		if _, err := ParseGUID(bad); !errors.Is(err, ErrGenerationID) {
			t.Errorf("%q: %v, want ErrGenerationID", bad, err)
		}
	}
	if a, b := NewGUID(), NewGUID(); a == b || a.String()[14] != '4' {
		t.Errorf("new GUIDs %s and %s", a, b)
	}
}

func TestGenerationID(t *testing.T) {
	mem, err := guestmem.New([]guestmem.Range{{GPA: 0, Size: 2 * guestmem.PageSize}})
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	a := newACPI(t)
	a.out16(PortGPE0+2, 1<<GPEGenerationID)

	const gpa = 0x1028
	first, second := NewGUID(), NewGUID()
	g, err := NewGenerationID(mem, a.dev, gpa, first)
	if err != nil {
		t.Fatal(err)
	}
	seen := func() GUID {
		var id GUID
		if err := mem.Read(gpa, id[:]); err != nil {
			t.Fatal(err)
		}
		return id
	}
	if err := g.Place(); err != nil || seen() != first || a.sci.level() {
		t.Errorf("after Place the guest sees %s, SCI %v, err %v", seen(), a.sci.level(), err)
	}
	if err := g.Change(second); err != nil || seen() != second || g.ID() != second || !a.sci.level() {
		t.Errorf("after Change the guest sees %s, SCI %v, err %v", seen(), a.sci.level(), err)
	}
	state := throughJSON(t, g.State())
	back, err := NewGenerationID(mem, a.dev, 0, first)
	if err != nil {
		t.Fatal(err)
	}
	if err := back.Restore(state); err != nil || back.GPA() != gpa || back.ID() != second {
		t.Errorf("restored id %s at %#x, err %v", back.ID(), back.GPA(), err)
	}
	for _, bad := range []uint64{4, 2*guestmem.PageSize - 8, 1 << 40, 1<<64 - 8} {
		if _, err := NewGenerationID(mem, a.dev, bad, first); !errors.Is(err, ErrGenerationID) {
			t.Errorf("GPA %#x: %v, want ErrGenerationID", bad, err)
		}
	}
}
