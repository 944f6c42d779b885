package monitor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/gnomon-vmm/gnomon/disk"
	"github.com/gnomon-vmm/gnomon/disk/backup"
	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/mirror"
	"github.com/gnomon-vmm/gnomon/disk/qcow2"
	"github.com/gnomon-vmm/gnomon/qmp"
	"github.com/gnomon-vmm/gnomon/vmm"
)

// newImageMode is NewImageMode, syncMode MirrorSyncMode of QEMU's
// qapi/block-core.json.
type (
	newImageMode string
	syncMode     string
)

const (
	modeExisting      newImageMode = "existing"
	modeAbsolutePaths newImageMode = "absolute-paths"

	syncFull        syncMode = "full"
	syncTop         syncMode = "top"
	syncIncremental syncMode = "incremental"
)

func (newImageMode) Values() []string {
	return []string{string(modeExisting), string(modeAbsolutePaths)}
}

func (syncMode) Values() []string {
	return []string{string(syncFull), string(syncTop), string(syncIncremental)}
}

type (
	snapshotSyncArguments struct {
		Device           *string       `qmp:"device"`
		NodeName         *string       `qmp:"node-name"`
		SnapshotFile     string        `qmp:"snapshot-file"`
		SnapshotNodeName *string       `qmp:"snapshot-node-name"`
		Format           *string       `qmp:"format"`
		Mode             *newImageMode `qmp:"mode"`
	}
	commitArguments struct {
		JobID        *string `qmp:"job-id"`
		Device       string  `qmp:"device"`
		BaseNode     *string `qmp:"base-node"`
		Base         *string `qmp:"base"`
		TopNode      *string `qmp:"top-node"`
		Top          *string `qmp:"top"`
		Speed        *int64  `qmp:"speed"`
		AutoFinalize *bool   `qmp:"auto-finalize"`
		AutoDismiss  *bool   `qmp:"auto-dismiss"`
	}
	driveMirrorArguments struct {
		JobID        *string       `qmp:"job-id"`
		Device       string        `qmp:"device"`
		Target       string        `qmp:"target"`
		Format       *string       `qmp:"format"`
		Sync         syncMode      `qmp:"sync"`
		Mode         *newImageMode `qmp:"mode"`
		Speed        *int64        `qmp:"speed"`
		AutoFinalize *bool         `qmp:"auto-finalize"`
		AutoDismiss  *bool         `qmp:"auto-dismiss"`
	}
	driveBackupArguments struct {
		JobID        *string       `qmp:"job-id"`
		Device       string        `qmp:"device"`
		Target       string        `qmp:"target"`
		Format       *string       `qmp:"format"`
		Sync         syncMode      `qmp:"sync"`
		Bitmap       *string       `qmp:"bitmap"`
		Mode         *newImageMode `qmp:"mode"`
		Speed        *int64        `qmp:"speed"`
		AutoFinalize *bool         `qmp:"auto-finalize"`
		AutoDismiss  *bool         `qmp:"auto-dismiss"`
	}
	resizeArguments struct {
		Device   *string `qmp:"device"`
		NodeName *string `qmp:"node-name"`
		Size     int64   `qmp:"size"`
	}
)

func (mon *monitor) registerBlockOperations(reg *qmp.Registry) {
	qmp.Register(reg, "blockdev-snapshot-sync", mon.snapshotSync)
	qmp.Register(reg, "block-commit", mon.blockCommit)
	qmp.Register(reg, "drive-mirror", mon.driveMirror)
	qmp.Register(reg, "drive-backup", mon.driveBackup)
	qmp.Register(reg, "block_resize", mon.resize)
}

// findDisk finds a disk by its id, or by the name of its node.
func (mon *monitor) findDisk(device, node *string) (vmm.AttachedDisk, error) {
	if device == nil && node == nil {
		return vmm.AttachedDisk{}, qmp.Errorf("Either device or node-name must be specified")
	}
	for _, d := range mon.m.Disks() {
		if device != nil && (d.ID == *device || nodeName(d.ID, 0) == *device) || node != nil && nodeName(d.ID, 0) == *node {
			return d, nil
		}
	}
	if device == nil {
		return vmm.AttachedDisk{}, qmp.Errorf("Cannot find device='' nor node-name='%s'", *node)
	}
	return vmm.AttachedDisk{}, &qmp.Error{Class: qmp.DeviceNotFound, Desc: fmt.Sprintf("Cannot find device='%s' nor node-name=''", *device)}
}

// busy refuses a disk that a job works on. It holds the jobs' lock while f runs.
func (mon *monitor) unlessBusy(d vmm.AttachedDisk, f func() error) error {
	mon.blockJobs.mu.Lock()
	defer mon.blockJobs.mu.Unlock()
	if w := mon.blockJobs.byDisk[d.ID]; w != nil {
		return qmp.Errorf("Node '%s' is busy: block device is in use by block job: %s", nodeName(d.ID, 0), w.kind)
	}
	if err := claim(d, "another command"); err != nil {
		return err
	}
	defer d.Root.Release()
	return f()
}

