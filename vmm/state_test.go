package vmm_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/mm/guestmem"
	"github.com/gnomon-vmm/gnomon/vmm"
)

// lent is a disk that outlives the machine it is attached to.
type lent struct{ block.Node }

func (lent) Close() error { return nil }

// save pauses a machine and reads its state.
func (r *running) save(t *testing.T) []vmm.Section {
	t.Helper()
	if err := r.Pause(); err != nil {
		t.Fatal(err)
	}
	sections, err := r.SaveState()
	if err != nil {
		t.Fatal(err)
	}
	return sections
}

// copyOf fills a machine's memory with that of another, which stands still.
func copyOf(from *guestmem.Memory) func(*guestmem.Memory) error {
	return func(to *guestmem.Memory) error {
		for i, r := range from.Regions() {
			copy(to.Regions()[i].Bytes(), r.Bytes())
		}
		return nil
	}
}

// restored makes a machine that goes on where r stands, and closes r.
func (r *running) restored(t *testing.T, sections []vmm.Section, change func(*vmm.Config)) *running {
	t.Helper()
	next := build(t, "", func(c *vmm.Config) {
		c.Kernel.Close()
		c.Kernel, c.Memory = nil, 0
		c.Serial = r.serial
		c.Restore = &vmm.Restore{Sections: sections, Prepare: copyOf(r.Memory())}
		if change != nil {
			change(c)
		}
	})
	next.serial = r.serial
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(next.done)
		next.exit, next.err = next.Run(context.Background())
	}()
	return next
}

// A guest that is moved from machine to machine while it uses its disk misses nothing.
func TestRestoredGuestGoesOn(t *testing.T) {
	const rounds = 100
	d, _ := disk(t, 16<<20)
	node := lent{d.Node}
	defer d.Node.Close()
	attach := func(c *vmm.Config) { c.Memory, c.Disks = 16<<20, []vmm.Disk{{Node: node}} }
	for _, ring := range []string{"", " packed=1"} {
		t.Run("ring"+ring, func(t *testing.T) {
			r := start(t, "blk op=seqwrite bs=4k qd=8 count=80000 seed=3"+ring+" blk op=seqread verify=1 seed=3 bs=64k total=16M"+ring, attach)
			for i := range rounds {
				dev := r.Disks()[0].Device
				for n := dev.Stats().Write.Ops; dev.Stats().Write.Ops < n+5; {
					select {
					case <-r.done:
						t.Fatalf("the guest was done after %d rounds: give it more requests\n%s", i, r.serial)
					default:
					}
				}
				r = r.restored(t, r.save(t), attach)
			}
			results := r.end(t, vmm.ExitPowerOff)
			if err := results.Err(); err != nil {
				t.Fatalf("%v:\n%s", err, r.serial)
			}
			if len(results.Lines) < 2 {
				t.Fatalf("results are missing:\n%s", r.serial)
			}
			for _, line := range results.Lines {
				for _, key := range []string{"failed", "bad"} {
					if v, ok := line.Values[key]; ok && v != "0" {
						t.Errorf("%s %s=%s", line.Name, key, v)
					}
				}
			}
		})
	}
}

