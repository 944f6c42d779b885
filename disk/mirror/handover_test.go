package mirror

import (
	"context"
	"encoding/binary"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/gnomon-vmm/gnomon/disk/block"
)

const (
	fakeSize  = 4 << 20
	fakeBlock = 4 << 10
	fakeCount = fakeSize / fakeBlock
	inCluster = clusterSize / fakeBlock
)

// fakeDisk is a disk whose power may be cut: what is not flushed is then there, or not.
// It keeps the number that each block of it begins with.
type fakeDisk struct {
	block.Node
	host *sync.Mutex // of both, as both lose power at once
	now  [fakeCount]uint64
	was  [fakeCount][]uint64 // what may be there too
	then func()              // after a flush, or nil
}

func (d *fakeDisk) Size() int64      { return fakeSize }
func (d *fakeDisk) ReadOnly() bool   { return false }
func (d *fakeDisk) Info() block.Info { return block.Info{Format: "fake", ClusterSize: clusterSize} }

func (d *fakeDisk) Writev(bufs [][]byte, off int64) error {
	d.host.Lock()
	defer d.host.Unlock()
	for b := bufs[0]; len(b) > 0; b, off = b[fakeBlock:], off+fakeBlock {
		i := off / fakeBlock
		d.was[i] = append(d.was[i], d.now[i])
		d.now[i] = binary.LittleEndian.Uint64(b)
	}
	return nil
}

func (d *fakeDisk) Flush() error {
	d.host.Lock()
	defer d.host.Unlock()
	clear(d.was[:])
	if f := d.then; f != nil {
		d.host.Unlock()
		f()
		d.host.Lock()
	}
	return nil
}

// after is what a block may hold after the power was cut. Preconditions: host is held.
func (d *fakeDisk) after(i int64, r *rand.Rand) uint64 {
	if k := r.IntN(len(d.was[i]) + 1); k < len(d.was[i]) {
		return d.was[i][k]
	}
	return d.now[i]
}

// fakeOverlay lies on a fakeDisk.
type fakeOverlay struct {
	fakeDisk
	base      *fakeDisk
	uncovered [fakeCount / inCluster]bool // in memory
	told      [fakeCount / inCluster]bool // on the disk; before a flush it may be false there yet
	durable   [fakeCount / inCluster]bool // on the disk in any case
	then      func()                      // after StoreTables, or nil
}

func (o *fakeOverlay) Readv(bufs [][]byte, off int64) error {
	o.host.Lock()
	defer o.host.Unlock()
	for b := bufs[0]; len(b) > 0; b, off = b[fakeBlock:], off+fakeBlock {
		i := off / fakeBlock
		v := o.now[i]
		if o.uncovered[i/inCluster] {
			v = o.base.now[i]
		}
		binary.LittleEndian.PutUint64(b, v)
	}
	return nil
}

func (o *fakeOverlay) Flush() error {
	o.host.Lock()
	o.told = o.uncovered
	o.durable = o.told
	o.host.Unlock()
	return o.fakeDisk.Flush()
}

func (o *fakeOverlay) Map(off, n int64) (block.Extent, error) {
	o.host.Lock()
	defer o.host.Unlock()
	e := block.Extent{Start: off, Length: min(n, clusterSize-off%clusterSize), Present: true, Data: true}
	if o.uncovered[off/clusterSize] {
		e.Depth = 1
	}
	return e, nil
}

func (o *fakeOverlay) Uncover(off, n int64) error {
	o.host.Lock()
	defer o.host.Unlock()
	for c := off / clusterSize; c < (off+n)/clusterSize; c++ {
		o.uncovered[c] = true
	}
	return nil
}

func (o *fakeOverlay) StoreTables() error {
	o.host.Lock()
	defer o.host.Unlock()
	o.told = o.uncovered
	if o.then != nil {
		o.then()
	}
	return nil
}

// The power is cut again and again while what the pass copied is handed over: each
// block then is as it was flushed, or newer.
func TestHandOverPowerLoss(t *testing.T) {
	cuts, alone := 0, 0
	for seed := range uint64(20) {
		var host sync.Mutex
		base := &fakeDisk{host: &host}
		o := &fakeOverlay{fakeDisk: fakeDisk{host: &host}, base: base}
		r := rand.New(rand.NewPCG(seed, 1))
		var flushed, written [fakeCount]uint64
		next := uint64(1)
		for i := range flushed {
			o.now[i], flushed[i], written[i] = next, next, next
			next++
		}
		var f *Filter
		cut := func() {
			host.Lock()
			defer host.Unlock()
			cuts++
			for i := range int64(fakeCount) {
				got := o.after(i, r)
				if c := i / inCluster; o.durable[c] || o.told[c] && r.IntN(2) == 0 {
					got = base.after(i, r)
					alone++
				}
				if got < flushed[i] || got > written[i] {
					t.Fatalf("seed %d: block %d is %d, and %d was flushed, %d written", seed, i, got, flushed[i], written[i])
				}
			}
		}
		use := func() error {
			for range r.IntN(40) {
				i := r.Int64N(fakeCount)
				b := make([]byte, fakeBlock)
				binary.LittleEndian.PutUint64(b, next)
				written[i] = next
				next++
				if err := f.Writev([][]byte{b}, i*fakeBlock); err != nil {
					return err
				}
				if r.IntN(30) == 0 {
					if err := f.Flush(); err != nil {
						return err
					}
					flushed = written
				}
			}
			cut()
			return nil
		}
		var err error
		if f, err = New(o, base, Options{Depth: 1, Step: clusterSize, Pause: use}); err != nil {
			t.Fatal(err)
		}
		if err := f.Run(context.Background()); err != nil {
			t.Fatal(err)
		}
		mirrored := f.Figures().Mirrored
		for range 10 {
			if err := use(); err != nil {
				t.Fatal(err)
			}
		}
		if g := f.Figures(); g.Mirrored != mirrored || g.Diverted == 0 {
			t.Errorf("writes go to both when all is handed over: %+v", g)
		}
		if base.now != written {
			t.Error("the base is not what was written")
		}
	}
	if alone == 0 {
		t.Errorf("of %d cuts none found what was handed over", cuts)
	}
}

// What went to both, and was flushed, is durable in the base as well before it may be
// read from there, even where nothing went to the base alone.
func TestHandOverFlush(t *testing.T) {
	var host sync.Mutex
	base := &fakeDisk{host: &host}
	o := &fakeOverlay{fakeDisk: fakeDisk{host: &host}, base: base}
	f, err := New(o, base, Options{Depth: 1, Step: clusterSize})
	if err != nil {
		t.Fatal(err)
	}
	base.then = func() { // it is about to be handed over
		base.then = nil
		b := make([]byte, fakeBlock)
		binary.LittleEndian.PutUint64(b, 7)
		if err := f.Writev([][]byte{b}, 0); err != nil {
			t.Error(err)
		}
		if err := f.Flush(); err != nil {
			t.Error(err)
		}
	}
	told := 0
	o.then = func() {
		if told++; told == 1 && (!o.told[0] || base.now[0] != 7 || len(base.was[0]) > 0) {
			t.Errorf("when the overlay's image does not hold it any more, the base has %d, and may have %d", base.now[0], base.was[0])
		}
	}
	if err := f.Run(context.Background()); err != nil {
		t.Fatal(err)
	}
	if g := f.Figures(); told == 0 || g.Mirrored != fakeBlock {
		t.Errorf("%+v, tables stored %d times", g, told)
	}
}
