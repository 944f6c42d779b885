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
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/tests/guest/probe"
)

// image is a disk image.
type image struct {
	path, format string
	size         int64 // of what is written, from the beginning; 0: it is empty at first
}

// image is one of those with disks' contents: whatever their format and number they hold the same.
func (b *bench) image(format string, number int) image {
	return image{filepath.Join(b.dir, fmt.Sprintf("disk%d.%s", number, format)), format, 256 * mib}
}

// make writes the image, if it is not there yet, and brings it into the page
// cache with nothing left to write back.
func (i image) make() error {
	f, err := i.open()
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := io.Copy(io.Discard, f); err != nil {
		return err
	}
	return f.Sync()
}

// makeDirect is make for direct I/O: nothing of the image is left in the page cache.
func (i image) makeDirect() error {
	f, err := i.open()
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Sync(); err != nil {
		return err
	}
	return unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
}

// open opens the image, which is written first if it is not there yet.
func (i image) open() (*os.File, error) {
	if i.format != "raw" {
		if _, err := os.Stat(i.path); err != nil {
			from := image{i.path + ".raw", "raw", i.size}
			if err := from.make(); err != nil {
				return nil, err
			}
			defer os.Remove(from.path)
			if err := qemuImg("convert", "-f", "raw", "-O", i.format, from.path, i.path); err != nil {
				return nil, err
			}
		}
		return os.Open(i.path)
	}
	f, err := os.OpenFile(i.path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, err
	}
	buf := make([]byte, mib)
	for off := st.Size(); off < i.size; off += mib {
		probe.Pattern(buf, 1, uint64(off))
		if _, err := f.WriteAt(buf, off); err != nil {
			f.Close()
			return nil, err
		}
	}
	return f, nil
}

