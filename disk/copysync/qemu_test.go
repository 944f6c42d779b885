package copysync

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/gnomon-vmm/gnomon/disk/extfs/extfstest"
	"github.com/gnomon-vmm/gnomon/disk/nbd"
	"github.com/gnomon-vmm/gnomon/qmp/client"
)

// incremental has QEMU see the disk go from before to after, and back up by its dirty
// bitmap what was written. It tells how many bytes QEMU copied.
func incremental(t *testing.T, before, after []byte) int64 {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	if err := errors.Join(os.WriteFile(at("disk"), before, 0o600), os.WriteFile(at("target"), before, 0o600)); err != nil {
		t.Fatal(err)
	}
	daemon := exec.CommandContext(ctx, "qemu-storage-daemon",
		"--blockdev", "driver=raw,node-name=disk,file.driver=file,file.filename="+at("disk"),
		"--blockdev", "driver=raw,node-name=target,file.driver=file,file.filename="+at("target"),
		"--nbd-server", "addr.type=unix,addr.path="+at("nbd.sock"), "--export", "type=nbd,id=export,node-name=disk,writable=on",
		"--chardev", "socket,id=qmp,path="+at("qmp.sock")+",server=on,wait=off", "--monitor", "chardev=qmp", "--pidfile", at("ready"))
	var stderr strings.Builder
	daemon.Stderr = &stderr
	if err := daemon.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		daemon.Process.Kill()
		daemon.Wait()
		if t.Failed() {
			t.Log(&stderr)
		}
	}()
	for { // it makes this file when it listens
		if _, err := os.Stat(at("ready")); err == nil {
			break
		}
		select {
		case <-ctx.Done():
			t.Fatal(ctx.Err())
		case <-time.After(5 * time.Millisecond):
		}
	}
	qmp, err := client.Dial(ctx, "unix:"+at("qmp.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer qmp.Close()
	do := func(command string, args map[string]any) {
		t.Helper()
		if err := qmp.Execute(ctx, command, args, nil); err != nil {
			t.Fatalf("%s: %v", command, err)
		}
	}
	do("block-dirty-bitmap-add", map[string]any{"node": "disk", "name": "changes", "granularity": granule})
	disk, err := nbd.DialURI(ctx, "nbd+unix:///disk?socket="+at("nbd.sock"), nbd.ClientOptions{})
	if err != nil {
		t.Fatal(err)
	}
	const page = 4 << 10
	changed := func(off int) bool {
		return off < len(after) && !bytes.Equal(before[off:min(off+page, len(after))], after[off:min(off+page, len(after))])
	}
	for off, end := 0, 0; off < len(after); off = max(end, off+page) {
		for end = off; changed(end) && end-off < 1<<20; end += page {
		}
		if end = min(end, len(after)); off < end {
			if err := disk.Writev([][]byte{after[off:end]}, int64(off)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := errors.Join(disk.Flush(), disk.Close()); err != nil {
		t.Fatal(err)
	}
	events := qmp.Subscribe(ctx)
	do("blockdev-backup", map[string]any{"job-id": "backup", "device": "disk", "target": "target", "sync": "incremental", "bitmap": "changes"})
	for e := range events {
		if e.Event == "BLOCK_JOB_COMPLETED" {
			var copied float64
			if _, err := fmt.Sscan(fmt.Sprint(e.Data["offset"]), &copied); err != nil || e.Data["error"] != nil {
				t.Fatalf("%v: %v", e.Data, err)
			}
			if !bytes.Equal(readFile(t, at("target")), after) {
				t.Error("QEMU's backup is not the disk")
			}
			return int64(copied)
		}
	}
	t.Fatal("QEMU's backup did not end")
	return 0
}

// TestSyncCopiesLessThanQEMU: of a disk that is filled, of which most is deleted and some
// written again, at most half is copied of what QEMU's incremental backup copies.
func TestSyncCopiesLessThanQEMU(t *testing.T) {
	disk := extfstest.Make(t, 96<<20, append([]string{"-t", "ext4", "-E", "lazy_itable_init=0"}, strings.Fields("-b 4096 -O "+extfstest.Modern)...)...)
	target := filepath.Join(t.TempDir(), "copy")
	before := readFile(t, disk)
	if err := os.WriteFile(target, before, 0o600); err != nil {
		t.Fatal(err)
	}
	files := map[string][]byte{}
	runSession(t, disk, 0, files)
	after := readFile(t, disk)
	src, dst := openDisk(t, disk), openDisk(t, target)
	defer src.Close()
	figures, err := Sync(context.Background(), dst, src, Bitmap(changedGranules(before, after), granule, src.Size()), Options{})
	if err := errors.Join(err, dst.Close()); err != nil {
		t.Fatal(err)
	}
	checkFiles(t, target, files)
	qemu := incremental(t, before, after)
	t.Logf("%d bytes were copied, %d by QEMU", figures.Copied, qemu)
	if figures.Copied*2 > qemu || qemu < figures.Changed {
		t.Errorf("%d bytes were copied, %d by QEMU, of %d that changed", figures.Copied, qemu, figures.Changed)
	}
}
