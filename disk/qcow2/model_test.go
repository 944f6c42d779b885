package qcow2

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/gnomon-vmm/gnomon/disk/bitmap"
)

// disk is an image with what it should hold.
type disk struct {
	t     testing.TB
	r     *rand.Rand
	dir   string
	names []string // of the chain, the last is the one in use
	o     CreateOptions
	n     *Node
	model []byte
	dirty *bitmap.Bitmap // what was written since the bitmap was made, or nil
}

func (d *disk) path() string { return filepath.Join(d.dir, d.names[len(d.names)-1]) }

func (d *disk) must(err error) {
	d.t.Helper()
	if err != nil {
		d.t.Fatal(err)
	}
}

func (d *disk) open() {
	d.t.Helper()
	var err error
	d.n, err = Open(d.path(), false)
	d.must(err)
}

// close has QEMU, and us, find nothing wrong, and the disk hold what it should.
func (d *disk) close() {
	d.t.Helper()
	d.must(d.n.Close())
	if r := agree(d.t, d.path()); !r.Clean() {
		d.t.Fatalf("%+v", r)
	}
	same(d.t, d.path(), d.model)
	compareMaps(d.t, d.path())
	if d.dirty != nil {
		n := mustOpen(d.t, d.path())
		defer n.Close()
		b, err := n.Bitmap("dirty")
		d.must(err)
		for off := int64(0); off < b.Size(); off += b.Granularity() {
			if d.dirty.Get(off) && !b.Get(off) {
				d.t.Fatalf("the bitmap does not know that %d was written", off)
			}
		}
	}
}

// overlay puts a new image on the one in use.
func (d *disk) overlay() {
	d.close()
	o := d.o
	o.Size, o.Backing, o.BackingFormat = int64(len(d.model)), d.names[len(d.names)-1], "qcow2"
	d.names = append(d.names, fmt.Sprintf("%d.qcow2", len(d.names)))
	d.must(Create(d.path(), o))
	d.dirty = nil
	d.open()
}

// commit moves the image in use into the one that it lies on.
func (d *disk) commit() {
	d.close()
	_, err := Commit(context.Background(), d.path(), CommitOptions{Empty: len(d.names)%2 == 0})
	d.must(err)
	d.must(os.Remove(d.path()))
	d.names = d.names[:len(d.names)-1]
	d.dirty = nil
	// It may be larger than the overlay was.
	d.open()
	for int64(len(d.model)) < d.n.Size() {
		part := make([]byte, d.n.Size()-int64(len(d.model)))
		d.must(d.n.Readv([][]byte{part}, int64(len(d.model))))
		d.model = append(d.model, part...)
	}
	if len(d.names) == 1 && d.n.header.Version > 2 {
		d.addBitmap()
	}
}

func (d *disk) addBitmap() {
	if all, err := d.n.Bitmaps(); err != nil || len(all) > 0 {
		d.must(err)
		d.must(d.n.RemoveBitmap("dirty"))
	}
	b, err := bitmap.New("dirty", d.n.Size(), 4096)
	d.must(err)
	if !d.n.header.roomForBitmaps() && d.n.header.Bitmaps == nil {
		return
	}
	d.must(d.n.AddBitmap(b))
	d.dirty, err = bitmap.New("model", d.n.Size(), 4096)
	d.must(err)
}

func (d *disk) resize() {
	size := (1 + d.r.Int64N(int64(len(d.model))*2/sector)) * sector
	d.must(d.n.Resize(size))
	old := int64(len(d.model))
	if size > old {
		d.model = append(d.model, make([]byte, size-old)...)
	}
	d.model = d.model[:size]
	if d.dirty != nil {
		d.must(d.dirty.Resize(size))
	}
	if d.n.Size() != size {
		d.t.Fatalf("size %d, want %d", d.n.Size(), size)
	}
}

// act does something at random.
func (d *disk) act() {
	d.t.Helper()
	limit := int64(32 << 10)
	if d.r.IntN(4) == 0 {
		limit = 256 << 10
	}
	off := d.r.Int64N(int64(len(d.model)))
	length := min(1+d.r.Int64N(limit), int64(len(d.model))-off)
	part := d.model[off : off+length]
	fill := func() {
		switch d.r.IntN(3) {
		case 0:
			copy(part, bytes.Repeat([]byte{byte(d.r.Uint32())}, len(part)))
		default:
			copy(part, mixed(d.r.Uint64(), uint64(len(part))))
		}
	}
	switch d.r.IntN(20) {
	case 0, 1:
		d.must(d.n.WriteZeroes(off, length, d.r.IntN(2) == 0))
		clear(part)
	case 2, 3:
		d.must(d.n.Discard(off, length))
		got := make([]byte, length) // zero, or as it was
		d.must(d.n.Readv([][]byte{got}, off))
		for i, v := range got {
			if v != 0 && v != part[i] {
				d.t.Fatalf("discarded byte %d is neither zero nor what it was", off+int64(i))
			}
			if v != part[i] && d.dirty != nil {
				d.dirty.Set(off+int64(i), 1)
			}
		}
		copy(part, got)
		return
	case 4:
		d.must(d.n.Flush())
		return
	case 5, 6, 7:
		got := make([]byte, length)
		d.must(d.n.Readv([][]byte{got}, off))
		if !bytes.Equal(got, part) {
			d.t.Fatalf("%d bytes at %d are wrong at %d", length, off, firstDifference(got, part))
		}
		return
	case 8, 9:
		if size := d.n.header.ClusterSize(); off%size != 0 && d.r.IntN(2) == 0 {
			off -= off % size
			part = d.model[off : off+length]
		}
		fill()
		d.must(d.n.WriteCompressed(part, off))
	default:
		fill()
		cut := d.r.Int64N(length + 1)
		d.must(d.n.Writev([][]byte{part[:cut], part[cut:]}, off))
	}
	if d.dirty != nil {
		d.dirty.Set(off, length)
	}
}

