package tests

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/gnomon-vmm/gnomon/tests/guest/probe"
)

// The commands on images agree with qemu-img's of the same name.
func TestDiskCommands(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	content := make([]byte, 5<<20)
	rand.NewChaCha8([32]byte{1}).Read(content[1<<20 : 3<<20])
	if err := os.WriteFile(at("a.img"), content, 0o600); err != nil {
		t.Fatal(err)
	}
	command(ctx, t, "disk", "convert", at("a.img"), at("a.qcow2"))
	qemuImg(ctx, t, "compare", at("a.img"), at("a.qcow2"))
	qemuImg(ctx, t, "check", at("a.qcow2"))
	if out := command(ctx, t, "disk", "compare", at("a.img"), at("a.qcow2")); out != "Images are identical.\n" {
		t.Errorf("compare: %q", out)
	}

	command(ctx, t, "disk", "create", "-b", "a.qcow2", "-F", "qcow2", at("b.qcow2"))
	if out, err := exec.CommandContext(ctx, "qemu-io", "-c", "write -P 7 100k 70k", at("b.qcow2")).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	qemuImg(ctx, t, "convert", "-O", "qcow2", "-c", at("b.qcow2"), at("c.qcow2"))
	for _, image := range []string{"a.qcow2", "b.qcow2", "c.qcow2"} {
		var ours, theirs []map[string]any
		if err := json.Unmarshal([]byte(command(ctx, t, "disk", "map", "--output", "json", at(image))), &ours); err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal([]byte(qemuImg(ctx, t, "map", "--output=json", at(image))), &theirs); err != nil {
			t.Fatal(err)
		}
		for _, e := range ours {
			delete(e, "compressed") // newer QEMU's
		}
		if !reflect.DeepEqual(ours, theirs) {
			t.Errorf("%s: map\n%v, qemu-img\n%v", image, ours, theirs)
		}
		var info, want map[string]any
		if err := json.Unmarshal([]byte(command(ctx, t, "disk", "info", "--output", "json", at(image))), &info); err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal([]byte(qemuImg(ctx, t, "info", "--output=json", at(image))), &want); err != nil {
			t.Fatal(err)
		}
		for _, key := range []string{"format", "virtual-size", "actual-size", "cluster-size", "dirty-flag", "backing-filename-format"} {
			if !reflect.DeepEqual(info[key], want[key]) {
				t.Errorf("%s: %s is %v, qemu-img says %v", image, key, info[key], want[key])
			}
		}
	}

	// Over NBD, to QEMU's tools and to ourselves.
	serve, serving := launchProgram(t, gnomon, "disk", "serve", at("b.qcow2"), "--read-only", "--listen", "unix:"+at("nbd.sock"))
	readUntil(serving, "served at")
	uri := "nbd+unix:///?socket=" + at("nbd.sock")
	qemuImg(ctx, t, "compare", uri, at("b.qcow2"))
	command(ctx, t, "disk", "convert", uri, at("d.qcow2"))
	command(ctx, t, "disk", "convert", at("d.qcow2"), at("compressed.qcow2"), "-c", "-t", "unsafe")
	qemuImg(ctx, t, "compare", at("d.qcow2"), at("compressed.qcow2"))
	if out := qemuImg(ctx, t, "check", at("compressed.qcow2")); !strings.Contains(out, "No errors were found") || strings.Contains(out, " 0.00% compressed") {
		t.Errorf("a compressed copy: %s", out)
	}
	if out := command(ctx, t, "disk", "compare", at("b.qcow2"), uri); out != "Images are identical.\n" {
		t.Errorf("compare: %q", out)
	}
	qemuImg(ctx, t, "compare", at("b.qcow2"), at("d.qcow2"))
	if err := serve.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if status := serve.status(ctx, t); status != 0 {
		t.Errorf("serve: status %d\n%s", status, &serve.log)
	}

	for _, tt := range []struct {
		args   []string
		status int
		says   string
	}{
		{[]string{"compare", at("a.img"), at("b.qcow2")}, 1, ""},
		{[]string{"compare", at("a.img"), at("missing")}, 2, "does not exist"},
		{[]string{"create", at("a.img"), "1M"}, 1, "exists"},
		{[]string{"create", at("new.img")}, 2, "no SIZE"},
		{[]string{"create", at("new.img"), "-b", "a.img"}, 2, "-b without -F"},
		{[]string{"convert", at("a.img"), at("b.qcow2")}, 1, "exists"},
		{[]string{"convert", at("a.img"), at("new.img"), "-O", "vmdk"}, 2, "raw and qcow2"},
		{[]string{"convert", at("a.img"), at("new.img"), "-c"}, 2, "use -O qcow2"},
		{[]string{"convert", at("a.img"), at("new.img"), "-t", "fast"}, 2, "writeback and unsafe"},
	} {
		cmd := exec.CommandContext(ctx, gnomon, append([]string{"disk"}, tt.args...)...)
		var stderr strings.Builder
		cmd.Stderr = &stderr
		err := cmd.Run()
		if cmd.ProcessState.ExitCode() != tt.status || !strings.Contains(stderr.String(), tt.says) || strings.Count(stderr.String(), "\n") > 1 {
			t.Errorf("disk %v: %v, %q; want status %d and %q", tt.args, err, &stderr, tt.status, tt.says)
		}
		if _, err := os.Lstat(at("new.img")); err == nil {
			t.Errorf("disk %v left an image behind", tt.args)
		}
	}
}

