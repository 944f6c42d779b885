package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"strings"

	"github.com/gnomon-vmm/gnomon/disk"
	"github.com/gnomon-vmm/gnomon/disk/changes"
	"github.com/gnomon-vmm/gnomon/disk/qcow2"
	"github.com/gnomon-vmm/gnomon/vmm/snapshot"
)

// overlays are images in which a restored machine writes to its disks.
type overlays struct {
	checkpoint, machine string // after which they are named
	paths               []string
	inUse               bool // a machine may have written to them
}

// prepare has the disks of the flags be those that the machine goes on with. named
// says that the user named them; else they are the flags' that the machine began
// with.
func (o *overlays) prepare(image *snapshot.Image, checkpoint string, f *runFlags, named bool, r *restoreFlags) error {
	if f.name == "" {
		f.name = fmt.Sprintf("gnomon-%d", os.Getpid())
	}
	if err := checkMachineName(f.name); err != nil {
		return usageError(fmt.Errorf("--name: %w", err))
	}
	o.checkpoint, o.machine = checkpoint, f.name
	began, err := readBegan(image)
	if err != nil {
		return err
	}
	switch {
	case image.Disks() != nil:
		return o.overKept(image.Disks(), began, f, named, r.changedDisks)
	case image.LeftDisks() != nil && !named:
		f.disks = nil
		for _, left := range image.LeftDisks() {
			if left.File == "" {
				return fmt.Errorf("disk %s of the machine that was saved was in no file: name the disks by --disk", left.ID)
			}
			d := began.options(&left)
			d.values["file"], d.values["format"] = left.File, left.Format
			f.disks = append(f.disks, d.String())
		}
	}
	if !r.snapshot {
		return nil // what becomes of them is the user's affair
	}
	return o.overLeft(f)
}

// beganDisks are the disks of the flags by which a machine began, by their ids.
// Others may have been plugged in since, and some of those have gone.
type beganDisks map[string]*options

func readBegan(image *snapshot.Image) (beganDisks, error) {
	var recipe struct {
		Disks []string `json:"disk"`
	}
	if err := json.Unmarshal(image.Recipe(), &recipe); err != nil {
		return nil, fmt.Errorf("the checkpoint's recipe: %w", err)
	}
	began := beganDisks{}
	for i, text := range recipe.Disks {
		d, err := readDiskOptions(text)
		if err != nil {
			return nil, err
		}
		if !d.has("id") {
			d.values["id"] = defaultDiskID(i)
		}
		began[d.values["id"]] = d
	}
	return began, nil
}

// defaultDiskID is vmm.Config's for a disk without one.
func defaultDiskID(i int) string { return fmt.Sprintf("disk%d", i) }

// options are those of a disk that the machine had when it was saved.
func (b beganDisks) options(saved *snapshot.SavedDisk) *options {
	if d := b[saved.ID]; d != nil {
		return d
	}
	d := &options{flag: "disk", values: map[string]string{"id": saved.ID}}
	if saved.ReadOnly {
		d.values["readonly"] = "on"
	}
	return d
}

// overKept has the machine write over the checkpoint's own disks, which lie where
// the flags say if named. Disks that cannot be written are the checkpoint's own.
// changed accepts disks that were changed since they were saved.
func (o *overlays) overKept(disks []snapshot.SavedDisk, began beganDisks, f *runFlags, named, changed bool) error {
	var moved map[string]*options
	if named {
		var err error
		if moved, err = matchDisks(f.disks, disks); err != nil {
			return usageError(err)
		}
	}
	f.disks = nil
	for i := range disks {
		saved := &disks[i]
		d := began.options(saved)
		own := moved[saved.ID]
		if named && own == nil {
			continue // the state that is left over is refused by name
		}
		var err error
		if own != nil {
			maps.Copy(d.values, own.values)
			d.values["id"] = saved.ID
			saved, err = movedDisk(saved, own)
		}
		if err == nil {
			err = saved.Unchanged()
		}
		switch {
		case saved == nil:
			return err
		case errors.Is(err, snapshot.ErrDiskChanged) && !changed:
			return fmt.Errorf("%w: put it back as it was (cp -p keeps its time), name another by --disk, or have the guest take it as it is by --accept-changed-disks", err)
		case err != nil && !changed:
			return err
		}
		d.values["file"], d.values["format"] = saved.File, saved.Format
		if own != nil && own.values["readonly"] == "on" {
			saved.ReadOnly = true // or the guest's idea of it is, which is refused by name
		}
		if !saved.ReadOnly {
			path, err := o.add(saved.ID, saved.OverlayChangedDisk)
			if err != nil {
				return err
			}
			d.values["file"], d.values["format"] = path, disk.FormatQcow2
		}
		f.disks = append(f.disks, d.String())
	}
	return nil
}

