package monitor

import (
	"errors"
	"slices"
	"sync"

	"github.com/gnomon-vmm/gnomon/disk/bitmap"
	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/qcow2"
	"github.com/gnomon-vmm/gnomon/qmp"
	"github.com/gnomon-vmm/gnomon/vmm"
)

// Dirty bitmaps of QEMU's qapi/block-core.json. They belong to the disk that a
// device uses, whatever image that is at the moment. Those that are persistent are
// kept by the image in which the disk ends.

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
	bitmapMergeArguments struct {
		Node    string           `qmp:"node"`
		Target  string           `qmp:"target"`
		Bitmaps []bitmapOrString `qmp:"bitmaps"`
	}
	bitmapOrString struct {
		Local    *string          `qmp:",alternate"`
		External *bitmapArguments `qmp:",alternate"`
	}
	dirtyInfo struct {
		Name        *string `qmp:"name"`
		Count       int64   `qmp:"count"` // bytes
		Granularity uint32  `qmp:"granularity"`
		Recording   bool    `qmp:"recording"`
		Busy        bool    `qmp:"busy"`
		Persistent  bool    `qmp:"persistent"`
		// Inconsistent: the machine before did not end well, so that the bitmap does not
		// tell of all writes.
		Inconsistent bool `qmp:"inconsistent,omitempty"`
	}
)

// Bounds of the number of bitmaps of a disk, and of the memory of all.
const (
	maxBitmaps     = 256
	maxBitmapBytes = 512 << 20
)

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

	persistent, inconsistent bool

	exports int // that serve it; guarded by dirtyBitmaps.mu
}

// busy tells that somebody works with what is in the bitmap. Preconditions:
// dirtyBitmaps.mu is held.
func (x *dirtyBitmap) busy() bool { return x.next != nil || x.exports > 0 }

func (mon *monitor) registerBitmaps(reg *qmp.Registry) {
	transactional(mon, reg, "block-dirty-bitmap-add", mon.addBitmap)
	transactional(mon, reg, "block-dirty-bitmap-remove", mon.removeBitmap)
	transactional(mon, reg, "block-dirty-bitmap-clear", mon.clearBitmap)
	transactional(mon, reg, "block-dirty-bitmap-enable", mon.enableBitmap)
	transactional(mon, reg, "block-dirty-bitmap-disable", mon.disableBitmap)
	transactional(mon, reg, "block-dirty-bitmap-merge", mon.mergeBitmaps)
}

// findLocked finds a bitmap that no backup uses.
func (b *dirtyBitmaps) findLocked(d vmm.AttachedDisk, name string) (int, error) {
	i := slices.IndexFunc(b.byDisk[d.ID], func(x *dirtyBitmap) bool { return x.Name() == name })
	switch {
	case i < 0:
		return 0, qmp.Errorf("Dirty bitmap '%s' not found", name)
	case b.byDisk[d.ID][i].busy():
		return 0, qmp.Errorf("Bitmap '%s' is currently in use by another operation and cannot be used", name)
	}
	return i, nil
}