// What does not fit is refused by name, and damaged state is an error and no more.
func TestRestoreRefuses(t *testing.T) {
	r := start(t, "spin", func(c *vmm.Config) { c.CPUs = 2 })
	sections := r.save(t)
	try := func(sections []vmm.Section, change func(*vmm.Config)) error {
		cfg := vmm.Config{Restore: &vmm.Restore{Sections: sections, Prepare: copyOf(r.Memory())}}
		if change != nil {
			change(&cfg)
		}
		m, err := vmm.New(cfg)
		if err == nil {
			m.Close()
		}
		return err
	}
	if err := try(sections, nil); err != nil {
		t.Fatal(err)
	}
	edit := func(name string, f func(*vmm.Section)) []vmm.Section {
		edited := append([]vmm.Section(nil), sections...)
		for i := range edited {
			if edited[i].Name == name {
				f(&edited[i])
			}
		}
		return edited
	}
	machine := func(change func(map[string]any)) []vmm.Section {
		return edit("machine", func(s *vmm.Section) {
			var m map[string]any
			_ = json.Unmarshal(s.Data, &m)
			change(m)
			s.Data, _ = json.Marshal(m)
		})
	}
	for name, c := range map[string]struct {
		sections []vmm.Section
		change   func(*vmm.Config)
		words    []string
	}{
		"unknown section": {append(sections[:len(sections):len(sections)], vmm.Section{Name: "flux-capacitor", Version: 1}), nil, []string{"flux-capacitor"}},
		"missing section": {sections[:len(sections)-1], nil, []string{"cpu1"}},
		"section twice":   {append(sections[:len(sections):len(sections)], sections[3]), nil, []string{sections[3].Name, "twice"}},
		"newer section":   {edit("rtc", func(s *vmm.Section) { s.Version = 2 }), nil, []string{"rtc", "version 2", "newer"}},
		"unknown field":   {edit("rtc", func(s *vmm.Section) { s.Data = []byte(`{"Wheels": 4}`) }), nil, []string{"rtc", "Wheels"}},
		"no data":         {edit("cpu1", func(s *vmm.Section) { s.Data = nil }), nil, []string{"cpu1"}},
		"null":            {edit("cpu0", func(s *vmm.Section) { s.Data = []byte("null") }), nil, []string{"cpu0"}},
		"other devices":   {sections, func(c *vmm.Config) { c.NoRNG = true }, []string{"slot 1", "another device"}},
		"no machine":      {sections[1:], nil, []string{"machine"}},
		"other kind of host": {
			machine(func(m map[string]any) { m["Assisted"] = !m["Assisted"].(bool) }), nil,
			[]string{"host", "ring 0", "VT-x"}[:1],
		},
		"lost CPU feature": {machine(func(m map[string]any) {
			for _, e := range m["CPUID"].([]any) {
				if e := e.(map[string]any); e["Function"] == 7.0 && e["Index"] == 0.0 {
					e["ECX"] = float64(uint32(e["ECX"].(float64)) | 1<<2 | 1<<29)
				}
			}
		}), nil, []string{"enqcmd", "lacks"}},
	} {
		err := try(c.sections, c.change)
		if !errors.Is(err, vmm.ErrRestore) {
			t.Errorf("%s: %v", name, err)
			continue
		}
		for _, word := range c.words {
			if !strings.Contains(err.Error(), word) {
				t.Errorf("%s: %q does not say %q", name, err, word)
			}
		}
	}
	if err := r.Resume(); err != nil {
		t.Fatal(err)
	}
	if _, err := r.SaveState(); !errors.Is(err, vmm.ErrState) {
		t.Errorf("state of a running machine: %v", err)
	}
	r.Quit()
	<-r.done
}

// FuzzRestore gives New sections that were tampered with: it must refuse them
// or build a machine, and no more.
func FuzzRestore(f *testing.F) {
	m, err := vmm.New(vmm.Config{Memory: 4 << 20, Kernel: probeKernel(f)})
	if err != nil {
		f.Fatal(err)
	}
	defer m.Close()
	sections, err := m.SaveState()
	if err != nil {
		f.Fatal(err)
	}
	for i, s := range sections {
		f.Add(uint8(i), s.Data)
	}
	f.Fuzz(func(t *testing.T, which uint8, data []byte) {
		edited := append([]vmm.Section(nil), sections...)
		edited[int(which)%len(edited)].Data = data
		m, err := vmm.New(vmm.Config{Restore: &vmm.Restore{Sections: edited, Prepare: func(mem *guestmem.Memory) error {
			if mem.Size() > 64<<20 {
				return fmt.Errorf("%d bytes are too much for a test", mem.Size())
			}
			return nil
		}}})
		if err == nil {
			m.Close()
		}
	})
}
