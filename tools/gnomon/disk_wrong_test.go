package main

import (
	"encoding/json"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// What a user is told helps, and does no harm; what cannot have been meant ends with status
// 2, before anything is opened.
func TestDiskAdvice(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	works(t, "create", "base.img", "1M")
	works(t, "create", "top.qcow2", "-b", "base.img", "-F", "raw")
	works(t, "create", "orphan.qcow2", "1M", "-u", "-b", "gone.img", "-F", "raw")
	works(t, "create", "a.qcow2", "1M")
	works(t, "create", "b.qcow2", "-b", "a.qcow2", "-F", "qcow2")
	works(t, "create", "above.qcow2", "-b", "orphan.qcow2", "-F", "qcow2", "-u", "1M")
	for _, args := range [][]string{
		{"rebase", "-u", "-f", "qcow2", "-b", "b.qcow2", "-F", "qcow2", "a.qcow2"}, // a loop
		{"create", "-q", "-f", "qcow2", "-o", "extended_l2=on", "parts.qcow2", "1M"},
		{"create", "-q", "-f", "qcow2", "-o", "extended_l2=on", "-b", "base.img", "-F", "raw", "parts-above.qcow2"},
	} {
		if out, err := exec.Command("qemu-img", args...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", args, out)
		}
	}
	works(t, "create", "on-parts.qcow2", "-b", "parts.qcow2", "-F", "qcow2")
	if err := os.Link("base.img", "link.img"); err != nil {
		t.Fatal(err)
	}
	const loop, gone, same = "the chain is a loop", "bring it back", "the same disk"
	for _, tt := range []struct {
		args   string
		status int
		says   string
	}{
		{"info --backing-chain orphan.qcow2", 1, gone},
		{"map orphan.qcow2", 1, gone},
		{"convert orphan.qcow2 x", 1, gone},
		{"commit orphan.qcow2", 1, gone},
		{"commit -b gone.img above.qcow2", 1, "gone.img"},
		{"resize orphan.qcow2 2M", 1, gone},
		{"rebase --backing= orphan.qcow2", 1, gone},
		{"convert - x", 1, "disk - does not exist: check the path"},
		{"info ", 1, "is empty"},
		{"info --backing-chain a.qcow2", 1, loop},
		{"resize a.qcow2 2M", 1, loop},
		{"commit a.qcow2", 1, loop},
		{"commit -d a.qcow2", 1, loop},
		{"rebase --backing= a.qcow2", 1, loop},
		{"sync base.img base.img", 1, same},
		{"sync base.img link.img", 1, same},
		{"convert -n base.img link.img", 1, same},
		{"sync top.qcow2 base.img", 1, "lies on base.img"},
		{"commit on-parts.qcow2", 1, "subclusters"},
		{"commit parts-above.qcow2", 1, "with -d it is committed"},
		{"create base.img 1M", 1, "remove it, or choose another name"},
		{"create top.qcow2 1M", 1, "remove it, or choose another name"},
		{"info -f vmdk nothing", 2, "raw and qcow2"},
		{"convert -f luks nothing x", 2, "raw and qcow2"},
		{"convert -O luks nothing x", 2, "raw and qcow2"},
		{"resize -f vmdk nothing 1M", 2, "raw and qcow2"},
		{"check -f vmdk nothing", 1, "raw and qcow2"}, // where 2 is damage
		{"create --cluster-size 256 x.qcow2 1M", 2, "powers of two"},
		{"create --cluster-size 1000 x.qcow2 1M", 2, "powers of two"},
		{"convert --cluster-size 4M nothing x.qcow2", 2, "powers of two"},
		{"serve nothing --listen foo", 2, "HOST:PORT"},
		{"serve nothing --listen unix:", 2, "path is missing"},
		{"serve nothing --listen localhost:99999", 2, "HOST:PORT"},
	} {
		_, says, status := gnomonDisk(t, strings.Split(tt.args, " ")...)
		if status != tt.status || !strings.Contains(says, tt.says) {
			t.Errorf("%s: status %d: %s", tt.args, status, says)
		}
		if strings.Contains(says, "truncate") || strings.Contains(says, "another process") || tt.says == "subclusters" && strings.Contains(says, "-d") {
			t.Errorf("%s: wrong advice: %s", tt.args, says)
		}
	}
	works(t, "commit", "-d", "parts-above.qcow2")
}

// An image's own description needs no other image, and is QEMU's; it has no control
// characters.
func TestDiskInfo(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	if err := os.Mkdir("below", 0o700); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"-u", "-b", "gone.img", "-F", "raw", "below/gone.qcow2", "1536"},
		{"-u", "-b", "json:{}", "-F", "raw", "json.qcow2", "100M"},
		{"-u", "-b", "./loop.qcow2", "-F", "qcow2", "loop.qcow2", "1000G"},
		{"large.qcow2", "64T"},
	} {
		if out, err := exec.Command("qemu-img", append([]string{"create", "-q", "-f", "qcow2"}, args...)...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", args, out)
		}
	}
	for _, name := range []string{"below/gone.qcow2", "json.qcow2", "loop.qcow2", "large.qcow2"} {
		var ours, theirs map[string]any
		want, status := byQEMU(t, "info", "--output=json", name)
		if err := json.Unmarshal([]byte(want), &theirs); err != nil || status != 0 {
			t.Fatal(err)
		}
		if err := json.Unmarshal([]byte(works(t, "info", "--output", "json", name)), &ours); err != nil {
			t.Fatal(err)
		}
		for key, value := range ours {
			if value != theirs[key] && name != "json.qcow2" {
				t.Errorf("%s: %s is %v, and %v", name, key, value, theirs[key])
			}
		}
		if ours["backing-filename"] != theirs["backing-filename"] {
			t.Errorf("%s: it lies on %v, and on %v", name, ours["backing-filename"], theirs["backing-filename"])
		}
		want, _ = byQEMU(t, "info", name)
		text := strings.Join(strings.Fields(works(t, "info", name)), " ")
		for _, line := range strings.Split(want, "\n") {
			if strings.HasPrefix(line, "virtual size") || strings.HasPrefix(line, "backing file:") && name == "below/gone.qcow2" {
				if !strings.Contains(text, line) {
					t.Errorf("%s: no %q in %q", name, line, text)
				}
			}
		}
	}
	works(t, "create", "x\n\x1b[31m.img", "1M")
	if out := works(t, "info", "x\n\x1b[31m.img"); strings.ContainsRune(out, 0x1b) || strings.Count(out, "\n") != 4 {
		t.Errorf("%q", out)
	}
}

