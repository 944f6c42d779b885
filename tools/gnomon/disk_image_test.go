package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/gnomon-vmm/gnomon/disk"
	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/changes"
	"github.com/gnomon-vmm/gnomon/disk/extfs/extfstest"
)

// gnomonDisk runs gnomon disk, and returns what it says and its exit status.
func gnomonDisk(t *testing.T, args ...string) (out, says string, status int) {
	t.Helper()
	root := newRootCommand()
	var stdout, stderr bytes.Buffer
	root.SetOut(&stdout)
	root.SetErr(&stderr)
	root.SetArgs(append([]string{"disk"}, args...))
	if err := root.ExecuteContext(t.Context()); err != nil {
		status = statusError
		var exit *exitStatus
		if errors.As(err, &exit) {
			status = exit.status
		}
		stderr.WriteString(oneLine(err))
	}
	return stdout.String(), stderr.String(), status
}

// works is gnomonDisk of what succeeds.
func works(t *testing.T, args ...string) string {
	t.Helper()
	out, says, status := gnomonDisk(t, args...)
	if status != statusOK {
		t.Fatalf("disk %v: status %d, %s", args, status, says)
	}
	return out
}

func byQEMU(t *testing.T, args ...string) (out string, status int) {
	t.Helper()
	cmd := exec.Command("qemu-img", args...)
	b, err := cmd.Output()
	if cmd.ProcessState == nil {
		t.Fatal("make deps installs it: ", err)
	}
	return string(b), cmd.ProcessState.ExitCode()
}

// patched changes bytes of a file.
func patched(t *testing.T, path string, at int64, b ...byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.WriteAt(b, at)
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
}

// gnomon disk check has qemu-img check's words and exit statuses.
func TestDiskCheck(t *testing.T) {
	dir := t.TempDir()
	source := filepath.Join(dir, "source.img")
	content := make([]byte, 1<<20)
	rand.NewChaCha8([32]byte{2}).Read(content)
	if err := os.WriteFile(source, content, 0o600); err != nil {
		t.Fatal(err)
	}
	const counts = 0x20000 // where such an image has its reference counts
	for _, tt := range []struct {
		name   string
		damage func(path string)
		status int
		says   string
	}{
		{"clean", func(string) {}, 0, "No errors were found"},
		{"leak", func(path string) {
			info, err := os.Stat(path)
			if err != nil {
				t.Fatal(err)
			}
			patched(t, path, counts+2*(info.Size()>>16), 0, 1)
			patched(t, path, info.Size(), make([]byte, 64<<10)...)
		}, statusLeaks, "1 leaked clusters"},
		{"damage", func(path string) { patched(t, path, counts+2*6, 0, 0) }, statusCorrupt, "errors were found"},
	} {
		path := filepath.Join(dir, tt.name+".qcow2")
		if out, status := byQEMU(t, "convert", "-O", "qcow2", source, path); status != 0 {
			t.Fatal(out)
		}
		tt.damage(path)
		out, _, status := gnomonDisk(t, "check", path)
		want, theirs := byQEMU(t, "check", path)
		if status != tt.status || theirs != status || !strings.Contains(out, tt.says) {
			t.Errorf("%s: status %d, qemu-img's is %d: %s", tt.name, status, theirs, out)
		}
		if tt.status != statusCorrupt && out != want { // QEMU counts some damage twice
			t.Errorf("%s: %q, qemu-img says %q", tt.name, out, want)
		}
		var ours, other map[string]any
		out, _, status = gnomonDisk(t, "check", "--output", "json", path)
		want, _ = byQEMU(t, "check", "--output=json", path)
		if err := errors.Join(json.Unmarshal([]byte(out), &ours), json.Unmarshal([]byte(want), &other)); err != nil || status != tt.status {
			t.Fatal(err)
		}
		delete(ours, "corruptions")
		delete(other, "corruptions")
		if !reflect.DeepEqual(ours, other) {
			t.Errorf("%s: %v, qemu-img says %v", tt.name, ours, other)
		}

		// Leaks are given back, and no more than leaks.
		if _, _, status := gnomonDisk(t, "check", "-r", "leaks", path); status == statusLeaks || (status == statusCorrupt) != (tt.status == statusCorrupt) {
			t.Errorf("%s: -r leaks: status %d", tt.name, status)
		}
		out, _, status = gnomonDisk(t, "check", "-r", "all", path)
		if status != 0 || tt.status == statusCorrupt && !strings.Contains(out, "found and repaired") {
			t.Errorf("%s: -r all: status %d: %s", tt.name, status, out)
		}
		if out, status := byQEMU(t, "check", path); status != 0 {
			t.Errorf("%s: repaired: status %d: %s", tt.name, status, out)
		}
		works(t, "compare", source, path)
	}
	for _, tt := range []struct {
		args   []string
		status int
		says   string
	}{
		{[]string{source}, statusUncheckable, "nothing to check"},
		{[]string{"-f", "qcow2", source}, statusError, "qcow2 header"},
		{[]string{filepath.Join(dir, "missing.qcow2")}, statusError, "does not exist"},
		{[]string{"-r", "some", source}, statusError, "leaks and all"},
		{[]string{"--speed", source}, statusError, "--speed"},
		{[]string{}, statusError, "1 arg"},
	} {
		if _, says, status := gnomonDisk(t, append([]string{"check"}, tt.args...)...); status != tt.status || !strings.Contains(says, tt.says) {
			t.Errorf("check %v: status %d: %s", tt.args, status, says)
		}
	}
}

