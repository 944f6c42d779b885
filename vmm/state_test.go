package vmm_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/mm/guestmem"
	"github.com/gnomon-vmm/gnomon/vmm"
	"github.com/gnomon-vmm/gnomon/vmm/boot"
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

// copyOf fills a machine's memory with that of another, which stands still. What
// that never touched is not touched here either.
func copyOf(from *guestmem.Memory) func(*guestmem.Memory) error {
	return func(to *guestmem.Memory) error {
		for i, r := range from.Regions() {
			for at, end := int64(r.Offset), int64(r.Offset+r.Size); at < end; {
				data, err := unix.Seek(from.FD(), at, unix.SEEK_DATA)
				if err == unix.ENXIO || data >= end {
					break
				}
				if err != nil {
					return err
				}
				hole, err := unix.Seek(from.FD(), data, unix.SEEK_HOLE)
				if err != nil {
					return err
				}
				at = min(hole, end)
				copy(to.Regions()[i].Bytes()[data-int64(r.Offset):], r.Bytes()[data-int64(r.Offset):at-int64(r.Offset)])
			}
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

// A guest that is moved from machine to machine while it uses its disk and its
// memory misses nothing.
func TestRestoredGuestGoesOn(t *testing.T) {
	for _, c := range []struct {
		name   string
		rounds int
		cpus   int
		ring   string
	}{
		{"split", 200, 1, ""},
		{"packed", 50, 1, " packed=1"},
		{"two vCPUs", 50, 2, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			d, _ := disk(t, 16<<20)
			defer d.Node.Close()
			change := func(cfg *vmm.Config) {
				cfg.Disks = []vmm.Disk{{Node: lent{d.Node}, Queues: 1}}
				if cfg.Restore == nil {
					cfg.CPUs = c.cpus
				}
			}
			r := start(t, fmt.Sprintf("fill size=2M seed=9 blk op=seqwrite bs=4k qd=8 count=%d seed=3%s blk op=seqread verify=1 seed=3 bs=64k total=16M%s verify seed=9",
				700*c.rounds, c.ring, c.ring), change)
			for i := range c.rounds {
				dev := r.Disks()[0].Device
				for n := dev.Stats().Write.Ops; dev.Stats().Write.Ops < n+5; {
					select {
					case <-r.done:
						t.Fatalf("the guest was done after %d rounds: give it more requests\n%s", i, r.serial)
					default:
					}
				}
				r = r.restored(t, r.save(t), change)
			}
			results := r.end(t, vmm.ExitPowerOff)
			if err := results.Err(); err != nil {
				t.Fatalf("%v:\n%s", err, r.serial)
			}
			for _, want := range []struct {
				name  string
				index int
				keys  []string // that must be 0
			}{{"blk", 0, []string{"failed"}}, {"blk", 1, []string{"failed", "bad"}}, {"verify", 0, []string{"bad"}}} {
				line, err := results.Find(want.name, want.index)
				if err != nil {
					t.Fatalf("%v:\n%s", err, r.serial)
				}
				for _, key := range want.keys {
					if v := line.Values[key]; v != "0" {
						t.Errorf("%s %d: %s=%s", want.name, want.index, key, v)
					}
				}
			}
		})
	}
}

// state decodes a section.
func state(t *testing.T, sections []vmm.Section, name string) map[string]any {
	t.Helper()
	for _, s := range sections {
		if s.Name == name {
			d := json.NewDecoder(bytes.NewReader(s.Data))
			d.UseNumber()
			var v map[string]any
			if err := d.Decode(&v); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			return v
		}
	}
	t.Fatalf("there is no section %s", name)
	return nil
}

// What a restored machine saves before it has run is what it was restored from,
// but for what the host's time has to do with.
func TestSavedStateComesBack(t *testing.T) {
	d, _ := disk(t, 16<<20)
	defer d.Node.Close()
	change := func(c *vmm.Config) {
		c.Disks = []vmm.Disk{{Node: lent{d.Node}, Queues: 1}}
		c.Console = newRecorder()
		if c.Restore == nil {
			c.CPUs = 2
		} else {
			c.Paused, c.Restore.KeepGenerationID = true, true
		}
	}
	r := start(t, "blk op=seqwrite bs=4k qd=8 count=1000000 seed=3", change)
	for r.Disks()[0].Device.Stats().Write.Ops < 100 {
		runtime.Gosched()
	}
	r.serial.connect.Input([]byte("typed ahead"))
	before := r.save(t)
	next := r.restored(t, before, change)
	after, err := next.SaveState()
	if err != nil {
		t.Fatal(err)
	}
	if len(before) != len(after) {
		t.Fatalf("%d sections, then %d", len(before), len(after))
	}
	timeless := func(name string, v map[string]any) map[string]any {
		switch name {
		case "cpu0", "cpu1":
			for _, m := range v["MSRs"].([]any) {
				if m := m.(map[string]any); m["Index"] == json.Number("16") { // TSC
					m["Data"] = nil
				}
			}
		case "rtc":
			v["OffsetSeconds"], v["Seen"] = nil, nil
		case "interrupts":
			for _, c := range v["PIT"].(map[string]any)["Channels"].([]any) {
				c.(map[string]any)["CountLoadTime"] = nil
			}
		}
		return v
	}
	for i, s := range before {
		was, is := timeless(s.Name, state(t, before, s.Name)), timeless(s.Name, state(t, after, s.Name))
		if after[i].Name != s.Name || !reflect.DeepEqual(was, is) {
			t.Errorf("%s was\n%v\nand is\n%v", s.Name, was, is)
		}
	}
	next.Quit()
	<-next.done
}

// The guest's clocks go on where they stood, or jump by the time between, as
// is asked; both times the monotonic one goes on.
func TestRestoredClocks(t *testing.T) {
	const away = 3600 // seconds
	for _, goesOn := range []bool{false, true} {
		r := start(t, "spin", nil)
		for r.count(t) == 0 {
			runtime.Gosched()
		}
		sections := r.save(t)
		was := state(t, sections, "machine")
		stopped, err := time.Parse(time.RFC3339Nano, was["Stopped"].(string))
		if err != nil {
			t.Fatal(err)
		}
		sections = edited(sections, "machine", func(m map[string]any) { m["Stopped"] = stopped.Add(-away * time.Second) })
		r = r.restored(t, sections, func(c *vmm.Config) { c.Restore.ClockGoesOn = goesOn })
		for n := r.count(t); r.count(t) == n; {
			runtime.Gosched()
		}
		after := r.save(t)
		number := func(section, field string) (change int64) {
			t.Helper()
			for sign, sections := range map[int64][]vmm.Section{-1: sections, 1: after} {
				n, err := state(t, sections, section)[field].(json.Number).Int64()
				if err != nil {
					t.Fatal(err)
				}
				change += sign * n
			}
			return change
		}
		for _, c := range []struct {
			section, field string
			unit           int64 // of a second
		}{
			{"machine", "KVMClock", 1e9},
			{"machine", "Clock", 1e9},
		} {
			got := number(c.section, c.field)
			if got <= 0 || (got >= away*c.unit) != goesOn {
				t.Errorf("ClockGoesOn %v: %s went on by %d", goesOn, c.field, got)
			}
		}
		// The RTC's offset from the host's clock.
		if got := number("rtc", "OffsetSeconds"); goesOn && got != 0 || !goesOn && got > -away {
			t.Errorf("ClockGoesOn %v: the RTC changed by %d s", goesOn, got)
		}
		r.Quit()
		<-r.done
	}
}

// A restored machine has a new generation id, in its memory too, unless it is
// to keep the old one.
func TestRestoredGenerationID(t *testing.T) {
	r := build(t, "spin", nil)
	close(r.done)
	sections, err := r.SaveState()
	if err != nil {
		t.Fatal(err)
	}
	for _, keep := range []bool{false, true} {
		m, err := vmm.New(vmm.Config{Restore: &vmm.Restore{Sections: sections, Prepare: copyOf(r.Memory()), KeepGenerationID: keep}})
		if err != nil {
			t.Fatal(err)
		}
		after, err := m.SaveState()
		if err != nil {
			t.Fatal(err)
		}
		was, is := state(t, sections, "generation-id"), state(t, after, "generation-id")
		if same := reflect.DeepEqual(was["ID"], is["ID"]); same != keep {
			t.Errorf("keep %v: %v was %v", keep, is, was)
		}
		var id [16]byte
		if err := m.Memory().Read(boot.GenerationIDAddr, id[:]); err != nil {
			t.Fatal(err)
		}
		for i, b := range is["ID"].([]any) {
			if b != json.Number(fmt.Sprint(id[i])) {
				t.Errorf("keep %v: in memory it is %x, not %v", keep, id, is["ID"])
				break
			}
		}
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	}
}

// edited changes one section's fields.
func edited(sections []vmm.Section, name string, change func(map[string]any)) []vmm.Section {
	sections = slices.Clone(sections)
	for i := range sections {
		if s := &sections[i]; s.Name == name {
			d := json.NewDecoder(bytes.NewReader(s.Data))
			d.UseNumber()
			var v map[string]any
			if err := d.Decode(&v); err != nil {
				panic(err)
			}
			change(v)
			s.Data, _ = json.Marshal(v)
		}
	}
	return sections
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
		edited := slices.Clone(sections)
		for i := range edited {
			if edited[i].Name == name {
				f(&edited[i])
			}
		}
		return edited
	}
	host := func(change func(map[string]any)) []vmm.Section {
		return edited(sections, "machine", func(m map[string]any) { change(m["Host"].(map[string]any)) })
	}
	// cpuid changes a register of a leaf that the guest was shown.
	cpuid := func(function, register string, change func(uint64) uint64) []vmm.Section {
		return host(func(h map[string]any) {
			for _, e := range h["CPUID"].([]any) {
				if e := e.(map[string]any); e["Function"] == json.Number(function) && e["Index"] == json.Number("0") {
					old, _ := e[register].(json.Number).Int64()
					e[register] = change(uint64(old))
				}
			}
		})
	}
	type refusal struct {
		sections []vmm.Section
		change   func(*vmm.Config)
		words    []string
	}
	refusals := map[string]refusal{
		"unknown section": {append(sections[:len(sections):len(sections)], vmm.Section{Name: "flux-capacitor", Version: 1}), nil, []string{"flux-capacitor"}},
		"missing section": {sections[:len(sections)-1], nil, []string{"virtio:balloon0"}},
		"section twice":   {append(sections[:len(sections):len(sections)], sections[3]), nil, []string{sections[3].Name, "twice"}},
		"newer section":   {edit("rtc", func(s *vmm.Section) { s.Version = 2 }), nil, []string{"rtc", "version 2", "newer"}},
		"unknown field":   {edit("rtc", func(s *vmm.Section) { s.Data = []byte(`{"Wheels": 4}`) }), nil, []string{"rtc", "Wheels"}},
		"no data":         {edit("cpu1", func(s *vmm.Section) { s.Data = nil }), nil, []string{"cpu1"}},
		"null":            {edit("cpu0", func(s *vmm.Section) { s.Data = []byte("null") }), nil, []string{"cpu0"}},
		"no version":      {edit("rtc", func(s *vmm.Section) { s.Version = 0 }), nil, []string{"rtc", "version"}},
		"newer machine":   {edit("machine", func(s *vmm.Section) { s.Version, s.Data = 7, []byte(`{"Wheels": 4}`) }), nil, []string{"machine", "version 7", "newer"}},
		"two values":      {edit("rtc", func(s *vmm.Section) { s.Data = append(slices.Clone(s.Data), "{}"...) }), nil, []string{"rtc", "follows"}},
		"fewer devices":   {sections, func(c *vmm.Config) { c.NoRNG = true }, []string{"virtio:rng0", "same devices"}},
		"more devices":    {sections, func(c *vmm.Config) { c.Console = newRecorder() }, []string{"virtio-console", "same devices"}},
		"no machine":      {sections[1:], nil, []string{"machine"}},
		"other memory":    {sections, func(c *vmm.Config) { c.Memory = 32 << 20 }, []string{"2 vCPUs", "67108864"}},
		"other CPUs":      {sections, func(c *vmm.Config) { c.CPUs = 4 }, []string{"2 vCPUs"}},
		"other kind of host": {
			host(func(h map[string]any) { h["Assisted"] = !h["Assisted"].(bool) }), nil,
			[]string{"host", "restore it on"},
		},
		"lost CPU features": {cpuid("7", "ECX", func(v uint64) uint64 { return v | 1<<24 | 1<<29 }), nil, []string{"enqcmd", "CPUID.7.0.ECX bit 24", "lacks"}},
		"other vendor":      {cpuid("0", "EBX", func(uint64) uint64 { return 0x41414141 }), nil, []string{"AAAA"}},
		"wider addresses":   {cpuid("2147483656", "EAX", func(v uint64) uint64 { return v&^0xFF | 60 }), nil, []string{"60 bits"}},
		"MSR of no value":   {edited(sections, "cpu0", func(m map[string]any) { m["MSRs"] = []any{map[string]any{"Index": 0xDEAD, "Data": 1}} }), nil, []string{"cpu0", "0xdead"}},
		"no XSAVE area":     {edited(sections, "cpu0", func(m map[string]any) { m["XSave"] = "AAAA" }), nil, []string{"cpu0", "XSAVE", "3 bytes"}},
		"function missing":  {edited(sections, "pci", func(m map[string]any) { m["Functions"] = m["Functions"].([]any)[:1] }), nil, []string{"pci", "slot 1"}},
		"another function": {edited(sections, "pci", func(m map[string]any) {
			f := m["Functions"].([]any)
			f[1].(map[string]any)["Config"] = f[2].(map[string]any)["Config"]
		}), nil, []string{"pci", "slot 1", "another device"}},
	}
	if r.Assisted() { // others may scale the TSC
		refusals["other TSC"] = refusal{host(func(h map[string]any) { h["TSCKHz"] = 1_000_000 }), nil, []string{"1000000 kHz"}}
		refusals["lost native feature"] = refusal{host(func(h map[string]any) { h["Native"] = []string{"sse2", "avx1024"} }), nil, []string{"lacks: avx1024:"}}
	}
	for name, c := range refusals {
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
		m, err := vmm.New(vmm.Config{CPUs: 1, Memory: 4 << 20, Restore: &vmm.Restore{Sections: edited}})
		if err == nil {
			m.Close()
		}
	})
}
