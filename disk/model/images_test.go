package model

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"

	"github.com/gnomon-vmm/gnomon/disk/qcow2"
)

// begin makes the image at the bottom of the chain: ours, QEMU's, or a raw one.
func (d *model) begin(seed uint64) {
	d.t.Helper()
	d.size = 160 << 10
	d.now, d.buf = make([]byte, d.size), make([]byte, d.size)
	switch seed % 8 {
	case 0, 1, 2:
		d.beginWithQEMU()
	case 3:
		d.add("raw")
		d.fill(d.newSize())
		d.must(os.WriteFile(d.path(d.top()), d.now, 0o600))
		d.did("raw image of %d bytes", len(d.now))
	default:
		d.add("qcow2")
		o := d.options()
		o.Size = d.newSize()
		d.setSize(o.Size)
		d.must(qcow2.Create(d.path(d.top()), o))
		d.did("image %+v", o)
	}
}

// options of an image, but what it lies on and its size.
func (d *model) options() qcow2.CreateOptions {
	o := qcow2.CreateOptions{ClusterSize: 512 << d.r.IntN(6)}
	switch k := d.r.IntN(400); {
	case k == 0:
		o.ClusterSize = 2 << 20
	case k < 40:
		o.ClusterSize = 64 << 10
	}
	if d.r.IntN(4) == 0 {
		o.Version = 2
		return o
	}
	o.Compression = qcow2.Compression(d.r.IntN(2))
	o.RefcountBits = 1 << d.r.IntN(7)
	o.LazyRefcounts = d.r.IntN(4) == 0
	return o
}

// fill makes the disk's content: noise, text and holes.
func (d *model) fill(size int64) {
	d.setSize(size)
	for rest := d.now; len(rest) > 0; {
		part := rest[:min(1+d.r.IntN(16_000), len(rest))]
		switch d.r.IntN(3) {
		case 0:
			noise(d.r, part)
		case 1:
			copy(part, bytes.Repeat([]byte("the shadow of a gnomon "), len(part)/23+1))
		}
		rest = rest[len(part):]
	}
}

// noise is what nothing can be left out of.
func noise(r *rand.Rand, p []byte) {
	var word [8]byte
	for ; len(p) > 0; p = p[copy(p, word[:]):] {
		binary.LittleEndian.PutUint64(word[:], r.Uint64())
	}
}

