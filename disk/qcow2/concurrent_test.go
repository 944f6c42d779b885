package qcow2

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
)

func memoryImage(t testing.TB, o CreateOptions) (*Node, *memory) {
	t.Helper()
	b, err := o.encode()
	if err != nil {
		t.Fatal(err)
	}
	file := &memory{b: b}
	n, err := inMemory(t, map[string]*memory{"image": file}, false)
	if err != nil {
		t.Fatal(err)
	}
	return n, file
}

// sound has the check find nothing wrong with an image that was closed.
func sound(t testing.TB, file *memory) *Report {
	t.Helper()
	r, err := newChain().node(file, "image").check(t.Context(), CheckOptions{})
	if err != nil || !r.Clean() {
		t.Fatalf("%v: %+v", err, r)
	}
	return r
}

// TestRequestsTogether: writers of all kinds, each with pieces of its own that share
// clusters and tables with those of others, readers, and flushes, after which
// clusters are used again.
func TestRequestsTogether(t *testing.T) {
	for _, o := range []CreateOptions{{ClusterSize: 4096}, {ClusterSize: 512, Version: 2}, {ClusterSize: 64 << 10, Compression: Zstd}} {
		const size, writers, piece = 2 << 20, 4, 3 << 10
		o.Size = size
		n, file := memoryImage(t, o)
		var wg, flushes sync.WaitGroup
		var stop atomic.Bool
		flushes.Go(func() {
			for !stop.Load() {
				if err := n.Flush(); err != nil {
					t.Error(err)
				}
			}
		})
		for w := range int64(writers) {
			wg.Go(func() {
				r := rand.New(rand.NewPCG(uint64(w), 9))
				model := map[int64]byte{}
				count := (size/piece - w + writers - 1) / writers
				for range 600 {
					off := (w + r.Int64N(count)*writers) * piece
					v := byte(1 + r.IntN(250))
					b := bytes.Repeat([]byte{v}, piece)
					var err error
					switch r.IntN(8) {
					case 0:
						err = n.WriteZeroes(off, piece, r.IntN(2) == 0)
						model[off] = 0
					case 1:
						if err = n.Discard(off, piece); err == nil {
							// Whole clusters of a piece are zero then, and others not.
							err = n.WriteZeroes(off, piece, true)
							model[off] = 0
						}
					case 2:
						err = n.WriteCompressed(b, off)
						model[off] = v
					case 3, 4:
						got := make([]byte, piece)
						if err = n.Readv([][]byte{got}, off); err == nil && !bytes.Equal(got, bytes.Repeat([]byte{model[off]}, piece)) {
							t.Errorf("%+v: at %d stands %d, not %d", o, off, got[0], model[off])
							return
						}
					default:
						err = n.Writev([][]byte{b[:1000], b[1000:]}, off)
						model[off] = v
					}
					if err != nil {
						t.Errorf("%+v: at %d: %v", o, off, err)
						return
					}
				}
				for off, v := range model {
					got := make([]byte, piece)
					if err := n.Readv([][]byte{got}, off); err != nil || !bytes.Equal(got, bytes.Repeat([]byte{v}, piece)) {
						t.Errorf("%+v: in the end at %d stands %d, not %d: %v", o, off, got[0], v, err)
					}
				}
			})
		}
		wg.Wait()
		stop.Store(true)
		flushes.Wait()
		if err := n.Close(); err != nil {
			t.Fatal(err)
		}
		if r := sound(t, file); r.ImageEndOffset > 2*size {
			t.Errorf("%+v: the file has %d bytes", o, r.ImageEndOffset)
		}
	}
}

// held is a file one of whose writes waits, at a place, until it is let go.
type held struct {
	*memory
	from, to atomic.Int64 // of the file; the first write there waits
	arrived  chan struct{}
	release  chan struct{}
}

func (h *held) Writev(bufs [][]byte, off int64) error {
	if off >= h.from.Load() && off < h.to.Load() {
		h.to.Store(0)
		close(h.arrived)
		<-h.release
	}
	return h.memory.Writev(bufs, off)
}

