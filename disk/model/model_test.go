// Package model drives images, chains of them and what is done to disks in use at
// random, beside a plain array of bytes. QEMU's tools have the last word.
package model

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/gnomon-vmm/gnomon/disk"
	"github.com/gnomon-vmm/gnomon/disk/bitmap"
	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/mirror"
	"github.com/gnomon-vmm/gnomon/disk/qcow2"
	"github.com/gnomon-vmm/gnomon/disk/stream"
)

const (
	cases      = 200
	operations = 250 // of a case
	sector     = 512
	maxChain   = 5
)

// effort is how many times more cases than usual there are, by an environment
// variable.
func effort() int {
	n := 1
	fmt.Sscan(os.Getenv("DISK_TEST_EFFORT"), &n)
	return n
}

// TestModel: whatever is done to a disk, it holds what an array of bytes holds;
// after a crash each sector is as it was flushed or as it was written since; QEMU
// finds nothing wrong with any image, and the same content.
func TestModel(t *testing.T) {
	if _, err := exec.LookPath("qemu-img"); err != nil {
		t.Skip("qemu-img is not installed")
	}
	for seed := range uint64(cases * effort()) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			d := newDisk(t, seed)
			for range operations {
				d.act()
			}
			d.verify()
		})
	}
}

// image is one of a chain.
type image struct {
	name    string
	format  string
	tail    []byte // what it read as when it was covered
	sealed  bool   // it is only read
	crashed bool   // while it was written
}

// model is a disk beside what it should be.
type model struct {
	t    *testing.T
	r    *rand.Rand
	dir  string
	size int64 // most of what the disk becomes

	chain []image // the last is in use
	made  int     // images
	root  *block.Root

	now     []byte             // the disk; as much as it becomes at most is there
	buf     []byte             // what read returns
	pending map[int64][][]byte // of each sector that was written since the last flush: what it was, and became
	dirty   *bitmap.Bitmap     // what was written since a bitmap of that name was made, or nil

	history []string
	step    int
}

func newDisk(t *testing.T, seed uint64) *model {
	t.Helper()
	d := &model{t: t, r: rand.New(rand.NewPCG(seed, 11)), dir: workDir(t), pending: map[int64][][]byte{}}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("seed %d:\n%s", seed, strings.Join(d.history, "\n"))
		}
		if d.root != nil {
			d.root.Close()
		}
	})
	d.begin(seed)
	d.open()
	return d
}

