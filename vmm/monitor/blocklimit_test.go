package monitor_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/gnomon-vmm/gnomon/disk/qcow2"
)

// No command makes a chain longer than one that can be opened; when images of it have
// been merged the disk takes overlays again.
func TestChainLimit(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	image := func(i int) string { return at(fmt.Sprintf("%d.qcow2", i)) }
	for i := range 63 {
		o := qcow2.CreateOptions{Size: 1 << 20}
		if i > 0 {
			o.Backing, o.BackingFormat = image(i-1), "qcow2"
		}
		if err := qcow2.Create(image(i), o); err != nil {
			t.Fatal(err)
		}
	}
	o := withDisks(t, "spin", image(62))
	for _, name := range []string{"over", "refused"} {
		qemuImg(t, "create", "-q", "-f", "qcow2", at(name), "1M")
		o.do(t, "blockdev-add", m{"driver": "qcow2", "node-name": name, "backing": nil, "file": m{"driver": "file", "filename": at(name)}}, nil)
	}
	qemuImg(t, "create", "-q", "-f", "raw", at("created"), "1M")
	o.do(t, "blockdev-add", m{"driver": "file", "node-name": "created", "filename": at("created")}, nil)
	qemuImg(t, "create", "-q", "-u", "-f", "qcow2", "-b", at("over"), "-F", "qcow2", at("existing"), "1M")
	o.do(t, "blockdev-snapshot-sync", m{"device": "disk0", "snapshot-file": image(63)}, nil) // the 64th image
	for what, refused := range map[string]struct {
		command   string
		arguments m
	}{
		"new":      {"blockdev-snapshot-sync", m{"device": "disk0", "snapshot-file": at("new.qcow2")}},
		"existing": {"blockdev-snapshot-sync", m{"device": "disk0", "snapshot-file": at("existing"), "mode": "existing"}},
		"node":     {"blockdev-snapshot", m{"node": "disk0", "overlay": "refused"}},
		"transaction": {"transaction", m{"actions": []m{
			{"type": "blockdev-snapshot-sync", "data": m{"device": "disk0", "snapshot-file": at("new.qcow2")}},
		}}},
	} {
		if err := o.refuse(t, refused.command, refused.arguments); !strings.Contains(err.Desc, "gnomon disk consolidate") {
			t.Errorf("%s: %q", what, err.Desc)
		}
	}
	o.do(t, "blockdev-create", m{"job-id": "create", "options": m{
		"driver": "qcow2", "file": "created", "size": 1 << 20, "backing-file": "63.qcow2", "backing-fmt": "qcow2",
	}}, nil)
	if err := o.ended(t, "create", "concluded"); !strings.Contains(err, "gnomon disk consolidate") {
		t.Errorf("blockdev-create: %q", err)
	}
	if _, err := os.Stat(at("new.qcow2")); !os.IsNotExist(err) {
		t.Errorf("an overlay that is refused is there: %v", err)
	}
	o.do(t, "block-commit", m{"device": "disk0", "top": image(2), "base": image(1)}, nil)
	o.completed(t, "disk0")
	o.do(t, "blockdev-snapshot", m{"node": "disk0", "overlay": "over"}, nil)
	o.do(t, "quit", nil, nil)
	<-o.done
	o.m.Close()
	openDisk(t, image(63)).Close()
}
