package monitor_test

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/digitalocean/go-qemu/qemu"
	goqmp "github.com/digitalocean/go-qemu/qmp"
	"github.com/google/go-cmp/cmp"

	"github.com/gnomon-vmm/gnomon/vmm"
)

// notQEMUs are the commands and events that QEMU 7.2 does not have.
var notQEMUs = []string{
	"query-cpus", "query-events", "__ORG.GNOMON_DEVICE_BROKEN", "__ORG.GNOMON_FAILED", "__org.gnomon_checkpoint", "__org.gnomon_query-checkpoint",
	"__org.gnomon_disk-changes", "__org.gnomon_disk-changes-reset", "__org.gnomon_disk-changes-forget", "__org.gnomon_disk-changes-list",
}

// looser are the places where our type is wider than QEMU's on purpose: our
// jobs have types of their own.
var looser = []string{"query-jobs returns[].type"}

// narrower are the commands that do not take all that QEMU's take: they refuse
// what they do not know by its name.
var narrower = []string{"block-commit", "block-stream", "blockdev-add", "blockdev-reopen", "blockdev-backup", "blockdev-create", "blockdev-mirror", "drive-backup", "drive-mirror", "transaction", "nbd-server-start", "nbd-server-add", "block-export-add", "block_set_io_throttle"}

// TestSchemaFitsQEMU compares the schemas: what we return and send is what
// QEMU's clients may expect, what they may ask for is accepted.
func TestSchemaFitsQEMU(t *testing.T) {
	ours := readSchema(t, everything(t, "spin").peer)
	theirs := readSchema(t, startQEMU(t, "q35", "spin"))
	f := fitting{ours: ours, theirs: theirs}
	compared := 0
	for name, our := range ours {
		if our.Meta != "command" && our.Meta != "event" {
			continue
		}
		their := theirs[name]
		if their == nil {
			if !slices.Contains(notQEMUs, name) {
				t.Errorf("QEMU has no %s", name)
			}
			continue
		}
		if their.Meta != our.Meta || slices.Contains(notQEMUs, name) {
			t.Errorf("QEMU has a %s %s", their.Meta, name)
			continue
		}
		compared++
		f.seen = map[string]bool{}
		if our.Meta == "event" {
			f.given(name, our.ArgType, their.ArgType)
			continue
		}
		f.given(name+" returns", our.RetType, their.RetType)
		f.seen = map[string]bool{}
		if !slices.Contains(narrower, name) {
			f.taken(name, our.ArgType, their.ArgType)
		}
	}
	for _, p := range f.problems {
		t.Error(p)
	}
	if compared < 50 {
		t.Errorf("only %d commands and events compared", compared)
	}
}

// fitting compares types of two schemas.
type fitting struct {
	ours, theirs schema
	seen         map[string]bool
	problems     []string
}

func (f *fitting) fail(format string, args ...any) {
	f.problems = append(f.problems, fmt.Sprintf(format, args...))
}

// enter returns both types, or false where there is nothing more to compare.
func (f *fitting) enter(at, our, their string) (o, h *schemaType, ok bool) {
	if key := our + "\x00" + their; f.seen[key] {
		return nil, nil, false
	} else {
		f.seen[key] = true
	}
	o, h = f.ours[our], f.theirs[their]
	if o.Meta != h.Meta || o.JSON != h.JSON {
		f.fail("%s: %s %s, QEMU's is %s %s", at, o.Meta, o.JSON, h.Meta, h.JSON)
		return nil, nil, false
	}
	return o, h, true
}

func member(members []schemaMember, name string) *schemaMember {
	for i := range members {
		if members[i].Name == name {
			return &members[i]
		}
	}
	return nil
}

// given checks that every value of our type is one of theirs.
func (f *fitting) given(at, our, their string) {
	if slices.Contains(looser, at) {
		return
	}
	o, h, ok := f.enter(at, our, their)
	if !ok {
		return
	}
	switch o.Meta {
	case "enum":
		for _, v := range o.Values {
			if !slices.Contains(h.Values, v) {
				f.fail("%s: QEMU never says %q", at, v)
			}
		}
	case "array":
		f.given(at+"[]", o.Element, h.Element)
	case "alternate":
		for _, m := range o.Members {
			if !slices.ContainsFunc(h.Members, func(x schemaMember) bool {
				return f.ours[m.Type].Meta == f.theirs[x.Type].Meta && f.ours[m.Type].JSON == f.theirs[x.Type].JSON
			}) {
				f.fail("%s: QEMU's has no choice %s", at, m.Type)
			}
		}
	case "object":
		for _, m := range o.Members {
			if x := member(h.Members, m.Name); x == nil {
				f.fail("%s: QEMU has no member %s", at, m.Name)
			} else {
				f.given(at+"."+m.Name, m.Type, x.Type)
			}
		}
		for _, x := range h.Members {
			if m := member(o.Members, x.Name); !x.Optional && (m == nil || m.Optional) {
				f.fail("%s: QEMU always has member %s", at, x.Name)
			}
		}
	}
}