// workDir is in memory where that can be: what is flushed here is to be read by
// others, not to outlive the host.
func workDir(t *testing.T) string {
	dir, err := os.MkdirTemp("/dev/shm", "gnomon-model-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func (d *model) must(err error) {
	d.t.Helper()
	if err != nil {
		d.t.Fatalf("step %d: %v", d.step, err)
	}
}

func (d *model) fail(format string, args ...any) {
	d.t.Helper()
	d.t.Fatalf("step %d: "+format, append([]any{d.step}, args...)...)
}

// did notes an operation.
func (d *model) did(format string, args ...any) {
	d.history = append(d.history, fmt.Sprintf("%d: ", d.step)+fmt.Sprintf(format, args...))
}

func (d *model) top() *image          { return &d.chain[len(d.chain)-1] }
func (d *model) path(i *image) string { return filepath.Join(d.dir, i.name) }

func (d *model) open() {
	d.t.Helper()
	n, err := disk.Open(d.path(d.top()), disk.Options{Format: d.top().format})
	d.must(err)
	d.root = block.NewRoot(n)
	if d.root.Size() != int64(len(d.now)) {
		d.fail("the disk has %d bytes, not %d", d.root.Size(), len(d.now))
	}
}

// close makes everything durable.
func (d *model) close() {
	d.t.Helper()
	root := d.root
	d.root = nil
	d.must(root.Close())
	clear(d.pending)
}

// qcow2 is the image in use, or nil if it is none.
func (d *model) qcow2() *qcow2.Node {
	n, _ := d.root.Current().(*qcow2.Node)
	return n
}

// read returns bytes that the disk holds, until the next read.
func (d *model) read(off, length int64) []byte {
	d.t.Helper()
	b := d.buf[:length]
	for i := range b {
		b[i] = 0xa5
	}
	cut := d.r.Int64N(length + 1)
	d.must(d.root.Readv([][]byte{b[:cut], b[cut:]}, off))
	return b
}

// expect compares bytes of the disk from off on with what it should hold.
func (d *model) expect(got []byte, off int64) {
	d.t.Helper()
	if want := d.now[off:][:len(got)]; !bytes.Equal(got, want) {
		i := slices.IndexFunc(got, func(b byte) bool { w := want[0]; want = want[1:]; return b != w })
		d.fail("byte %d is %#x, not as it should be", off+int64(i), got[i])
	}
}

// change has do change a range; now says what it becomes then.
func (d *model) change(off, length int64, now func(part []byte), do func()) {
	d.t.Helper()
	from, to := off/sector*sector, (off+length+sector-1)/sector*sector
	was := bytes.Clone(d.now[from:to])
	now(d.now[off : off+length])
	do()
	is := bytes.Clone(d.now[from:to])
	for at := int64(0); at < to-from; at += sector {
		i := (from + at) / sector
		if d.pending[i] == nil {
			d.pending[i] = [][]byte{was[at:][:sector]}
		}
		d.pending[i] = append(d.pending[i], is[at:][:sector])
	}
}

// act does something at random.
func (d *model) act() {
	d.t.Helper()
	d.step++
	switch k := d.r.IntN(100); {
	case k < 76:
		d.request()
	case k < 80:
		d.did("reopen")
		d.close()
		d.open()
		d.checkBitmap()
	case k < 84:
		d.crash()
	case k < 88:
		d.resize()
	case k < 91:
		d.bitmap()
	case k < 94:
		d.overlay()
	case k < 96:
		d.commit()
	case k < 98:
		d.consolidate()
		d.middle()
		d.stream()
	default:
		d.rebase()
	}
}

// request is what a guest does.
func (d *model) request() {
	d.t.Helper()
	size := int64(len(d.now))
	off := d.r.Int64N(size)
	length := min(1+d.r.Int64N(d.size/16), size-off)
	if d.r.IntN(3) == 0 { // as file systems do
		off -= off % 4096
		length = min((length+4095)/4096*4096, size-off)
	}
	fill := func(part []byte) {
		if d.r.IntN(2) == 0 {
			copy(part, bytes.Repeat([]byte{byte(d.r.Uint32())}, len(part)))
			return
		}
		noise(d.r, part)
	}
	wrote := func() {
		if d.dirty != nil {
			d.dirty.Set(off, length)
		}
	}
	switch k := d.r.IntN(76); {
	case k < 36:
		d.did("write %d at %d", length, off)
		d.change(off, length, fill, func() {
			cut := d.r.Int64N(length + 1)
			d.must(d.root.Writev([][]byte{d.now[off : off+cut], d.now[off+cut : off+length]}, off))
		})
		wrote()
	case k < 44:
		unmap := d.r.IntN(2) == 0
		d.did("zero %d at %d, unmap=%v", length, off, unmap)
		d.change(off, length, func(part []byte) { clear(part) }, func() { d.must(d.root.WriteZeroes(off, length, unmap)) })
		wrote()
	case k < 52:
		d.did("discard %d at %d", length, off)
		d.discard(off, length)
	case k < 58:
		d.did("flush")
		d.must(d.root.Flush())
		clear(d.pending)
	case k < 60 && d.qcow2() != nil:
		d.did("compress %d at %d", length, off)
		d.change(off, length, fill, func() { d.must(d.qcow2().WriteCompressed(d.now[off:off+length], off)) })
		wrote()
	default:
		d.did("read %d at %d", length, off)
		d.expect(d.read(off, length), off)
	}
}

// discard leaves each byte as it was, or zero.
func (d *model) discard(off, length int64) {
	was := bytes.Clone(d.now[off : off+length])
	d.change(off, length, func([]byte) {}, func() {
		d.must(d.root.Discard(off, length))
		got := d.read(off, length)
		for i, b := range got {
			if b == was[i] {
				continue
			}
			if b != 0 {
				d.fail("discarded byte %d is neither zero nor what it was", off+int64(i))
			}
			if d.dirty != nil {
				d.dirty.Set(off+int64(i), 1)
			}
		}
		copy(d.now[off:], got)
	})
	// What was flushed may be back after a crash, and what was discarded may be zero.
	for i := off / sector; i <= (off+length-1)/sector; i++ {
		d.pending[i] = append(d.pending[i], make([]byte, sector))
	}
}

// newSize is from half of the most that the disk becomes up to that.
func (d *model) newSize() int64 {
	return (d.size/2 + d.r.Int64N(d.size/2+1)) / sector * sector
}

// setSize makes the disk's model larger, by zeroes, or smaller.
func (d *model) setSize(size int64) {
	old := int64(len(d.now))
	d.now = d.now[:size]
	clear(d.now[min(old, size):])
}

func (d *model) resize() {
	size := d.newSize()
	if size == int64(len(d.now)) {
		return // nothing happens then: nothing is flushed
	}
	d.did("resize to %d", size)
	d.must(d.root.Current().(block.Resizer).Resize(size))
	d.setSize(size)
	clear(d.pending)
	if d.dirty != nil {
		d.must(d.dirty.Resize(size))
	}
	d.expect(d.read(0, size), 0)
}

// bitmap has a new one begin, in place of the old.
func (d *model) bitmap() {
	n := d.qcow2()
	if n == nil || n.Header().Version < 3 {
		return
	}
	d.checkBitmap()
	d.did("bitmap")
	all, err := n.Bitmaps()
	d.must(err)
	for _, b := range all {
		d.must(n.RemoveBitmap(b.Name))
	}
	d.dirty = nil
	b, err := bitmap.New("dirty", n.Size(), 4096)
	d.must(err)
	if err := n.AddBitmap(b); err != nil {
		if !errors.Is(err, qcow2.ErrBitmap) { // no room in the header
			d.fail("%v", err)
		}
		return
	}
	d.dirty, err = bitmap.New("model", n.Size(), 4096)
	d.must(err)
}

// checkBitmap: the bitmap knows of all that was written.
func (d *model) checkBitmap() {
	d.t.Helper()
	if d.dirty == nil {
		return
	}
	b, err := d.qcow2().Bitmap("dirty")
	d.must(err)
	for off := int64(0); off < b.Size(); off += b.Granularity() {
		if d.dirty.Get(off) && !b.Get(off) {
			d.fail("the bitmap does not know that %d was written", off)
		}
	}
}

// crash ends the process that has the disk, as far as its files can tell.
func (d *model) crash() {
	d.t.Helper()
	d.did("crash")
	for i := range d.chain {
		copyFile(d.t, d.path(&d.chain[i]), d.path(&d.chain[i])+".crashed")
	}
	root := d.root
	d.root = nil
	root.Close() // what it still writes nobody reads
	for i := range d.chain {
		d.must(os.Rename(d.path(&d.chain[i])+".crashed", d.path(&d.chain[i])))
		d.chain[i].crashed = true
	}
	d.open()
	got := d.read(0, int64(len(d.now)))
	for i := range int64(len(got) / sector) {
		part := got[i*sector:][:sector]
		if !bytes.Equal(part, d.now[i*sector:][:sector]) && !slices.ContainsFunc(d.pending[i], func(b []byte) bool { return bytes.Equal(b, part) }) {
			d.fail("after a crash, sector %d holds neither what was flushed nor what was written since", i)
		}
	}
	copy(d.now, got)
	clear(d.pending)
	d.dirty = nil // it does not count any more
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	src, err := os.Open(from)
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	dst, err := os.Create(to)
	if err != nil {
		t.Fatal(err)
	}
	_, err = io.Copy(dst, src)
	if err := errors.Join(err, dst.Close()); err != nil {
		t.Fatal(err)
	}
}

// overlay is a snapshot: the disk goes on in a new image on the one in use.
func (d *model) overlay() {
	if len(d.chain) == maxChain {
		return
	}
	o := d.options()
	o.Backing, o.BackingFormat, o.Size = d.top().name, d.top().format, int64(len(d.now))
	if d.r.IntN(3) == 0 {
		o.Size = d.newSize()
	}
	d.did("overlay %+v", o)
	d.close()
	d.top().tail = bytes.Clone(d.now)
	d.setSize(o.Size)
	d.add("qcow2")
	d.must(qcow2.Create(d.path(d.top()), o))
	d.dirty = nil
	d.open()
}

// add names a new image.
func (d *model) add(format string) {
	d.chain = append(d.chain, image{name: fmt.Sprintf("%d.%s", d.made, format), format: format})
	d.made++
}

// drop removes the images above the one at depth, in which the disk goes on: it
// may be larger, and holds its own there.
func (d *model) drop(depth int) {
	keep := len(d.chain) - depth
	for i := range d.chain[keep:] {
		d.must(os.Remove(d.path(&d.chain[keep+i])))
	}
	d.chain = d.chain[:keep]
	if tail := d.top().tail; len(tail) > len(d.now) {
		d.now = append(d.now, tail[len(d.now):]...)
	}
	d.dirty = nil
}

// commit moves the image in use into the one that it lies on, while nobody uses it.
func (d *model) commit() {
	if len(d.chain) == 1 || d.chain[len(d.chain)-2].sealed {
		return
	}
	d.did("commit")
	d.close()
	_, err := qcow2.Commit(context.Background(), d.path(d.top()), qcow2.CommitOptions{Empty: d.r.IntN(2) == 0})
	d.must(err)
	d.drop(1)
	d.open()
}

// consolidate does the same while the disk is used, over any number of images.
// It ends, is given up, or its process dies.
func (d *model) consolidate() {
	if len(d.chain) == 1 {
		return
	}
	depth := 1 + d.r.IntN(len(d.chain)-1)
	base := &d.chain[len(d.chain)-1-depth]
	if base.sealed {
		return
	}
	if d.r.IntN(2) == 0 {
		d.bitmap()
	}
	end := d.ending()
	d.did("consolidate %d images, %s", depth, end)
	c, err := mirror.Consolidate(d.root, mirror.Options{Depth: depth, Step: 64 << 10, Pause: d.pause(end != finish)})
	if base.tail != nil && len(base.tail) < len(d.now) {
		if err == nil {
			d.fail("a disk of %d bytes is consolidated into %d", len(d.now), len(base.tail))
		}
		d.expect(d.read(0, int64(len(d.now))), 0)
		return
	}
	d.must(err)
	d.run(c.Run)
	for range 5 {
		d.request()
	}
	switch end {
	case giveUp:
		d.must(c.Cancel())
		d.uncover(depth)
		d.checkBitmap()
	case crash:
		d.crash()
		d.uncover(depth)
	default:
		d.must(c.Finish())
		clear(d.pending)
		d.drop(depth)
	}
	d.expect(d.read(0, int64(len(d.now))), 0)
}

// ending is how a job ends. Half of those that do not finish end in their pass.
type ending string

const (
	giveUp ending = "give up"
	crash  ending = "crash"
	finish ending = "finish"
)

func (d *model) ending() ending {
	return []ending{giveUp, crash, finish, finish}[d.r.IntN(4)]
}

// errGiveUp ends a pass before its end.
var errGiveUp = errors.New("given up")

// pause does things between a job's steps, and may end it.
func (d *model) pause(mayEnd bool) func() error {
	mayEnd = mayEnd && d.r.IntN(2) == 0
	return func() error {
		for range d.r.IntN(3) {
			d.request()
		}
		if mayEnd && d.r.IntN(2) == 0 {
			return errGiveUp
		}
		return nil
	}
}

// run makes a job's pass, or a part of it.
func (d *model) run(pass func(context.Context) error) {
	d.t.Helper()
	if err := pass(context.Background()); !errors.Is(err, errGiveUp) {
		d.must(err)
	}
}

// middle deletes images of which the disk's own is none, and none the last.
func (d *model) middle() {
	if len(d.chain) < 3 || d.r.IntN(2) == 0 {
		return
	}
	top := 1 + d.r.IntN(len(d.chain)-2)
	depth := top + 1 + d.r.IntN(len(d.chain)-top-1)
	last := len(d.chain) - 1
	above, base := &d.chain[last-top+1], &d.chain[last-depth]
	if base.sealed || above.sealed {
		return
	}
	end := d.ending()
	d.did("delete images at depths %d to %d, %s", top, depth-1, end)
	m, err := mirror.NewMiddle(d.root, mirror.MiddleOptions{
		Options: mirror.Options{Depth: depth, Step: 64 << 10, Pause: d.pause(end != finish)}, Top: top, BackingFile: base.name,
	})
	d.must(err)
	d.run(m.Run)
	switch end {
	case giveUp:
		d.must(m.Cancel())
	case crash:
		d.crash()
	default:
		d.must(m.Finish())
		for i := last - depth + 1; i <= last-top; i++ {
			d.must(os.Remove(d.path(&d.chain[i])))
		}
		d.chain = slices.Delete(d.chain, last-depth+1, last-top+1)
	}
	d.uncover(len(d.chain) - 1)
	d.expect(d.read(0, int64(len(d.now))), 0)
	d.checkBitmap()
}

// stream has the disk's own image come to hold what images behind it hold, which go.
func (d *model) stream() {
	n := d.qcow2()
	if len(d.chain) == 1 || n == nil || d.r.IntN(2) == 0 {
		return
	}
	end := d.ending()
	o := stream.Options{Pause: d.pause(end != finish)}
	below := d.r.IntN(len(d.chain) - 1) // images that stay
	if below > 0 {
		o.Depth, o.BackingFile = len(d.chain)-below, d.chain[below-1].name
	}
	d.did("stream, %d images stay, %s", below, end)
	f, err := stream.New(n, o)
	if err != nil && n.Header().Version < 3 {
		return // it cannot hold zeroes
	}
	d.must(err)
	d.root.Swap(f)
	d.run(f.Run)
	switch end {
	case giveUp:
		d.root.Swap(n)
		d.expect(d.read(0, int64(len(d.now))), 0)
		return
	case crash:
		d.crash()
		return
	}
	d.root.Drained(func(block.Node) block.Node {
		gone, err := f.Finish()
		d.must(err)
		d.must(gone.Close())
		return n
	})
	for i := below; i < len(d.chain)-1; i++ {
		d.must(os.Remove(d.path(&d.chain[i])))
	}
	d.chain = slices.Delete(d.chain, below, len(d.chain)-1)
	clear(d.pending)
	d.expect(d.read(0, int64(len(d.now))), 0)
	d.checkBitmap()
}

// uncover reads anew what the images below the disk hold: they are not the
// snapshots any more that they were.
func (d *model) uncover(depth int) {
	d.t.Helper()
	for i := range depth {
		image := &d.chain[len(d.chain)-2-i]
		n, err := disk.Open(d.path(image), disk.Options{Format: image.format, ReadOnly: true})
		d.must(err)
		image.tail = make([]byte, n.Size())
		d.must(errors.Join(n.Readv([][]byte{image.tail}, 0), n.Close()))
	}
}

// rebase has the image in use lie on one further down, or on none, and removes
// those between.
func (d *model) rebase() {
	if len(d.chain) == 1 {
		return
	}
	below := d.r.IntN(len(d.chain)) // images that stay below it
	o := qcow2.RebaseOptions{}
	if below > 0 {
		o.Backing, o.BackingFormat = d.chain[below-1].name, d.chain[below-1].format
	}
	d.did("rebase to %q", o.Backing)
	d.close()
	d.must(qcow2.Rebase(context.Background(), d.path(d.top()), o))
	for i := below; i < len(d.chain)-1; i++ {
		d.must(os.Remove(d.path(&d.chain[i])))
	}
	d.chain = append(d.chain[:below], *d.top())
	d.open()
	d.checkBitmap()
}
