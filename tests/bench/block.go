package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/gnomon-vmm/gnomon/tests/guest/probe"
)

// image is a disk image that all contenders use in turn.
type image struct {
	path string
	size int64
}

func imageOf(b *bench) image { return image{filepath.Join(b.dir, "disk.img"), 256 * mib} }

// make writes the image, if it is not there yet, and brings it into the page
// cache with nothing left to write back.
func (i image) make() error {
	f, err := os.OpenFile(i.path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	buf := make([]byte, mib)
	for off := st.Size(); off < i.size; off += mib {
		probe.Pattern(buf, 1, uint64(off))
		if _, err := f.WriteAt(buf, off); err != nil {
			return err
		}
	}
	if _, err := io.Copy(io.Discard, f); err != nil {
		return err
	}
	return f.Sync()
}

// A diskLoad is one way to use the disk.
type diskLoad struct {
	metric, text, unit string
	words              string // of the probe guest, but for the time
	mbytes             bool   // the figure is MB/s and not requests/s
}

var diskLoads = []diskLoad{
	{"randread1", "virtio-blk 4 KiB random read, 1 in flight", "1/s", "op=randread bs=4k qd=1", false},
	{"randread32", "virtio-blk 4 KiB random read, 32 in flight", "1/s", "op=randread bs=4k qd=32", false},
	{"randwrite1", "virtio-blk 4 KiB random write, 1 in flight", "1/s", "op=randwrite bs=4k qd=1 data=same", false},
	{"randwrite32", "virtio-blk 4 KiB random write, 32 in flight", "1/s", "op=randwrite bs=4k qd=32 data=same", false},
	{"seqread", "virtio-blk 1 MiB sequential read, 8 in flight", "MB/s", "op=seqread bs=1M qd=8", true},
	{"seqwrite", "virtio-blk 1 MiB sequential write, 8 in flight", "MB/s", "op=seqwrite bs=1M qd=8 data=same", true},
}

// block measures virtio-blk with one image in the page cache, beside each of
// QEMU's usual ways to do I/O; the best of them counts.
func (b *bench) block() experiment {
	img := imageOf(b)
	qemu := func(aio, device string, more ...string) vmm {
		return b.peer("q35", 256, append([]string{
			"-drive", "file=" + img.path + ",format=raw,if=none,id=d,cache=writeback,aio=" + aio,
			"-device", "virtio-blk-pci,drive=d,disable-legacy=on" + device,
		}, more...)...)
	}
	thread := []string{"-object", "iothread,id=io0"}
	run := func(v vmm) func(context.Context) (figures, error) {
		return func(ctx context.Context) (figures, error) { return b.blockOnce(ctx, v, img) }
	}
	e := experiment{
		name: "block",
		contenders: []contender{
			{"gnomon", run(b.ours(256, "--disk", "file="+img.path, "--net", "none"))},
			{"QEMU q35 io_uring", run(qemu("io_uring", ""))},
			{"QEMU q35 io_uring iothread", run(qemu("io_uring", ",iothread=io0", thread...))},
			{"QEMU q35 threads iothread", run(qemu("threads", ",iothread=io0", thread...))},
		},
	}
	for _, l := range diskLoads {
		e.promises = append(e.promises, promise{metric: l.metric, text: l.text, unit: l.unit, higher: true, bound: bound{"ratio", ">=", 1}})
	}
	return e
}

func (b *bench) blockOnce(ctx context.Context, v vmm, img image) (figures, error) {
	if err := img.make(); err != nil {
		return nil, err
	}
	var words strings.Builder
	for _, l := range diskLoads {
		// The first moments, in which a side's threads and caches warm up, do not count.
		fmt.Fprintf(&words, "blk %s ms=50; blk %s ms=%d; ", l.words, l.words, b.pick(800, 200))
	}
	g, err := v.start(ctx, words.String())
	if err != nil {
		return nil, err
	}
	defer g.kill()
	results, err := g.results()
	if err != nil {
		return nil, err
	}
	f := figures{}
	for i, l := range diskLoads {
		line, err := results.Find("blk", 2*i+1)
		if err != nil {
			return nil, err
		}
		if failed, err := line.Number("failed"); err != nil || failed != 0 {
			return nil, fmt.Errorf("%s: %d requests failed (%v)", l.text, failed, err)
		}
		seconds, err := line.Seconds()
		if err != nil {
			return nil, err
		}
		key, scale := "ios", 1.0
		if l.mbytes {
			key, scale = "bytes", 1e6
		}
		n, err := line.Number(key)
		if err != nil {
			return nil, err
		}
		f[l.metric] = float64(n) / scale / seconds
	}
	return f, nil
}