// beginWithQEMU has qemu-img make the image, with something on it. Of an image that
// we only read, the disk is an overlay.
func (d *model) beginWithQEMU() {
	d.t.Helper()
	d.fill(d.newSize())
	source := filepath.Join(d.dir, "source")
	d.must(os.WriteFile(source, d.now, 0o600))
	d.add("qcow2")
	var options, flags []string
	pick := func(all ...string) string { return all[d.r.IntN(len(all))] }
	option := func(all ...string) {
		if o := pick(all...); o != "" {
			options = append(options, o)
		}
	}
	kind := pick("2", "3", "3", "3", "subclusters", "data file", "snapshots", "overlay", "overlay")
	switch kind {
	case "2":
		options = []string{"compat=0.10"}
	case "subclusters":
		options = []string{"extended_l2=on", "cluster_size=" + pick("16k", "32k", "64k", "128k")}
	case "data file":
		options = []string{"data_file=" + filepath.Join(d.dir, "data"), "data_file_raw=" + pick("on", "off")}
	}
	if kind == "2" || kind == "3" || kind == "overlay" {
		option("", "cluster_size=512", "cluster_size=1k", "cluster_size=2k", "cluster_size=4k", "cluster_size=16k", "cluster_size=32k", "cluster_size=128k")
		if d.r.IntN(24) == 0 {
			options = append(options, "cluster_size=2M")
		}
	}
	if kind == "3" || kind == "overlay" {
		option("", "compression_type=zstd")
		option("", "", "refcount_bits=1", "refcount_bits=2", "refcount_bits=4", "refcount_bits=8", "refcount_bits=32", "refcount_bits=64")
		option("", "lazy_refcounts=on")
	}
	if kind == "3" {
		option("", "", "preallocation=metadata", "preallocation=falloc", "preallocation=full")
	}
	if kind != "data file" && !strings.Contains(strings.Join(options, ","), "preallocation") && d.r.IntN(2) == 0 {
		flags = []string{"-c"}
	}
	if kind == "overlay" { // on a smaller raw one, of which it holds what differs
		base := bytes.Clone(d.now[:len(d.now)/2/sector*sector])
		clear(base[len(base)/3:])
		d.must(os.WriteFile(filepath.Join(d.dir, "base"), base, 0o600))
		d.chain = []image{{name: "base", format: "raw", tail: base, sealed: true}, d.chain[0]}
		flags = append(flags, "-B", "base", "-F", "raw")
	}
	args := append([]string{"convert", "-f", "raw", "-O", "qcow2"}, flags...)
	if len(options) > 0 {
		args = append(args, "-o", strings.Join(options, ","))
	}
	d.qemuImg(append(args, "source", d.top().name)...)
	switch kind {
	case "snapshots":
		d.qemuImg("snapshot", "-c", "one", d.top().name)
		d.qemuImg("snapshot", "-c", "two", d.top().name)
	case "3":
		if d.r.IntN(3) == 0 {
			d.qemuImg("bitmap", "--add", "-g", "4096", d.top().name, "qemu")
		}
	}
	d.did("qemu-img %s", strings.Join(args, " "))
	if kind == "subclusters" || kind == "data file" || kind == "snapshots" {
		d.top().sealed, d.top().tail = true, bytes.Clone(d.now)
		o := d.options()
		o.Backing, o.BackingFormat, o.Size = d.top().name, "qcow2", int64(len(d.now))
		d.add("qcow2")
		d.must(qcow2.Create(d.path(d.top()), o))
		d.did("on it: image %+v", o)
	}
}

func (d *model) qemuImg(args ...string) string {
	d.t.Helper()
	out, says, status := run(d.t, d.dir, append([]string{"qemu-img"}, args...)...)
	if status != 0 {
		d.fail("qemu-img %v: status %d\n%s%s", args, status, out, says)
	}
	return out
}

// verify has QEMU check all images, and compare the disk.
func (d *model) verify() {
	d.t.Helper()
	d.expect(d.read(0, int64(len(d.now))), 0)
	d.checkBitmap()
	d.close()
	d.mend()
	for i := range d.chain {
		if d.chain[i].format != "qcow2" || d.chain[i].sealed {
			continue
		}
		var found struct {
			Corruptions, Leaks int
			CheckErrors        int `json:"check-errors"`
		}
		out := d.qemuImg("check", "-f", "qcow2", "--output=json", d.chain[i].name)
		if err := json.Unmarshal([]byte(out), &found); err != nil || fmt.Sprint(found) != "{0 0 0}" {
			d.fail("%s: %v\n%s", d.chain[i].name, err, out)
		}
	}
	d.must(os.WriteFile(filepath.Join(d.dir, "model"), d.now, 0o600))
	if out := d.qemuImg("compare", "-f", "raw", "-F", d.top().format, "model", d.top().name); out != "Images are identical.\n" {
		d.fail("%s", out) // of different sizes
	}
}

// mend gives back what crashes lost: space, no more.
func (d *model) mend() {
	for i := range d.chain {
		if !d.chain[i].crashed || d.chain[i].format != "qcow2" || d.chain[i].sealed {
			continue
		}
		r, err := qcow2.Check(context.Background(), d.path(&d.chain[i]), qcow2.CheckOptions{Repair: qcow2.RepairLeaks})
		d.must(err)
		if !r.Clean() || r.CorruptionsFixed != 0 {
			d.fail("%s: %+v", d.chain[i].name, r)
		}
	}
}
