package monitor

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/nbd"
	"github.com/gnomon-vmm/gnomon/disk/qcow2"
	"github.com/gnomon-vmm/gnomon/qmp"
	"github.com/gnomon-vmm/gnomon/vmm"
)

// pluggable is the one driver that device_add knows; pciBusName is QEMU's name for
// the root bus of a q35, where such devices go.
const (
	pluggable  = "virtio-blk-pci"
	pciBusName = "pcie.0"
	maxSerial  = 20 // bytes; the guest sees no more, of QEMU's disks either
)

// onDeviceError is BlockdevOnError as far as a device knows it.
type onDeviceError string

func (onDeviceError) Values() []string {
	return []string{string(vmm.OnErrorReport), string(vmm.OnErrorIgnore), string(vmm.OnErrorStop), string(vmm.OnErrorNoSpace), "auto"}
}

type (
	deviceAddArguments struct {
		Driver    string         `qmp:"driver"`
		Bus       *string        `qmp:"bus"`
		ID        *string        `qmp:"id"`
		Drive     *string        `qmp:"drive"`
		Serial    *string        `qmp:"serial"`
		NumQueues *int64         `qmp:"num-queues"`
		RError    *onDeviceError `qmp:"rerror"`
		WError    *onDeviceError `qmp:"werror"`
	}
	deviceDelArguments struct {
		ID string `qmp:"id"`
	}
	deviceDeletedData struct {
		Device *string `qmp:"device"`
		Path   string  `qmp:"path"`
	}
)

func (mon *monitor) registerHotplug(reg *qmp.Registry) {
	qmp.RegisterEvent[deviceDeletedData](reg, "DEVICE_DELETED")
	qmp.Register(reg, "device_add", mon.deviceAdd)
	qmp.Register(reg, "device_del", mon.deviceDel)
}

// deviceAdd plugs in a disk on a node that nothing else uses.
func (mon *monitor) deviceAdd(_ context.Context, _ *qmp.Session, a deviceAddArguments) (e qmp.Empty, err error) {
	mon.plugging.Lock()
	defer mon.plugging.Unlock()
	d, err := mon.newDisk(a)
	if err != nil {
		return e, err
	}
	by := "device " + d.ID
	mon.refresh()
	mon.graph.mu.Lock()
	node := mon.graph.byName[*a.Drive]
	mon.graph.mu.Unlock()
	if node == nil {
		return e, qmp.Errorf("Property '%s.drive' can't find value '%s'", strings.TrimSuffix(pluggable, "-pci")+"-device", *a.Drive)
	}
	if node, err = mon.take(*a.Drive, by); err != nil {
		return e, err
	}
	defer mon.drop(node, by) // the disk has it then
	root := block.NewRoot(node.node)
	mon.giveBitmaps(d.ID, root)
	d.Node = root
	err = mon.m.Plug(d)
	if err != nil {
		mon.dropBitmaps(d.ID)
	}
	switch {
	case errors.Is(err, vmm.ErrTwoDevices):
		return e, qmp.Errorf("Duplicate device ID '%s'", d.ID)
	case errors.Is(err, vmm.ErrNoSlot):
		return e, qmp.Errorf("PCI: no slot/function available for %s, all in use or reserved", pluggable)
	case errors.Is(err, vmm.ErrHeld):
		return e, qmp.Errorf("device_add not allowed while the machine is saved or restored")
	case err != nil:
		return e, err
	}
	mon.refresh()
	return e, nil
}

// newDisk is what device_add's arguments describe, but for its node.
func (mon *monitor) newDisk(a deviceAddArguments) (d vmm.Disk, err error) {
	switch {
	case a.Driver != pluggable:
		return d, qmp.Errorf("'%s' is not a valid device model name: %s can be plugged in", a.Driver, pluggable)
	case a.Bus != nil && *a.Bus != pciBusName:
		return d, qmp.Errorf("Bus '%s' not found", *a.Bus)
	case a.ID == nil:
		return d, qmp.Errorf("Parameter 'id' is missing: it is how the device is found again")
	case !wellFormed(*a.ID):
		return d, qmp.Errorf("Parameter 'id' expects an identifier")
	case a.Drive == nil:
		return d, qmp.Errorf("drive property not set")
	}
	d.ID = *a.ID
	for _, other := range mon.m.Virtio() {
		if other.Name() == d.ID {
			return d, qmp.Errorf("Duplicate device ID '%s'", d.ID)
		}
	}
	if d.ID != *a.Drive {
		if _, err := mon.findNode(d.ID); err == nil {
			return d, qmp.Errorf("id=%s is conflicting with a node name", d.ID)
		}
	}
	if a.Serial != nil {
		d.Serial = (*a.Serial)[:min(len(*a.Serial), maxSerial)]
	}
	if a.NumQueues != nil {
		if *a.NumQueues < 1 || *a.NumQueues > vmm.MaxCPUs {
			return d, qmp.Errorf("num-queues property must be larger than 0 and at most %d", vmm.MaxCPUs)
		}
		d.Queues = int(*a.NumQueues)
	}
	d.ReadError, d.WriteError = policy(a.RError, vmm.OnErrorReport), policy(a.WError, vmm.OnErrorNoSpace)
	if d.ReadError == vmm.OnErrorNoSpace {
		return d, qmp.Errorf("rerror cannot be 'enospc': nothing is written")
	}
	return d, nil
}