func TestDiskResize(t *testing.T) {
	dir := t.TempDir()
	for _, format := range []string{"raw", "qcow2"} {
		path := filepath.Join(dir, "disk."+format)
		works(t, "create", path, "1M", "-f", format)
		size := func() int64 {
			n, err := disk.Open(path, disk.Options{Format: format, ReadOnly: true})
			if err != nil {
				t.Fatal(err)
			}
			defer n.Close()
			return n.Size()
		}
		for _, tt := range []struct {
			args   []string
			size   int64 // afterwards
			status int
		}{
			{[]string{"3M"}, 3 << 20, 0},
			{[]string{"+1M"}, 4 << 20, 0},
			{[]string{"2M"}, 4 << 20, statusUsage},
			{[]string{"--", "-1M"}, 4 << 20, statusUsage},
			{[]string{"--shrink", "--", "-1M"}, 3 << 20, 0},
			{[]string{"--shrink", "1000"}, 1024, 0},
			{[]string{"--shrink", "0"}, 1024, statusUsage},
			{[]string{"--shrink", "--", "-1M"}, 1024, statusUsage},
			{[]string{"+-1M"}, 1024, statusUsage},
			{[]string{"large"}, 1024, statusUsage},
			{[]string{"--preallocation", "some", "1M"}, 1024, statusUsage},
			{[]string{"--preallocation", "full", "1M"}, 1 << 20, 0},
		} {
			if _, says, status := gnomonDisk(t, append([]string{"resize", "-f", format, path}, tt.args...)...); status != tt.status || size() != tt.size {
				t.Errorf("%s: resize %v: status %d, %d bytes: %s", format, tt.args, status, size(), says)
			}
		}
		allocated := func(least int64) {
			n, err := disk.Open(path, disk.Options{Format: format, ReadOnly: true})
			if err != nil {
				t.Fatal(err)
			}
			defer n.Close()
			if got := n.Info().ActualSize; got < least {
				t.Errorf("%s: %d bytes are allocated", format, got)
			}
		}
		allocated(1<<20 - 64<<10)
		_, says, status := gnomonDisk(t, "resize", "-f", format, "--preallocation", "falloc", path, "+1M")
		if format == "qcow2" {
			if status != statusUsage || size() != 1<<20 {
				t.Errorf("falloc: status %d, %d bytes", status, size())
			}
			if out, status := byQEMU(t, "check", path); status != 0 {
				t.Errorf("status %d: %s", status, out)
			}
			continue
		}
		if status != 0 {
			t.Errorf("falloc: status %d: %s", status, says)
		}
		allocated(2<<20 - 64<<10)
	}
}

