package monitor

import (
	"context"

	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/mirror"
	"github.com/gnomon-vmm/gnomon/qmp"
	"github.com/gnomon-vmm/gnomon/vmm"
)

type commitArguments struct {
	jobArguments
	Device      string  `qmp:"device"`
	BaseNode    *string `qmp:"base-node"`
	Base        *string `qmp:"base"`
	TopNode     *string `qmp:"top-node"`
	Top         *string `qmp:"top"`
	BackingFile *string `qmp:"backing-file"`
}

// blockCommit moves what some images of a disk's chain hold into the base, by
// default from the newest image on into the last.
func (mon *monitor) blockCommit(_ context.Context, s *qmp.Session, a commitArguments) (e qmp.Empty, err error) {
	d, err := mon.findDisk(&a.Device, nil)
	if err != nil {
		return e, err
	}
	top, base, err := mon.committed(d, &a)
	if err != nil {
		return e, err
	}
	w, err := mon.newBlockWork(s, jobCommit, d, a.options(), top == 0)
	if err != nil {
		return e, err
	}
	if top == 0 {
		mon.commitNewest(w, base)
	} else {
		name := ""
		if a.BackingFile != nil {
			name = *a.BackingFile
		}
		mon.commitMiddle(w, top, base, name)
	}
	return e, mon.transact(w.change())
}

// committed are the depths of the first image that goes and of the base.
func (mon *monitor) committed(d vmm.AttachedDisk, a *commitArguments) (top, base int, err error) {
	switch {
	case a.TopNode != nil && a.Top != nil:
		return 0, 0, qmp.Errorf("'top-node' and 'top' are mutually exclusive")
	case a.BaseNode != nil && a.Base != nil:
		return 0, 0, qmp.Errorf("'base-node' and 'base' are mutually exclusive")
	}
	if a.TopNode != nil || a.Top != nil {
		if top, err = mon.chainDepth(d, a.TopNode, a.Top); err != nil {
			return 0, 0, err
		}
	}
	for i := d.Node.Info().Backing; i != nil; i = i.Backing {
		base++
	}
	if a.BaseNode != nil || a.Base != nil {
		if base, err = mon.chainDepth(d, a.BaseNode, a.Base); err != nil {
			return 0, 0, err
		}
	}
	switch {
	case base == top:
		return 0, 0, qmp.Errorf("cannot commit an image into itself")
	case base < top:
		return 0, 0, qmp.Errorf("the base does not lie behind the image to commit in this backing file chain")
	case top == 0 && a.BackingFile != nil:
		return 0, 0, qmp.Errorf("'backing-file' specified, but 'top' is the active layer")
	}
	return top, base, nil
}

// commitNewest has the disk go on in the base.
func (mon *monitor) commitNewest(w *blockWork, base int) {
	d, names := w.disk, mon.namedChain(w.disk)
	var c *mirror.Consolidation
	var written block.Node // the base, while it is written
	// The disk may be in the base when something fails, too.
	rename := func() {
		if base < len(names) && d.Root.Current() == written {
			mon.rename(d, names[base:])
			return
		}
		mon.rename(d, names)
	}
	w.prepare = func() (err error) {
		c, err = mirror.Consolidate(d.Root, mirror.Options{Depth: base, Progress: w.progress, Pause: w.pace})
		mon.rename(d, names)
		if chain := chainOf(d.Root); base < len(chain) {
			written = chain[base]
		}
		return err
	}
	w.abandon = func() error {
		defer rename()
		return c.Cancel()
	}
	complete := false
	w.work = func(ctx context.Context) (err error) {
		if err := c.Run(ctx); err != nil {
			return err
		}
		complete, err = w.ready()
		return err
	}
	w.finish = func() error {
		defer rename()
		if !complete {
			return c.Cancel()
		}
		return c.Finish()
	}
}

// commitMiddle has the image above the first that goes lie on the base, by a name
// or by its path. It ends without being told to.
func (mon *monitor) commitMiddle(w *blockWork, top, base int, name string) {
	d, names := w.disk, mon.namedChain(w.disk)
	var m *mirror.Middle
	w.prepare = func() (err error) {
		m, err = mirror.NewMiddle(d.Root, mirror.MiddleOptions{
			Options: mirror.Options{Depth: base, Progress: w.progress, Pause: w.pace}, Top: top, BackingFile: name,
		})
		mon.rename(d, names)
		return err
	}
	w.abandon = func() error {
		defer mon.rename(d, names)
		return m.Cancel()
	}
	w.work = func(ctx context.Context) error { return m.Run(ctx) }
	w.finish = func() error {
		if err := m.Finish(); err != nil {
			return err
		}
		mon.unlink(d, names, top, base)
		return nil
	}
}
