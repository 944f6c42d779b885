package monitor

import (
	"context"
	"errors"
	"slices"
	"strings"

	"github.com/gnomon-vmm/gnomon/disk/backup"
	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/qcow2"
	"github.com/gnomon-vmm/gnomon/qmp"
	"github.com/gnomon-vmm/gnomon/vmm"
)

// An image that lies on a disk in use, to which blockdev-backup copies with sync
// 'none' what is about to change, is the disk as it was when that began. It can be
// served, with the disk's bitmaps, to programs that fetch a backup themselves.

// rootOf is the disk whose node has a name, or nil.
func (mon *monitor) rootOf(name string) *block.Root {
	d, err := mon.findDisk(nil, &name)
	if err != nil {
		return nil
	}
	return d.Root
}

// instantOf has an image, which it closes if it fails, keep what a disk holds.
func instantOf(of *block.Root, image *qcow2.Node) (n block.Node, err error) {
	switch {
	case image.ReadOnly():
		err = qmp.Errorf("an image that lies on a disk's node keeps what that held: it cannot be read only")
	case image.Size() != of.Size():
		err = qmp.Errorf("the image has %d bytes, and the disk %d", image.Size(), of.Size())
	case !readsAsZero(image):
		err = qmp.Errorf("the image is not empty: only an empty one can keep what a disk held")
	default:
		return backup.NewInstant(of, image), nil
	}
	return nil, errors.Join(err, image.Close())
}

// diskOf is the disk whose instant a node is, or none.
func (mon *monitor) diskOf(n block.Node) (d vmm.AttachedDisk) {
	i, ok := n.(*backup.Instant)
	if !ok {
		return d
	}
	all := mon.m.Disks()
	if at := slices.IndexFunc(all, func(d vmm.AttachedDisk) bool { return d.Root == i.Of() }); at >= 0 {
		d = all[at]
	}
	return d
}

// takeInstant is take for an instant that a job keeps; nil where the node is none.
func (mon *monitor) takeInstant(name, by string) (*graphNode, error) {
	e, err := mon.findNode(name)
	if err != nil {
		return nil, err
	}
	g := &mon.graph
	g.mu.Lock()
	defer g.mu.Unlock()
	if _, ok := e.node.(*backup.Instant); !ok {
		return nil, nil
	}
	if slices.ContainsFunc(e.users, func(user string) bool { return strings.HasPrefix(user, "block export: ") }) {
		return nil, qmp.Errorf("Node '%s' is busy: block device is in use by %s", e.name, e.users[len(e.users)-1])
	}
	e.users = append(e.users, by)
	return e, nil
}

// keepInstant keeps what the disk holds now, until the job is cancelled.
func (mon *monitor) keepInstant(s *qmp.Session, d vmm.AttachedDisk, a blockdevBackupArguments) (*change, error) {
	w, err := mon.newBlockWork(s, jobBackup, d, a.options(), false)
	if err != nil {
		return nil, err
	}
	var i *backup.Instant
	var f *backup.Filter
	w.prepare = func() error {
		e, err := mon.take(a.Target, w.user())
		if err != nil {
			return err
		}
		var ok bool
		if i, ok = e.node.(*backup.Instant); !ok || i.Of() != d.Root {
			mon.drop(e, w.user())
			return qmp.Errorf("the target of sync 'none' is an image whose backing file is the disk's node, and '%s' is none", a.Target)
		}
		w.nodes = append(w.nodes, e)
		return nil
	}
	w.install = func(current block.Node) (_ block.Node, err error) {
		f, err = i.Begin(current, backup.Options{})
		return f, err
	}
	w.uninstall = func(block.Node) block.Node {
		i.End()
		return f.Node
	}
	w.work = func(ctx context.Context) error { return f.Wait(ctx) }
	return w.change(), nil
}
