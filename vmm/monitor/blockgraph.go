package monitor

import (
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/gnomon-vmm/gnomon/disk/backup"
	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/mirror"
	"github.com/gnomon-vmm/gnomon/disk/qcow2"
	"github.com/gnomon-vmm/gnomon/disk/raw"
	"github.com/gnomon-vmm/gnomon/disk/stream"
	"github.com/gnomon-vmm/gnomon/qmp"
	"github.com/gnomon-vmm/gnomon/vmm"
)

// Bounds of the graph.
const (
	maxNodes    = 256
	maxNodeName = 31 // bytes, as in QEMU
)

// graph are the nodes that have names. The images of disks are nodes without an
// entry, which are named by the disk's id, until they are given one.
type graph struct {
	mu     sync.Mutex
	byName map[string]*graphNode // guarded by mu
}

// graphNode is a node with a name. A node belongs to one other at most: what lies
// on it, or a disk; or a job or export uses it.
type graphNode struct {
	name   string
	driver blockdevDriver
	// owned: blockdev-add made it, and blockdev-del takes it away. One that is not
	// goes with what uses it.
	owned bool

	// All guarded by graph.mu.
	options  blockdevOptions
	manner   manner
	readOnly bool
	// node is what requests go to; nil: the format node above has the file open.
	node  block.Node
	file  *graphNode // of a format node
	under *graphNode // the backing file's node, where that has a name
	disk  string     // whose chain it has come into, or ""
	users []string   // jobs and exports
	// gone: who used the node has closed it, or removed its file.
	gone bool
}

// identity is a node that can be looked up; others have no names.
func identity(n block.Node) (block.Node, bool) {
	switch n := n.(type) {
	case *qcow2.Node, *raw.Node, *rawFormat, *ruled, *backup.Instant:
		return n, true
	}
	return nil, false
}

// behindFilters is the image that a job's filter stands before.
func behindFilters(n block.Node) block.Node {
	for {
		switch f := n.(type) {
		case *mirror.Filter:
			n = f.Source()
		case *backup.Filter:
			n = f.Node
		case *stream.Filter:
			n = f.Node
		default:
			return n
		}
	}
}

// chainOf are the images of a disk as far as they are known to be nodes, the newest
// first.
func chainOf(root *block.Root) (all []block.Node) {
	root.View(func(current block.Node) { all = chainFrom(current) })
	return all
}

func chainFrom(n block.Node) (all []block.Node) {
	for n = behindFilters(n); n != nil; {
		all = append(all, n)
		q, ok := n.(*qcow2.Node)
		if !ok {
			break
		}
		n = q.Backing()
	}
	return all
}

// entryLocked is the entry of a node, or nil.
func (g *graph) entryLocked(n block.Node) *graphNode {
	id, ok := identity(n)
	if !ok {
		return nil
	}
	for _, e := range g.byName {
		if e.node == id && !e.gone {
			return e
		}
	}
	return nil
}

func (g *graph) entry(n block.Node) *graphNode {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.entryLocked(n)
}

// madeUpName names a disk's node, or the depth-th of its backing files, that was
// not given a name. Names that begin with # are made up, in QEMU too.
func madeUpName(disk string, depth int) string {
	if depth == 0 {
		return "#" + disk
	}
	return fmt.Sprintf("#%s-backing%d", disk, depth)
}

// chainNames names the images of a disk's chain that are known to be nodes.
func (mon *monitor) chainNames(d vmm.AttachedDisk) []string {
	chain := chainOf(d.Root)
	mon.graph.mu.Lock()
	defer mon.graph.mu.Unlock()
	names := make([]string, len(chain))
	for i, n := range chain {
		names[i] = madeUpName(d.ID, i)
		if e := mon.graph.entryLocked(n); e != nil {
			names[i] = e.name
		}
	}
	return names
}

// nameAt is the name of the depth-th image of a disk; names are those of chainNames.
func nameAt(d vmm.AttachedDisk, names []string, depth int) string {
	if depth < len(names) {
		return names[depth]
	}
	return madeUpName(d.ID, depth)
}

// topName is the name of the node that a disk's device uses. It waits for nobody
// who changes the graph.
func (mon *monitor) topName(d vmm.AttachedDisk) string {
	if e := mon.graph.entry(behindFilters(d.Root.Current())); e != nil {
		return e.name
	}
	return madeUpName(d.ID, 0)
}

// refresh notes which nodes have come into the disks' chains, and which have left
// them, which closed them. It is called before the entries are used.
func (mon *monitor) refresh() {
	chains := map[string][]block.Node{}
	for _, d := range mon.m.Disks() {
		chains[d.ID] = chainOf(d.Root)
	}
	g := &mon.graph
	g.mu.Lock()
	defer g.mu.Unlock()
	in := map[*graphNode]string{}
	for disk, chain := range chains {
		for _, n := range chain {
			if e := g.entryLocked(n); e != nil {
				in[e] = disk
			}
		}
	}
	for name, e := range g.byName {
		switch disk, ok := in[e]; {
		case ok:
			e.disk = disk
		case e.disk != "" && e.owned:
			e.gone, e.disk = true, ""
		case e.disk != "":
			delete(g.byName, name)
		}
	}
}

// parentLocked is the node with a name that has e below it, or nil.
func (g *graph) parentLocked(e *graphNode) *graphNode {
	for _, p := range g.byName {
		if p.file.has(e) || p.under.has(e) {
			return p
		}
	}
	return nil
}

// has tells whether e is the node or below it.
func (p *graphNode) has(e *graphNode) bool {
	return p != nil && (p == e || p.file.has(e) || p.under.has(e))
}

