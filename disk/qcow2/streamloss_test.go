package qcow2

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/gnomon-vmm/gnomon/disk/block"
)

// Streaming is a stream.Filter, and NewStream its New with Options.Depth, BackingFile and
// Pause: that package lies on this one, whose own tests cannot import it.
type Streaming interface {
	block.Node
	Run(ctx context.Context) error
	Finish() (block.Node, error)
}

var NewStream func(top *Node, depth int, backingFile string, pause func() error) (Streaming, error)

// guest does something to the disk that its user may do while it is streamed.
func (w *workload) guest(d block.Node) {
	s, r := w.s, w.r
	off := r.Int64N(s.size)
	length := min(1+r.Int64N(s.size/8), s.size-off)
	part := s.now[off : off+length]
	switch r.IntN(8) {
	case 0:
		clear(part)
		s.wrote(off, length)
		w.note()
		w.must(d.WriteZeroes(off, length, true))
	case 1:
		old := slices.Clone(part)
		clear(part)
		s.wrote(off, length)
		w.note()
		w.must(d.Discard(off, length))
		w.must(d.Readv([][]byte{part}, off))
		if !bytes.Equal(part, old) {
			s.wrote(off, length)
		}
	case 2, 3:
		w.must(d.Flush())
		s.durable()
	default:
		for i := range part {
			part[i] = byte(r.Uint32())
		}
		s.wrote(off, length)
		w.note()
		w.must(d.Writev([][]byte{part}, off))
	}
	w.note()
}

// layer makes an image with random content on those that there are, and returns its file.
func (w *workload) layer(empty []byte) []byte {
	file := &memory{b: empty}
	n, err := w.open(file)
	w.must(err)
	for range 12 {
		w.guest(n)
	}
	w.must(n.Close())
	w.s.durable()
	w.moments = nil
	return file.b
}

// stream has an image come to hold what the image between it and the base holds, and the
// base if it shall not stay, while the disk is used.
func (w *workload) stream(depth int, name string) {
	file := &memory{b: slices.Clone(w.first), log: &w.log}
	w.note()
	n, err := w.open(file)
	w.must(err)
	var f Streaming
	f, err = NewStream(n, depth, name, func() error {
		for range w.acts {
			w.guest(f)
		}
		return nil
	})
	w.must(err)
	w.must(f.Run(context.Background()))
	for range w.acts {
		w.guest(f)
	}
	gone, err := f.Finish()
	w.must(err)
	w.must(gone.Close())
	w.s.durable()
	w.note()
	w.done, w.stay = len(w.log), map[string]*memory{}
	if depth != 0 {
		w.stay["base"] = w.files["base"]
	}
	for range w.acts {
		w.guest(n)
	}
	w.must(n.Close())
	w.s.durable()
	w.note()
}

// TestPowerLossOfStream cuts the power at every write of a stream, and of the change of the
// backing file's name at its end, while the disk is used: as TestPowerLoss does. Once the
// stream has ended the images that it was for are gone.
func TestPowerLossOfStream(t *testing.T) {
	const enough = 1500
	var cuts atomic.Int64
	t.Cleanup(func() {
		t.Logf("%d cuts", cuts.Load())
		if cuts.Load() < enough && !t.Failed() {
			t.Errorf("%d cuts, of %d", cuts.Load(), enough)
		}
	})
	long := strings.Repeat("./", 300) // a name that fills more than a sector
	for i, tt := range []struct {
		o       CreateOptions
		between string // the backing file as the image names it first
		base    string // and in the end, if it stays
		depth   int
		byQEMU  bool // who made it
		seeds   int
	}{
		{CreateOptions{Size: 24 << 10, ClusterSize: 512}, "between", "base", 2, false, 9},
		{CreateOptions{Size: 24 << 10, ClusterSize: 512, Version: 2}, "between", "", 0, false, 9},
		{CreateOptions{Size: 48 << 10, ClusterSize: 2048}, long + "between", "base", 2, false, 6},
		{CreateOptions{Size: 48 << 10, ClusterSize: 2048}, long + "between", "", 0, false, 6},
		{CreateOptions{Size: 64 << 10, ClusterSize: 4096}, "between", long + "base", 2, false, 6},
		{CreateOptions{Size: 64 << 10, ClusterSize: 4096}, long + "between", long + "base", 2, true, 6},
		{CreateOptions{Size: 64 << 10, ClusterSize: 4096}, "between", "", 0, true, 6},
		{CreateOptions{Size: 2<<20 + 200<<10, ClusterSize: 64 << 10}, "between", "base", 2, false, 1},
	} {
		t.Run(fmt.Sprintf("%d bytes, stream %d", tt.o.ClusterSize, i), func(t *testing.T) {
			t.Parallel()
			for seed := range tt.seeds * effort() {
				w := newWorkload(t, CreateOptions{Size: tt.o.Size, Backing: "base", BackingFormat: "raw"}, tt.o.Size, 4, rand.New(rand.NewPCG(uint64(seed), uint64(100+i))))
				o := tt.o
				o.Backing, o.BackingFormat = "base", "raw"
				empty, err := o.encode()
				w.must(err)
				w.files["between"] = &memory{b: w.layer(empty), readOnly: true}
				o.Backing, o.BackingFormat = tt.between, "qcow2"
				if tt.byQEMU {
					path := filepath.Join(t.TempDir(), "image")
					qemuImg(t, "create", "-q", "-u", "-f", "qcow2", "-b", o.Backing, "-F", "qcow2", "-o", fmt.Sprintf("cluster_size=%d", o.ClusterSize), path, fmt.Sprint(o.Size))
					empty, err = os.ReadFile(path)
				} else {
					empty, err = o.encode()
				}
				w.must(err)
				w.first = w.layer(empty)
				w.stream(tt.depth, tt.base)
				w.cut(fmt.Sprintf("stream %d, seed %d", i, seed))
				cuts.Add(int64(len(w.log)))
			}
		})
	}
}
