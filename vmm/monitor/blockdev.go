package monitor

import (
	"context"
	"errors"
	"net"
	"os"
	"time"

	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/nbd"
	"github.com/gnomon-vmm/gnomon/disk/qcow2"
	"github.com/gnomon-vmm/gnomon/disk/raw"
	"github.com/gnomon-vmm/gnomon/qmp"
)

// blockdevDriver is BlockdevDriver of QEMU's qapi/block-core.json; addressType SocketAddressType of qapi/sockets.json.
type (
	blockdevDriver string
	addressType    string
)

const (
	driverFile   blockdevDriver = "file"
	driverDevice blockdevDriver = "host_device"
	driverRaw    blockdevDriver = "raw"
	driverQcow2  blockdevDriver = "qcow2"
	driverNBD    blockdevDriver = "nbd"
	driverNull   blockdevDriver = "null-co"

	addressUnix addressType = "unix"
	addressInet addressType = "inet"
)

func (blockdevDriver) Values() []string {
	return []string{string(driverFile), string(driverDevice), string(driverRaw), string(driverQcow2), string(driverNBD), string(driverNull)}
}

func (addressType) Values() []string { return []string{string(addressUnix), string(addressInet)} }

type (
	// blockdevOptions are BlockdevOptions, as far as they have a meaning here.
	blockdevOptions struct {
		Driver       blockdevDriver `qmp:"driver,tag"`
		NodeName     *string        `qmp:"node-name"`
		ReadOnly     *bool          `qmp:"read-only"`
		AutoReadOnly *bool          `qmp:"auto-read-only"`
		Discard      *discardMode   `qmp:"discard"`
		DetectZeroes *detectZeroes  `qmp:"detect-zeroes"`
		Cache        *cacheOptions  `qmp:"cache"`
		File         *fileOptions   `qmp:"file,variant"`
		Device       *fileOptions   `qmp:"host_device,variant"`
		Raw          *rawOptions    `qmp:"raw,variant"`
		Qcow2        *qcow2Options  `qmp:"qcow2,variant"`
		NBD          *nbdOptions    `qmp:"nbd,variant"`
		Null         *nullOptions   `qmp:"null-co,variant"`
	}
	fileOptions struct {
		Filename string   `qmp:"filename"`
		AIO      *aioMode `qmp:"aio"`
	}
	rawOptions struct {
		File blockdevRef `qmp:"file"`
	}
	qcow2Options struct {
		File    blockdevRef        `qmp:"file"`
		Backing *blockdevRefOrNull `qmp:"backing"`
	}
	nbdOptions struct {
		Server socketAddress `qmp:"server"`
		Export *string       `qmp:"export"`
	}
	nullOptions struct {
		Size *int64 `qmp:"size"`
	}
	// blockdevRef names a node, or describes one that is made beside.
	blockdevRef struct {
		Reference  *string          `qmp:",alternate"`
		Definition *blockdevOptions `qmp:",alternate"`
	}
	blockdevRefOrNull struct {
		Reference  *string          `qmp:",alternate"`
		Definition *blockdevOptions `qmp:",alternate"`
		Null       *any             `qmp:",alternate"`
	}
	socketAddress struct {
		Type addressType  `qmp:"type,tag"`
		Unix *unixAddress `qmp:"unix,variant"`
		Inet *inetAddress `qmp:"inet,variant"`
	}
	unixAddress struct {
		Path string `qmp:"path"`
	}
	inetAddress struct {
		Host string `qmp:"host"`
		Port string `qmp:"port"`
	}
	blockdevDelArguments struct {
		NodeName string `qmp:"node-name"`
	}
	blockdevReopenArguments struct {
		Options []blockdevOptions `qmp:"options"`
	}
)

// dialTime is what a server has to answer: other commands wait meanwhile.
const dialTime = 5 * time.Second

// maxInline bounds how deep descriptions of nodes lie in one another.
const maxInline = 32

func (mon *monitor) registerBlockdev(reg *qmp.Registry) {
	qmp.Register(reg, "blockdev-add", mon.blockdevAdd)
	qmp.Register(reg, "blockdev-del", mon.blockdevDel)
	qmp.Register(reg, "blockdev-reopen", mon.blockdevReopen)
}

