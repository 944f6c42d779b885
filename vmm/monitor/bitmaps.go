package monitor

import (
	"context"
	"errors"
	"slices"
	"sync"

	"github.com/gnomon-vmm/gnomon/disk/bitmap"
	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/qmp"
	"github.com/gnomon-vmm/gnomon/vmm"
)

// Dirty bitmaps of QEMU's qapi/block-core.json. They belong to the disk that a
// device uses, whatever image that is at the moment, and end with the machine.

type (
	bitmapAddArguments struct {
		Node        string  `qmp:"node"`
		Name        string  `qmp:"name"`
		Granularity *uint32 `qmp:"granularity"`
		Persistent  *bool   `qmp:"persistent"`
		Disabled    *bool   `qmp:"disabled"`
	}
	bitmapArguments struct {
		Node string `qmp:"node"`
		Name string `qmp:"name"`
	}
	dirtyInfo struct {
		Name        *string `qmp:"name"`
		Count       int64   `qmp:"count"` // bytes
		Granularity uint32  `qmp:"granularity"`
		Recording   bool    `qmp:"recording"`
		Busy        bool    `qmp:"busy"`
		Persistent  bool    `qmp:"persistent"`
	}
)

// maxBitmaps bounds those of a disk.
const maxBitmaps = 256

// dirtyBitmaps are all disks'.
type dirtyBitmaps struct {
	mu     sync.Mutex
	byDisk map[string][]*dirtyBitmap // guarded by mu
}

// dirtyBitmap is one; while it is busy a backup works with what was in it, and
// what changes meanwhile is in next.
type dirtyBitmap struct {
	*bitmap.Bitmap
	next *bitmap.Bitmap // nil: not busy; guarded by dirtyBitmaps.mu
}

func (mon *monitor) registerBitmaps(reg *qmp.Registry) {
	qmp.Register(reg, "block-dirty-bitmap-add", mon.addBitmap)
	on := func(name string, do func(d vmm.AttachedDisk, all []*dirtyBitmap, i int)) {
		qmp.Register(reg, name, func(_ context.Context, _ *qmp.Session, a bitmapArguments) (e qmp.Empty, err error) {
			d, err := mon.findDisk(&a.Node, nil)
			if err != nil {
				return e, err
			}
			b := &mon.bitmaps
			b.mu.Lock()
			defer b.mu.Unlock()
			i, err := b.findLocked(d, a.Name)
			if err == nil {
				do(d, b.byDisk[d.ID], i)
			}
			return e, err
		})
	}
	on("block-dirty-bitmap-remove", func(d vmm.AttachedDisk, all []*dirtyBitmap, i int) {
		mon.bitmaps.setLocked(d, slices.Delete(slices.Clone(all), i, i+1))
	})
	on("block-dirty-bitmap-clear", func(_ vmm.AttachedDisk, all []*dirtyBitmap, i int) { all[i].ClearAll() })
	on("block-dirty-bitmap-enable", func(_ vmm.AttachedDisk, all []*dirtyBitmap, i int) { all[i].SetEnabled(true) })
	on("block-dirty-bitmap-disable", func(_ vmm.AttachedDisk, all []*dirtyBitmap, i int) { all[i].SetEnabled(false) })
}

// findLocked finds a bitmap that no backup uses.
func (b *dirtyBitmaps) findLocked(d vmm.AttachedDisk, name string) (int, error) {
	i := slices.IndexFunc(b.byDisk[d.ID], func(x *dirtyBitmap) bool { return x.Name() == name })
	switch {
	case i < 0:
		return 0, qmp.Errorf("Dirty bitmap '%s' not found", name)
	case b.byDisk[d.ID][i].next != nil:
		return 0, qmp.Errorf("Bitmap '%s' is currently in use by another operation and cannot be used", name)
	}
	return i, nil
}

// setLocked gives a disk its bitmaps, between two requests.
func (b *dirtyBitmaps) setLocked(d vmm.AttachedDisk, all []*dirtyBitmap) {
	b.byDisk[d.ID] = all
	d.Root.Drained(func(current block.Node) block.Node {
		b.recordLocked(d)
		return current
	})
}

