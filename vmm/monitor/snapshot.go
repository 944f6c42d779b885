package monitor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/gnomon-vmm/gnomon/mm/checkpoint"
	"github.com/gnomon-vmm/gnomon/mm/pager"
	"github.com/gnomon-vmm/gnomon/qmp"
	"github.com/gnomon-vmm/gnomon/vmm"
	"github.com/gnomon-vmm/gnomon/vmm/snapshot"
)

// QEMU's snapshot jobs (qapi/migration.json). A tag names a checkpoint file
// beside the image of the disk that vmstate names, IMAGE.TAG.checkpoint, and
// overlays IMAGE.TAG.qcow2, where QEMU has an internal snapshot. It is looked for
// beside every image of that disk and their overlays, whatever the machine went
// back to since.

const tagSuffix = ".checkpoint"

type (
	snapshotArguments struct {
		JobID   string   `qmp:"job-id"`
		Tag     string   `qmp:"tag"`
		VMState string   `qmp:"vmstate"`
		Devices []string `qmp:"devices"`
	}
	snapshotDeleteArguments struct {
		JobID   string   `qmp:"job-id"`
		Tag     string   `qmp:"tag"`
		Devices []string `qmp:"devices"`
	}
)

func (mon *monitor) registerSnapshots(reg *qmp.Registry) {
	qmp.Register(reg, "snapshot-save", mon.snapshotSave)
	qmp.Register(reg, "snapshot-load", mon.snapshotLoad)
	qmp.Register(reg, "snapshot-delete", mon.snapshotDelete)
}

func (mon *monitor) snapshotJob(s *qmp.Session, id, kind string, work func(context.Context, *qmp.Job) error) (e qmp.Empty, err error) {
	_, err = s.Server().Jobs().Start(id, kind, qmp.JobOptions{ManualDismiss: true}, work)
	return e, err
}

func (mon *monitor) snapshotSave(_ context.Context, s *qmp.Session, a snapshotArguments) (qmp.Empty, error) {
	return mon.snapshotJob(s, a.JobID, "snapshot-save", func(ctx context.Context, j *qmp.Job) error {
		images, err := mon.snapshotImages(a.Tag, a.VMState, a.Devices)
		if err != nil {
			return err
		}
		switch found, err := findTag(images, a.Tag, mon.m.UUID()); {
		case err != nil:
			return err
		case found != "":
			return qmp.Errorf("Snapshot '%s' already exists in one or more devices: %s", a.Tag, found)
		}
		return mon.checkpoints.save(ctx, images[0]+"."+a.Tag+tagSuffix, snapshot.SaveOptions{Tag: a.Tag, Progress: j.SetProgress})
	})
}

func (mon *monitor) snapshotLoad(_ context.Context, s *qmp.Session, a snapshotArguments) (qmp.Empty, error) {
	return mon.snapshotJob(s, a.JobID, "snapshot-load", func(ctx context.Context, j *qmp.Job) error {
		images, err := mon.snapshotImages(a.Tag, a.VMState, a.Devices)
		if err != nil {
			return err
		}
		path, err := findTag(images, a.Tag, mon.m.UUID())
		if err != nil {
			return err
		}
		if path == "" {
			return errNoSnapshot(a.Tag)
		}
		return mon.checkpoints.saver.Revert(ctx, path, snapshot.RevertOptions{Tag: a.Tag, Policy: pager.Locality, Progress: j.SetProgress})
	})
}

// snapshotDelete deletes a checkpoint. The overlays stay: the machine, or another
// checkpoint, may stand on them; a tag that there is not is no error, as in QEMU.
func (mon *monitor) snapshotDelete(_ context.Context, s *qmp.Session, a snapshotDeleteArguments) (qmp.Empty, error) {
	return mon.snapshotJob(s, a.JobID, "snapshot-delete", func(context.Context, *qmp.Job) error {
		for _, device := range a.Devices {
			images, err := mon.snapshotImages(a.Tag, device, nil)
			if err != nil {
				return err
			}
			path, err := findTag(images, a.Tag, mon.m.UUID())
			if err != nil {
				return err
			}
			if path == "" {
				continue
			}
			r, err := checkpoint.Open(path)
			if err != nil {
				return err
			}
			_, err = r.Delete()
			if err := errors.Join(err, r.Close()); err != nil {
				return err
			}
		}
		return nil
	})
}

func errNoSnapshot(tag string) error {
	return qmp.Errorf("Snapshot '%s' does not exist in one or more devices", tag)
}

// snapshotImages checks what a command names and returns the images of the disk
// vmstate, that in use first. devices, where not nil, are all disks that can be
// written: a machine is not itself with some of its disks at another time.
func (mon *monitor) snapshotImages(tag, vmstate string, devices []string) ([]string, error) {
	if tag == "" || strings.ContainsAny(tag, "/\x00") || strings.Contains(tag, ".qcow2") || len(tag) > 128 {
		return nil, fmt.Errorf("tag '%s' cannot be part of a file's name", tag)
	}
	for _, name := range devices {
		if !slices.ContainsFunc(mon.m.Disks(), func(d vmm.AttachedDisk) bool { return mon.topName(d) == name }) {
			return nil, qmp.Errorf("No block device node '%s'", name)
		}
	}
	var images []string
	for _, d := range mon.m.Disks() {
		name := mon.topName(d)
		if devices != nil && !d.Node.ReadOnly() && !slices.Contains(devices, name) {
			return nil, qmp.Errorf("Device '%s' is writable and is not among the devices", name)
		}
		if name != vmstate {
			continue
		}
		info := d.Node.Info()
		for i := &info; i != nil; i = i.Backing {
			images = append(images, i.Filename)
		}
	}
	if images == nil {
		return nil, fmt.Errorf("vmstate block device '%s' does not exist", vmstate)
	}
	return images, nil
}

// ofMachine tells whether a checkpoint was taken of the machine. An overlay's name
// may be that of another machine's disk.
func ofMachine(path string, uuid vmm.UUID) bool {
	i, err := snapshot.Open(path)
	if err != nil {
		return false
	}
	defer i.Close()
	return i.UUID() == uuid
}

// findTag returns the checkpoint of a tag, or "".
func findTag(images []string, tag string, uuid vmm.UUID) (string, error) {
	for _, image := range images {
		entries, err := os.ReadDir(filepath.Dir(image))
		if err != nil {
			return "", err
		}
		for _, e := range entries {
			// IMAGE.TAG.checkpoint, or that of an overlay: IMAGE.OTHER.qcow2.TAG.checkpoint.
			rest, ok := strings.CutPrefix(e.Name(), filepath.Base(image)+".")
			if !ok {
				continue
			}
			overlay, ok := strings.CutSuffix(rest, tag+tagSuffix)
			path := filepath.Join(filepath.Dir(image), e.Name())
			if ok && (overlay == "" || strings.HasSuffix(overlay, ".qcow2.") && ofMachine(path, uuid)) {
				return path, nil
			}
		}
	}
	return "", nil
}
