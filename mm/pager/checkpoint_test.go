package pager

import (
	"bytes"
	"context"
	"math/rand/v2"
	"path/filepath"
	"testing"

	"github.com/gnomon-vmm/gnomon/mm/checkpoint"
	"github.com/gnomon-vmm/gnomon/mm/guestmem"
)

// save writes a checkpoint of the pages that order names, in that order.
func save(t *testing.T, path, parent string, ranges []guestmem.Range, order []uint64, content func(pfn uint64) []byte) {
	t.Helper()
	w, err := checkpoint.Create(path, checkpoint.CreateOptions{Memory: ranges, Parent: parent})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Abort()
	for len(order) > 0 {
		n := min(len(order), BlockPages)
		var data []byte
		for _, pfn := range order[:n] {
			data = append(data, content(pfn)...)
		}
		if err := w.Block(order[:n], data); err != nil {
			t.Fatal(err)
		}
		order = order[n:]
	}
	if err := w.Commit(); err != nil {
		t.Fatal(err)
	}
}

// TestCheckpoint restores from a file with a parent, zeros and pages that equal
// others, as the guest, as a device, and in the background.
func TestCheckpoint(t *testing.T) {
	const pages = 6000
	ranges := []guestmem.Range{{GPA: 0, Size: 4000 * pageSize}, {GPA: 1 << 32, Size: (pages - 4000) * pageSize}}
	rng := rand.New(rand.NewPCG(20, 1))
	var order []uint64
	for _, i := range rng.Perm(pages) {
		pfn := uint64(i)
		if i >= 4000 {
			pfn = 1<<32/pageSize + pfn - 4000
		}
		order = append(order, pfn)
	}
	content := map[uint64][]byte{}
	write := func(pfn uint64) {
		p := make([]byte, pageSize)
		switch rng.IntN(8) {
		case 0: // zeros
		case 1:
			fill(p, uint64(rng.IntN(5))) // like some others
		default:
			for i := range p[:512] {
				p[i] = byte(rng.Uint32())
			}
		}
		content[pfn] = p
	}
	for _, pfn := range order {
		write(pfn)
	}
	dir := t.TempDir()
	parent, child := filepath.Join(dir, "parent"), filepath.Join(dir, "child")
	save(t, parent, "", ranges, order, func(pfn uint64) []byte { return content[pfn] })
	var changed []uint64
	for _, pfn := range order {
		if rng.IntN(5) == 0 {
			write(pfn)
			changed = append(changed, pfn)
		}
	}
	save(t, child, parent, ranges, changed, func(pfn uint64) []byte { return content[pfn] })

	for _, o := range []Options{
		{Policy: Locality, Background: true}, {Policy: Locality}, {Policy: Physical}, {}, {Policy: Locality | Recorded, Recorded: []Block{3, 2, 1}},
	} {
		r, err := checkpoint.Open(child)
		if err != nil {
			t.Fatal(err)
		}
		mem, err := guestmem.New(ranges)
		if err != nil {
			t.Fatal(err)
		}
		p, err := New(mem, r, o)
		if err != nil {
			t.Fatal(err)
		}
		p.Start()
		m := &machine{t: t, mem: mem, p: p}
		c := m.vcpu()
		for i, pfn := range order {
			if i%2 == 0 {
				got, err := c.read(pfn, pageSize)
				if err != nil || !bytes.Equal(got, content[pfn]) {
					t.Fatalf("%v: the guest's page %#x: %v", o.Policy, pfn, err)
				}
			} else if i%3 == 0 {
				got := make([]byte, pageSize)
				if err := mem.Read(pfn*pageSize, got); err != nil || !bytes.Equal(got, content[pfn]) {
					t.Fatalf("%v: a device's page %#x: %v", o.Policy, pfn, err)
				}
			}
		}
		p.LoadAll()
		if err := p.Wait(context.Background()); err != nil {
			t.Fatal(err)
		}
		for _, region := range mem.Regions() {
			for i := uint64(0); i < region.Size; i += pageSize {
				if pfn := (region.GPA + i) / pageSize; !bytes.Equal(region.Bytes()[i:i+pageSize], content[pfn]) {
					t.Fatalf("%v: page %#x at last", o.Policy, pfn)
				}
			}
		}
		s := p.Stats()
		if o.Policy&Locality != 0 && s.BlockReads != uint64(s.Blocks) {
			t.Errorf("%d reads for %d blocks", s.BlockReads, s.Blocks)
		}
		t.Logf("%v: %+v", o.Policy, s)
		if err := p.Close(); err != nil {
			t.Error(err)
		}
		mem.Close()
		r.Close()
	}
}