// The same commands work on disks of running machines, ours and QEMU's.
func TestDisksOfMachines(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	const words = "blk op=randwrite bs=4k qd=4 count=50000 seed=5 order=1; wait for=test; blk op=randread bs=4k qd=4 count=8192 seed=5 order=1 verify=1"
	for _, vmm := range []string{"gnomon", "QEMU"} {
		t.Run(vmm, func(t *testing.T) {
			dir := t.TempDir()
			at := func(name string) string { return filepath.Join(dir, name) }
			img, machine := at("disk.img"), at("qmp.sock")
			qemuImg(ctx, t, "create", "-q", "-f", "raw", img, "16M")
			p, serial := launchEither(ctx, t, vmm, words, img, "", machine)
			command(ctx, t, "qmp", machine, "stop")
			command(ctx, t, "backup", machine, "--to", at("backup.qcow2"))
			qemuImg(ctx, t, "compare", "-U", "-f", "raw", img, at("backup.qcow2"))
			command(ctx, t, "qmp", machine, "cont")
			for _, name := range []string{"one.qcow2", "two.qcow2", "three.qcow2"} {
				if out := command(ctx, t, "disk", "snapshot", machine, "disk0", "--to", at(name)); !strings.Contains(out, at(name)) {
					t.Errorf("snapshot: %q", out)
				}
			}
			command(ctx, t, "backup", machine, "disk0", "--to", at("top.qcow2"), "--sync", "top")
			if out := command(ctx, t, "disk", "consolidate", machine, "--top", at("two.qcow2"), "--base", at("one.qcow2")); !strings.Contains(out, at("three.qcow2")) {
				t.Errorf("consolidate: %q", out)
			}
			if out := command(ctx, t, "disk", "consolidate", machine); !strings.Contains(out, at("one.qcow2")) {
				t.Errorf("consolidate: %q", out)
			}
			if out := command(ctx, t, "disk", "consolidate", machine, "--all"); !strings.Contains(out, img) {
				t.Errorf("consolidate: %q", out)
			}
			verified(t, serial)
			if status := p.status(ctx, t); status != 0 {
				t.Errorf("status %d\n%s", status, &p.log)
			}
			for _, name := range []string{"backup.qcow2", "top.qcow2"} {
				if out := qemuImg(ctx, t, "check", at(name)); !strings.Contains(out, "No errors were found") {
					t.Errorf("%s: %s", name, out)
				}
			}
		})
	}
}

// launchWriting launches a machine that has written to a new raw image of 16 MiB, and goes
// on doing so.
func launchWriting(ctx context.Context, t *testing.T, vmm, img, socket string) {
	t.Helper()
	qemuImg(ctx, t, "create", "-q", "-f", "raw", img, "16M")
	_, serial := launchEither(ctx, t, vmm, "blk op=randwrite qd=4 count=1000; wait for=first; blk op=randwrite qd=4 count=100000000 seed=3", img, "", socket)
	readUntil(serial, "for=first")
}