// A request whose data is slow to write keeps nobody waiting but those to the same
// cluster; and its cluster is not used for something else, even if it is discarded
// meanwhile.
func TestSlowRequestHoldsNobodyUp(t *testing.T) {
	const cluster = 4096
	n, file := memoryImage(t, CreateOptions{Size: 1 << 20, ClusterSize: cluster})
	h := &held{memory: file, arrived: make(chan struct{}), release: make(chan struct{})}
	n.file, n.w.file = h, h
	fill := func(v byte, off int64) {
		t.Helper()
		if err := n.Writev([][]byte{bytes.Repeat([]byte{v}, cluster)}, off); err != nil {
			t.Fatal(err)
		}
	}
	fill(1, 0)
	e, epoch, err := n.lookup(0, cluster)
	if err != nil {
		t.Fatal(err)
	}
	n.leave(epoch)
	h.from.Store(e.host)
	h.to.Store(e.host + cluster)
	var slow sync.WaitGroup
	slow.Go(func() {
		if err := n.Writev([][]byte{bytes.Repeat([]byte{2}, cluster)}, 0); err != nil {
			t.Error(err)
		}
	})
	<-h.arrived
	if err := n.Discard(0, cluster); err != nil {
		t.Fatal(err)
	}
	var flushed sync.WaitGroup
	flushed.Go(func() {
		if err := n.Flush(); err != nil {
			t.Error(err)
		}
	})
	for i := int64(1); i < 50; i++ {
		fill(byte(10+i), i*cluster)
	}
	close(h.release)
	slow.Wait()
	flushed.Wait()
	for i := int64(50); i < 100; i++ {
		fill(byte(10+i), i*cluster)
	}
	for i := int64(1); i < 100; i++ {
		got := make([]byte, cluster)
		if err := n.Readv([][]byte{got}, i*cluster); err != nil || !bytes.Equal(got, bytes.Repeat([]byte{byte(10 + i)}, cluster)) {
			t.Fatalf("cluster %d holds %d: %v", i, got[0], err)
		}
	}
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	sound(t, file)
}

// TestFlushes: a flush takes as few of the file as the order of its writes allows.
func TestFlushes(t *testing.T) {
	const cluster = 4096
	n, file := memoryImage(t, CreateOptions{Size: 64 << 20, ClusterSize: cluster})
	step := func(what string, want int, f func() error) {
		t.Helper()
		if err := f(); err != nil {
			t.Fatal(err)
		}
		file.flushes = 0
		if err := n.Flush(); err != nil {
			t.Fatal(err)
		}
		if file.flushes != want {
			t.Errorf("%s: %d flushes, want %d", what, file.flushes, want)
		}
	}
	write := func(off int64, length int) func() error {
		return func() error { return n.Writev([][]byte{make([]byte, length)}, off) }
	}
	step("nothing", 1, func() error { return nil })
	step("new table", 3, write(0, cluster))
	step("new clusters", 2, write(cluster, 100*cluster))
	step("in place", 1, write(0, 50*cluster))
	step("discard", 2, func() error { return n.Discard(0, 10*cluster) })
	step("after a discard", 1, func() error { return nil })
	step("compressed", 2, func() error { return n.WriteCompressed(make([]byte, 10*cluster), 0) })
	// 2048 clusters are counted by a block of counts.
	step("new block of counts", 4, write(8<<20, 9<<20))
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	sound(t, file)
}

// TestSpaceIsUsedAgain: what is discarded, written over, or written compressed anew
// does not make the file grow; and it ends where its last cluster does.
func TestSpaceIsUsedAgain(t *testing.T) {
	for name, again := range map[string]func(n *Node, b []byte, off int64) error{
		"discard": func(n *Node, b []byte, off int64) error {
			return errors.Join(n.Discard(off, int64(len(b))), n.Flush(), n.Writev([][]byte{b}, off))
		},
		"zeroes": func(n *Node, b []byte, off int64) error {
			return errors.Join(n.WriteZeroes(off, int64(len(b)), true), n.Flush(), n.Writev([][]byte{b}, off))
		},
		"compressed": func(n *Node, b []byte, off int64) error {
			return errors.Join(n.WriteCompressed(b, off), n.Flush())
		},
		"compressed and written": func(n *Node, b []byte, off int64) error {
			return errors.Join(n.WriteCompressed(b, off), n.Flush(), n.Writev([][]byte{b}, off), n.Flush())
		},
		"kept": func(n *Node, b []byte, off int64) error {
			return errors.Join(n.WriteZeroes(off, int64(len(b)), false), n.Writev([][]byte{b}, off))
		},
	} {
		const size = 1 << 20
		n, file := memoryImage(t, CreateOptions{Size: size, ClusterSize: 4096})
		r := rand.New(rand.NewPCG(5, 5))
		model := make([]byte, size)
		for i := range 100 {
			off := r.Int64N(size/4096-16) * 4096
			b := mixed(uint64(i), 64<<10)
			copy(model[off:], b)
			if err := again(n, b, off); err != nil {
				t.Fatal(err)
			}
		}
		if end := n.w.end; end > size*5/4 {
			t.Errorf("%s: the file has %d bytes for a disk of %d", name, end, size)
		}
		if !bytes.Equal(readAll(t, n), model) {
			t.Errorf("%s: the disk holds something else", name)
		}
		if err := n.Discard(0, size); err != nil {
			t.Fatal(err)
		}
		if err := n.Close(); err != nil {
			t.Fatal(err)
		}
		if r := sound(t, file); r.AllocatedClusters != 0 || int64(len(file.b)) > 128<<10 || r.ImageEndOffset != int64(len(file.b)) {
			t.Errorf("%s: the file of an empty disk has %d bytes, and ends at %d", name, len(file.b), r.ImageEndOffset)
		}
	}
}

