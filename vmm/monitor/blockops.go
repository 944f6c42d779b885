package monitor

import (
	"context"
	"fmt"
	"strings"

	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/qmp"
	"github.com/gnomon-vmm/gnomon/vmm"
)

type resizeArguments struct {
	Device   *string `qmp:"device"`
	NodeName *string `qmp:"node-name"`
	Size     int64   `qmp:"size"`
}

func (mon *monitor) registerBlockOperations(reg *qmp.Registry) {
	qmp.Register(reg, "block-commit", mon.blockCommit)
	qmp.Register(reg, "block_resize", mon.resize)
}

// findDisk finds a disk by its id, or by the name of its node.
func (mon *monitor) findDisk(device, node *string) (vmm.AttachedDisk, error) {
	if device == nil && node == nil {
		return vmm.AttachedDisk{}, qmp.Errorf("Either device or node-name must be specified")
	}
	for _, d := range mon.m.Disks() {
		if device != nil && (d.ID == *device || mon.topName(d) == *device) || node != nil && mon.topName(d) == *node {
			return d, nil
		}
	}
	if device == nil {
		return vmm.AttachedDisk{}, qmp.Errorf("Cannot find device='' nor node-name='%s'", *node)
	}
	return vmm.AttachedDisk{}, &qmp.Error{Class: qmp.DeviceNotFound, Desc: fmt.Sprintf("Cannot find device='%s' nor node-name=''", *device)}
}

// unlessBusy calls f unless a job works on the disk, or something else changes its
// nodes; neither begins meanwhile.
func (mon *monitor) unlessBusy(d vmm.AttachedDisk, f func() error) error {
	mon.blockJobs.mu.Lock()
	defer mon.blockJobs.mu.Unlock()
	if err := mon.notBusyLocked(d); err != nil {
		return err
	}
	if err := mon.claim(d, "another command"); err != nil {
		return err
	}
	defer d.Root.Release()
	return f()
}

// chain names a disk's images as block-commit does: the node's name, or the file.
func (mon *monitor) chainDepth(d vmm.AttachedDisk, node, file *string) (int, error) {
	if node != nil && file != nil {
		return 0, qmp.Errorf("a node's name and a file were both given")
	}
	info, names := d.Node.Info(), mon.chainNames(d)
	for depth, i := 0, &info; i != nil; depth, i = depth+1, i.Backing {
		if node != nil && *node == nameAt(d, names, depth) || file != nil && *file == i.Filename {
			return depth, nil
		}
	}
	if node != nil {
		return 0, qmp.Errorf("Cannot find device='' nor node-name='%s'", *node)
	}
	return 0, qmp.Errorf("Can't find '%s' in the backing chain", *file)
}

// resize changes a disk's size; the guest is told.
func (mon *monitor) resize(_ context.Context, _ *qmp.Session, a resizeArguments) (e qmp.Empty, err error) {
	d, err := mon.findDisk(a.Device, a.NodeName)
	if err != nil {
		return e, err
	}
	if a.Size < 0 {
		return e, qmp.Errorf("Parameter 'size' expects a >0 size")
	}
	if mon.exported(d.ID) {
		return e, qmp.Errorf("Node '%s' is busy: block device is in use by a block export", mon.topName(d))
	}
	return e, mon.unlessBusy(d, func() error {
		var err error
		mon.bitmaps.mu.Lock()
		defer mon.bitmaps.mu.Unlock()
		d.Root.Drained(func(current block.Node) block.Node {
			r, ok := current.(block.Resizer)
			if !ok {
				err = qmp.Errorf("a disk of format %s cannot be resized", strings.ToLower(current.Info().Format))
				return current
			}
			size := (a.Size + 511) / 512 * 512
			if err = r.Resize(size); err == nil {
				err = mon.bitmaps.resizedLocked(d, size)
			}
			return current
		})
		if err == nil {
			d.Device.Resized()
		}
		return err
	})
}
