package qcow2

import (
	"encoding/json"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/gnomon-vmm/gnomon/disk/block"
)

// mapped is an extent as qemu-img map prints it.
type mapped struct {
	Start   int64  `json:"start"`
	Length  int64  `json:"length"`
	Depth   int    `json:"depth"`
	Present bool   `json:"present"`
	Zero    bool   `json:"zero"`
	Data    bool   `json:"data"`
	Offset  *int64 `json:"offset"`
}

func (m *mapped) offset() int64 {
	if m.Offset == nil {
		return -1
	}
	return *m.Offset
}

// continues tells whether next prolongs m, as qemu-img decides.
func (m *mapped) continues(next *mapped) bool {
	if m.Depth != next.Depth || m.Present != next.Present || m.Zero != next.Zero || m.Data != next.Data {
		return false
	}
	if m.Offset == nil || next.Offset == nil {
		return m.Offset == next.Offset
	}
	return *m.Offset+m.Length == *next.Offset
}

func joined(all []mapped) []mapped {
	var out []mapped
	for _, m := range all {
		if k := len(out) - 1; k >= 0 && out[k].continues(&m) {
			out[k].Length += m.Length
			continue
		}
		out = append(out, m)
	}
	return out
}

func mapByQEMU(t testing.TB, path string) []mapped {
	t.Helper()
	cmd := exec.Command("qemu-img", "map", "-f", "qcow2", "--output=json", path)
	cmd.Dir = filepath.Dir(path) // where QEMU looks for data files
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	var all []mapped
	if err := json.Unmarshal(out, &all); err != nil {
		t.Fatal(err)
	}
	return joined(all)
}

func mapByUs(t testing.TB, n block.Mapper) []mapped {
	t.Helper()
	var all []mapped
	for off := int64(0); off < n.Size(); {
		e, err := n.Map(off, n.Size()-off)
		if err != nil {
			t.Fatal(err)
		}
		if e.Start != off || e.Length <= 0 || e.Length > n.Size()-off {
			t.Fatalf("asked at %d: %+v", off, e)
		}
		m := mapped{Start: off, Length: e.Length, Depth: e.Depth, Present: e.Present, Zero: e.Zero, Data: e.Data}
		if e.Offset >= 0 {
			m.Offset = &e.Offset
		}
		all = append(all, m)
		off += e.Length
	}
	return joined(all)
}

// compareMaps fails where the image at path is mapped otherwise than by QEMU. To
// say which data is zero is a guess that may be made otherwise, but not wrongly.
func compareMaps(t testing.TB, path string) {
	t.Helper()
	n := mustOpen(t, path)
	defer n.Close()
	want, got := mapByQEMU(t, path), mapByUs(t, n)
	for _, m := range got {
		if b := make([]byte, m.Length); m.Zero {
			if err := n.Readv([][]byte{b}, m.Start); err != nil || !block.IsZero(b) {
				t.Fatalf("%+v does not read as zero: %v", m, err)
			}
		}
	}
	want, got = forgetZeroData(want), forgetZeroData(got)
	for i := range max(len(want), len(got)) {
		switch {
		case i == 0 && len(got) == 0 && want[0].Length == 0:
			return // QEMU's word for nothing at all
		case i >= len(got):
			t.Fatalf("%d extents, QEMU has %d", len(got), len(want))
		case i >= len(want):
			t.Fatalf("%d extents, QEMU has %d: %+v", len(got), len(want), got[i])
		}
		w, g := want[i], got[i]
		if w.offset() != g.offset() || w.Start != g.Start || w.Length != g.Length || !w.continues(&mapped{
			Depth: g.Depth, Present: g.Present, Zero: g.Zero, Data: g.Data, Offset: after(&w),
		}) {
			t.Fatalf("extent %d of %d: %+v at %d, QEMU: %+v at %d", i, len(want), g, g.offset(), w, w.offset())
		}
	}
}

func forgetZeroData(all []mapped) []mapped {
	for i := range all {
		all[i].Zero = all[i].Zero && !all[i].Data
	}
	return joined(all)
}

// after is where what follows m would have to be, or nil if m has no place.
func after(m *mapped) *int64 {
	if m.Offset == nil {
		return nil
	}
	end := *m.Offset + m.Length
	return &end
}
