package tests

import (
	"context"
	"path/filepath"
	"strings"
	"testing"

	"github.com/gnomon-vmm/gnomon/tests/guest/probe"
)

// A guest reads what it wrote, on disks of all formats past the page cache and by all
// engines, and the image is whole afterwards.
func TestDirectDisks(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	kernel, err := probe.Path()
	if err != nil {
		t.Fatal(err)
	}
	const words = "blk op=randwrite bs=4k qd=32 count=1000 seed=5 order=1 off=0 span=8M; blk op=seqwrite bs=1M qd=4 count=4 off=8M seed=6; " +
		"blk op=randread bs=4k qd=32 count=1000 seed=5 order=1 off=0 span=8M verify=1; blk op=seqread bs=1M qd=4 count=4 off=8M seed=6 verify=1"
	for _, format := range []string{"raw", "qcow2"} {
		for _, how := range []string{"cache=none", "cache=none,aio=threads", "cache=none,aio=native", "cache=directsync,aio=io_uring", "cache=writethrough"} {
			name := strings.NewReplacer("cache=", "", ",aio=", "-").Replace(how)
			t.Run(format+"-"+name, func(t *testing.T) {
				img := filepath.Join(t.TempDir(), "disk."+format)
				qemuImg(ctx, t, "create", "-q", "-f", format, img, "16M")
				p, serial := launch(t, "--kernel", kernel, "--append", words, "--memory", "64M", "--net", "none", "--disk", "file="+img+",format="+format+","+how)
				verified(t, serial)
				if status := p.status(ctx, t); status != 0 {
					t.Errorf("status %d\n%s", status, &p.log)
				}
				if format == "qcow2" {
					qemuImg(ctx, t, "check", "-q", img)
				}
			})
		}
	}
}
