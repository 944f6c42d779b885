package monitor

import (
	"context"
	"errors"
	"os"

	"github.com/gnomon-vmm/gnomon/disk"
	"github.com/gnomon-vmm/gnomon/disk/backup"
	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/mirror"
	"github.com/gnomon-vmm/gnomon/disk/qcow2"
	"github.com/gnomon-vmm/gnomon/qmp"
	"github.com/gnomon-vmm/gnomon/vmm"
)

// newImageMode is NewImageMode, syncMode MirrorSyncMode, bitmapMode
// BitmapSyncMode, copyMode MirrorCopyMode of QEMU's qapi/block-core.json.
type (
	newImageMode string
	syncMode     string
	bitmapMode   string
	copyMode     string
)

const (
	modeExisting      newImageMode = "existing"
	modeAbsolutePaths newImageMode = "absolute-paths"

	syncFull        syncMode = "full"
	syncTop         syncMode = "top"
	syncIncremental syncMode = "incremental"
	syncBitmap      syncMode = "bitmap"
	syncNone        syncMode = "none"

	bitmapOnSuccess bitmapMode = "on-success"
	bitmapNever     bitmapMode = "never"
)

func (newImageMode) Values() []string {
	return []string{string(modeExisting), string(modeAbsolutePaths)}
}

func (syncMode) Values() []string {
	return []string{string(syncFull), string(syncTop), string(syncIncremental), string(syncBitmap), string(syncNone)}
}

func (bitmapMode) Values() []string { return []string{string(bitmapOnSuccess), string(bitmapNever)} }

// Values are those that a mirror is: a write to what was copied goes to both, in the
// guest's own time.
func (copyMode) Values() []string { return []string{"background", "write-blocking"} }

type (
	// jobArguments are those that all jobs on disks have.
	jobArguments struct {
		JobID        *string `qmp:"job-id"`
		Speed        *int64  `qmp:"speed"`
		AutoFinalize *bool   `qmp:"auto-finalize"`
		AutoDismiss  *bool   `qmp:"auto-dismiss"`
	}
	driveMirrorArguments struct {
		jobArguments
		Device   string        `qmp:"device"`
		Target   string        `qmp:"target"`
		Format   *string       `qmp:"format"`
		Sync     syncMode      `qmp:"sync"`
		Mode     *newImageMode `qmp:"mode"`
		CopyMode *copyMode     `qmp:"copy-mode"`
	}
	blockdevMirrorArguments struct {
		jobArguments
		Device   string    `qmp:"device"`
		Target   string    `qmp:"target"`
		Sync     syncMode  `qmp:"sync"`
		CopyMode *copyMode `qmp:"copy-mode"`
	}
	driveBackupArguments struct {
		jobArguments
		Device     string        `qmp:"device"`
		Target     string        `qmp:"target"`
		Format     *string       `qmp:"format"`
		Sync       syncMode      `qmp:"sync"`
		Bitmap     *string       `qmp:"bitmap"`
		BitmapMode *bitmapMode   `qmp:"bitmap-mode"`
		Mode       *newImageMode `qmp:"mode"`
	}
	blockdevBackupArguments struct {
		jobArguments
		Device     string      `qmp:"device"`
		Target     string      `qmp:"target"`
		Sync       syncMode    `qmp:"sync"`
		Bitmap     *string     `qmp:"bitmap"`
		BitmapMode *bitmapMode `qmp:"bitmap-mode"`
	}
)

func (a jobArguments) options() blockJobOptions {
	return blockJobOptions{id: a.JobID, speed: a.Speed, autoFinalize: a.AutoFinalize, autoDismiss: a.AutoDismiss}
}

// transactional registers a command that a change does.
func transactional[A any](mon *monitor, reg *qmp.Registry, name string, f func(*qmp.Session, A) (*change, error)) {
	qmp.Register(reg, name, func(_ context.Context, s *qmp.Session, a A) (e qmp.Empty, err error) {
		c, err := f(s, a)
		if err != nil {
			return e, err
		}
		return e, mon.transact(c)
	})
}

func (mon *monitor) registerCopies(reg *qmp.Registry) {
	transactional(mon, reg, "drive-mirror", mon.driveMirror)
	transactional(mon, reg, "blockdev-mirror", mon.blockdevMirror)
	transactional(mon, reg, "drive-backup", mon.driveBackup)
	transactional(mon, reg, "blockdev-backup", mon.blockdevBackup)
}

// target is what a disk is copied to.
type target struct {
	node    block.Node
	path    string // that is removed if the copy fails; ""
	named   bool   // the node is somebody else's
	zero    bool   // it reads as zero
	prepare func(w *blockWork) error
}

func (t *target) close() error {
	if t.named {
		return t.node.Flush()
	}
	return t.node.Close()
}

// abandon gives up a copy that is not complete.
func (t *target) abandon() (err error) {
	if !t.named {
		err = t.node.Close()
	}
	if t.path != "" {
		err = errors.Join(err, os.Remove(t.path))
	}
	return err
}

