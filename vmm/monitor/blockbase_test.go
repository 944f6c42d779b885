package monitor_test

import (
	"fmt"
	"path/filepath"
	"testing"

	"github.com/gnomon-vmm/gnomon/disk"
	"github.com/gnomon-vmm/gnomon/disk/aio"
	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/raw"
	"github.com/gnomon-vmm/gnomon/vmm"
)

// A base is written as it was read: when the disk goes on in it, when images in the
// middle of a chain go, and what lies on it.
func TestCacheOfBase(t *testing.T) {
	for _, format := range []string{"raw", "qcow2"} {
		for _, mode := range cacheModes {
			dir := t.TempDir()
			at := func(i int) string { return filepath.Join(dir, fmt.Sprintf("%d.%s", i, format)) }
			qemuImg(t, "create", "-q", "-f", format, at(0), "8M")
			o := start(t, "spin", func(c *vmm.Config) {
				n, err := disk.Open(at(0), disk.Options{Cache: mode, Engine: aio.Threads})
				if err != nil {
					t.Fatal(err)
				}
				c.Disks = append(c.Disks, vmm.Disk{Node: n})
			})
			var want raw.Options
			whileStill(o.m.Disks()[0].Root, func(n block.Node) { want = raw.OptionsOf(n) })
			for i := 1; i < 5; i++ {
				o.do(t, "blockdev-snapshot-sync", m{"device": "disk0", "snapshot-file": at(i)}, nil)
			}
			check := func(what string, length int) {
				t.Helper()
				whileStill(o.m.Disks()[0].Root, func(chain block.Node) {
					for i := range length {
						if got := raw.OptionsOf(chain); got != want {
							t.Errorf("%s, cache=%s, %s: image %d is open with %+v, want %+v", format, mode, what, i, got, want)
						}
						if b, ok := chain.(interface{ Backing() block.Node }); ok {
							chain = b.Backing()
						}
					}
				})
			}
			o.do(t, "block-commit", m{"device": "disk0", "top": at(2), "base": at(1)}, nil)
			o.completed(t, "disk0")
			check("in the middle", 4)
			o.do(t, "block-commit", m{"device": "disk0"}, nil)
			o.job(t, "disk0", "BLOCK_JOB_READY")
			o.do(t, "block-job-complete", m{"device": "disk0"}, nil)
			o.completed(t, "disk0")
			check("at the end", 1)
			if direct := openDirect(t, at(0)); direct != mode.Direct() {
				t.Errorf("%s, cache=%s: the base is open past the page cache: %v", format, mode, direct)
			}
		}
	}
}