// findNode finds a node by its name, gone ones too.
func (mon *monitor) findNode(name string) (*graphNode, error) {
	mon.refresh()
	mon.graph.mu.Lock()
	defer mon.graph.mu.Unlock()
	if e := mon.graph.byName[name]; e != nil {
		return e, nil
	}
	return nil, qmp.Errorf("Failed to find node with node-name='%s'", name)
}

// unusedLocked refuses a node that something uses.
func (g *graph) unusedLocked(e *graphNode) error {
	switch {
	case e.gone:
		return nil
	case e.disk != "":
		return qmp.Errorf("Node %s is in use", e.name)
	case len(e.users) > 0:
		return qmp.Errorf("Node '%s' is busy: block device is in use by %s", e.name, e.users[0])
	case g.parentLocked(e) != nil:
		return qmp.Errorf("Block device %s is in use", e.name)
	}
	return nil
}

// take has a node that nothing uses be used by somebody until drop.
func (mon *monitor) take(name, by string) (*graphNode, error) {
	e, err := mon.findNode(name)
	if err != nil {
		return nil, err
	}
	g := &mon.graph
	g.mu.Lock()
	defer g.mu.Unlock()
	if err := g.unusedLocked(e); err != nil {
		return nil, err
	}
	if err := e.openLocked(); err != nil {
		return nil, err
	}
	e.users = append(e.users, by)
	return e, nil
}

func (e *graphNode) openLocked() error {
	if e.gone {
		return qmp.Errorf("Node '%s' was closed: delete it and add it again", e.name)
	}
	return nil
}

func (mon *monitor) drop(e *graphNode, by string) {
	g := &mon.graph
	g.mu.Lock()
	defer g.mu.Unlock()
	if i := slices.Index(e.users, by); i >= 0 {
		e.users = slices.Delete(e.users, i, i+1)
	}
}

// wellFormed tells whether a name of a node or job begins with a letter and goes on
// with letters, digits, '-', '.' and '_'.
func wellFormed(name string) bool {
	for i := range len(name) {
		c := name[i]
		letter := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z'
		if !letter && (i == 0 || !(c >= '0' && c <= '9' || c == '-' || c == '.' || c == '_')) {
			return false
		}
	}
	return name != ""
}

// namedChain are the entries of the images of a disk's chain; nil: one has none.
func (mon *monitor) namedChain(d vmm.AttachedDisk) []*graphNode {
	mon.refresh()
	chain := chainOf(d.Root)
	mon.graph.mu.Lock()
	defer mon.graph.mu.Unlock()
	entries := make([]*graphNode, len(chain))
	for i, n := range chain {
		entries[i] = mon.graph.entryLocked(n)
	}
	return entries
}

// rename has entries mean the images of a disk's chain, some of which a job has
// opened anew.
func (mon *monitor) rename(d vmm.AttachedDisk, entries []*graphNode) {
	chain := chainOf(d.Root)
	mon.graph.mu.Lock()
	defer mon.graph.mu.Unlock()
	for i, n := range chain {
		if i < len(entries) && entries[i] != nil {
			e := entries[i]
			e.node, e.readOnly, e.disk, e.gone = n, n.ReadOnly(), d.ID, false
			mon.graph.byName[e.name] = e
		}
	}
}

// checkName refuses a name that no new node can have.
func (mon *monitor) checkName(name string) error {
	if !wellFormed(name) {
		return qmp.Errorf("Invalid node-name: '%s'", name)
	}
	for _, d := range mon.m.Disks() {
		if d.ID == name {
			return qmp.Errorf("node-name=%s is conflicting with a device id", name)
		}
	}
	mon.refresh()
	g := &mon.graph
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case g.byName[name] != nil:
		return qmp.Errorf("Duplicate nodes with node-name='%s'", name)
	case len(name) > maxNodeName:
		return qmp.Errorf("Node name too long")
	case len(g.byName) >= maxNodes:
		return qmp.Errorf("there are %d nodes, which is the most there can be", maxNodes)
	}
	return nil
}

// letGo ends the use of an image that was a disk's: those of its chain that have
// names stay, for whoever gave them, the others are closed.
func (mon *monitor) letGo(n block.Node) error {
	g := &mon.graph
	var errs []error
	for {
		if _, ok := identity(n); !ok {
			if n != nil {
				errs = append(errs, n.Close())
			}
			break
		}
		q, _ := n.(*qcow2.Node)
		var next block.Node
		g.mu.Lock()
		var e *graphNode
		for _, x := range g.byName {
			if x.node == n { // one that left a disk's chain passes for closed so far
				e = x
			}
		}
		if e != nil && e.owned {
			for c := e; c != nil; c = c.under {
				c.disk, c.gone = "", false
			}
			g.mu.Unlock()
			break
		}
		if e != nil {
			delete(g.byName, e.name)
		}
		if q != nil {
			next = q.Backing()
		}
		g.mu.Unlock()
		if q != nil {
			q.SetBacking(nil)
		}
		errs = append(errs, n.Close())
		n = next
	}
	return errors.Join(errs...)
}

// closeNodes closes the nodes that no disk has. The machine has ended.
func (mon *monitor) closeNodes() error {
	mon.refresh()
	g := &mon.graph
	g.mu.Lock()
	defer g.mu.Unlock()
	var errs []error
	for _, e := range g.byName {
		if e.disk == "" && g.parentLocked(e) == nil {
			errs = append(errs, e.closeTreeLocked())
		}
	}
	clear(g.byName)
	return errors.Join(errs...)
}

// closeTreeLocked closes a node and what it lies on.
func (e *graphNode) closeTreeLocked() error {
	under := e.under
	err := e.closeLocked()
	if under != nil {
		err = errors.Join(err, under.closeTreeLocked())
	}
	return err
}