// taken checks that every value of their type is one of ours.
func (f *fitting) taken(at, our, their string) {
	o, h, ok := f.enter(at, our, their)
	if !ok {
		return
	}
	switch o.Meta {
	case "enum":
		for _, v := range h.Values {
			if !slices.Contains(o.Values, v) {
				f.fail("%s: does not take %q", at, v)
			}
		}
	case "array":
		f.taken(at+"[]", o.Element, h.Element)
	case "object":
		f.takenMembers(at, o.Members, h.Members)
		for _, v := range h.Variants {
			f.takenMembers(at+"="+v.Case, f.ours.variant(o, v.Case), f.theirs[v.Type].Members)
		}
	}
}

func (f *fitting) takenMembers(at string, ours, theirs []schemaMember) {
	for _, x := range theirs {
		if m := member(ours, x.Name); m == nil {
			f.fail("%s: does not take %s", at, x.Name)
		} else {
			f.taken(at+"."+x.Name, m.Type, x.Type)
		}
	}
	for _, m := range ours {
		if x := member(theirs, m.Name); !m.Optional && (x == nil || x.Optional) {
			f.fail("%s: needs %s, QEMU does not", at, m.Name)
		}
	}
}

// conforms checks a value against a type of s; at says what it is.
func (s schema) conforms(at string, v any, name string) (problems []string) {
	st := s[name]
	bad := func() []string { return []string{fmt.Sprintf("%s: %v (%T) is no %s %s", at, v, v, st.Meta, st.JSON)} }
	switch st.Meta {
	case "enum":
		if text, ok := v.(string); !ok || !slices.Contains(st.Values, text) {
			return bad()
		}
	case "array":
		list, ok := v.([]any)
		if !ok {
			return bad()
		}
		for i, e := range list {
			problems = append(problems, s.conforms(fmt.Sprintf("%s[%d]", at, i), e, st.Element)...)
		}
	case "alternate":
		for _, m := range st.Members {
			if len(s.conforms(at, v, m.Type)) == 0 {
				return nil
			}
		}
		return bad()
	case "object":
		o, ok := v.(map[string]any)
		if !ok {
			return bad()
		}
		members := st.Members
		if tag, ok := o[st.Tag].(string); ok {
			members = append(slices.Clone(members), s.variant(st, tag)...)
		}
		for key, value := range o {
			if m := member(members, key); m == nil {
				problems = append(problems, at+": no member is called "+key)
			} else {
				problems = append(problems, s.conforms(at+"."+key, value, m.Type)...)
			}
		}
		for _, m := range members {
			if _, there := o[m.Name]; !there && !m.Optional {
				problems = append(problems, at+": member "+m.Name+" is missing")
			}
		}
	default:
		ok := false
		switch v := v.(type) {
		case string:
			ok = st.JSON == "string"
		case bool:
			ok = st.JSON == "boolean"
		case json.Number:
			ok = st.JSON == "number" || st.JSON == "int" && !strings.ContainsAny(v.String(), ".eE")
		case nil:
			ok = st.JSON == "null"
		}
		if !ok && st.JSON != "value" {
			return bad()
		}
	}
	return problems
}

