package monitor

import (
	"context"
	"errors"
	"reflect"

	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/qcow2"
	"github.com/gnomon-vmm/gnomon/qmp"
)

// blockdevReopen changes whether nodes can be written, and what they lie on: all of
// them, or none.
func (mon *monitor) blockdevReopen(ctx context.Context, _ *qmp.Session, a blockdevReopenArguments) (empty qmp.Empty, err error) {
	var nodes []*graphNode
	for i := range a.Options {
		e, err := mon.checkReopen(&a.Options[i])
		if err != nil {
			return empty, err
		}
		for _, other := range nodes {
			if other == e {
				return empty, qmp.Errorf("Node '%s' is named twice", e.name)
			}
		}
		nodes = append(nodes, e)
	}
	was := make([]blockdevOptions, len(nodes))
	for i, e := range nodes {
		was[i] = e.options
		if err := mon.reopen(ctx, e, a.Options[i]); err != nil {
			for i--; i >= 0; i-- {
				err = errors.Join(err, mon.reopen(ctx, nodes[i], was[i]))
			}
			return empty, err
		}
	}
	return empty, nil
}

// checkReopen refuses what cannot be changed.
func (mon *monitor) checkReopen(o *blockdevOptions) (*graphNode, error) {
	if o.NodeName == nil {
		return nil, qmp.Errorf("node-name not specified")
	}
	e, err := mon.findNode(*o.NodeName)
	if err != nil {
		return nil, err
	}
	g := &mon.graph
	g.mu.Lock()
	defer g.mu.Unlock()
	if err := e.openLocked(); err != nil {
		return nil, err
	}
	if !e.owned {
		return nil, qmp.Errorf("Node %s is not owned by the monitor", e.name)
	}
	same := *o
	same.ReadOnly, same.AutoReadOnly, same.Discard = e.options.ReadOnly, e.options.AutoReadOnly, e.options.Discard
	if same.Qcow2 != nil && e.options.Qcow2 != nil {
		q := *same.Qcow2
		q.Backing = e.options.Qcow2.Backing
		same.Qcow2 = &q
	}
	if !reflect.DeepEqual(same, e.options) {
		return nil, qmp.Errorf("Cannot change the option 'driver', or what it has beside: only 'read-only' and 'backing' can be changed")
	}
	readOnly := o.ReadOnly != nil && *o.ReadOnly
	if e.disk != "" {
		if readOnly != e.readOnly {
			return nil, qmp.Errorf("Node '%s' is in use by disk %s: 'read-only' cannot be changed", e.name, e.disk)
		}
	} else if err := g.unusedLocked(e); err != nil {
		return nil, err
	}
	if o.Qcow2 == nil || o.Qcow2.Backing == nil {
		return e, nil
	}
	switch b := o.Qcow2.Backing; {
	case b.Null != nil && *b.Null != nil:
		return nil, qmp.Errorf("Invalid parameter type for 'backing', expected: string, object or null")
	case b.Definition != nil:
		return nil, qmp.Errorf("what 'backing' is to be must be a node that was added")
	case b.Reference != nil && *b.Reference != "":
		under := g.byName[*b.Reference]
		if under == nil {
			return nil, qmp.Errorf("Cannot find device='%s' nor node-name='%s'", *b.Reference, *b.Reference)
		}
		if under.has(e) {
			return nil, qmp.Errorf("Making '%s' a backing child of '%s' would create a cycle", under.name, e.name)
		}
		if under != e.under {
			if err := errors.Join(g.unusedLocked(under), under.openLocked()); err != nil {
				return nil, err
			}
		}
	}
	return e, nil
}

// reopen gives a node other options.
func (mon *monitor) reopen(ctx context.Context, e *graphNode, o blockdevOptions) error {
	g := &mon.graph
	g.mu.Lock()
	sameMode := e.readOnly == (o.ReadOnly != nil && *o.ReadOnly)
	g.mu.Unlock()
	if sameMode {
		return mon.relink(e, o)
	}
	g.mu.Lock()
	was, readOnly := e.options, e.readOnly
	err := e.closeLocked()
	g.mu.Unlock()
	if err == nil {
		if err = mon.openAgain(ctx, e, o, o.ReadOnly != nil && *o.ReadOnly); err == nil {
			return nil
		}
	}
	if again := mon.openAgain(ctx, e, was, readOnly); again != nil {
		g.mu.Lock()
		e.gone = true
		g.mu.Unlock()
		err = errors.Join(err, again)
	}
	return err
}

// openAgain opens a node that was closed.
func (mon *monitor) openAgain(ctx context.Context, e *graphNode, o blockdevOptions, readOnly bool) error {
	op := &opening{mon: mon, ctx: ctx}
	o.ReadOnly = &readOnly
	fresh, err := op.open(&o, readOnly)
	if err != nil {
		op.undo()
		return err
	}
	op.nodes = op.nodes[:len(op.nodes)-1] // fresh, which e becomes
	op.register()
	g := &mon.graph
	g.mu.Lock()
	defer g.mu.Unlock()
	e.options, e.readOnly, e.node, e.file, e.under = o, readOnly, fresh.node, fresh.file, fresh.under
	return nil
}

// relink changes what an image lies on.
func (mon *monitor) relink(e *graphNode, o blockdevOptions) error {
	g := &mon.graph
	g.mu.Lock()
	q, ok := e.node.(*qcow2.Node)
	g.mu.Unlock()
	if !ok || o.Qcow2.Backing == nil || reflect.DeepEqual(o.Qcow2.Backing, e.options.Qcow2.Backing) {
		e.options = o
		return nil
	}
	var under *graphNode
	if name := o.Qcow2.Backing.Reference; name != nil && *name != "" {
		var err error
		if under, err = mon.findNode(*name); err != nil {
			return err
		}
	}
	var old block.Node
	change := func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		var node block.Node
		if under != nil {
			node = under.node
		}
		if old = q.SetBacking(node); e.under != nil {
			e.under.disk = "" // it goes on as a node of its own
			old = nil
		}
		e.under, e.options = under, o
	}
	if e.disk == "" {
		change()
	} else {
		disk := e.disk
		d, err := mon.findDisk(&disk, nil)
		if err != nil {
			return err
		}
		if err := mon.unlessBusy(d, func() error {
			d.Root.Drained(func(current block.Node) block.Node {
				change()
				return current
			})
			return nil
		}); err != nil {
			return err
		}
	}
	if old != nil {
		return mon.letGo(old)
	}
	return nil
}