// snapshotSync has a disk go on in a new overlay.
func (mon *monitor) snapshotSync(_ context.Context, _ *qmp.Session, a snapshotSyncArguments) (e qmp.Empty, err error) {
	d, err := mon.findDisk(a.Device, a.NodeName)
	if err != nil {
		return e, err
	}
	if a.Format != nil && *a.Format != disk.FormatQcow2 {
		return e, qmp.Errorf("Unknown driver '%s': an overlay is qcow2", *a.Format)
	}
	if a.SnapshotNodeName != nil {
		return e, qmp.Errorf("Parameter 'snapshot-node-name' cannot be chosen here: a disk's nodes are named by its id")
	}
	return e, mon.unlessBusy(d, func() error { return overlayDisk(d, a.SnapshotFile, a.Mode == nil || *a.Mode == modeAbsolutePaths) })
}

// overlayDisk puts an overlay over a disk that is in use.
func overlayDisk(d vmm.AttachedDisk, path string, create bool) error {
	base, ok := d.Root.Current().(block.Freezer)
	switch {
	case !ok:
		return qmp.Errorf("Device '%s' does not support snapshots", d.ID)
	case base.ReadOnly():
		return qmp.Errorf("Block node is read-only")
	}
	if create {
		if err := qcow2.CreateOver(path, base); err != nil {
			return err
		}
	}
	overlay, err := qcow2.OpenOver(path, base)
	if err != nil {
		if create {
			os.Remove(path)
		}
		return err
	}
	d.Root.Drained(func(block.Node) block.Node {
		if err = errors.Join(base.Flush(), base.Freeze()); err != nil && !base.ReadOnly() {
			return base
		}
		return overlay
	})
	return err
}

// chain names a disk's images as block-commit does: the node's name, or the file.
func chainDepth(d vmm.AttachedDisk, node, file *string) (int, error) {
	if node != nil && file != nil {
		return 0, qmp.Errorf("a node's name and a file were both given")
	}
	info := d.Node.Info()
	for depth, i := 0, &info; i != nil; depth, i = depth+1, i.Backing {
		if node != nil && *node == nodeName(d.ID, depth) || file != nil && *file == i.Filename {
			return depth, nil
		}
	}
	if node != nil {
		return 0, qmp.Errorf("Cannot find device='' nor node-name='%s'", *node)
	}
	return 0, qmp.Errorf("Can't find '%s' in the backing chain", *file)
}

// blockCommit moves what a disk's newest images hold into the base: by default
// the last of the chain, as in QEMU.
func (mon *monitor) blockCommit(_ context.Context, s *qmp.Session, a commitArguments) (e qmp.Empty, err error) {
	d, err := mon.findDisk(&a.Device, nil)
	if err != nil {
		return e, err
	}
	if a.TopNode != nil || a.Top != nil {
		if depth, err := chainDepth(d, a.TopNode, a.Top); err != nil || depth != 0 {
			return e, errors.Join(err, qmp.Errorf("only the disk's newest image can be committed: leave out top"))
		}
	}
	depth := 0
	for i := d.Node.Info().Backing; i != nil; i = i.Backing {
		depth++
	}
	if a.BaseNode != nil || a.Base != nil {
		if depth, err = chainDepth(d, a.BaseNode, a.Base); err != nil {
			return e, err
		}
	}
	if depth == 0 {
		return e, qmp.Errorf("There is nothing to commit: the image has no backing file, or is the base itself")
	}
	o := blockJobOptions{id: a.JobID, speed: a.Speed, autoFinalize: a.AutoFinalize, autoDismiss: a.AutoDismiss}
	return e, mon.startBlockJob(s, jobCommit, d, o, true, func(w *blockWork) (func(context.Context) error, func(), error) {
		var ctx context.Context
		c, err := mirror.Consolidate(d.Root, mirror.Options{Depth: depth, Progress: w.progress, Pause: func() error { return w.pace(ctx) }})
		if err != nil {
			return nil, nil, err
		}
		return func(jobCtx context.Context) error {
			ctx = jobCtx
			if err := c.Run(ctx); err != nil {
				return err
			}
			complete, err := w.ready()
			switch {
			case err != nil:
				return err
			case !complete:
				return c.Cancel()
			}
			return c.Finish()
		}, func() { _ = c.Cancel() }, nil
	})
}

// newTarget makes or opens the image that a disk is copied to.
func newTarget(d vmm.AttachedDisk, path string, format *string, mode *newImageMode, sync syncMode) (target block.Node, created bool, err error) {
	info := d.Node.Info()
	f := info.Format
	if format != nil {
		f = *format
	}
	if mode != nil && *mode == modeExisting {
		target, err = disk.Open(path, disk.Options{Format: f})
		return target, false, err
	}
	o := qcow2.CreateOptions{Size: d.Node.Size()}
	if sync == syncTop {
		if info.Backing == nil || f != disk.FormatQcow2 {
			return nil, false, qmp.Errorf("sync 'top' needs a disk that has a backing file, and a target in qcow2")
		}
		o.Backing, o.BackingFormat = info.Backing.Filename, info.Backing.Format
	}
	switch f {
	case disk.FormatQcow2:
		err = qcow2.Create(path, o)
	case disk.FormatRaw:
		err = createRaw(path, o.Size)
	default:
		err = qmp.Errorf("Unknown driver '%s'", f)
	}
	if err != nil {
		return nil, false, err
	}
	if target, err = disk.Open(path, disk.Options{Format: f}); err != nil {
		os.Remove(path)
	}
	return target, true, err
}