// TestRepliesFitQEMUsSchema holds what our queries return, and their own
// replies by way of control, against QEMU's schema.
func TestRepliesFitQEMUsSchema(t *testing.T) {
	o := everything(t, "blk op=seqwrite bs=4k count=10 spin")
	o.waitCounting(t, 0)
	q := startQEMU(t, "q35", "spin")
	s := readSchema(t, q)
	compared := 0
	for name, p := range map[string]peer{"ours": o.peer, "QEMU's": q} {
		commands, err := o.Commands(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, command := range commands {
			if !strings.HasPrefix(command, "query-") || s[command] == nil || p.path == q.path && command == "query-balloon" {
				continue
			}
			request, err := json.Marshal(map[string]any{"execute": command, "arguments": argumentsOrNone(queryArguments[command])})
			if err != nil {
				t.Fatal(err)
			}
			reply, err := p.ExecuteRaw(t.Context(), request)
			if err != nil {
				t.Errorf("%s %s: %v", name, command, err)
				continue
			}
			compared++
			for _, problem := range s.conforms(name+" "+command, decode(t, reply), s[command].RetType) {
				t.Error(problem)
			}
		}
	}
	if compared < 50 {
		t.Errorf("only %d replies compared", compared)
	}
}

func argumentsOrNone(a map[string]any) map[string]any {
	if a == nil {
		return map[string]any{}
	}
	return a
}

// TestDomain uses go-qemu's Domain on its own client, on us and on QEMU.
func TestDomain(t *testing.T) {
	const guest = "blk op=seqwrite bs=4k count=20 wait for=go"
	q := startQEMU(t, "q35", guest,
		"-drive", "file="+image(t, 1<<20)+",format=raw,if=none,id=disk0", "-device", "virtio-blk-pci,drive=disk0")
	q.do(t, "cont", nil, nil)
	o := start(t, guest, func(c *vmm.Config) { c.Disks = []vmm.Disk{{Node: openImage(t, 1<<20)}} })
	for name, p := range map[string]peer{"qemu": q, "gnomon": o.peer} {
		t.Run(name, func(t *testing.T) {
			p.serial.waitFor(t, "for=go")
			// QEMU serves one session of a socket at a time.
			p.Close()
			m := domainMonitor(t, p.path)
			d, err := qemu.NewDomain(m, "test")
			if err != nil {
				t.Fatal(err)
			}
			defer d.Close()
			checkDomain(t, d, name == "gnomon")
		})
	}
}

// domainMonitor connects go-qemu's own client. It hands out a buffer that it
// goes on reading into, so that the race detector must be shown ours.
func domainMonitor(t *testing.T, path string) goqmp.Monitor {
	t.Helper()
	if raceDetector {
		return dial(t, path, nil)
	}
	m, err := goqmp.NewSocketMonitor("unix", path, guard)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Connect(); err != nil {
		t.Fatal(err)
	}
	return m
}

// checkDomain calls every method that there is something for. The guest has
// written 20 blocks.
func checkDomain(t *testing.T, d *qemu.Domain, ours bool) {
	if v, err := d.Version(); err != nil || !strings.HasPrefix(v, "7.2.") {
		t.Errorf("Version: %q, %v", v, err)
	}
	if v, err := d.PackageVersion(); err != nil || v == "" {
		t.Errorf("PackageVersion: %q, %v", v, err)
	}
	if s, err := d.Status(); err != nil || s != qemu.StatusRunning {
		t.Errorf("Status: %v, %v", s, err)
	}
	if all, err := d.Commands(); err != nil || !slices.Contains(all, "query-block") {
		t.Errorf("Commands: %v, %v", all, err)
	}
	for command, want := range map[string]bool{"stop": true, "no-such-command": false} {
		if ok, err := d.Supported(command); err != nil || ok != want {
			t.Errorf("Supported(%s): %v, %v", command, ok, err)
		}
	}
	disks, err := d.BlockDevices()
	if err != nil || len(disks) != 1 {
		t.Fatalf("BlockDevices: %+v, %v", disks, err)
	}
	if b := disks[0]; b.Device != "disk0" || b.Inserted.Driver != "raw" || b.Inserted.ReadOnly || b.IOStatus != "ok" ||
		b.Inserted.NodeName == "" || b.Inserted.Image.VirtualSize != 1<<20 || !b.Inserted.Cache.Writeback {
		t.Errorf("BlockDevices: %+v", b)
	}
	if b, err := d.BlockDevice("disk0"); err != nil || !cmp.Equal(b, disks[0]) {
		t.Errorf("BlockDevice: %+v, %v", b, err)
	}
	if _, err := d.BlockDevice("disk1"); err != qemu.ErrBlockDeviceNotFound {
		t.Errorf("BlockDevice of none: %v", err)
	}
	stats, err := d.BlockStats()
	if err != nil || len(stats) != 1 || stats[0].Device != "disk0" || stats[0].WriteOperations != 20 || stats[0].WriteBytes != 20*4096 {
		t.Errorf("BlockStats: %+v, %v", stats, err)
	}
	if jobs, err := d.BlockJobs(); err != nil || len(jobs) != 0 {
		t.Errorf("BlockJobs: %+v, %v", jobs, err)
	}
	pci, err := d.PCIDevices()
	if err != nil || len(pci) < 2 || pci[0].ClassInfo.Desc != "Host bridge" || pci[0].ID.Vendor != 0x8086 ||
		!slices.ContainsFunc(pci, func(p qemu.PCIDevice) bool { return p.ClassInfo.Desc == "SCSI controller" && len(p.Regions) > 0 }) {
		t.Errorf("PCIDevices: %+v, %v", pci, err)
	}
	// query-cpus went from QEMU in 6.0.
	if cpus, err := d.CPUs(); ours && (err != nil || len(cpus) != 1 || cpus[0].PC == 0) || !ours && err == nil {
		t.Errorf("CPUs: %+v, %v", cpus, err)
	}
	// There is no screen.
	if r, err := d.ScreenDump(); err == nil {
		r.Close()
		t.Error("ScreenDump succeeded")
	}
	events, done, err := d.Events()
	if err != nil {
		t.Fatal(err)
	}
	defer close(done)
	for _, step := range []struct {
		do    func() error
		event string
	}{{d.SystemReset, "RESET"}, {d.SystemPowerdown, "POWERDOWN"}} {
		if err := step.do(); err != nil {
			t.Error(err)
		}
		select {
		case e := <-events:
			if e.Event != step.event {
				t.Errorf("event %+v, want %s", e, step.event)
			}
		case <-time.After(guard):
			t.Fatalf("no event %s", step.event)
		}
	}
}