// fileTarget is an image that is made, or opened, for the job.
func fileTarget(d vmm.AttachedDisk, path string, format *string, mode *newImageMode, sync syncMode) *target {
	t := &target{}
	t.prepare = func(*blockWork) (err error) {
		info, like := d.Node.Info(), behindFilters(d.Root.Current())
		f := info.Format
		if format != nil {
			f = *format
		}
		if mode != nil && *mode == modeExisting {
			if t.node, err = openLike(path, f, like); err == nil {
				t.zero = readsAsZero(t.node)
			}
			return err
		}
		o := qcow2.CreateOptions{Size: d.Node.Size()}
		if sync == syncTop {
			if info.Backing == nil || f != disk.FormatQcow2 {
				return qmp.Errorf("sync 'top' needs a disk that has a backing file, and a target in qcow2")
			}
			o.Backing, o.BackingFormat = info.Backing.Filename, info.Backing.Format
		}
		if err := createImage(path, f, o); err != nil {
			return err
		}
		t.path, t.zero = path, true
		if t.node, err = openLike(path, f, like); err != nil {
			os.Remove(path)
		}
		return err
	}
	return t
}

// openLike opens an image to be read and written as a disk is, which as in QEMU does
// not say what becomes of zeroes that are written.
func openLike(path, format string, like block.Node) (block.Node, error) {
	n, err := disk.Open(path, disk.Options{Format: format, Like: like})
	if err == nil {
		n.(block.Ruled).SetRules(block.WriteRules{KeepDiscarded: block.RulesOf(like).KeepDiscarded})
	}
	return n, err
}