// usableLocked is findLocked for one whose bits are right.
func (b *dirtyBitmaps) usableLocked(d vmm.AttachedDisk, name string) (*dirtyBitmap, error) {
	i, err := b.findLocked(d, name)
	if err != nil {
		return nil, err
	}
	x := b.byDisk[d.ID][i]
	if x.inconsistent {
		return nil, qmp.Errorf("Bitmap '%s' is inconsistent and cannot be used: try block-dirty-bitmap-remove to delete this bitmap from disk", name)
	}
	return x, nil
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

// addBitmap adds a bitmap to a disk; one that is persistent also to its image.
func (mon *monitor) addBitmap(_ *qmp.Session, a bitmapAddArguments) (*change, error) {
	d, err := mon.findDisk(&a.Node, nil)
	if err != nil {
		return nil, err
	}
	if a.Name == "" {
		return nil, qmp.Errorf("Bitmap name cannot be empty")
	}
	if len(a.Name) > 1023 {
		return nil, qmp.Errorf("Bitmap name too long")
	}
	granularity := int64(bitmap.DefaultGranularity)
	if a.Granularity != nil {
		granularity = int64(*a.Granularity)
		if granularity < bitmap.MinGranularity || granularity&(granularity-1) != 0 {
			return nil, qmp.Errorf("Granularity must be power of 2 and at least 512")
		}
	}
	b := &mon.bitmaps
	x := &dirtyBitmap{persistent: a.Persistent != nil && *a.Persistent}
	var before []*dirtyBitmap
	return &change{
		disk: d,
		prepare: func() (err error) {
			if b.bytesLocked()+d.Node.Size()/granularity/8 > maxBitmapBytes {
				return qmp.Errorf("the bitmaps of all disks have at most %d bytes together", maxBitmapBytes)
			}
			if x.Bitmap, err = bitmap.New(a.Name, d.Node.Size(), granularity); err != nil {
				return err
			}
			x.SetEnabled(a.Disabled == nil || !*a.Disabled)
			return nil
		},
		apply: func(current block.Node) (block.Node, error) {
			before = b.byDisk[d.ID]
			switch {
			case slices.ContainsFunc(before, func(x *dirtyBitmap) bool { return x.Name() == a.Name }):
				return nil, qmp.Errorf("Bitmap already exists: %s", a.Name)
			case len(before) >= maxBitmaps:
				return nil, qmp.Errorf("a disk has at most %d bitmaps", maxBitmaps)
			case x.Size() != current.Size():
				return nil, qmp.Errorf("the disk's size has changed")
			}
			if x.persistent {
				if err := keep(current, x.Bitmap); err != nil {
					return nil, err
				}
			}
			b.setLocked(d, append(slices.Clone(before), x))
			return current, nil
		},
		revert: func(current block.Node) block.Node {
			if x.persistent {
				_ = imageOf(current).RemoveBitmap(a.Name)
			}
			b.setLocked(d, before)
			return current
		},
	}, nil
}

// imageOf is the image in which a disk's persistent bitmaps are kept, or nil.
func imageOf(current block.Node) *qcow2.Node {
	q, ok := behindFilters(current).(*qcow2.Node)
	if !ok || q.ReadOnly() {
		return nil
	}
	return q
}

// keep makes a bitmap one of the disk's image, in the place of another of its name.
func keep(current block.Node, x *bitmap.Bitmap) error {
	q := imageOf(current)
	if q == nil {
		return qmp.Errorf("Cannot store dirty bitmap '%s': the disk's image is not a qcow2 image that can be written", x.Name())
	}
	all, err := q.Bitmaps()
	if err != nil {
		return err
	}
	for _, info := range all {
		if info.Name != x.Name() {
			continue
		}
		if have, err := q.Bitmap(info.Name); err == nil && have == x {
			return nil
		}
		if err := q.RemoveBitmap(info.Name); err != nil {
			return err
		}
	}
	return q.AddBitmap(x)
}

// removeBitmap takes a bitmap away, also from its image.
func (mon *monitor) removeBitmap(_ *qmp.Session, a bitmapArguments) (*change, error) {
	d, err := mon.findDisk(&a.Node, nil)
	if err != nil {
		return nil, err
	}
	b := &mon.bitmaps
	var before []*dirtyBitmap
	var x *dirtyBitmap
	return &change{
		disk: d,
		apply: func(current block.Node) (block.Node, error) {
			i, err := b.findLocked(d, a.Name)
			if err != nil {
				return nil, err
			}
			before = b.byDisk[d.ID]
			x = before[i]
			b.setLocked(d, slices.Delete(slices.Clone(before), i, i+1))
			return current, nil
		},
		revert: func(current block.Node) block.Node {
			b.setLocked(d, before)
			return current
		},
		done: func() (err error) {
			if !x.persistent {
				return nil
			}
			d.Root.Drained(func(current block.Node) block.Node {
				if q := imageOf(current); q != nil {
					if err = q.RemoveBitmap(a.Name); errors.Is(err, qcow2.ErrBitmap) {
						err = nil // it was not in this image
					}
				}
				return current
			})
			return err
		},
	}, nil
}

// onBitmap is a change of one bitmap; what it does returns what undoes it.
func (mon *monitor) onBitmap(node, name string, do func(*dirtyBitmap) (undo func(), err error)) (*change, error) {
	d, err := mon.findDisk(&node, nil)
	if err != nil {
		return nil, err
	}
	undo := func() {}
	return &change{
		disk: d,
		apply: func(current block.Node) (block.Node, error) {
			x, err := mon.bitmaps.usableLocked(d, name)
			if err == nil {
				undo, err = do(x)
			}
			return current, err
		},
		revert: func(current block.Node) block.Node {
			undo()
			return current
		},
	}, nil
}

func (mon *monitor) clearBitmap(_ *qmp.Session, a bitmapArguments) (*change, error) {
	return mon.onBitmap(a.Node, a.Name, func(x *dirtyBitmap) (func(), error) {
		was := x.Copy("", false)
		x.ClearAll()
		return func() { _ = x.Merge(was) }, nil // of one size
	})
}

func (mon *monitor) enableBitmap(_ *qmp.Session, a bitmapArguments) (*change, error) {
	return mon.switchBitmap(a, true)
}

func (mon *monitor) disableBitmap(_ *qmp.Session, a bitmapArguments) (*change, error) {
	return mon.switchBitmap(a, false)
}

func (mon *monitor) switchBitmap(a bitmapArguments, on bool) (*change, error) {
	return mon.onBitmap(a.Node, a.Name, func(x *dirtyBitmap) (func(), error) {
		was := x.Enabled()
		x.SetEnabled(on)
		return func() { x.SetEnabled(was) }, nil
	})
}

// mergeBitmaps sets in one bitmap what is set in others.
func (mon *monitor) mergeBitmaps(_ *qmp.Session, a bitmapMergeArguments) (*change, error) {
	if len(a.Bitmaps) > maxBitmaps {
		return nil, qmp.Errorf("at most %d bitmaps can be merged", maxBitmaps)
	}
	type source struct {
		disk vmm.AttachedDisk
		name string
	}
	var sources []source
	for _, ref := range a.Bitmaps {
		node, name := a.Node, ref.Local
		if ref.External != nil {
			node, name = ref.External.Node, &ref.External.Name
		}
		d, err := mon.findDisk(&node, nil)
		if err != nil {
			return nil, err
		}
		sources = append(sources, source{d, *name})
	}
	return mon.onBitmap(a.Node, a.Target, func(x *dirtyBitmap) (func(), error) {
		was, all := x.Copy("", false), x.Copy("", false)
		for _, s := range sources {
			from, err := mon.bitmaps.usableLocked(s.disk, s.name)
			if err != nil {
				return nil, err
			}
			if from.Size() != x.Size() {
				return nil, qmp.Errorf("Bitmaps are of different sizes (destination size is %d, source size is %d) and can't be merged", x.Size(), from.Size())
			}
			if err := all.Merge(from.Bitmap); err != nil {
				return nil, err
			}
		}
		_ = x.Merge(all) // of one size
		return func() {
			x.ClearAll()
			_ = x.Merge(was)
		}, nil
	})
}

// bytesLocked is the memory of all bitmaps.
func (b *dirtyBitmaps) bytesLocked() (n int64) {
	for _, all := range b.byDisk {
		for _, x := range all {
			n += x.Bits() / 8
		}
	}
	return n
}

// setLocked gives a disk, which has no requests, its bitmaps.
func (b *dirtyBitmaps) setLocked(d vmm.AttachedDisk, all []*dirtyBitmap) {
	b.byDisk[d.ID] = all
	b.recordLocked(d)
}

// loadBitmaps has the disks have the bitmaps that their images keep.
func (mon *monitor) loadBitmaps() {
	b := &mon.bitmaps
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, d := range mon.m.Disks() {
		d.Root.Drained(func(current block.Node) block.Node {
			if q, ok := current.(*qcow2.Node); ok {
				b.setLocked(d, keptBitmaps(q))
			}
			return current
		})
	}
}

// keptBitmaps are an image's. Those that cannot be read can only be removed.
func keptBitmaps(q *qcow2.Node) (all []*dirtyBitmap) {
	kept, err := q.Bitmaps()
	if err != nil {
		return nil
	}
	for _, info := range kept {
		x := &dirtyBitmap{persistent: true}
		if x.Bitmap, err = q.Bitmap(info.Name); err != nil {
			x.inconsistent = true
			if x.Bitmap, err = bitmap.New(info.Name, q.Size(), info.Granularity); err != nil {
				continue
			}
			x.SetEnabled(false)
		}
		all = append(all, x)
	}
	return all
}

// storeBitmaps has the images in which the disks end keep the persistent bitmaps,
// wherever they were begun. The images store them when they are closed.
func (mon *monitor) storeBitmaps() error {
	b := &mon.bitmaps
	b.mu.Lock()
	defer b.mu.Unlock()
	var errs []error
	for _, d := range mon.m.Disks() {
		errs = append(errs, b.storeLocked(d))
	}
	return errors.Join(errs...)
}

func (b *dirtyBitmaps) storeLocked(d vmm.AttachedDisk) error {
	if d.Node.ReadOnly() {
		return nil
	}
	var errs []error
	d.Root.Drained(func(current block.Node) block.Node {
		for _, x := range b.byDisk[d.ID] {
			if x.persistent && !x.inconsistent {
				errs = append(errs, keep(current, x.Bitmap))
			}
		}
		return current
	})
	return errors.Join(errs...)
}

// takeLocked has a backup work with what is in a bitmap; what changes from now on is
// kept apart until it is given back, by giveBack with the lock held. The disk has no
// requests during either.
func (b *dirtyBitmaps) takeLocked(d vmm.AttachedDisk, name string) (only *bitmap.Bitmap, giveBack func(copied bool), err error) {
	x, err := b.usableLocked(d, name)
	if err != nil {
		return nil, nil, err
	}
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
			Recording: x.Enabled(), Busy: x.busy(), Persistent: x.persistent, Inconsistent: x.inconsistent,
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