// recordLocked has the disk's requests recorded. There are none meanwhile.
func (b *dirtyBitmaps) recordLocked(d vmm.AttachedDisk) {
	var recorders []block.Recorder
	for _, x := range b.byDisk[d.ID] {
		if x.next != nil {
			recorders = append(recorders, x.next)
		} else {
			recorders = append(recorders, x.Bitmap)
		}
	}
	d.Root.SetRecorders(recorders)
}

func (mon *monitor) addBitmap(_ context.Context, _ *qmp.Session, a bitmapAddArguments) (e qmp.Empty, err error) {
	d, err := mon.findDisk(&a.Node, nil)
	if err != nil {
		return e, err
	}
	if a.Name == "" {
		return e, qmp.Errorf("Bitmap name cannot be empty")
	}
	if len(a.Name) > 1023 {
		return e, qmp.Errorf("Bitmap name too long")
	}
	if a.Persistent != nil && *a.Persistent {
		return e, qmp.Errorf("a bitmap cannot be kept in the image here: leave out 'persistent'")
	}
	granularity := int64(0)
	if a.Granularity != nil {
		granularity = int64(*a.Granularity)
		if granularity < bitmap.MinGranularity || granularity&(granularity-1) != 0 {
			return e, qmp.Errorf("Granularity must be power of 2 and at least 512")
		}
	}
	made, err := bitmap.New(a.Name, d.Node.Size(), granularity)
	if err != nil {
		return e, err
	}
	made.SetEnabled(a.Disabled == nil || !*a.Disabled)
	b := &mon.bitmaps
	b.mu.Lock()
	defer b.mu.Unlock()
	all := b.byDisk[d.ID]
	switch {
	case slices.ContainsFunc(all, func(x *dirtyBitmap) bool { return x.Name() == a.Name }):
		return e, qmp.Errorf("Bitmap already exists: %s", a.Name)
	case len(all) >= maxBitmaps:
		return e, qmp.Errorf("a disk has at most %d bitmaps", maxBitmaps)
	}
	b.setLocked(d, append(slices.Clone(all), &dirtyBitmap{Bitmap: made}))
	return e, nil
}

// takeLocked has a backup work with what is in a bitmap; what changes from now on is
// kept apart until it is given back, by giveBack with the lock held. The disk has no
// requests during either.
func (b *dirtyBitmaps) takeLocked(d vmm.AttachedDisk, name string) (only *bitmap.Bitmap, giveBack func(copied bool), err error) {
	i, err := b.findLocked(d, name)
	if err != nil {
		return nil, nil, err
	}
	x := b.byDisk[d.ID][i]
	if x.next, err = bitmap.New(name, x.Size(), x.Granularity()); err != nil {
		return nil, nil, err
	}
	x.next.SetEnabled(x.Enabled())
	b.recordLocked(d)
	return x.Bitmap, func(copied bool) {
		if x.next == nil {
			return
		}
		if copied {
			x.ClearAll()
		}
		_ = x.Merge(x.next) // of one size
		x.next = nil
		b.recordLocked(d)
	}, nil
}

// info tells of a disk's bitmaps.
func (b *dirtyBitmaps) info(disk string) (all []dirtyInfo) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, x := range b.byDisk[disk] {
		name := x.Name()
		all = append(all, dirtyInfo{
			Name: &name, Count: x.Count() * x.Granularity(), Granularity: uint32(x.Granularity()),
			Recording: x.Enabled(), Busy: x.next != nil,
		})
	}
	return all
}

// resizedLocked makes the bitmaps as large as the disk.
func (b *dirtyBitmaps) resizedLocked(d vmm.AttachedDisk, size int64) error {
	var errs []error
	for _, x := range b.byDisk[d.ID] {
		errs = append(errs, x.Resize(size))
	}
	return errors.Join(errs...)
}