func createRaw(path string, size int64) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	return errors.Join(f.Truncate(size), f.Close())
}

// driveMirror copies a disk while it is used, writes included, until it is told
// to go on in the copy, or to leave the copy as it is then.
func (mon *monitor) driveMirror(_ context.Context, s *qmp.Session, a driveMirrorArguments) (e qmp.Empty, err error) {
	d, err := mon.findDisk(&a.Device, nil)
	if err != nil {
		return e, err
	}
	if a.Sync != syncFull {
		return e, qmp.Errorf("sync '%s' is not possible for a mirror here", a.Sync)
	}
	o := blockJobOptions{id: a.JobID, speed: a.Speed, autoFinalize: a.AutoFinalize, autoDismiss: a.AutoDismiss}
	return e, mon.startBlockJob(s, jobMirror, d, o, true, func(w *blockWork) (func(context.Context) error, func(), error) {
		target, created, err := newTarget(d, a.Target, a.Format, a.Mode, a.Sync)
		if err != nil {
			return nil, nil, err
		}
		var ctx context.Context
		var f *mirror.Filter
		d.Root.Drained(func(current block.Node) block.Node {
			if f, err = mirror.New(current, target, mirror.Options{TargetIsZero: created, Progress: w.progress, Pause: func() error { return w.pace(ctx) }}); err != nil {
				return current
			}
			return f
		})
		abandon := func() {
			target.Close()
			if created {
				os.Remove(a.Target)
			}
		}
		if err != nil {
			abandon()
			return nil, nil, err
		}
		undo := func() {
			d.Root.Swap(f.Source())
			abandon()
		}
		return func(jobCtx context.Context) error {
			ctx = jobCtx
			if err := f.Run(ctx); err != nil {
				return err
			}
			complete, err := w.ready()
			if err != nil {
				return err
			}
			if err := target.Flush(); err != nil { // most of it, while the disk is used
				return err
			}
			var source block.Node
			d.Root.Drained(func(filter block.Node) block.Node {
				if err = errors.Join(f.Err(), target.Flush()); err != nil {
					return filter
				}
				source = f.Source()
				if complete {
					return target
				}
				return source
			})
			if err != nil {
				return err
			}
			if complete {
				return source.Close()
			}
			return target.Close()
		}, undo, nil
	})
}

// driveBackup copies a disk as it is when the command is answered.
func (mon *monitor) driveBackup(_ context.Context, s *qmp.Session, a driveBackupArguments) (e qmp.Empty, err error) {
	d, err := mon.findDisk(&a.Device, nil)
	if err != nil {
		return e, err
	}
	if (a.Bitmap != nil) != (a.Sync == syncIncremental) {
		return e, qmp.Errorf("sync 'incremental' and a bitmap go together")
	}
	o := blockJobOptions{id: a.JobID, speed: a.Speed, autoFinalize: a.AutoFinalize, autoDismiss: a.AutoDismiss}
	return e, mon.startBlockJob(s, jobBackup, d, o, false, func(w *blockWork) (func(context.Context) error, func(), error) {
		target, created, err := newTarget(d, a.Target, a.Format, a.Mode, a.Sync)
		if err != nil {
			return nil, nil, err
		}
		var ctx context.Context
		var f *backup.Filter
		giveBack := func(bool) {}
		mon.bitmaps.mu.Lock() // before the disk's requests, as everywhere
		d.Root.Drained(func(current block.Node) block.Node {
			o := backup.Options{Top: a.Sync == syncTop, Pause: func() error { return w.pace(ctx) }}
			if a.Bitmap != nil {
				var back func(bool)
				if o.Only, back, err = mon.bitmaps.takeLocked(d, *a.Bitmap); err != nil {
					return current
				}
				giveBack = back
			}
			if f, err = backup.New(current, target, o); err != nil {
				return current
			}
			return f
		})
		mon.bitmaps.mu.Unlock()
		abandon := func() {
			giveBack(false)
			target.Close()
			if created {
				os.Remove(a.Target)
			}
		}
		if err != nil {
			abandon()
			return nil, nil, err
		}
		undo := func() {
			d.Root.Swap(f.Node)
			abandon()
		}
		return func(jobCtx context.Context) error {
			ctx = jobCtx
			if err := f.Copy(ctx, w.progress); err != nil {
				return err
			}
			if err := target.Flush(); err != nil {
				return err
			}
			d.Root.Swap(f.Node)
			giveBack(true)
			return target.Close()
		}, undo, nil
	})
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
