package monitor

import (
	"context"
	"errors"
	"reflect"

	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/qcow2"
	"github.com/gnomon-vmm/gnomon/disk/raw"
	"github.com/gnomon-vmm/gnomon/qmp"
)

// blockdevReopen changes how nodes are read and written, and what they lie on: all of
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
	same.DetectZeroes, same.Cache = e.options.DetectZeroes, e.options.Cache
	if same.Qcow2 != nil && e.options.Qcow2 != nil {
		q := *same.Qcow2
		q.Backing = e.options.Qcow2.Backing
		same.Qcow2 = &q
	}
	if now, was := o.fileOptions(), e.options.fileOptions(); now != nil && was != nil && !reflect.DeepEqual(now.AIO, was.AIO) {
		if now.AIO == nil {
			return nil, qmp.Errorf("Option 'aio' cannot be reset to its default value")
		}
		return nil, qmp.Errorf("Cannot change the option 'aio'")
	}
	if !reflect.DeepEqual(same, e.options) {
		return nil, qmp.Errorf("Cannot change the option 'driver', or what it has beside: only 'read-only', 'auto-read-only', 'cache', 'discard', 'detect-zeroes' and 'backing' can be changed")
	}
	m, err := manner{}.with(o)
	if err != nil {
		return nil, err
	}
	readOnly := e.wants(m)
	relinked := o.Qcow2 != nil && o.Qcow2.Backing != nil
	switch disk, err := g.usedByDiskLocked(e); {
	case err != nil:
		return nil, err
	case readOnly == e.readOnly && !relinked:
		return e, nil
	case disk == "" || e.disk == "":
		if err := g.unusedLocked(e); err != nil {
			return nil, err
		}
	case readOnly != e.readOnly:
		return nil, qmp.Errorf("Node '%s' is in use by disk %s: 'read-only' cannot be changed", e.name, e.disk)
	}
	if !relinked {
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

// wants tells whether a node is to be read only in a manner; one that may be is as it is.
func (e *graphNode) wants(m manner) bool { return m.readOnly || m.autoReadOnly && e.readOnly }

// usedByDiskLocked is the disk that has a node in its chain, or below an image of it,
// or "". It refuses a node that a job or export uses, which would go on meanwhile.
func (g *graph) usedByDiskLocked(e *graphNode) (disk string, err error) {
	for ; e != nil; e = g.parentLocked(e) {
		switch {
		case len(e.users) > 0:
			return "", qmp.Errorf("Node '%s' is busy: block device is in use by %s", e.name, e.users[0])
		case e.disk != "":
			disk = e.disk
		}
	}
	return disk, nil
}

// reopen gives a node other options.
func (mon *monitor) reopen(ctx context.Context, e *graphNode, o blockdevOptions) error {
	m, err := manner{}.with(&o)
	if err != nil {
		return err
	}
	g := &mon.graph
	g.mu.Lock()
	was, old, readOnly := e.options, e.manner, e.readOnly
	want := e.wants(m)
	g.mu.Unlock()
	if want == readOnly {
		m.readOnly = readOnly
		if err := mon.retune(e, m); err != nil {
			return err
		}
		if err := mon.relink(e, o); err != nil {
			return errors.Join(err, mon.retune(e, old))
		}
		return nil
	}
	g.mu.Lock()
	err = e.closeLocked()
	g.mu.Unlock()
	if err == nil {
		if err = mon.openAgain(ctx, e, o, want); err == nil {
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
	fresh, err := op.open(&o, manner{})
	if err != nil {
		op.undo()
		return err
	}
	op.nodes = op.nodes[:len(op.nodes)-1] // fresh, which e becomes
	op.register()
	g := &mon.graph
	g.mu.Lock()
	defer g.mu.Unlock()
	e.options, e.manner, e.readOnly, e.node, e.file, e.under = o, fresh.manner, fresh.readOnly, fresh.node, fresh.file, fresh.under
	return nil
}

// retune has a node, which stays open, be read and written in another manner.
func (mon *monitor) retune(e *graphNode, m manner) error {
	g := &mon.graph
	g.mu.Lock()
	disk, err := g.usedByDiskLocked(e)
	g.mu.Unlock()
	if err != nil {
		return err
	}
	change := func() error {
		g.mu.Lock()
		defer g.mu.Unlock()
		return g.retuneLocked(e, m)
	}
	if disk == "" {
		return change()
	}
	d, err := mon.findDisk(&disk, nil)
	if err != nil {
		return err
	}
	return mon.unlessBusy(d, func() (err error) {
		d.Root.Drained(func(current block.Node) block.Node {
			err = change()
			return current
		})
		return err
	})
}

// retuneLocked is retune while there are no requests.
func (g *graph) retuneLocked(e *graphNode, m manner) error {
	switch {
	case e.options.fileOptions() != nil:
		node := e.node
		if node == nil { // the image in it has it open
			node = g.formatOfLocked(e).node
		}
		opened, ok := node.(raw.Opened)
		if !ok {
			return qmp.Errorf("Block device %s is in use", e.name)
		}
		o := m.options()
		o.WriteThrough = opened.Options().WriteThrough
		if err := opened.SetOptions(o); err != nil {
			return err
		}
	case e.file != nil && !e.file.owned:
		below, err := m.below(false).with(&e.file.options)
		if err != nil {
			return err
		}
		if err := g.retuneLocked(e.file, below); err != nil {
			return err
		}
	}
	switch n := e.node.(type) {
	case *ruled:
		n.manner = m
	case block.Ruled:
		n.SetRules(m.rules)
	}
	e.manner = m
	return nil
}

// formatOfLocked is the node that has a file's node open.
func (g *graph) formatOfLocked(file *graphNode) *graphNode {
	for _, p := range g.byName {
		if p.file == file {
			return p
		}
	}
	return &graphNode{}
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