// launchEither launches a machine of ours or of QEMU's with the probe guest and one
// disk, disk0, and waits for its QMP socket. The options of the disk are for ours.
func launchEither(ctx context.Context, t *testing.T, vmm, words, img, options, socket string) (*process, io.ReadWriter) {
	t.Helper()
	kernel, err := probe.Path()
	if err != nil {
		t.Fatal(err)
	}
	var p *process
	var serial io.ReadWriter
	if vmm == "gnomon" {
		p, serial = launch(t, "--kernel", kernel, "--append", words, "--memory", "64M", "--net", "none", "--disk", "file="+img+options, "--qmp", "unix:"+socket)
	} else {
		format := "raw"
		if filepath.Ext(img) == ".qcow2" {
			format = "qcow2"
		}
		p, serial = launchProgram(t, "qemu-system-x86_64", "-accel", "kvm", "-machine", "q35", "-bios", "qboot.rom", "-m", "64", "-nodefaults",
			"-display", "none", "-no-reboot", "-serial", "stdio", "-kernel", kernel, "-append", words, "-qmp", "unix:"+socket+",server=on,wait=off",
			"-drive", "file="+img+",format="+format+",if=none,id=disk0", "-device", "virtio-blk-pci,drive=disk0,disable-legacy=on")
	}
	awaitFile(ctx, t, socket)
	return p, serial
}

// awaitFile returns when a machine's socket is there.
func awaitFile(ctx context.Context, t *testing.T, path string) {
	t.Helper()
	for {
		if _, err := os.Stat(path); err == nil {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("%s: %v", path, ctx.Err())
		case <-time.After(10 * time.Millisecond): // another process makes it
		}
	}
}

// A disk goes from one running machine to another, which finds what the first wrote.
func TestDiskChangesOwner(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	kernel, err := probe.Path()
	if err != nil {
		t.Fatal(err)
	}
	img := filepath.Join(t.TempDir(), "disk.img")
	qemuImg(ctx, t, "create", "-q", "-f", "raw", img, "8M")
	state := func() string {
		var o struct {
			State string `json:"state"`
			Epoch int    `json:"epoch"`
			Name  string `json:"name"`
		}
		if err := json.Unmarshal([]byte(command(ctx, t, "disk", "owner", "--output", "json", img)), &o); err != nil {
			t.Fatal(err)
		}
		return fmt.Sprint(o.State, " ", o.Epoch)
	}
	if got := state(); got != "unowned 0" {
		t.Errorf("at first: %s", got)
	}
	args := func(words string) []string {
		return []string{"--kernel", kernel, "--append", words, "--memory", "64M", "--net", "none", "--disk", "file=" + img + ",owner=on"}
	}
	first, serial := launch(t, args("blk op=seqwrite bs=64k seed=9 total=8M; wait for=ever")...)
	first.connect(ctx, t)
	readUntil(serial, "probe: wait")
	if got := state(); got != "owned 1" {
		t.Errorf("with an owner: %s", got)
	}
	// Another machine asks for it by being started.
	second, serial := launchProgram(t, gnomon, append([]string{"run", "--name", "second"}, args("blk op=seqread bs=64k seed=9 total=8M verify=1")...)...)
	verified(t, serial)
	if status := second.status(ctx, t); status != 0 {
		t.Errorf("status %d\n%s", status, &second.log)
	}
	var status struct{ Status string }
	first.do(ctx, t, "query-status", nil, &status)
	if status.Status != "paused" || !strings.Contains(first.log.String(), "released to another owner") {
		t.Errorf("the first machine is %s\n%s", status.Status, &first.log)
	}
	if err := first.qmp.Execute(ctx, "cont", nil, nil); err == nil || !strings.Contains(err.Error(), "released to another owner") {
		t.Errorf("cont of a machine whose disk is another's: %v", err)
	}
	if got := state(); got != "released 2" {
		t.Errorf("at last: %s", got)
	}
	cmd := exec.CommandContext(ctx, gnomon, "disk", "release", img)
	if out, err := cmd.CombinedOutput(); err == nil || strings.Count(string(out), "\n") != 1 {
		t.Errorf("release of what nobody owns: %v, %s", err, out)
	}
}
