package monitor

import (
	"context"
	"errors"
	"net"
	"slices"
	"sync"

	"github.com/gnomon-vmm/gnomon/disk/bitmap"
	"github.com/gnomon-vmm/gnomon/disk/nbd"
	"github.com/gnomon-vmm/gnomon/qmp"
	"github.com/gnomon-vmm/gnomon/vmm"
)

// exportType is BlockExportType, removeMode BlockExportRemoveMode of QEMU's
// qapi/block-export.json.
type (
	exportType string
	removeMode string
)

const (
	removeSafe removeMode = "safe"
	removeHard removeMode = "hard"
)

func (exportType) Values() []string { return []string{"nbd"} }
func (removeMode) Values() []string { return []string{string(removeSafe), string(removeHard)} }

// Bounds of what is served.
const (
	maxExports     = 128
	maxConnections = 1024
)

type (
	nbdServerArguments struct {
		Address        legacyAddress `qmp:"addr"`
		MaxConnections *uint32       `qmp:"max-connections"`
	}
	// legacyAddress is SocketAddressLegacy.
	legacyAddress struct {
		Type addressType            `qmp:"type,tag"`
		Unix *actionOf[unixAddress] `qmp:"unix,variant"`
		Inet *actionOf[inetAddress] `qmp:"inet,variant"`
	}
	nbdAddArguments struct {
		Device      string  `qmp:"device"`
		Name        *string `qmp:"name"`
		Description *string `qmp:"description"`
		Writable    *bool   `qmp:"writable"`
		Bitmap      *string `qmp:"bitmap"`
	}
	nbdRemoveArguments struct {
		Name string      `qmp:"name"`
		Mode *removeMode `qmp:"mode"`
	}
	exportArguments struct {
		Type     exportType   `qmp:"type,tag"`
		ID       string       `qmp:"id"`
		NodeName string       `qmp:"node-name"`
		Writable *bool        `qmp:"writable"`
		NBD      *exportOfNBD `qmp:"nbd,variant"`
	}
	exportOfNBD struct {
		Name        *string          `qmp:"name"`
		Description *string          `qmp:"description"`
		Bitmaps     []bitmapOrString `qmp:"bitmaps,omitempty"`
	}
	exportDelArguments struct {
		ID   string      `qmp:"id"`
		Mode *removeMode `qmp:"mode"`
	}
	exportID struct {
		ID string `qmp:"id"`
	}
	exportInfo struct {
		ID           string     `qmp:"id"`
		Type         exportType `qmp:"type"`
		NodeName     string     `qmp:"node-name"`
		ShuttingDown bool       `qmp:"shutting-down"`
	}
)

// exports are what the machine serves by NBD.
type exports struct {
	mu     sync.Mutex
	server *nbd.Server    // nil: there is none; guarded by mu
	byID   []*blockExport // guarded by mu
	going  sync.WaitGroup // those that are being removed
}

// blockExport is a node that is served.
type blockExport struct {
	id, name string
	node     string
	disk     string // whose node it is, or ""
	leaving  bool   // guarded by exports.mu
	free     func() // lets others use what is served
}

func (mon *monitor) registerExports(reg *qmp.Registry) {
	qmp.RegisterEvent[exportID](reg, "BLOCK_EXPORT_DELETED")
	qmp.Register(reg, "nbd-server-start", mon.startNBD)
	action(reg, "nbd-server-stop", mon.stopNBD)
	qmp.Register(reg, "nbd-server-add", func(_ context.Context, _ *qmp.Session, a nbdAddArguments) (e qmp.Empty, err error) {
		name := a.Device
		if a.Name != nil {
			name = *a.Name
		}
		o := exportOfNBD{Name: &name, Description: a.Description}
		if a.Bitmap != nil {
			o.Bitmaps = []bitmapOrString{{Local: a.Bitmap}}
		}
		return e, mon.addExport(exportArguments{ID: name, NodeName: a.Device, Writable: a.Writable, NBD: &o})
	})
	qmp.Register(reg, "nbd-server-remove", func(_ context.Context, _ *qmp.Session, a nbdRemoveArguments) (e qmp.Empty, err error) {
		return e, mon.removeExport(a.Name, a.Mode)
	})
	qmp.Register(reg, "block-export-add", func(_ context.Context, _ *qmp.Session, a exportArguments) (e qmp.Empty, err error) {
		if !wellFormed(a.ID) {
			return e, qmp.Errorf("Invalid block export id")
		}
		return e, mon.addExport(a)
	})
	qmp.Register(reg, "block-export-del", func(_ context.Context, _ *qmp.Session, a exportDelArguments) (e qmp.Empty, err error) {
		return e, mon.removeExport(a.ID, a.Mode)
	})
	query(reg, "query-block-exports", func() (all []exportInfo) {
		mon.exports.mu.Lock()
		defer mon.exports.mu.Unlock()
		for _, x := range mon.exports.byID {
			all = append(all, exportInfo{ID: x.id, Type: "nbd", NodeName: x.node, ShuttingDown: x.leaving})
		}
		return all
	})
}