func TestDiskRebase(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	content := make([]byte, 1<<20)
	rand.NewChaCha8([32]byte{3}).Read(content[100_000:700_000])
	if err := os.WriteFile(at("base.img"), content, 0o600); err != nil {
		t.Fatal(err)
	}
	works(t, "create", at("mid.qcow2"), "-b", "base.img", "-F", "raw")
	works(t, "create", at("top.qcow2"), "-b", "mid.qcow2", "-F", "qcow2")
	for name, command := range map[string]string{"mid.qcow2": "write -P 1 50k 200k", "top.qcow2": "write -P 2 150k 200k"} {
		if out, err := exec.Command("qemu-io", "-c", command, "-c", "write -z 400k 100k", at(name)).CombinedOutput(); err != nil {
			t.Fatalf("qemu-io: %v\n%s", err, out)
		}
	}
	works(t, "convert", at("top.qcow2"), at("want.img"))
	whole := func(backing string) {
		t.Helper()
		if out, status := byQEMU(t, "compare", at("want.img"), at("top.qcow2")); status != 0 {
			t.Errorf("on %q: %s", backing, out)
		}
		if out, status := byQEMU(t, "check", at("top.qcow2")); status != 0 {
			t.Errorf("on %q: %s", backing, out)
		}
		out, _ := byQEMU(t, "info", "--output=json", at("top.qcow2"))
		var info struct {
			Backing string `json:"backing-filename"`
		}
		if err := json.Unmarshal([]byte(out), &info); err != nil || info.Backing != backing {
			t.Errorf("it lies on %q and not on %q: %v", info.Backing, backing, err)
		}
	}
	works(t, "rebase", at("top.qcow2"), "-b", "base.img", "-F", "raw")
	whole("base.img")
	if err := os.Rename(at("base.img"), at("moved.img")); err != nil {
		t.Fatal(err)
	}
	if _, says, status := gnomonDisk(t, "rebase", at("top.qcow2"), "-b", ""); status != statusError || !strings.Contains(says, "base.img") {
		t.Errorf("on what is gone: status %d: %s", status, says)
	}
	works(t, "rebase", "-u", at("top.qcow2"), "-b", "moved.img", "-F", "raw")
	whole("moved.img")
	for _, tt := range []struct {
		args   []string
		status int
		says   string
	}{
		{[]string{at("top.qcow2")}, statusUsage, "no -b"},
		{[]string{at("top.qcow2"), "-b", "moved.img"}, statusUsage, "-F"},
		{[]string{at("moved.img"), "-b", ""}, statusUsage, "only a qcow2"},
		{[]string{at("top.qcow2"), "-b", "top.qcow2", "-F", "qcow2"}, statusError, "loop"},
		{[]string{at("top.qcow2"), "-b", "missing", "-F", "raw"}, statusError, "does not exist"},
	} {
		if _, says, status := gnomonDisk(t, append([]string{"rebase"}, tt.args...)...); status != tt.status || !strings.Contains(says, tt.says) {
			t.Errorf("rebase %v: status %d: %s", tt.args, status, says)
		}
		whole("moved.img")
	}
	works(t, "rebase", at("top.qcow2"), "-b", "")
	whole("")
}