// makeEmpty replaces the image by one of 256 GiB with nothing in it.
func (i image) makeEmpty() error {
	if err := os.Remove(i.path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return qemuImg("create", "-q", "-f", i.format, i.path, "256G")
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

// diskLoads use what the image holds; their words are the probe guest's.
var diskLoads = []load{
	{"randread1", "4 KiB random read, 1 in flight", "1/s", "op=randread bs=4k qd=1"},
	{"randread32", "4 KiB random read, 32 in flight", "1/s", "op=randread bs=4k qd=32"},
	{"randwrite1", "4 KiB random write, 1 in flight", "1/s", "op=randwrite bs=4k qd=1 data=same"},
	{"randwrite32", "4 KiB random write, 32 in flight", "1/s", "op=randwrite bs=4k qd=32 data=same"},
	{"seqread", "1 MiB sequential read, 8 in flight", "MB/s", "op=seqread bs=1M qd=8"},
	{"seqwrite", "1 MiB sequential write, 8 in flight", "MB/s", "op=seqwrite bs=1M qd=8 data=same"},
}

// allocatingLoads write where an empty image has nothing yet, each time elsewhere.
var allocatingLoads = []load{
	{"allocating32", "4 KiB random allocating write, 32 in flight", "1/s", "op=randwrite bs=4k qd=32 data=same span=1G count="},
	{"seqallocating", "1 MiB sequential allocating write, 8 in flight", "MB/s", "op=seqwrite bs=1M qd=8 data=same count="},
}

// block measures virtio-blk with one format, in the page cache or past it
// (cache=writeback, cache=none), beside each of QEMU's usual ways to do I/O; the best
// of them counts.
func (b *bench) block(format, cache string) experiment {
	return b.blockTurns(format, cache, diskLoads, b.awhile, func(place int) (image, error) {
		img := b.image(format, place)
		if cache == "none" {
			return img, img.makeDirect()
		}
		return img, img.make()
	})
}

// awhile are the words of a load that goes on for a moment. The monitor of Go's runtime
// takes 25 ms to calm down after a halt, as long as what adapts in QEMU.
func (b *bench) awhile(l load, _ int) [2]string {
	ms := b.pick(300, 120)
	return [2]string{fmt.Sprintf("%s ms=%d", l.words, ms/3), fmt.Sprintf("%s ms=%d", l.words, ms)}
}

// allocating measures virtio-blk with images that are empty at first.
func (b *bench) allocating(format, cache string) experiment {
	return b.blockTurns(format, cache, allocatingLoads, func(l load, leg int) [2]string {
		some, many, at := 500, b.pick(3000, 1000), 4*leg
		if l.unit == "MB/s" {
			some, many, at = 192, b.pick(384, 192), at+1
		}
		return [2]string{fmt.Sprintf("%s%d off=%dG", l.words, some, at), fmt.Sprintf("%s%d off=%dG", l.words, many, at+2)}
	}, func(place int) (image, error) {
		img := b.image(format, place)
		img.path, img.size = img.path+".empty", 0
		return img, img.makeEmpty()
	})
}

// blockTurns measures the second of the words that are said in each leg: the first
// moments, in which a side's threads and caches warm up, do not count.
func (b *bench) blockTurns(format, cache string, loads []load, words func(l load, leg int) [2]string, ready func(place int) (image, error)) experiment {
	name := "virtio-blk"
	if format != "raw" {
		name += " " + format
	}
	other := "threads"
	if cache == "none" {
		name += " direct"
		other = "native" // which the page cache has not
	}
	side := func(v func(image) vmm) opener { return diskSide(v, words, ready) }
	qemu := func(aio, device string, more ...string) opener {
		return side(func(img image) vmm {
			return b.peer("q35", 256, append([]string{
				"-drive", "file=" + img.path + ",format=" + img.format + ",if=none,id=d,cache=" + cache + ",aio=" + aio,
				"-device", "virtio-blk-pci,drive=d,disable-legacy=on" + device,
			}, more...)...)
		})
	}
	thread := []string{"-object", "iothread,id=io0"}
	e := experiment{
		name: name,
		schedule: &turns{count: 2, loads: loads, sides: []contestant{
			{"gnomon", side(func(img image) vmm {
				return b.ours(256, "--disk", "file="+img.path+",format="+format+",cache="+cache, "--net", "none")
			})},
			{"QEMU q35 io_uring", qemu("io_uring", "")},
			{"QEMU q35 io_uring iothread", qemu("io_uring", ",iothread=io0", thread...)},
			{"QEMU q35 " + other + " iothread", qemu(other, ",iothread=io0", thread...)},
		}},
	}
	e.promise(loads, 1)
	return e
}

// diskSide is a side whose guest is told what to do by two words in each leg of a turn.
func diskSide(v func(image) vmm, words func(l load, leg int) [2]string, ready func(place int) (image, error)) opener {
	return func(ctx context.Context, loads []load, times, place int) (standby, error) {
		img, err := ready(place)
		if err != nil {
			return nil, err
		}
		var all strings.Builder
		for _, l := range loads {
			for leg := range 2 * times {
				w := words(l, leg)
				fmt.Fprintf(&all, "wait; blk %s; blk %s; ", w[0], w[1])
			}
		}
		all.WriteString("wait")
		leftovers, err := takeLeftovers()
		if err != nil {
			return nil, err
		}
		g, err := v(img).start(ctx, all.String())
		if err != nil {
			return nil, errors.Join(err, unix.Munmap(leftovers))
		}
		d := &diskGuest{g, leftovers, img.size == 0}
		if err := d.waiting(); err != nil {
			d.close()
			return nil, err
		}
		return d, nil
	}
}

// promise adds that each load is at least so much of the best peer's.
func (e *experiment) promise(loads []load, ratio float64) {
	for _, l := range loads {
		e.promises = append(e.promises, promise{metric: l.metric, text: e.name + " " + l.text, unit: l.unit, higher: true, bound: bound{"ratio", ">=", ratio}})
	}
}

// A diskGuest is a guest that uses its disk whenever it is told. Meanwhile its VMM
// stands still.
type diskGuest struct {
	*guest
	leftovers []byte
	allocates bool
}

// takeLeftovers uses up the host's free memory that lies in small pieces. Of guests that
// are started then none has its memory in more pieces than another: a disk does large
// requests of many pieces half as fast, and smaller processes would get more of them.
func takeLeftovers() ([]byte, error) {
	return unix.Mmap(-1, 0, 1024*mib, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_POPULATE)
}

// turn has the guest do the load with its vCPU on one processor and then on another: the
// disk interrupts one of them, and with the guest there all takes longer.
func (d *diskGuest) turn(ctx context.Context, l load) (float64, error) {
	if d.allocates {
		unix.Sync()                               // so that the kernel does not slow down who writes when too much is left to write back
		if err := touchMemory(1280); err != nil { // what is written to the page cache in a turn, and more
			return 0, err
		}
	}
	var ios, seconds float64
	for _, cpu := range []int{0, runtime.NumCPU() - 1} {
		if err := d.pin(cpu); err != nil {
			return 0, err
		}
		w, err := d.leg()
		if err != nil {
			return 0, err
		}
		ios, seconds = ios+float64(w.ios), seconds+w.seconds
	}
	if l.unit == "MB/s" {
		ios *= mib / 1e6
	}
	return ios / seconds, ctx.Err()
}

// pin has the vCPU run on one processor.
func (d *diskGuest) pin(cpu int) error {
	names, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/comm", d.pid()))
	if err != nil {
		return err
	}
	var only unix.CPUSet
	only.Set(cpu)
	for _, name := range names {
		if text, err := os.ReadFile(name); err != nil || string(text) != "CPU 0/KVM\n" {
			continue // it may have ended
		}
		tid, err := strconv.Atoi(filepath.Base(filepath.Dir(name)))
		if err != nil {
			return err
		}
		return unix.SchedSetaffinity(tid, &only)
	}
	return fmt.Errorf("process %d has no thread CPU 0/KVM", d.pid())
}

// leg has the guest go on until it waits again.
func (d *diskGuest) leg() (w writing, err error) {
	if err := errors.Join(d.cmd.Process.Signal(unix.SIGCONT), d.release()); err != nil {
		return w, err
	}
	for range 2 {
		if w, err = d.writing(); err != nil {
			return w, err
		}
	}
	return w, d.waiting()
}

// waiting returns when the guest waits.
func (d *diskGuest) waiting() error {
	if _, _, err := d.line("wait"); err != nil {
		return err
	}
	return d.cmd.Process.Signal(unix.SIGSTOP)
}

func (d *diskGuest) close() {
	d.kill()
	_ = unix.Munmap(d.leftovers) // it is ours
}