// startNBD serves exports on a Unix socket, or on this host.
func (mon *monitor) startNBD(_ context.Context, _ *qmp.Session, a nbdServerArguments) (e qmp.Empty, err error) {
	o := nbd.ServerOptions{}
	if a.MaxConnections != nil {
		o.MaxConnections = int(min(*a.MaxConnections, maxConnections))
	}
	address := ""
	switch {
	case a.Address.Unix != nil:
		address = "unix:" + a.Address.Unix.Data.Path
	default:
		in := a.Address.Inet.Data
		if !loopback(in.Host) {
			return e, qmp.Errorf("'%s' is not an address of this host alone: NBD is served without encryption", in.Host)
		}
		address = net.JoinHostPort(in.Host, in.Port)
	}
	x := &mon.exports
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.server != nil {
		return e, qmp.Errorf("NBD server already running")
	}
	l, err := nbd.Listen(address)
	if err != nil {
		return e, err
	}
	x.server = nbd.NewServer(o)
	go x.server.Serve(l) // until the server is closed
	return e, nil
}

func loopback(host string) bool {
	return host == "localhost" || net.ParseIP(host).IsLoopback()
}

// stopNBD ends the server, and what it serves.
func (mon *monitor) stopNBD() error {
	x := &mon.exports
	x.mu.Lock()
	server, gone := x.server, x.byID
	if server == nil {
		x.mu.Unlock()
		return qmp.Errorf("NBD server not running")
	}
	x.server, x.byID = nil, nil
	x.mu.Unlock()
	err := server.Close()
	x.going.Wait()
	for _, e := range gone {
		if !e.leaving {
			e.free()
			mon.emit("BLOCK_EXPORT_DELETED", exportID{e.id})
		}
	}
	return err
}

// closeExports ends what the machine serves.
func (mon *monitor) closeExports() error {
	mon.exports.mu.Lock()
	serves := mon.exports.server != nil
	mon.exports.mu.Unlock()
	if !serves {
		return nil
	}
	return mon.stopNBD()
}

// addExport serves a disk, or a node that was added and that nothing else uses.
func (mon *monitor) addExport(a exportArguments) error {
	x := &mon.exports
	x.mu.Lock()
	defer x.mu.Unlock()
	e := nbd.Export{Name: a.NodeName, ReadOnly: a.Writable == nil || !*a.Writable}
	if a.NBD.Name != nil {
		e.Name = *a.NBD.Name
	}
	if a.NBD.Description != nil {
		e.Description = *a.NBD.Description
	}
	switch {
	case x.server == nil:
		return qmp.Errorf("NBD server not running")
	case slices.ContainsFunc(x.byID, func(o *blockExport) bool { return o.id == a.ID }):
		return qmp.Errorf("Block export id '%s' is already in use", a.ID)
	case slices.ContainsFunc(x.byID, func(o *blockExport) bool { return o.name == e.Name }):
		return qmp.Errorf("NBD server already has export named '%s'", e.Name)
	case len(x.byID) >= maxExports:
		return qmp.Errorf("there are %d exports, which is the most there can be", maxExports)
	}
	made := &blockExport{id: a.ID, name: e.Name, node: a.NodeName, free: func() {}}
	d, err := mon.findDisk(&a.NodeName, nil)
	if err == nil {
		made.disk, made.node = d.ID, mon.topName(d)
		if !e.ReadOnly {
			return qmp.Errorf("Node '%s' is written by the guest: its export can be read only", made.node)
		}
		e.Node = d.Root
	} else {
		by := "block export: " + a.ID
		node, err := mon.takeInstant(a.NodeName, by)
		if node == nil && err == nil {
			node, err = mon.take(a.NodeName, by)
		}
		if err != nil {
			return err
		}
		made.free = func() { mon.drop(node, by) }
		if e.Node = node.node; !e.ReadOnly && (node.readOnly || node.node.ReadOnly()) {
			made.free()
			return qmp.Errorf("Block node is read-only")
		}
		d = mon.diskOf(node.node)
	}
	if err := mon.exportBitmaps(made, &e, d, a); err != nil {
		made.free()
		return err
	}
	if err := x.server.Add(e); err != nil {
		made.free()
		return err
	}
	x.byID = append(x.byID, made)
	return nil
}