func TestDiskCommit(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	names := []string{"base.qcow2", "mid.qcow2", "top.qcow2"}
	works(t, "create", at(names[0]), "1M")
	for i, name := range names[1:] {
		works(t, "create", at(name), "-b", names[i], "-F", "qcow2")
	}
	for i, name := range names {
		if out, err := exec.Command("qemu-io", "-c", fmt.Sprintf("write -P %d %dk 200k", i+1, i*100), at(name)).CombinedOutput(); err != nil {
			t.Fatalf("qemu-io: %v\n%s", err, out)
		}
	}
	works(t, "convert", at("top.qcow2"), at("want.img"))
	same := func(name string) {
		t.Helper()
		if out, status := byQEMU(t, "compare", at("want.img"), at(name)); status != 0 {
			t.Errorf("%s: %s", name, out)
		}
		if out, status := byQEMU(t, "check", at(name)); status != 0 {
			t.Errorf("%s: %s", name, out)
		}
	}
	holds := func() (clusters int) {
		t.Helper()
		out, _ := byQEMU(t, "map", "--output=json", at("top.qcow2"))
		return strings.Count(out, `"depth": 0`)
	}
	for _, tt := range []struct {
		args   []string
		status int
		says   string
	}{
		{[]string{at("nothing.qcow2")}, statusError, "check the path"},
		{[]string{at("base.qcow2")}, statusError, "lies on none"},
		{[]string{at("top.qcow2"), "-b", at("want.img")}, statusError, "does not lie on"},
		{[]string{at("top.qcow2"), "-b", ""}, statusUsage, "-b"},
		{[]string{at("want.img"), "-f", "raw"}, statusUsage, "only a qcow2"},
	} {
		if _, says, status := gnomonDisk(t, append([]string{"commit"}, tt.args...)...); status != tt.status || !strings.Contains(says, tt.says) {
			t.Errorf("commit %v: status %d: %s", tt.args, status, says)
		}
	}
	held := holds()
	out, says, status := gnomonDisk(t, "commit", "-b", at("base.qcow2"), at("top.qcow2"))
	if status != 0 || out != "Image committed.\n" || !strings.Contains(says, at("mid.qcow2")+" is not what it was") || strings.Count(says, "\n") != 1 {
		t.Errorf("commit -b: status %d: %q, %q", status, out, says)
	}
	same("base.qcow2")
	same("top.qcow2")
	if now := holds(); now != held || held == 0 {
		t.Errorf("commit -b: it held %d extents and holds %d", held, now)
	}
	works(t, "commit", "-d", at("top.qcow2"))
	if now := holds(); now != held {
		t.Errorf("commit -d: it held %d extents and holds %d", held, now)
	}
	if _, says, _ := gnomonDisk(t, "commit", at("top.qcow2")); says != "" || holds() != 0 {
		t.Errorf("commit: it holds %d extents; %q", holds(), says)
	}
	same("mid.qcow2")
	same("top.qcow2")
}

