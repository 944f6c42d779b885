package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/tests/guest/probe"
)

// image is a disk image that all contenders use in turn.
type image struct {
	path, format string
	size         int64 // of what is written, from the beginning
}

// image is that of the experiments with disks: raw and qcow2 hold the same.
func (b *bench) image(format string) image {
	return image{filepath.Join(b.dir, "disk."+format), format, 256 * mib}
}

// make writes the image, if it is not there yet, and brings it into the page
// cache with nothing left to write back.
func (i image) make() error {
	if i.format != "raw" {
		if _, err := os.Stat(i.path); err != nil {
			from := image{i.path + ".raw", "raw", i.size}
			if err := from.make(); err != nil {
				return err
			}
			defer os.Remove(from.path)
			if err := qemuImg("convert", "-f", "raw", "-O", i.format, from.path, i.path); err != nil {
				return err
			}
		}
	}
	f, err := os.OpenFile(i.path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if i.format == "raw" {
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
	}
	if _, err := io.Copy(io.Discard, f); err != nil {
		return err
	}
	return f.Sync()
}

// makeDirect is make for direct I/O: nothing of the image is left in the page cache.
func (i image) makeDirect() error {
	if err := i.make(); err != nil {
		return err
	}
	f, err := os.Open(i.path)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
}

// empty replaces the image by one of 4 GiB with nothing in it.
func (i image) empty() error {
	if err := os.Remove(i.path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return qemuImg("create", "-q", "-f", i.format, i.path, "4G")
}

func qemuImg(args ...string) error { return tool("qemu-img", args...) }

// qemuIO does something to a qcow2 image.
func qemuIO(path, command string) error { return tool("qemu-io", "-f", "qcow2", "-c", command, path) }

func tool(name string, args ...string) error {
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, bytes.TrimSpace(out))
	}
	return nil
}

// A diskLoad is one way to use the disk.
type diskLoad struct {
	metric, text, unit string
	words              string // of the probe guest, but for the time
	mbytes             bool   // the figure is MB/s and not requests/s
}

// diskLoads use what the image holds.
var diskLoads = []diskLoad{
	{"randread1", "4 KiB random read, 1 in flight", "1/s", "op=randread bs=4k qd=1", false},
	{"randread32", "4 KiB random read, 32 in flight", "1/s", "op=randread bs=4k qd=32", false},
	{"randwrite1", "4 KiB random write, 1 in flight", "1/s", "op=randwrite bs=4k qd=1 data=same", false},
	{"randwrite32", "4 KiB random write, 32 in flight", "1/s", "op=randwrite bs=4k qd=32 data=same", false},
	{"seqread", "1 MiB sequential read, 8 in flight", "MB/s", "op=seqread bs=1M qd=8", true},
	{"seqwrite", "1 MiB sequential write, 8 in flight", "MB/s", "op=seqwrite bs=1M qd=8 data=same", true},
}

// allocatingLoads write where an empty image has nothing yet, each elsewhere.
var allocatingLoads = []diskLoad{
	{"allocating32", "4 KiB random allocating write, 32 in flight", "1/s", "op=randwrite bs=4k qd=32 data=same off=0 span=2G count=6000", false},
	{"seqallocating", "1 MiB sequential allocating write, 8 in flight", "MB/s", "op=seqwrite bs=1M qd=8 data=same off=2G span=1G total=384M", true},
}

// block measures virtio-blk with one image, in the page cache or past it
// (cache=writeback, cache=none), beside each of QEMU's usual ways to do I/O; the best
// of them counts.
func (b *bench) block(format, cache string) experiment {
	ready := image.make
	if cache == "none" {
		ready = image.makeDirect
	}
	return b.blockLoads(blockName(format, cache), b.image(format), cache, diskLoads, func(l diskLoad) []string {
		// The first moments, in which a side's threads and caches warm up, do not count.
		return []string{l.words + " ms=50", fmt.Sprintf("%s ms=%d", l.words, b.pick(800, 200))}
	}, ready)
}

// allocating measures virtio-blk with a qcow2 image that is empty for each run.
func (b *bench) allocating(cache string) experiment {
	img := image{filepath.Join(b.dir, "empty.qcow2"), "qcow2", 0}
	return b.blockLoads(blockName("qcow2", cache), img, cache, allocatingLoads, func(l diskLoad) []string { return []string{l.words} }, image.empty)
}

func blockName(format, cache string) string {
	name := "virtio-blk"
	if format != "raw" {
		name += " " + format
	}
	if cache == "none" {
		name += " direct"
	}
	return name
}

// blockLoads measures the last of each load's words.
func (b *bench) blockLoads(name string, img image, cache string, loads []diskLoad, words func(diskLoad) []string, ready func(image) error) experiment {
	qemu := func(aio, device string, more ...string) vmm {
		return b.peer("q35", 256, append([]string{
			"-drive", "file=" + img.path + ",format=" + img.format + ",if=none,id=d,cache=" + cache + ",aio=" + aio,
			"-device", "virtio-blk-pci,drive=d,disable-legacy=on" + device,
		}, more...)...)
	}
	thread := []string{"-object", "iothread,id=io0"}
	run := func(v vmm) func(context.Context) (figures, error) {
		return func(ctx context.Context) (figures, error) {
			if err := ready(img); err != nil {
				return nil, err
			}
			return v.blockOnce(ctx, loads, words)
		}
	}
	other := "threads"
	if cache == "none" {
		other = "native" // which the page cache has not
	}
	e := experiment{
		name: name,
		contenders: []contender{
			{"gnomon", run(b.ours(256, "--disk", "file="+img.path+",format="+img.format+",cache="+cache, "--net", "none"))},
			{"QEMU q35 io_uring", run(qemu("io_uring", ""))},
			{"QEMU q35 io_uring iothread", run(qemu("io_uring", ",iothread=io0", thread...))},
			{"QEMU q35 " + other + " iothread", run(qemu(other, ",iothread=io0", thread...))},
		},
	}
	for _, l := range loads {
		e.promises = append(e.promises, promise{metric: l.metric, text: name + " " + l.text, unit: l.unit, higher: true, bound: bound{"ratio", ">=", 1}})
	}
	return e
}

func (v vmm) blockOnce(ctx context.Context, loads []diskLoad, words func(diskLoad) []string) (figures, error) {
	var all strings.Builder
	for _, l := range loads {
		for _, w := range words(l) {
			fmt.Fprintf(&all, "blk %s; ", w)
		}
	}
	g, err := v.start(ctx, all.String())
	if err != nil {
		return nil, err
	}
	defer g.kill()
	results, err := g.results()
	if err != nil {
		return nil, err
	}
	f, at := figures{}, -1
	for _, l := range loads {
		at += len(words(l))
		line, err := results.Find("blk", at)
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