// exportBitmaps has clients read bitmaps of the disk that is served, which nothing
// else uses meanwhile.
func (mon *monitor) exportBitmaps(made *blockExport, e *nbd.Export, d vmm.AttachedDisk, a exportArguments) error {
	b := &mon.bitmaps
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, ref := range a.NBD.Bitmaps {
		name, of := ref.Local, d
		if ref.External != nil {
			name = &ref.External.Name
			var err error
			if of, err = mon.findDisk(&ref.External.Node, nil); err != nil {
				return err
			}
		}
		if d.Root == nil || of.ID != d.ID {
			return qmp.Errorf("Bitmap '%s' is not found", *name)
		}
		x, err := b.usableLocked(d, *name)
		if err != nil {
			return err
		}
		if x.Enabled() {
			return qmp.Errorf("Enabled bitmap '%s' incompatible with readonly export", *name)
		}
		x.exports++
		free := made.free
		made.free = func() {
			free()
			b.mu.Lock()
			defer b.mu.Unlock()
			x.exports--
		}
		e.Bitmaps = append(e.Bitmaps, exportedBitmap{x.Bitmap})
	}
	return nil
}

// exportedBitmap is a bitmap as NBD clients read it.
type exportedBitmap struct{ *bitmap.Bitmap }

func (b exportedBitmap) NextDirty(off, end int64) (start, stop int64, err error) {
	start, n := b.Next(off)
	if n == 0 || start >= end {
		return end, end, nil
	}
	return start, min(start+n, end), nil
}

// removeExport ends an export: one that has clients only if they are to be
// disconnected.
func (mon *monitor) removeExport(id string, mode *removeMode) error {
	x := &mon.exports
	x.mu.Lock()
	defer x.mu.Unlock()
	i := slices.IndexFunc(x.byID, func(e *blockExport) bool { return e.id == id })
	if i < 0 {
		return qmp.Errorf("Export '%s' is not found", id)
	}
	e := x.byID[i]
	if e.leaving {
		return qmp.Errorf("Export '%s' is already shutting down", id)
	}
	if mode != nil && *mode == removeHard {
		e.leaving = true
		server := x.server
		x.going.Add(1)
		go func() {
			defer x.going.Done()
			// Requests under way end; the server's Close ends them too.
			_ = server.Remove(context.Background(), e.name, nbd.RemoveHard)
			mon.exportGone(e)
		}()
		return nil
	}
	err := x.server.Remove(context.Background(), e.name, nbd.RemoveIfUnused)
	switch {
	case errors.Is(err, nbd.ErrInUse):
		return qmp.Errorf("export '%s' still in use", id)
	case err != nil:
		return err
	}
	x.byID = slices.Delete(x.byID, i, i+1)
	e.free()
	mon.emit("BLOCK_EXPORT_DELETED", exportID{e.id})
	return nil
}

func (mon *monitor) exportGone(e *blockExport) {
	x := &mon.exports
	x.mu.Lock()
	if i := slices.Index(x.byID, e); i >= 0 {
		x.byID = slices.Delete(x.byID, i, i+1)
	}
	x.mu.Unlock()
	e.free()
	mon.emit("BLOCK_EXPORT_DELETED", exportID{e.id})
}

// exported tells that a disk is served.
func (mon *monitor) exported(disk string) bool {
	mon.exports.mu.Lock()
	defer mon.exports.mu.Unlock()
	return slices.ContainsFunc(mon.exports.byID, func(e *blockExport) bool { return e.disk == disk })
}