// A copy of a disk is brought up to date again and again; what the file system uses
// is the same then, and no more is copied than changed.
func TestDiskSync(t *testing.T) {
	const size = 12 << 20
	source := extfstest.Make(t, size, "-t", "ext4", "-O", extfstest.Modern)
	target := filepath.Join(t.TempDir(), "copy.qcow2")
	sync := func(args ...string) (r syncReport) {
		t.Helper()
		out := works(t, append([]string{"sync", source, target, "-F", "qcow2", "--output", "json"}, args...)...)
		if err := json.Unmarshal([]byte(out), &r); err != nil {
			t.Fatal(err)
		}
		return r
	}
	if _, says, status := gnomonDisk(t, "sync", source, target, "-a", "copy"); status != statusError || !strings.Contains(says, "not recorded") {
		t.Errorf("status %d: %s", status, says)
	}
	if _, err := os.Stat(target); err == nil {
		t.Error("a target was made for nothing")
	}

	// write changes the source as a machine with changes=on does.
	write := func(content []byte) (changed int64) {
		t.Helper()
		n, err := disk.Open(source, disk.Options{Format: disk.FormatRaw})
		if err != nil {
			t.Fatal(err)
		}
		r, err := changes.Open(changes.Path(source), n, changes.Options{BlockSize: 4096})
		if err != nil {
			t.Fatal(err)
		}
		root := block.NewRoot(n)
		root.SetRecorders([]block.Recorder{r})
		was := make([]byte, 4096)
		for off := int64(0); off < int64(len(content)); off += 4096 {
			if err := root.Readv([][]byte{was}, off); err != nil {
				t.Fatal(err)
			}
			if part := content[off:][:4096]; !bytes.Equal(was, part) {
				changed += 4096
				if err := root.Writev([][]byte{part}, off); err != nil {
					t.Fatal(err)
				}
			}
		}
		if err := changes.CloseWith(root, r).Close(); err != nil {
			t.Fatal(err)
		}
		return changed
	}
	// edited is the source with a file system that debugfs changed.
	edited := func(change func(path string)) []byte {
		t.Helper()
		b, err := os.ReadFile(source)
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(t.TempDir(), "edited")
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		change(path)
		if b, err = os.ReadFile(path); err != nil {
			t.Fatal(err)
		}
		return b
	}
	same := func() {
		t.Helper()
		whole := filepath.Join(t.TempDir(), "whole.img")
		works(t, "convert", target, whole)
		extfstest.Run(t, "", "e2fsck", "-f", "-n", source)
		extfstest.Run(t, "", "e2fsck", "-f", "-n", whole)
		got, err := os.ReadFile(whole)
		if err != nil {
			t.Fatal(err)
		}
		want, err := os.ReadFile(source)
		if err != nil {
			t.Fatal(err)
		}
		for _, free := range extfstest.Free(t, source) {
			clear(got[free.Start:free.End])
			clear(want[free.Start:free.End])
		}
		if !bytes.Equal(got, want) {
			t.Error("what is used is not the same")
		}
	}
	add := func(name string) func(string) {
		return func(path string) {
			file := filepath.Join(t.TempDir(), name)
			content := make([]byte, 1<<20+123)
			rand.NewChaCha8([32]byte([]byte(name + strings.Repeat(" ", 32))[:32])).Read(content)
			if err := os.WriteFile(file, content, 0o600); err != nil {
				t.Fatal(err)
			}
			extfstest.Run(t, "write "+file+" "+name+"\n", "debugfs", "-w", "-f", "-", path)
		}
	}
	remove := func(name string) func(string) {
		return func(path string) { extfstest.Run(t, "rm "+name+"\n", "debugfs", "-w", "-f", "-", path) }
	}
	write(edited(func(path string) { extfstest.Populate(t, path, 20, 200<<10, 1) }))
	if r := sync("-a", "copy"); !r.All || r.Changed != size || r.Copied+r.Skipped != size || r.Skipped == 0 {
		t.Errorf("the first: %+v", r)
	}
	same()
	if r := sync("-a", "copy"); r.All || r.Copied != 0 || r.Changed == 0 { // what was left out
		t.Errorf("nothing changed: %+v", r)
	}
	skipped := int64(size)
	for i, change := range []func(string){add("one"), remove("one"), add("two"), add("three"), remove("two"), add("four")} {
		changed := write(edited(change))
		r := sync("-a", "copy")
		// What was left out before may be used now; blocks that lie across are whole.
		if r.All || r.Copied == 0 || r.Copied > changed+skipped || r.Changed > changed+skipped {
			t.Errorf("change %d of %d bytes, %d were left out before: %+v", i, changed, skipped, r)
		}
		skipped = r.Skipped
		same()
	}

	// A target that is not what the application synced last is synced as a whole.
	if err := os.Remove(target); err != nil {
		t.Fatal(err)
	}
	if r := sync("-a", "copy"); !r.All || r.Reason == "" {
		t.Errorf("a target that is gone: %+v", r)
	}
	same()
	for _, state := range []string{"", "{}", `{"version":1,"skipped":[[5,3]]}`} {
		if err := os.WriteFile(target+".sync", []byte(state), 0o600); err != nil {
			t.Fatal(err)
		}
		if r := sync("-a", "copy"); !r.All {
			t.Errorf("%q: %+v", state, r)
		}
	}
	same()
	if r := sync(); !r.All || r.Copied != r.Used {
		t.Errorf("without an application: %+v", r)
	}
	same()
}

