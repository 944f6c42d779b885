package monitor

import (
	"errors"

	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/qmp"
	"github.com/gnomon-vmm/gnomon/vmm"
)

// change is one thing that is done to a disk between two requests, alone or together
// with others of a transaction. What is nil does nothing.
type change struct {
	disk vmm.AttachedDisk // has no requests while changes are made
	// claim names who changes the disk's nodes; "": they stay.
	claim string
	// prepare does what can be done before, and is undone by abandon.
	prepare func() error
	abandon func() error
	// apply makes the change, and returns the node with which the disk goes on. What
	// it did is undone by revert, which gets that node and returns the one before.
	apply  func(current block.Node) (block.Node, error)
	revert func(current block.Node) block.Node
	// done follows when all changes are made and the disk has requests again.
	done func() error
}

// transact makes all changes, or none.
func (mon *monitor) transact(changes ...*change) error {
	mon.blockJobs.mu.Lock()
	defer mon.blockJobs.mu.Unlock()
	mon.bitmaps.mu.Lock() // before the disks' requests, as everywhere
	defer mon.bitmaps.mu.Unlock()
	t := &transaction{mon: mon, changes: changes, nodes: map[string]block.Node{}, claimed: map[string]bool{}}
	defer t.release()
	err := t.prepare()
	if err == nil {
		err = t.drained(t.disks())
	}
	if err != nil {
		for ; t.prepared > 0; t.prepared-- {
			if c := changes[t.prepared-1]; c.abandon != nil {
				err = errors.Join(err, c.abandon())
			}
		}
		return err
	}
	var errs []error
	for _, c := range changes {
		if c.done != nil {
			errs = append(errs, c.done())
		}
	}
	return errors.Join(errs...)
}

// transaction are changes that are being made.
type transaction struct {
	mon      *monitor
	changes  []*change
	prepared int
	nodes    map[string]block.Node // the disks' now, by their ids
	claimed  map[string]bool
}

func (t *transaction) prepare() error {
	for _, c := range t.changes {
		if c.claim != "" && !t.claimed[c.disk.ID] {
			if err := t.mon.notBusyLocked(c.disk); err != nil {
				return err
			}
			if err := t.mon.claim(c.disk, c.claim); err != nil {
				return err
			}
			t.claimed[c.disk.ID] = true
		}
		if c.prepare != nil {
			if err := c.prepare(); err != nil {
				return err
			}
		}
		t.prepared++
	}
	return nil
}

// release ends the claims, except those of jobs that have begun.
func (t *transaction) release() {
	for _, d := range t.disks() {
		if t.claimed[d.ID] && t.mon.blockJobs.byDisk[d.ID] == nil {
			d.Root.Release()
		}
	}
}

func (t *transaction) disks() (all []vmm.AttachedDisk) {
	seen := map[string]bool{}
	for _, c := range t.changes {
		if c.disk.Root != nil && !seen[c.disk.ID] {
			seen[c.disk.ID] = true
			all = append(all, c.disk)
		}
	}
	return all
}

// drained makes the changes while none of the disks has requests.
func (t *transaction) drained(disks []vmm.AttachedDisk) (err error) {
	if len(disks) == 0 {
		return t.apply()
	}
	disks[0].Root.Drained(func(current block.Node) block.Node {
		t.nodes[disks[0].ID] = current
		err = t.drained(disks[1:])
		return t.nodes[disks[0].ID]
	})
	return err
}

func (t *transaction) apply() error {
	for i, c := range t.changes {
		if c.apply == nil {
			continue
		}
		next, err := c.apply(t.nodes[c.disk.ID])
		if err != nil {
			for i--; i >= 0; i-- {
				if c := t.changes[i]; c.revert != nil {
					t.nodes[c.disk.ID] = c.revert(t.nodes[c.disk.ID])
				}
			}
			return err
		}
		t.nodes[c.disk.ID] = next
	}
	return nil
}

// notBusyLocked refuses a disk that a job works on.
func (mon *monitor) notBusyLocked(d vmm.AttachedDisk) error {
	if w := mon.blockJobs.byDisk[d.ID]; w != nil {
		return qmp.Errorf("Node '%s' is busy: block device is in use by block job: %s", mon.topName(d), w.kind)
	}
	return nil
}
