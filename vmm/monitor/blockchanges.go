package monitor

import (
	"context"
	"time"

	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/changes"
	"github.com/gnomon-vmm/gnomon/qmp"
	"github.com/gnomon-vmm/gnomon/vmm"
)

// maxExtents are told at most of what changed: where there are more, neighbours are
// told as one, with what lies between them.
const maxExtents = 100_000

type (
	changesArguments struct {
		Device      string `qmp:"device"`
		Application string `qmp:"application"`
	}
	changesListArguments struct {
		Device string `qmp:"device"`
	}
	changedExtent struct {
		Start  int64 `qmp:"start"`
		Length int64 `qmp:"length"`
	}
	// changesData is what changed since an application's last backup, in bytes.
	changesData struct {
		All       bool            `qmp:"all"` // all of the disk counts as changed
		Reason    *string         `qmp:"reason"`
		BlockSize int64           `qmp:"block-size"`
		Bytes     int64           `qmp:"bytes"`
		Extents   []changedExtent `qmp:"extents"`
	}
	changesApplication struct {
		Application string `qmp:"application"`
		Time        string `qmp:"time"` // of its last backup, RFC 3339
		All         bool   `qmp:"all"`  // which does not count any more
	}
)

// registerChanges registers the commands on what is recorded of disks with changes=on.
func (mon *monitor) registerChanges(reg *qmp.Registry) {
	qmp.Register(reg, "__org.gnomon_disk-changes", func(_ context.Context, _ *qmp.Session, a changesArguments) (c changesData, err error) {
		d, err := mon.recorded(a.Device)
		if err != nil {
			return c, err
		}
		s, err := mon.changesSince(d, a.Application)
		if err != nil {
			return c, err
		}
		return tellChanges(s, d.Changes.BlockSize()), nil
	})
	qmp.Register(reg, "__org.gnomon_disk-changes-reset", func(_ context.Context, _ *qmp.Session, a changesArguments) (e qmp.Empty, err error) {
		d, err := mon.recorded(a.Device)
		if err != nil {
			return e, err
		}
		s, err := mon.changesSince(d, a.Application)
		if err != nil {
			return e, err
		}
		return e, s.Commit()
	})
	qmp.Register(reg, "__org.gnomon_disk-changes-forget", func(_ context.Context, _ *qmp.Session, a changesArguments) (e qmp.Empty, err error) {
		d, err := mon.recorded(a.Device)
		if err != nil {
			return e, err
		}
		return e, d.Changes.Forget(a.Application)
	})
	qmp.Register(reg, "__org.gnomon_disk-changes-list", func(_ context.Context, _ *qmp.Session, a changesListArguments) ([]changesApplication, error) {
		d, err := mon.recorded(a.Device)
		if err != nil {
			return nil, err
		}
		all := []changesApplication{}
		for _, x := range d.Changes.Applications() {
			all = append(all, changesApplication{x.Name, x.Time.Format(time.RFC3339Nano), x.Epoch == 0})
		}
		return all, nil
	})
}

// recorded is a disk whose changes are recorded.
func (mon *monitor) recorded(device string) (vmm.AttachedDisk, error) {
	d, err := mon.findDisk(&device, nil)
	if err == nil && d.Changes == nil {
		err = qmp.Errorf("the changes of disk '%s' are not recorded: use it with changes=on", d.ID)
	}
	return d, err
}

// changesSince is what changed since an application's last backup up to now. It begins
// an epoch between two requests.
func (mon *monitor) changesSince(d vmm.AttachedDisk, application string) (s *changes.Set, err error) {
	p, err := d.Changes.Prepare(behindFilters(d.Root.Current()), application)
	if err != nil {
		return nil, err
	}
	d.Root.Drained(func(current block.Node) block.Node {
		s, err = p.Raise()
		return current
	})
	return s, err
}

func tellChanges(s *changes.Set, blockSize int64) changesData {
	c := changesData{All: s.Changed == nil, BlockSize: blockSize, Bytes: s.Bytes(), Extents: []changedExtent{}}
	if c.All {
		c.Reason = &s.Reason
	}
	// Of those that are too many the ones nearest to each other are joined first.
	for gap := int64(0); ; gap = max(2*gap, blockSize) {
		c.Extents = c.Extents[:0]
		for off, n := range s.Extents() {
			if k := len(c.Extents) - 1; k >= 0 && off-(c.Extents[k].Start+c.Extents[k].Length) <= gap {
				c.Extents[k].Length = off + n - c.Extents[k].Start
			} else if c.Extents = append(c.Extents, changedExtent{off, n}); len(c.Extents) > maxExtents {
				break
			}
		}
		if len(c.Extents) <= maxExtents {
			return c
		}
	}
}