// TestWriterIsBounded: tables and counts that a writer keeps are no more than its
// caches hold, and what waits for a flush no more than is allowed.
func TestWriterIsBounded(t *testing.T) {
	const cluster = 512
	n, file := memoryImage(t, CreateOptions{Size: 16 << 20, ClusterSize: cluster})
	n.w.l2.limit, n.w.counts.slices.limit = 16, 8
	r := rand.New(rand.NewPCG(6, 6))
	model := make([]byte, n.Size())
	for i := range 3000 {
		off := r.Int64N(n.Size()/cluster) * cluster
		b := bytes.Repeat([]byte{byte(i)}, cluster)
		copy(model[off:], b)
		if err := n.Writev([][]byte{b}, off); err != nil {
			t.Fatal(err)
		}
		if l2, counts := len(n.w.l2.ring), len(n.w.counts.slices.ring); l2 > 17 || counts > 9 || len(n.w.l2.at) != l2 {
			t.Fatalf("%d slices of tables, %d of counts", l2, counts)
		}
	}
	if !bytes.Equal(readAll(t, n), model) {
		t.Error("the disk holds something else")
	}
	for off := int64(0); off < n.Size(); off += 2 * cluster {
		if err := n.Discard(off, cluster); err != nil {
			t.Fatal(err)
		}
		if len(n.w.freed) > maxFreed+1 {
			t.Fatalf("%d runs wait", len(n.w.freed))
		}
	}
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	sound(t, file)
}

// TestFullFile: a file that cannot grow fails writes, and nothing else.
func TestFullFile(t *testing.T) {
	n, file := memoryImage(t, CreateOptions{Size: 1 << 20, ClusterSize: 512})
	file.limit = 300 << 10
	model := make([]byte, n.Size())
	failed := 0
	for off := int64(0); off < n.Size(); off += 8 << 10 {
		b := bytes.Repeat([]byte{byte(off >> 13)}, 8<<10)
		if err := n.Writev([][]byte{b}, off); err != nil {
			failed++
			continue
		}
		copy(model[off:], b)
	}
	if failed == 0 || failed == 128 {
		t.Errorf("%d failed", failed)
	}
	// A failed write may have been made in part; what succeeded is there.
	for off := int64(0); off < n.Size(); off += 8 << 10 {
		got := make([]byte, 8<<10)
		if err := n.Readv([][]byte{got}, off); err != nil || model[off+1] != 0 && !bytes.Equal(got, model[off:off+8<<10]) {
			t.Fatalf("at %d: %v", off, err)
		}
	}
	if err := n.Flush(); err != nil {
		t.Fatal(err)
	}
	if err := n.Discard(0, 512<<10); err != nil {
		t.Fatal(err)
	}
	if err := n.Flush(); err != nil {
		t.Fatal(err)
	}
	if err := n.Writev([][]byte{make([]byte, 100<<10)}, 0); err != nil {
		t.Errorf("there is room again: %v", err)
	}
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	sound(t, file)
}

// TestGrowL1 grows a disk until its L1 table, and the table of counts, have to move.
func TestGrowL1(t *testing.T) {
	n, file := memoryImage(t, CreateOptions{Size: 512, ClusterSize: 512})
	if err := n.Writev([][]byte{bytes.Repeat([]byte{7}, 512)}, 0); err != nil {
		t.Fatal(err)
	}
	for size := int64(1 << 10); size <= 256<<20; size *= 4 {
		if err := n.Resize(size); err != nil {
			t.Fatal(err)
		}
		if err := n.Writev([][]byte{bytes.Repeat([]byte{byte(size >> 10)}, 512)}, size-512); err != nil {
			t.Fatal(err)
		}
	}
	if err := n.Writev([][]byte{bytes.Repeat([]byte{9}, 12<<20)}, 100<<20); err != nil {
		t.Fatal(err)
	}
	if err := n.Resize(1 << 62); !errors.Is(err, ErrHeader) {
		t.Errorf("a giant disk: %v", err)
	}
	if err := n.Resize(1000); !errors.Is(err, ErrHeader) {
		t.Errorf("half a sector: %v", err)
	}
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	sound(t, file)
	n, err := inMemory(t, map[string]*memory{"image": file}, false)
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 512)
	for _, off := range []int64{0, 105 << 20} {
		if err := n.Readv([][]byte{b}, off); err != nil || b[0] == 0 || b[0] != b[511] {
			t.Errorf("at %d stands %d: %v", off, b[0], err)
		}
	}
	if err := errors.Join(n.Resize(512), n.Close()); err != nil {
		t.Fatal(err)
	}
	if r := sound(t, file); r.AllocatedClusters != 1 {
		t.Errorf("%+v", r)
	}
}