func (mon *monitor) blockdevAdd(ctx context.Context, _ *qmp.Session, o blockdevOptions) (e qmp.Empty, err error) {
	if o.NodeName == nil {
		return e, qmp.Errorf("'node-name' must be specified for the root node")
	}
	names := map[string]bool{}
	if err := mon.checkOptions(&o, names, 0); err != nil {
		return e, err
	}
	opened := &opening{mon: mon, ctx: ctx}
	root, err := opened.open(&o, manner{})
	if err != nil {
		opened.undo()
		return e, err
	}
	root.owned = true
	opened.register()
	return e, nil
}

// checkOptions refuses what cannot be opened for reasons that need no opening.
func (mon *monitor) checkOptions(o *blockdevOptions, names map[string]bool, depth int) error {
	if depth > maxInline {
		return qmp.Errorf("nodes are described in one another more than %d times", maxInline)
	}
	if o.NodeName != nil {
		if err := mon.checkName(*o.NodeName); err != nil {
			return err
		}
		if names[*o.NodeName] {
			return qmp.Errorf("Duplicate nodes with node-name='%s'", *o.NodeName)
		}
		names[*o.NodeName] = true
		mon.graph.mu.Lock()
		many := len(mon.graph.byName)+len(names) > maxNodes
		mon.graph.mu.Unlock()
		if many {
			return qmp.Errorf("there are at most %d nodes", maxNodes)
		}
	}
	switch {
	case o.Null != nil && o.Null.Size != nil && (*o.Null.Size < 0 || *o.Null.Size%512 != 0):
		return qmp.Errorf("Invalid size: multiples of 512 are possible")
	case o.NBD != nil && o.NBD.Server.Inet != nil && !loopback(o.NBD.Server.Inet.Host):
		return qmp.Errorf("a server that is not on this host needs encryption, which cannot be asked for here")
	case o.Raw != nil:
		return mon.checkRef(o.Raw.File.Reference, o.Raw.File.Definition, names, depth, nil)
	case o.Qcow2 != nil:
		files := []blockdevDriver{driverFile, driverDevice}
		if err := mon.checkRef(o.Qcow2.File.Reference, o.Qcow2.File.Definition, names, depth, files); err != nil {
			return err
		}
		if b := o.Qcow2.Backing; b != nil {
			switch {
			case b.Null != nil && *b.Null != nil:
				return qmp.Errorf("Invalid parameter type for 'backing', expected: string, object or null")
			case b.Reference != nil && *b.Reference == "":
				return nil // as null, in QEMU too
			case b.Reference != nil && mon.rootOf(*b.Reference) != nil:
				return nil // an instant of it
			case b.Null == nil:
				return mon.checkRef(b.Reference, b.Definition, names, depth, nil)
			}
		}
	}
	return nil
}

func (mon *monitor) checkRef(name *string, inline *blockdevOptions, names map[string]bool, depth int, drivers []blockdevDriver) error {
	driver := blockdevDriver("")
	if inline != nil {
		if err := mon.checkOptions(inline, names, depth+1); err != nil {
			return err
		}
		driver = inline.Driver
	} else {
		e, err := mon.findNode(*name)
		if err != nil {
			return qmp.Errorf("Cannot find device='%s' nor node-name='%s'", *name, *name)
		}
		mon.graph.mu.Lock()
		defer mon.graph.mu.Unlock()
		if err := errors.Join(mon.graph.unusedLocked(e), e.openLocked()); err != nil {
			return err
		}
		driver = e.driver
	}
	for _, d := range drivers {
		if d == driver {
			return nil
		}
	}
	if drivers != nil {
		return qmp.Errorf("an image of this format must lie in a file here, and '%s' is none", driver)
	}
	return nil
}

// opening makes nodes of options that were checked.
type opening struct {
	mon   *monitor
	ctx   context.Context
	nodes []*graphNode // those that were opened, children first
}

