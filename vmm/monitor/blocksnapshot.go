package monitor

import (
	"errors"
	"fmt"
	"os"

	"github.com/gnomon-vmm/gnomon/disk"
	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/qcow2"
	"github.com/gnomon-vmm/gnomon/qmp"
	"github.com/gnomon-vmm/gnomon/vmm"
)

type (
	snapshotSyncArguments struct {
		Device           *string       `qmp:"device"`
		NodeName         *string       `qmp:"node-name"`
		SnapshotFile     string        `qmp:"snapshot-file"`
		SnapshotNodeName *string       `qmp:"snapshot-node-name"`
		Format           *string       `qmp:"format"`
		Mode             *newImageMode `qmp:"mode"`
	}
	overlayArguments struct {
		Node    string `qmp:"node"`
		Overlay string `qmp:"overlay"`
	}
)

func (mon *monitor) registerOverlays(reg *qmp.Registry) {
	transactional(mon, reg, "blockdev-snapshot-sync", mon.snapshotSync)
	transactional(mon, reg, "blockdev-snapshot", mon.snapshotOn)
}

// overlaying is a change by which a disk goes on in an overlay.
type overlaying struct {
	mon     *monitor
	disk    vmm.AttachedDisk
	base    block.Freezer
	overlay *qcow2.Node
}

func (o *overlaying) change() *change {
	return &change{disk: o.disk, claim: "another command", apply: o.apply, revert: o.revert, done: o.done}
}

// begin finds the image that is to be kept, and writes most of what is not on the
// host's disk yet.
func (o *overlaying) begin() (err error) {
	var ok bool
	o.base, ok = o.disk.Root.Current().(block.Freezer)
	switch {
	case !ok:
		return qmp.Errorf("Device '%s' does not support snapshots", o.disk.ID)
	case o.base.ReadOnly():
		return qmp.Errorf("Block node is read-only")
	}
	if err := qcow2.RoomOver(o.base); err != nil {
		return err
	}
	return o.base.Flush()
}

func (o *overlaying) apply(current block.Node) (block.Node, error) {
	if current != block.Node(o.base) {
		return nil, qmp.Errorf("Device '%s' has another image in use since an action before in this transaction", o.disk.ID)
	}
	if err := o.base.Flush(); err != nil {
		return nil, err
	}
	o.overlay.SetBacking(o.base)
	return o.overlay, nil
}

func (o *overlaying) revert(block.Node) block.Node {
	o.overlay.SetBacking(nil)
	return o.base
}

// done lets go of what keeps others from reading the image. It is read only from
// the overlay on.
func (o *overlaying) done() (err error) {
	o.disk.Root.Drained(func(current block.Node) block.Node {
		err = o.base.Freeze()
		return current
	})
	if err != nil {
		return fmt.Errorf("disk %s goes on in its overlay: %w", o.disk.ID, err)
	}
	return nil
}

// snapshotSync has a disk go on in a new overlay.
func (mon *monitor) snapshotSync(_ *qmp.Session, a snapshotSyncArguments) (*change, error) {
	d, err := mon.findDisk(a.Device, a.NodeName)
	if err != nil {
		return nil, err
	}
	if a.Format != nil && *a.Format != disk.FormatQcow2 {
		return nil, qmp.Errorf("Unknown driver '%s': an overlay is qcow2", *a.Format)
	}
	if a.SnapshotNodeName != nil {
		if err := mon.checkName(*a.SnapshotNodeName); err != nil {
			return nil, err
		}
	}
	create := a.Mode == nil || *a.Mode == modeAbsolutePaths
	o := &overlaying{mon: mon, disk: d}
	c := o.change()
	c.prepare = func() (err error) {
		if err := o.begin(); err != nil {
			return err
		}
		if create {
			if err := qcow2.CreateOver(a.SnapshotFile, o.base); err != nil {
				return err
			}
		}
		o.overlay, err = qcow2.OpenOverWith(a.SnapshotFile, nil, qcow2.OptionsOver(o.base))
		switch {
		case err == nil:
			o.overlay.SetRules(block.WriteRules{KeepDiscarded: block.RulesOf(o.base).KeepDiscarded})
		case create:
			os.Remove(a.SnapshotFile)
		}
		return err
	}
	c.abandon = func() error {
		err := o.overlay.Close()
		if create {
			err = errors.Join(err, os.Remove(a.SnapshotFile))
		}
		return err
	}
	c.done = func() error {
		if a.SnapshotNodeName != nil {
			mon.graph.name(*a.SnapshotNodeName, driverQcow2, o.overlay, d.ID)
		}
		return o.done()
	}
	return c, nil
}

// snapshotOn has a disk go on in an overlay that is a node.
func (mon *monitor) snapshotOn(_ *qmp.Session, a overlayArguments) (*change, error) {
	d, err := mon.findDisk(&a.Node, &a.Node)
	if err != nil {
		return nil, err
	}
	if _, err := mon.findNode(a.Overlay); err != nil {
		return nil, qmp.Errorf("Cannot find device='%s' nor node-name='%s'", a.Overlay, a.Overlay)
	}
	o := &overlaying{mon: mon, disk: d}
	by := "blockdev-snapshot"
	var e *graphNode
	c := o.change()
	c.prepare = func() (err error) {
		if err := o.begin(); err != nil {
			return err
		}
		if e, err = mon.take(a.Overlay, by); err != nil {
			return qmp.Errorf("The overlay is already in use: %v", err)
		}
		if o.overlay, err = mon.overlayOf(e, d); err != nil {
			mon.drop(e, by)
		}
		return err
	}
	c.abandon = func() error {
		mon.drop(e, by)
		return nil
	}
	c.done = func() error {
		mon.graph.join(e, o.base, d.ID)
		mon.drop(e, by)
		return o.done()
	}
	return c, nil
}

// overlayOf is a node as one that a disk can go on in.
func (mon *monitor) overlayOf(e *graphNode, d vmm.AttachedDisk) (*qcow2.Node, error) {
	mon.graph.mu.Lock()
	defer mon.graph.mu.Unlock()
	q, ok := e.node.(*qcow2.Node)
	switch {
	case !ok:
		return nil, qmp.Errorf("The overlay does not support backing images")
	case q.Backing() != nil:
		return nil, qmp.Errorf("The overlay already has a backing image")
	case q.ReadOnly():
		return nil, qmp.Errorf("Block node is read-only")
	case q.Size() != d.Node.Size():
		return nil, qmp.Errorf("The overlay has %d bytes, and the disk %d", q.Size(), d.Node.Size())
	}
	return q, nil
}

// name gives a node that a disk uses a name, if that is free still.
func (g *graph) name(name string, driver blockdevDriver, n block.Node, disk string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.byName[name] == nil {
		g.byName[name] = &graphNode{name: name, driver: driver, node: n, disk: disk}
	}
}

// join notes that a node has become a disk's, on a base.
func (g *graph) join(e *graphNode, base block.Node, disk string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	e.disk, e.under = disk, g.entryLocked(base)
}