// policy is that of QEMU's property; auto is what QEMU means by it.
func policy(p *onDeviceError, auto vmm.OnError) vmm.OnError {
	if p == nil || *p == "auto" {
		return auto
	}
	return vmm.OnError(*p)
}

// giveBitmaps has a disk that is about to be plugged in have the bitmaps that its
// image keeps. plugging is held, so that no other disk gets the id.
func (mon *monitor) giveBitmaps(id string, root *block.Root) {
	b := &mon.bitmaps
	b.mu.Lock()
	defer b.mu.Unlock()
	var kept []*dirtyBitmap
	if q, ok := root.Current().(*qcow2.Node); ok {
		kept = keptBitmaps(q)
	}
	b.setLocked(vmm.AttachedDisk{Disk: vmm.Disk{ID: id}, Root: root}, kept)
}

func (mon *monitor) dropBitmaps(id string) {
	mon.bitmaps.mu.Lock()
	defer mon.bitmaps.mu.Unlock()
	delete(mon.bitmaps.byDisk, id)
}

// deviceDel asks the guest to let go of a disk that was plugged in.
func (mon *monitor) deviceDel(_ context.Context, _ *qmp.Session, a deviceDelArguments) (e qmp.Empty, err error) {
	id := strings.TrimPrefix(a.ID, devicePath(""))
	switch err := mon.m.Unplug(id); {
	case errors.Is(err, vmm.ErrNoDevice):
		return e, &qmp.Error{Class: qmp.DeviceNotFound, Desc: fmt.Sprintf("Device '%s' not found", a.ID)}
	case errors.Is(err, vmm.ErrFixed):
		return e, qmp.Errorf("Bus '%s' does not support hotplugging", pciBusName)
	case errors.Is(err, vmm.ErrLeaving):
		return e, qmp.Errorf("Device %s is already in the process of unplug", id)
	default:
		return e, err
	}
}

// unplugged gives the nodes of a disk that is gone back to those who added them. The
// others are closed.
func (mon *monitor) unplugged(d vmm.AttachedDisk) error {
	err := mon.storeBitmapsOf(d)
	mon.dropBitmaps(d.ID)
	top := d.Root.Current()
	err = errors.Join(err, mon.keepExports(d.ID, mon.graph.added(top)))
	return errors.Join(err, mon.letGo(top))
}

// added is the entry of a node that stays when it leaves a disk, or nil.
func (g *graph) added(n block.Node) *graphNode {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, e := range g.byName {
		if e.owned && e.node == n {
			return e
		}
	}
	return nil
}

// storeBitmapsOf has a disk's image keep its persistent bitmaps.
func (mon *monitor) storeBitmapsOf(d vmm.AttachedDisk) error {
	b := &mon.bitmaps
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.storeLocked(d)
}

// keepExports has exports of a disk that is gone be those of its node, as in QEMU;
// where that is closed they end.
func (mon *monitor) keepExports(disk string, node *graphNode) error {
	x := &mon.exports
	x.mu.Lock()
	defer x.mu.Unlock()
	var errs []error
	for _, e := range slices.Clone(x.byID) {
		switch {
		case e.disk != disk:
		case node == nil:
			errs = append(errs, x.server.Remove(context.Background(), e.name, nbd.RemoveHard))
			x.byID = slices.DeleteFunc(x.byID, func(o *blockExport) bool { return o == e })
			e.free()
			mon.emit("BLOCK_EXPORT_DELETED", exportID{e.id})
		default:
			by, free := "block export: "+e.id, e.free
			mon.graph.mu.Lock()
			node.users = append(node.users, by)
			mon.graph.mu.Unlock()
			e.disk, e.free = "", func() {
				free()
				mon.drop(node, by)
			}
		}
	}
	return errors.Join(errs...)
}
