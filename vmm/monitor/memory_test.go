package monitor_test

import (
	"bytes"
	"encoding/binary"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/qmp"
	"github.com/gnomon-vmm/gnomon/tests/guest/probe"
	"github.com/gnomon-vmm/gnomon/vmm"
)

const mailboxCounter = probe.MailboxAddr + probe.MailboxCounter

// save runs memsave or pmemsave and returns what was saved.
func (o *ours) save(t *testing.T, command string, addr, size uint64) []byte {
	t.Helper()
	path := filepath.Join(t.TempDir(), "saved")
	o.do(t, command, map[string]any{"val": addr, "size": size, "filename": path}, nil)
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode() != 0o600 {
		t.Errorf("mode %v", info.Mode())
	}
	p, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestPhysicalMemory(t *testing.T) {
	o := start(t, "spin", nil)
	o.waitCounting(t, 0)
	o.do(t, "stop", nil, nil)
	first := o.save(t, "pmemsave", probe.MailboxAddr, 16)
	if got := binary.LittleEndian.Uint64(first); got != probe.Magic {
		t.Errorf("magic %#x", got)
	}
	if got, want := binary.LittleEndian.Uint64(first[8:]), o.counter(t); got != want {
		t.Errorf("counter %d, want %d", got, want)
	}
	if !bytes.Equal(first, o.save(t, "pmemsave", probe.MailboxAddr, 16)) {
		t.Error("the memory of a stopped guest changed")
	}
	before := o.counter(t)
	o.do(t, "cont", nil, nil)
	o.waitCounting(t, before)
	if bytes.Equal(first, o.save(t, "pmemsave", probe.MailboxAddr, 16)) {
		t.Error("the memory of a running guest did not change")
	}
}

// Memory that the guest's page tables scatter comes out in virtual order, from
// and to the middle of pages.
func TestVirtualMemory(t *testing.T) {
	const size, seed = 3 << 20, 7
	o := start(t, "map size=3M fill seed=7 wait for=go", nil)
	va, err := o.serial.waitFor(t, "for=go").Number("map", "va")
	if err != nil {
		t.Fatal(err)
	}
	want := make([]byte, size)
	probe.Pattern(want, seed, 0)
	for _, r := range []struct{ from, to uint64 }{{0, size}, {100, 5000}, {4095, 4097}, {1 << 20, 1<<20 + 8}, {5, 5}} {
		if !bytes.Equal(o.save(t, "memsave", va+r.from, r.to-r.from), want[r.from:r.to]) {
			t.Errorf("bytes %d to %d are not what the guest wrote there", r.from, r.to)
		}
	}
}

// Reading what the guest never touched allocates nothing.
func TestSavingAllocatesNoGuestMemory(t *testing.T) {
	o := start(t, "spin", nil)
	o.waitCounting(t, 0)
	o.do(t, "stop", nil, nil)
	blocks := func() int64 {
		var st unix.Stat_t
		if err := unix.Fstat(o.m.Memory().FD(), &st); err != nil {
			t.Fatal(err)
		}
		return st.Blocks
	}
	before := blocks()
	if n := len(o.save(t, "pmemsave", 0, 64<<20)); n != 64<<20 {
		t.Errorf("%d bytes saved", n)
	}
	o.do(t, "dump-guest-memory", map[string]any{"paging": false, "protocol": "file:" + filepath.Join(t.TempDir(), "core")}, nil)
	if after := blocks(); after != before {
		t.Errorf("guest memory has %d blocks, %d before", after, before)
	}
}

// What cannot be saved is refused before a file is touched.
func TestSavingRefuses(t *testing.T) {
	o := start(t, "spin", func(c *vmm.Config) { c.CPUs = 2 })
	o.waitCounting(t, 0)
	path := filepath.Join(t.TempDir(), "saved")
	if err := os.WriteFile(path, []byte("earlier"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		command string
		args    map[string]any
		want    string
	}{
		{"pmemsave", map[string]any{"val": 1 << 50, "size": 100}, "Invalid addr 0x0004000000000000/size 100 specified"},
		{"pmemsave", map[string]any{"val": 64<<20 - 4, "size": 5}, "Invalid addr 0x0000000003fffffc/size 5 specified"},
		{"pmemsave", map[string]any{"val": 0, "size": -1}, "Invalid addr 0x0000000000000000/size -1 specified"},
		{"pmemsave", map[string]any{"val": -4096, "size": 8192}, "Invalid addr 0xfffffffffffff000/size 8192 specified"},
		{"memsave", map[string]any{"val": 1 << 46, "size": 100}, "Invalid addr 0x0000400000000000/size 100 specified"},
		{"memsave", map[string]any{"val": probe.MailboxAddr, "size": 1 << 62}, "Invalid addr 0x0000000000100000/size 4611686018427387904 specified"},
		{"memsave", map[string]any{"val": -1, "size": 2}, "Invalid addr 0xffffffffffffffff/size 2 specified"},
		{"memsave", map[string]any{"val": 0, "size": -1}, "Invalid addr 0x0000000000000000/size -1 specified"},
		{"memsave", map[string]any{"val": 0, "size": 1, "cpu-index": 2}, "Parameter 'cpu-index' expects a CPU number"},
		{"memsave", map[string]any{"val": 0, "size": 1, "cpu-index": -1}, "Parameter 'cpu-index' expects a CPU number"},
	} {
		c.args["filename"] = path
		if got := o.refuse(t, c.command, c.args); got != (qmp.Error{Class: qmp.GenericError, Desc: c.want}) {
			t.Errorf("%s %v: %+v", c.command, c.args, got)
		}
		if b, err := os.ReadFile(path); err != nil || string(b) != "earlier" {
			t.Fatalf("%s %v touched the file: %q, %v", c.command, c.args, b, err)
		}
	}
	missing := filepath.Join(t.TempDir(), "no", "such")
	want := "Could not open '" + missing + "': No such file or directory"
	if got := o.refuse(t, "pmemsave", map[string]any{"val": 0, "size": 1, "filename": missing}); got.Desc != want {
		t.Errorf("%+v", got)
	}
	if s := o.status(t); s != "running" {
		t.Errorf("status %q", s)
	}
}

// smallDisk is a directory with room for 256 KiB.
func smallDisk(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=256k"); err != nil {
		t.Skipf("host feature missing: mounting a tmpfs (%v)", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// What could not be saved in full is removed; a device or a link stays.
func TestPartialFilesAreRemoved(t *testing.T) {
	o := start(t, "map size=2M fill wait for=go", nil)
	va, err := o.serial.waitFor(t, "for=go").Number("map", "va")
	if err != nil {
		t.Fatal(err)
	}
	dir := smallDisk(t)
	path, link, target := filepath.Join(dir, "saved"), filepath.Join(dir, "link"), filepath.Join(dir, "target")
	if err := os.Symlink(target, link); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{path, link, "/dev/full"} {
		for _, c := range []struct {
			command string
			args    map[string]any
		}{
			{"pmemsave", map[string]any{"val": 0, "size": 64 << 20, "filename": name}},
			{"memsave", map[string]any{"val": va, "size": 2 << 20, "filename": name}},
			{"dump-guest-memory", map[string]any{"paging": false, "protocol": "file:" + name}},
		} {
			if got := o.refuse(t, c.command, c.args); !strings.Contains(got.Desc, "No space left on device") {
				t.Errorf("%s to %s: %+v", c.command, name, got)
			}
			os.Remove(target)
		}
	}
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Error("a partial file is left")
	}
	if info, err := os.Lstat(link); err != nil || info.Mode()&fs.ModeSymlink == 0 {
		t.Errorf("the link is gone: %v", err)
	}
	if _, err := os.Stat("/dev/full"); err != nil {
		t.Error(err)
	}
	if s := o.status(t); s != "running" {
		t.Errorf("status %q", s)
	}
}