// matchDisks tells which of the disks each --disk is: that of its id, or else the one
// in its place.
func matchDisks(texts []string, disks []snapshot.SavedDisk) (map[string]*options, error) {
	if len(texts) > len(disks) {
		return nil, fmt.Errorf("%d disks are named by --disk, and the checkpoint has %d", len(texts), len(disks))
	}
	known := map[string]bool{}
	var ids []string
	for _, d := range disks {
		known[d.ID] = true
		ids = append(ids, d.ID)
	}
	matched := map[string]*options{}
	for i, text := range texts {
		d, err := readDiskOptions(text)
		if err != nil {
			return nil, err
		}
		id := ids[i]
		if d.has("id") {
			id = d.values["id"]
		}
		switch {
		case !known[id]:
			return nil, d.errorf("the checkpoint has no disk %q, but %s", id, strings.Join(ids, ", "))
		case matched[id] != nil:
			return nil, d.errorf("disk %s is named twice", id)
		}
		matched[id] = d
	}
	return matched, nil
}

// movedDisk is the disk as own says where it lies; nil: it cannot be that.
func movedDisk(saved *snapshot.SavedDisk, own *options) (*snapshot.SavedDisk, error) {
	path, err := own.need("file")
	if err != nil {
		return nil, usageError(err)
	}
	format, err := own.oneOf("format", "", disk.FormatRaw, disk.FormatQcow2)
	if err != nil {
		return nil, usageError(err)
	}
	if saved.ReadOnly && own.values["readonly"] == "off" {
		return nil, own.errorf("the guest knows disk %s as one that cannot be written: leave out readonly=off", saved.ID)
	}
	if err := checkDiskFile(path); err != nil {
		return nil, err
	}
	return saved.At(path, format)
}

// overLeft has the machine write over the disks of the flags, whatever they hold.
func (o *overlays) overLeft(f *runFlags) error {
	for i, text := range f.disks {
		d, err := readDiskOptions(text)
		if err != nil {
			return usageError(err)
		}
		if d.values["readonly"] == "on" {
			continue
		}
		path, err := d.need("file")
		if err != nil {
			return usageError(err)
		}
		if err := checkDiskFile(path); err != nil {
			return err
		}
		if path, err = filepath.Abs(path); err != nil {
			return err
		}
		node, err := disk.Open(path, disk.Options{Format: d.values["format"], ReadOnly: true})
		if err != nil {
			return err
		}
		below := qcow2.CreateOptions{Size: node.Size(), Backing: path, BackingFormat: node.Info().Format}
		node.Close()
		if !d.has("id") {
			d.values["id"] = defaultDiskID(i)
		}
		overlay, err := o.add(d.values["id"], func(path string) error { return qcow2.Create(path, below) })
		if err != nil {
			return err
		}
		d.values["file"], d.values["format"] = overlay, disk.FormatQcow2
		f.disks[i] = d.String()
	}
	return nil
}

// add makes an overlay beside the checkpoint.
func (o *overlays) add(id string, create func(path string) error) (path string, err error) {
	path = fmt.Sprintf("%s.%s.%s.qcow2", o.checkpoint, o.machine, id)
	if err := create(path); errors.Is(err, fs.ErrExist) {
		return "", fmt.Errorf("%w; another --name makes other disks", err)
	} else if err != nil {
		return "", err
	}
	o.paths = append(o.paths, path)
	return path, nil
}

// remove removes them, but those on which others lie: they belong to checkpoints
// that were taken meanwhile.
func (o *overlays) remove() {
	for _, path := range o.paths {
		if over, _ := filepath.Glob(globEscape(path) + ".*.qcow2"); len(over) > 0 {
			report("%s stays: a checkpoint was taken of the machine, and %s lies on it", path, over[0])
			continue
		}
		os.Remove(path)
		os.Remove(changes.Path(path)) // if they were recorded
	}
}

// globEscape has a path match itself.
func globEscape(path string) string {
	return strings.NewReplacer(`\`, `\\`, `*`, `\*`, `?`, `\?`, `[`, `\[`).Replace(path)
}