// createImage makes an empty image at a path that is free.
func createImage(path, format string, o qcow2.CreateOptions) error {
	switch format {
	case disk.FormatQcow2:
		return qcow2.Create(path, o)
	case disk.FormatRaw:
	default:
		return qmp.Errorf("Unknown driver '%s'", format)
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	return errors.Join(f.Truncate(o.Size), f.Close())
}

// nodeTarget is a node that was added.
func (mon *monitor) nodeTarget(name string) *target {
	t := &target{named: true}
	t.prepare = func(w *blockWork) error {
		e, err := mon.take(name, w.user())
		if err != nil {
			return err
		}
		if _, instant := e.node.(*backup.Instant); instant || e.readOnly {
			mon.drop(e, w.user())
			return qmp.Errorf("Block node is read-only")
		}
		w.nodes = append(w.nodes, e)
		t.node = e.node
		t.zero = readsAsZero(t.node)
		return nil
	}
	return t
}

// readsAsZero tells that all of a node is known to read as zero.
func readsAsZero(n block.Node) bool {
	m, ok := n.(block.Mapper)
	if !ok {
		return false
	}
	for off := int64(0); off < n.Size(); {
		e, err := m.Map(off, n.Size()-off)
		if err != nil || e.Length <= 0 || !e.Zero && (e.Present || e.Data) {
			return false
		}
		off += e.Length
	}
	return true
}

// prepareTarget makes or finds a job's target, which must be as large as the disk.
func (w *blockWork) prepareTarget(t *target) error {
	if err := t.prepare(w); err != nil {
		return err
	}
	if have, need := t.node.Size(), w.disk.Node.Size(); have != need {
		err := t.abandon()
		w.dropNodes()
		return errors.Join(qmp.Errorf("the target has %d bytes, and the disk %d", have, need), err)
	}
	return nil
}

func (mon *monitor) driveMirror(s *qmp.Session, a driveMirrorArguments) (*change, error) {
	d, err := mon.findDisk(&a.Device, nil)
	if err != nil {
		return nil, err
	}
	return mon.mirror(s, d, a.jobArguments, a.Sync, fileTarget(d, a.Target, a.Format, a.Mode, a.Sync))
}

func (mon *monitor) blockdevMirror(s *qmp.Session, a blockdevMirrorArguments) (*change, error) {
	d, err := mon.findDisk(&a.Device, nil)
	if err != nil {
		return nil, err
	}
	return mon.mirror(s, d, a.jobArguments, a.Sync, mon.nodeTarget(a.Target))
}

// mirror copies a disk while it is used, writes included, until it is told to go on
// in the copy, or to leave the copy as it is then.
func (mon *monitor) mirror(s *qmp.Session, d vmm.AttachedDisk, a jobArguments, sync syncMode, t *target) (*change, error) {
	if sync != syncFull {
		return nil, qmp.Errorf("sync '%s' is not possible for a mirror here", sync)
	}
	w, err := mon.newBlockWork(s, jobMirror, d, a.options(), true)
	if err != nil {
		return nil, err
	}
	var f *mirror.Filter
	w.prepare = func() error { return w.prepareTarget(t) }
	w.abandon = t.abandon
	w.install = func(current block.Node) (_ block.Node, err error) {
		f, err = mirror.New(current, t.node, mirror.Options{TargetIsZero: t.zero, Progress: w.progress, Pause: w.pace})
		return f, err
	}
	w.uninstall = func(block.Node) block.Node { return f.Source() }
	// leave has the disk go on without the filter, in its own node or in the copy.
	leave := func(in block.Node) (err error) {
		if err := t.node.Flush(); err != nil { // most of it, while the disk is used
			return err
		}
		d.Root.Drained(func(filter block.Node) block.Node {
			if err = errors.Join(f.Err(), t.node.Flush()); err != nil {
				return filter
			}
			return in
		})
		return err
	}
	complete := false
	w.work = func(ctx context.Context) (err error) {
		if err := f.Run(ctx); err != nil {
			return err
		}
		if complete, err = w.ready(); err != nil || complete {
			return err
		}
		return leave(f.Source()) // the copy is the disk of this instant, whenever the job is finalized
	}
	// Until then writes go to both, so that a client that thinks does not keep the guest
	// from its disk.
	w.finish = func() error {
		if !complete {
			return t.close()
		}
		if err := leave(t.node); err != nil {
			return err
		}
		mon.refresh() // the target is the disk's, before the source is let go
		// The disk is in the copy, whatever closing the source says.
		_ = mon.letGo(f.Source())
		return nil
	}
	return w.change(), nil
}

func (mon *monitor) driveBackup(s *qmp.Session, a driveBackupArguments) (*change, error) {
	d, err := mon.findDisk(&a.Device, nil)
	if err != nil {
		return nil, err
	}
	return mon.backup(s, d, a.jobArguments, a.Sync, a.Bitmap, a.BitmapMode, fileTarget(d, a.Target, a.Format, a.Mode, a.Sync))
}

func (mon *monitor) blockdevBackup(s *qmp.Session, a blockdevBackupArguments) (*change, error) {
	d, err := mon.findDisk(&a.Device, nil)
	if err != nil {
		return nil, err
	}
	if a.Sync == syncNone && a.Bitmap == nil {
		return mon.keepInstant(s, d, a)
	}
	return mon.backup(s, d, a.jobArguments, a.Sync, a.Bitmap, a.BitmapMode, mon.nodeTarget(a.Target))
}

// backup copies a disk as it is when the command is answered.
func (mon *monitor) backup(s *qmp.Session, d vmm.AttachedDisk, a jobArguments, sync syncMode, bitmap *string, how *bitmapMode, t *target) (*change, error) {
	byBitmap := sync == syncIncremental || sync == syncBitmap
	switch {
	case sync == syncNone && bitmap == nil:
		return nil, qmp.Errorf("sync 'none' is possible by blockdev-backup, to an image that lies on the disk's node")
	case byBitmap && bitmap == nil:
		return nil, qmp.Errorf("must provide a valid bitmap name for '%s' sync mode", sync)
	case !byBitmap && bitmap != nil:
		return nil, qmp.Errorf("sync '%s' and a bitmap do not go together here", sync)
	case how == nil && sync == syncBitmap:
		return nil, qmp.Errorf("Bitmap sync mode must be given when providing a bitmap")
	case how != nil && !byBitmap:
		return nil, qmp.Errorf("Cannot specify bitmap sync mode without a bitmap")
	case how != nil && sync == syncIncremental && *how != bitmapOnSuccess:
		return nil, qmp.Errorf("Bitmap sync mode must be 'on-success' when using sync mode 'incremental'")
	}
	w, err := mon.newBlockWork(s, jobBackup, d, a.options(), false)
	if err != nil {
		return nil, err
	}
	var f *backup.Filter
	giveBack := func(bool) {}
	w.prepare = func() error { return w.prepareTarget(t) }
	w.abandon = t.abandon
	w.install = func(current block.Node) (_ block.Node, err error) {
		o := backup.Options{Top: sync == syncTop, Overwrite: !t.zero && sync == syncFull, Pause: w.pace}
		if bitmap != nil {
			if o.Only, giveBack, err = mon.bitmaps.takeLocked(d, *bitmap); err != nil {
				return nil, err
			}
		}
		if f, err = backup.New(current, t.node, o); err != nil {
			giveBack(false)
			return nil, err
		}
		return f, nil
	}
	w.uninstall = func(block.Node) block.Node {
		giveBack(false)
		return f.Node
	}
	w.work = func(ctx context.Context) error {
		if err := f.Copy(ctx, w.progress); err != nil {
			return err
		}
		return t.node.Flush()
	}
	w.finish = func() error {
		d.Root.Drained(func(block.Node) block.Node { return f.Node })
		err := t.close()
		mon.bitmaps.mu.Lock()
		defer mon.bitmaps.mu.Unlock()
		d.Root.Drained(func(current block.Node) block.Node {
			giveBack(err == nil && (how == nil || *how != bitmapNever))
			return current
		})
		return err
	}
	return w.change(), nil
}
