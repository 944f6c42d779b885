package monitor_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/digitalocean/go-qemu/qemu"
	goqmp "github.com/digitalocean/go-qemu/qmp"

	"github.com/gnomon-vmm/gnomon/vmm"
)

// TestBlockDevice uses each method of go-qemu's BlockDevice and BlockJob, on us and on
// QEMU: the disk's chain, its content and that of the copies are the same after each.
func TestBlockDevice(t *testing.T) {
	const guest = "blk op=seqwrite bs=4k count=20 wait for=go"
	dir := t.TempDir()
	ourImage, theirImage := filepath.Join(dir, "ours.qcow2"), filepath.Join(dir, "theirs.qcow2")
	for _, path := range []string{ourImage, theirImage} {
		qemuImg(t, "create", "-q", "-f", "qcow2", path, "1M")
	}
	q := startQEMU(t, "q35", guest,
		"-drive", "file="+theirImage+",format=qcow2,if=none,id=disk0", "-device", "virtio-blk-pci,drive=disk0")
	q.do(t, "cont", nil, nil)
	o := start(t, guest, func(c *vmm.Config) { c.Disks = []vmm.Disk{{Node: openDisk(t, ourImage)}} })
	for name, x := range map[string]struct {
		peer
		image string
	}{"qemu": {q, theirImage}, "gnomon": {o.peer, ourImage}} {
		t.Run(name, func(t *testing.T) {
			x.serial.waitFor(t, "for=go")
			x.Close() // QEMU serves one session of a socket at a time
			d, err := qemu.NewDomain(domainMonitor(t, x.path), "test")
			if err != nil {
				t.Fatal(err)
			}
			b := blockDeviceTest{Domain: d, dir: t.TempDir(), image: x.image}
			b.snapshotAndCommit(t)
			b.mirrorAndCancel(t)
			b.mirrorAndComplete(t)
			b.run(t)
			if err := d.Close(); err != nil {
				t.Errorf("Close: %v", err)
			}
		})
	}
}

// blockDeviceTest are the steps on one machine's disk.
type blockDeviceTest struct {
	*qemu.Domain
	dir, image string
}

func (b *blockDeviceTest) disk(t *testing.T, file string) qemu.BlockDevice {
	t.Helper()
	d, err := b.BlockDevice("disk0")
	if err != nil || d.Inserted.File != file {
		t.Fatalf("the disk is in %q, want %q: %v", d.Inserted.File, file, err)
	}
	return d
}

// job is the one job, which must be ready.
func (b *blockDeviceTest) job(t *testing.T, kind string) qemu.BlockJob {
	t.Helper()
	jobs, err := b.BlockJobs()
	if err != nil || len(jobs) != 1 || jobs[0].Type != kind || !jobs[0].Ready || jobs[0].Len != jobs[0].Offset || jobs[0].IOStatus != "ok" {
		t.Fatalf("jobs %+v, %v: want one ready of type %s", jobs, err, kind)
	}
	return jobs[0]
}

func (b *blockDeviceTest) idle(t *testing.T) {
	t.Helper()
	if jobs, err := b.BlockJobs(); err != nil || len(jobs) != 0 {
		t.Errorf("jobs %+v, %v", jobs, err)
	}
}

func (b *blockDeviceTest) snapshotAndCommit(t *testing.T) {
	overlay := filepath.Join(b.dir, "overlay.qcow2")
	if err := b.disk(t, b.image).Snapshot(b.Domain, overlay, "over"); err != nil {
		t.Fatalf("Snapshot: %v", err)
	}
	d := b.disk(t, overlay)
	if d.Inserted.NodeName != "over" || d.Inserted.BackingFile != b.image || d.Inserted.BackingFileDepth != 1 || d.Inserted.Image.BackingImage.Filename != b.image {
		t.Errorf("after Snapshot: %+v", d.Inserted)
	}
	if err := d.Snapshot(b.Domain, filepath.Join(b.dir, "no-such", "directory"), "again"); err == nil {
		t.Error("Snapshot into a directory that does not exist succeeded")
	}
	if err := d.Commit(b.Domain, overlay, "the-commit", guard); err != nil {
		t.Fatalf("Commit: %v", err)
	}
	j := b.job(t, "commit")
	if j.Device != "the-commit" {
		t.Errorf("the job is %q", j.Device)
	}
	if err := j.Complete(b.Domain, guard); err != nil {
		t.Fatalf("Complete: %v", err)
	}
	b.disk(t, b.image)
	b.idle(t)
}

func (b *blockDeviceTest) mirrorAndCancel(t *testing.T) {
	if err := b.disk(t, b.image).Mirror(b.Domain, "relative", guard); err == nil {
		t.Error("Mirror to a relative path succeeded")
	}
	target := filepath.Join(b.dir, "copy.raw")
	if err := b.disk(t, b.image).Mirror(b.Domain, target, guard); err != nil {
		t.Fatalf("Mirror: %v", err)
	}
	if err := b.job(t, "mirror").Cancel(b.Domain, guard); err != nil {
		t.Fatalf("Cancel: %v", err)
	}
	b.disk(t, b.image)
	b.idle(t)
	qemuImg(t, "compare", "-U", "-f", "qcow2", "-F", "raw", b.image, target)
	if content, err := os.ReadFile(target); err != nil || len(content) != 1<<20 {
		t.Errorf("the copy has %d bytes, %v", len(content), err)
	}
}

func (b *blockDeviceTest) mirrorAndComplete(t *testing.T) {
	target := filepath.Join(b.dir, "next.raw")
	if err := b.disk(t, b.image).Mirror(b.Domain, target, guard); err != nil {
		t.Fatalf("Mirror: %v", err)
	}
	if err := b.job(t, "mirror").Complete(b.Domain, guard); err != nil {
		t.Fatalf("Complete: %v", err)
	}
	if d := b.disk(t, target); d.Inserted.Driver != "raw" {
		t.Errorf("the disk's format is %s", d.Inserted.Driver)
	}
	b.idle(t)
	qemuImg(t, "compare", "-U", "-f", "qcow2", "-F", "raw", b.image, target)
	clean(t, b.image)
}

// run is the method that the others use.
func (b *blockDeviceTest) run(t *testing.T) {
	if out, err := b.Run(goqmp.Command{Execute: "query-status"}); err != nil || len(out) == 0 {
		t.Errorf("Run: %s, %v", out, err)
	}
	if _, err := b.Run(goqmp.Command{Execute: "block-job-cancel", Args: map[string]string{"device": "none"}}); err == nil {
		t.Error("Run of a command that is refused succeeded")
	}
}