// open opens a node and what is described in it; what it does not say is as above says.
func (op *opening) open(o *blockdevOptions, above manner) (*graphNode, error) {
	e := &graphNode{driver: o.Driver, options: *o}
	if o.NodeName != nil {
		e.name = *o.NodeName
	}
	var err error
	if e.manner, err = above.with(o); err != nil {
		return nil, err
	}
	e.readOnly = e.manner.readOnly
	err = op.openInto(e, o)
	if err != nil && !e.readOnly && e.manner.autoReadOnly && cannotWrite(err) {
		e.readOnly, e.manner.readOnly = true, true
		err = op.openInto(e, o)
	}
	if err != nil {
		return nil, err
	}
	op.nodes = append(op.nodes, e)
	return e, nil
}

func (op *opening) openInto(e *graphNode, o *blockdevOptions) (err error) {
	switch o.Driver {
	case driverFile:
		e.node, err = e.openFile()
	case driverDevice:
		st, statErr := os.Stat(o.Device.Filename)
		if statErr == nil && st.Mode()&os.ModeDevice == 0 {
			return qmp.Errorf("'host_device' driver requires '%s' to be a block device", o.Device.Filename)
		}
		e.node, err = e.openFile()
	case driverNull:
		size := int64(1 << 30)
		if o.Null.Size != nil {
			size = *o.Null.Size
		}
		e.node = &ruled{Mapper: &nullNode{size: size, readOnly: e.readOnly}, manner: e.manner}
	case driverNBD:
		var c *nbd.Client
		if c, err = op.dial(o.NBD, e.readOnly); err != nil {
			return err
		}
		if c.ReadOnly() && !e.readOnly {
			return errors.Join(errReadOnlyExport, c.Close())
		}
		e.node = &ruled{Mapper: c, manner: e.manner}
	case driverRaw:
		err = op.openRaw(e, o.Raw)
	case driverQcow2:
		err = op.openQcow2(e, o.Qcow2)
	}
	return err
}

func (op *opening) dial(o *nbdOptions, readOnly bool) (*nbd.Client, error) {
	address, export := "", ""
	if o.Server.Unix != nil {
		address = "unix:" + o.Server.Unix.Path
	} else {
		address = net.JoinHostPort(o.Server.Inet.Host, o.Server.Inet.Port)
	}
	if o.Export != nil {
		export = *o.Export
	}
	ctx, cancel := context.WithTimeout(op.ctx, dialTime)
	defer cancel()
	return nbd.Dial(ctx, address, export, nbd.ClientOptions{ReadOnly: readOnly})
}

// child is the node that a reference means.
func (op *opening) child(name *string, inline *blockdevOptions, above manner) (*graphNode, error) {
	if inline != nil {
		return op.open(inline, above)
	}
	return op.mon.findNode(*name)
}

func (op *opening) openRaw(e *graphNode, o *rawOptions) (err error) {
	if e.file, err = op.child(o.File.Reference, o.File.Definition, e.manner.below(false)); err != nil {
		return err
	}
	g := &op.mon.graph
	g.mu.Lock()
	defer g.mu.Unlock()
	if e.file.readOnly && !e.readOnly {
		return qmp.Errorf("Block node is read-only")
	}
	switch n := e.file.node.(type) {
	case *raw.Node:
		e.node = &rawFormat{Node: n, rules: e.manner.rules}
	case block.Mapper:
		e.node = &ruled{Mapper: n, manner: e.manner}
	default:
		return qmp.Errorf("the format raw cannot lie on '%s'", e.file.driver)
	}
	return nil
}

