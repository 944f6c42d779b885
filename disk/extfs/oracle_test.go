package extfs

import (
	"testing"

	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/extfs/extfstest"
	"github.com/gnomon-vmm/gnomon/disk/raw"
)

func openRaw(t testing.TB, path string) block.Node {
	t.Helper()
	n, err := raw.Open(path, false)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.Close() })
	return n
}

// freeOf is what the map says is free.
func freeOf(m *Map) []extfstest.Extent {
	var free []extfstest.Extent
	for start, end := range m.Free() {
		free = append(free, extfstest.Extent{Start: start, End: end})
	}
	return free
}

// complement is the used runs of a map, as the free ones between them.
func complement(m *Map) []extfstest.Extent {
	var free []extfstest.Extent
	at := m.Start()
	for start, end := range m.Used() {
		if start > at {
			free = append(free, extfstest.Extent{Start: at, End: start})
		}
		at = end
	}
	if at < m.End() {
		free = append(free, extfstest.Extent{Start: at, End: m.End()})
	}
	return free
}