// Disks of no bytes are made, copied and grown.
func TestDiskOfNoBytes(t *testing.T) {
	t.Chdir(t.TempDir())
	works(t, "create", "empty.qcow2", "0")
	works(t, "convert", "empty.qcow2", "empty.img")
	works(t, "convert", "empty.img", "copy.qcow2")
	works(t, "create", "top.qcow2", "-b", "empty.qcow2", "-F", "qcow2")
	works(t, "compare", "copy.qcow2", "empty.img")
	works(t, "commit", "top.qcow2")
	works(t, "resize", "top.qcow2", "1.5M")
	works(t, "rebase", "top.qcow2", "-b", "")
	for _, name := range []string{"empty.qcow2", "copy.qcow2", "top.qcow2"} {
		works(t, "check", name)
		if out, status := byQEMU(t, "check", name); status != 0 {
			t.Errorf("%s: %s", name, out)
		}
	}
	for _, format := range []string{"raw", "qcow2"} {
		into := filepath.Join(t.TempDir(), format)
		for _, args := range [][]string{
			{"backup", "empty.img", "--into", into, "--format", format},
			{"backup", "restore", into, format + ".img"},
		} {
			root := newRootCommand()
			root.SetArgs(args)
			root.SetOut(io.Discard)
			if err := root.ExecuteContext(t.Context()); err != nil {
				t.Errorf("%v: %v", args, err)
			}
		}
		if info, err := os.Stat(format + ".img"); err != nil || info.Size() != 0 {
			t.Errorf("restored: %v", err)
		}
	}
}