// Scripts that use qemu-img's options for how a command works and what it says can use
// gnomon disk.
func TestDiskManner(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	content := make([]byte, 3<<20)
	rand.NewChaCha8([32]byte{7}).Read(content[1<<20:])
	if err := os.WriteFile(at("disk.img"), content, 0o600); err != nil {
		t.Fatal(err)
	}
	same := func(name string) {
		t.Helper()
		if out, status := byQEMU(t, "compare", "-f", "raw", at("disk.img"), at(name)); status != 0 {
			t.Errorf("%s: %s", name, out)
		}
	}
	works(t, "create", "-q", "-u", "-b", "later.img", "-F", "raw", at("top.qcow2"), "3M")
	works(t, "create", "--cluster-size", "4K", at("old.qcow2"), "3M")
	if out, err := exec.Command("qemu-io", "-c", "write -P 9 0 2M", at("old.qcow2")).CombinedOutput(); err != nil {
		t.Fatalf("qemu-io: %v\n%s", err, out)
	}
	for _, tt := range []struct {
		args string
		says string // of the progress
	}{
		{"convert -q -p -m 3 -W -t none -T none disk.img later.img", ""},
		{"convert -p --cluster-size 512 -r 1G disk.img fine.qcow2", "converting"},
		{"convert -n disk.img old.qcow2", ""},
		{"resize -q fine.qcow2 3M", ""},
		{"check -q fine.qcow2", ""},
		{"commit -q -t writethrough top.qcow2", ""},
		{"commit -q -p -t none -r 1G top.qcow2", ""},
		{"compare -q -T none disk.img fine.qcow2", ""},
		{"compare -q -p disk.img later.img", ""},
		{"rebase -q -t none -b old.qcow2 -F qcow2 top.qcow2", ""},
		{"rebase -p -b fine.qcow2 -F qcow2 top.qcow2", "rebasing"},
	} {
		args := strings.Fields(tt.args)
		for i, a := range args {
			if strings.Contains(a, ".") && args[i-1] != "-b" {
				args[i] = at(a)
			}
		}
		out, says, status := gnomonDisk(t, args...)
		if status != 0 || out != "" || !strings.Contains(says, tt.says) || tt.says == "" && says != "" {
			t.Errorf("%s: status %d, %q, %q", tt.args, status, out, says)
		}
	}
	for _, name := range []string{"later.img", "fine.qcow2", "old.qcow2", "top.qcow2"} {
		same(name)
	}
	if out := works(t, "info", at("fine.qcow2")); !strings.Contains(out, "cluster_size: 512\n") {
		t.Error(out)
	}
	if _, says, status := gnomonDisk(t, "compare", "-q", at("disk.img"), at("top.qcow2")); status != 0 || says != "" {
		t.Errorf("status %d: %s", status, says)
	}

	// A part of a map.
	for _, part := range [][2]string{{"0", "3M"}, {"1M", "1M"}, {"1048577", "70000"}, {"2M", "9M"}} {
		out := works(t, "map", "--output", "json", "-s", part[0], "-l", part[1], at("fine.qcow2"))
		want, _ := byQEMU(t, "map", "--output=json", "-s", part[0], "-l", part[1], at("fine.qcow2"))
		var ours, theirs []map[string]any
		err := errors.Join(json.Unmarshal([]byte(out), &ours), json.Unmarshal([]byte(want), &theirs))
		for _, e := range ours {
			delete(e, "compressed") // QEMU 7.2 does not tell
		}
		if err != nil || !reflect.DeepEqual(ours, theirs) {
			t.Errorf("map from %s, %s: %v: %s, qemu-img says %s", part[0], part[1], err, out, want)
		}
	}

	if out := works(t, "map", "--output", "json", "-s", "4M", at("fine.qcow2")); out != "[]\n" {
		t.Errorf("map behind the end: %q", out)
	}

	for _, tt := range []struct{ args, says string }{
		{"convert -n --cluster-size 4K disk.img old.qcow2", "has its own"},
		{"convert --target-is-zero disk.img new.qcow2", "without -n"},
		{"convert -m 17 disk.img new.qcow2", "1 to 16"},
		{"convert -T often disk.img new.qcow2", "writethrough"},
		{"convert -r none disk.img new.qcow2", "bytes a second"},
		{"commit -r 0 top.qcow2", "bytes a second"},
		{"commit -t often top.qcow2", "writethrough"},
		{"rebase -t often -b fine.qcow2 -F qcow2 top.qcow2", "writethrough"},
		{"create -u -b later.img -F raw new.qcow2", "no SIZE"},
		{"map -s x fine.qcow2", "--start-offset"},
		{"map -l x fine.qcow2", "--max-length"},
	} {
		args := strings.Fields(tt.args)
		for i, a := range args {
			if strings.Contains(a, ".") {
				args[i] = at(a)
			}
		}
		if _, says, status := gnomonDisk(t, args...); status != statusUsage || !strings.Contains(says, tt.says) {
			t.Errorf("%s: status %d: %s", tt.args, status, says)
		}
	}
	// What was there is not removed when it cannot be converted into.
	if _, says, status := gnomonDisk(t, "convert", "-n", at("disk.img"), at("small.qcow2")); status != statusError || !strings.Contains(says, "does not exist") {
		t.Errorf("status %d: %s", status, says)
	}
	works(t, "create", at("small.qcow2"), "1M")
	if _, says, status := gnomonDisk(t, "convert", "-n", at("disk.img"), at("small.qcow2")); status != statusError || !strings.Contains(says, "bytes") {
		t.Errorf("status %d: %s", status, says)
	}
	works(t, "check", at("small.qcow2"))
}