// openQcow2 opens an image by the path of its file, whose own node is closed while
// the image is open.
func (op *opening) openQcow2(e *graphNode, o *qcow2Options) (err error) {
	// The file's own node tells whether it can be opened at all.
	if e.file, err = op.child(o.File.Reference, o.File.Definition, e.manner.below(false)); err != nil {
		return err
	}
	override, under := o.Backing != nil, (*graphNode)(nil)
	var of *block.Root // where it is to be an instant of a disk
	if override && o.Backing.Reference != nil {
		of = op.mon.rootOf(*o.Backing.Reference)
	}
	if of == nil && override && o.Backing.Null == nil && (o.Backing.Reference == nil || *o.Backing.Reference != "") {
		if under, err = op.child(o.Backing.Reference, o.Backing.Definition, e.manner.below(true)); err != nil {
			return err
		}
	}
	g := &op.mon.graph
	g.mu.Lock()
	defer g.mu.Unlock()
	if e.file.readOnly && !e.readOnly {
		return qmp.Errorf("Block node is read-only")
	}
	var backing block.Node
	if under != nil {
		backing = under.node
	}
	if err := e.file.node.Close(); err != nil {
		return err
	}
	e.file.node = nil
	image, err := openImage(e.file, e.readOnly, override, backing)
	e.node, e.under = image, under
	if err == nil {
		image.SetRules(e.manner.rules)
	}
	if err == nil && of != nil {
		e.node, err = instantOf(of, image)
	}
	if err != nil {
		e.node, e.under = nil, nil
		again, openErr := e.file.openFile()
		if openErr != nil {
			e.file.gone, again = true, nil
			return errors.Join(err, openErr)
		}
		e.file.node = again
		return err
	}
	return nil
}

// openImage opens the qcow2 image in a file, on what its header names or, with
// override, on a node or nothing.
func openImage(file *graphNode, readOnly, override bool, backing block.Node) (*qcow2.Node, error) {
	path, o := file.path(), file.manner.options()
	switch {
	case !override:
		return qcow2.OpenWith(path, readOnly, o)
	case !readOnly:
		return qcow2.OpenOverWith(path, backing, o)
	}
	n, err := qcow2.OpenWith(path, true, o)
	if err != nil {
		return nil, err
	}
	if old := n.SetBacking(backing); old != nil {
		if err := old.Close(); err != nil {
			n.SetBacking(nil)
			return nil, errors.Join(err, n.Close())
		}
	}
	return n, nil
}

// undo closes what was opened, and leaves what was there before as it was.
func (op *opening) undo() {
	g := &op.mon.graph
	g.mu.Lock()
	defer g.mu.Unlock()
	for i := len(op.nodes) - 1; i >= 0; i-- {
		_ = op.nodes[i].closeLocked()
	}
}

// register makes nodes that were opened known. Those that are not named are known
// only to what lies on them.
func (op *opening) register() {
	g := &op.mon.graph
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, e := range op.nodes {
		if e.name != "" {
			g.byName[e.name] = e
		}
	}
}

// closeLocked closes a node, and what was described in it. What it lay on that was a
// node before is one again.
func (e *graphNode) closeLocked() error {
	var err error
	if q, ok := e.node.(*qcow2.Node); ok && e.under != nil {
		q.SetBacking(nil)
	}
	shared := e.driver == driverRaw && e.file != nil // the node is the file's
	if e.node != nil && !e.gone && !shared {
		err = e.node.Close()
	}
	e.node, e.under = nil, nil
	file := e.file
	e.file = nil
	if file == nil || file.gone {
		return err
	}
	switch {
	case shared && !file.owned:
		err = errors.Join(err, file.closeLocked())
	case !shared && file.owned && file.node == nil:
		n, openErr := file.openFile()
		if openErr != nil {
			file.gone = true
			return errors.Join(err, openErr)
		}
		file.node = n
	}
	return err
}

// blockdevDel closes a node that nothing uses.
func (mon *monitor) blockdevDel(_ context.Context, _ *qmp.Session, a blockdevDelArguments) (empty qmp.Empty, err error) {
	e, err := mon.findNode(a.NodeName)
	if err != nil {
		return empty, err
	}
	g := &mon.graph
	g.mu.Lock()
	defer g.mu.Unlock()
	if err := g.unusedLocked(e); err != nil {
		return empty, err
	}
	if !e.owned {
		return empty, qmp.Errorf("Node %s is not owned by the monitor", e.name)
	}
	return empty, g.deleteLocked(e)
}

// deleteLocked closes a node and takes it out of the graph, with what was described in it.
func (g *graph) deleteLocked(e *graphNode) error {
	file, under := e.file, e.under
	err := e.closeLocked()
	delete(g.byName, e.name)
	if file != nil && !file.owned {
		delete(g.byName, file.name)
	}
	if under != nil && !under.owned {
		err = errors.Join(err, g.deleteLocked(under))
	}
	return err
}