// run does things to a disk, closes and opens it, puts images on it and commits
// them, and resizes it.
func (d *disk) run(rounds, actions int) {
	for range rounds {
		for range actions {
			d.act()
		}
		got := make([]byte, d.n.Size())
		d.must(d.n.Readv([][]byte{got}, 0))
		if !bytes.Equal(got, d.model) {
			d.t.Fatalf("the image holds something else at %d", firstDifference(got, d.model))
		}
		switch k := d.r.IntN(6); {
		case k == 0 && len(d.names) < 4:
			d.overlay()
		case k == 1 && len(d.names) > 1:
			d.commit()
		case k <= 3:
			d.resize()
		default:
			d.close()
			d.open()
		}
	}
	d.close()
}

// effort is how much more than usual the tests do that are random, each time in
// another way: a number, by an environment variable.
func effort() int {
	n := 1
	fmt.Sscan(os.Getenv("QCOW2_TEST_EFFORT"), &n)
	return n
}

// TestModel: whatever is done to an image, it holds what its model holds, QEMU
// finds nothing wrong with it, and maps it as we do. disk/model does the same to
// chains of images, at length.
func TestModel(t *testing.T) {
	for _, tt := range []struct {
		name string
		o    CreateOptions
		qemu string // options of qemu-img, in place of ours

		compressed bool // there is something on the disk before
	}{
		{name: "plain"},
		{name: "version 2", o: CreateOptions{Version: 2}},
		{name: "version 2, small clusters", o: CreateOptions{Version: 2, ClusterSize: 512}},
		{name: "512", o: CreateOptions{ClusterSize: 512}},
		{name: "1k, counts of 1 bit", o: CreateOptions{ClusterSize: 1024, RefcountBits: 1}},
		{name: "4k, zstd, counts of 2 bits", o: CreateOptions{ClusterSize: 4096, RefcountBits: 2, Compression: Zstd}},
		{name: "16k, counts of 64 bits", o: CreateOptions{ClusterSize: 16 << 10, RefcountBits: 64}},
		{name: "32k, counts of 8 bits", o: CreateOptions{ClusterSize: 32 << 10, RefcountBits: 8}},
		{name: "256k, zstd, counts of 32 bits", o: CreateOptions{ClusterSize: 256 << 10, RefcountBits: 32, Compression: Zstd}},
		{name: "2M", o: CreateOptions{ClusterSize: 2 << 20, LazyRefcounts: true}},
		{name: "QEMU's, preallocated", qemu: "preallocation=metadata"},
		{name: "QEMU's, counts of 4 bits", qemu: "refcount_bits=4,cluster_size=8k"},
		{name: "QEMU's, lazy", qemu: "lazy_refcounts=on"},
		{name: "QEMU's, compressed", qemu: "compression_type=zlib", compressed: true},
		{name: "QEMU's, compressed by zstd", qemu: "compression_type=zstd", compressed: true},
		{name: "QEMU's of version 2", qemu: "compat=0.10,cluster_size=128k"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			const size = 1<<20 + 512*3
			d := &disk{t: t, r: rand.New(rand.NewPCG(7, uint64(len(tt.name)))), dir: t.TempDir(), names: []string{"0.qcow2"}, o: tt.o, model: make([]byte, size)}
			if tt.compressed {
				d.model = mixed(1, size)
				writeFile(t, filepath.Join(d.dir, "source"), d.model)
				qemuImg(t, "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", tt.qemu, filepath.Join(d.dir, "source"), d.path())
			} else if tt.qemu != "" {
				create(t, d.dir, "0.qcow2", fmt.Sprint(size), tt.qemu)
			} else {
				d.o.Size = size
				d.must(Create(d.path(), d.o))
			}
			d.open()
			if d.n.header.Version > 2 {
				d.addBitmap()
			}
			d.run(3*effort(), 50)
		})
	}
}
