package snapshot

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/gnomon-vmm/gnomon/disk"
	"github.com/gnomon-vmm/gnomon/disk/backup"
	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/qcow2"
	"github.com/gnomon-vmm/gnomon/vmm"
)

// SavedDisk is a disk as a checkpoint needs it.
type SavedDisk struct {
	ID       string `json:"id"`
	File     string `json:"file"`   // absolute path of the image, which must stay as it is
	Format   string `json:"format"` // "raw" or "qcow2"
	ReadOnly bool   `json:"read-only"`
	Size     int64  `json:"size"` // virtual, bytes
	// Overlay is where the machine that was saved went on; "": nowhere else.
	Overlay string `json:"overlay,omitempty"`
	// Files are that of the image and those it lies on, as they were left; nil: it
	// is not known.
	Files []SavedFile `json:"files,omitempty"`
}

// SavedFile is by what it is seen later that a file is not as it was left. Copies
// that keep the time, as cp -p makes them, pass for the file.
type SavedFile struct {
	File     string `json:"file"`     // absolute path
	Size     int64  `json:"size"`     // bytes
	Modified int64  `json:"modified"` // when it was last written to, nanoseconds since 1970
}

// ErrDiskChanged is a disk that is not any more what a checkpoint needs.
var ErrDiskChanged = errors.New("it was changed since")

// keeper keeps a machine's disks as they are at one instant: each under an
// overlay in which the machine goes on, or by copying them.
type keeper struct {
	disks    []keptDisk
	claimed  []*block.Root
	release  func() // lets disks come and go again
	switched bool
	done     bool // the checkpoint is complete

	leaves *vmm.Machine // whose disks are left to the caller; nil: they are kept
	left   []SavedDisk  // which those are, after switchOver
}

type keptDisk struct {
	SavedDisk
	chain block.Info // of the images that are kept
	root  *block.Root
	base  block.Freezer // nil: the disk cannot be written
	// Of a disk that is copied:
	copy   string      // the copy's path
	target *qcow2.Node // until it is complete
	copier *backup.Filter
}

// keepDisks prepares it, ahead of the pause: images are made, and what is to be
// kept is written to the disk, so that little is left to do.
func keepDisks(m *vmm.Machine, checkpoint string, o SaveOptions) (*keeper, error) {
	k := &keeper{release: m.HoldDevices()}
	if err := k.prepare(m, checkpoint, o); err != nil {
		k.undo()
		return nil, err
	}
	return k, nil
}

func (k *keeper) prepare(m *vmm.Machine, checkpoint string, o SaveOptions) (err error) {
	if checkpoint, err = filepath.Abs(checkpoint); err != nil {
		return err
	}
	tag := o.Tag
	if tag == "" {
		tag = filepath.Base(checkpoint)
	}
	for _, d := range m.Disks() {
		info := d.Node.Info()
		kept := keptDisk{root: d.Root, chain: info, SavedDisk: SavedDisk{ID: d.ID, Format: info.Format, ReadOnly: d.Node.ReadOnly(), Size: d.Node.Size()}}
		if kept.File, err = filepath.Abs(info.Filename); err != nil {
			return err
		}
		if !kept.ReadOnly {
			// A job that changes the disk's nodes meanwhile would undo what is done here.
			if err := d.Root.Claim("checkpoint"); err != nil {
				return fmt.Errorf("disk %s: %w", d.ID, err)
			}
			k.claimed = append(k.claimed, d.Root)
		}
		switch {
		case kept.ReadOnly:
			_, err = savedFiles(info) // which must lie in files
		case o.Disks == CopyDisks:
			err = kept.prepareCopy(checkpoint + "." + d.ID + ".qcow2")
		default:
			err = kept.prepareOverlay(info, tag)
		}
		if err != nil {
			return fmt.Errorf("disk %s: %w", d.ID, err)
		}
		k.disks = append(k.disks, kept)
	}
	return nil
}

// Original is the image after which a new overlay of a disk is named, so that
// names do not grow with the chain: of the images in the chain the lowest that the
// image in use is an overlay of by its name, or else the image in use.
func Original(disk block.Info) (string, error) { return originalOf(disk.Filename, disk) }

// originalOf is Original for an image of the disk that need not be in its chain now.
func originalOf(image string, disk block.Info) (string, error) {
	image, err := filepath.Abs(image)
	if err != nil {
		return "", err
	}
	original := image
	for i := &disk; i != nil; i = i.Backing {
		name, err := filepath.Abs(i.Filename)
		if err != nil {
			return "", err
		}
		if strings.HasPrefix(image, name+".") && strings.HasSuffix(image, overlaySuffix) {
			original = name
		}
	}
	return original, nil
}

const overlaySuffix = ".qcow2"

// overlayName is a name for another overlay of an image: IMAGE.TAG.qcow2, or, if
// that is taken or numbered, IMAGE.TAG-N.qcow2.
func overlayName(image, tag string, numbered bool) (string, error) {
	path := image + "." + tag + overlaySuffix
	for n := 1; n < 10000; n++ {
		if !numbered {
			if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
				return path, nil
			} else if err != nil {
				return "", err
			}
		}
		numbered = false
		path = fmt.Sprintf("%s.%s-%d%s", image, tag, n, overlaySuffix)
	}
	return "", errors.New("there are too many overlays of it: commit or remove some")
}

func (d *keptDisk) prepareOverlay(info block.Info, tag string) error {
	base, ok := d.root.Current().(block.Freezer)
	if !ok {
		return fmt.Errorf("a disk of format %s cannot be kept: have it copied", d.Format)
	}
	if st, err := os.Stat(d.File); err != nil || !st.Mode().IsRegular() {
		return errors.Join(err, errors.New("an overlay beside a device would be in memory: use --disks copy"))
	}
	if err := base.Flush(); err != nil {
		return err
	}
	original, err := Original(info)
	if err != nil {
		return err
	}
	path, err := overlayName(original, tag, false)
	if err != nil {
		return err
	}
	if err := qcow2.CreateOver(path, base); err != nil {
		return err
	}
	d.base, d.Overlay = base, path
	return nil
}

func (d *keptDisk) prepareCopy(path string) error {
	if err := qcow2.Create(path, qcow2.CreateOptions{Size: d.Size}); err != nil {
		return err
	}
	var err error
	if d.target, err = qcow2.Open(path, false); err != nil {
		os.Remove(path)
		return err
	}
	d.copy, d.File, d.Format, d.chain = path, path, "qcow2", block.Info{Filename: path}
	return nil
}

// switchOver puts overlays and copiers in place, or notes what disks there are. The
// machine is paused.
func (k *keeper) switchOver() error {
	if k.leaves != nil {
		k.left = leftDisks(k.leaves)
		return nil
	}
	next := make([]block.Node, len(k.disks))
	for i := range k.disks {
		d := &k.disks[i]
		var err error
		switch {
		case d.target != nil:
			d.copier, err = backup.New(d.root.Current(), d.target, backup.Options{})
			next[i] = d.copier
		case d.base != nil:
			next[i], err = qcow2.OpenOver(d.Overlay, d.base)
		}
		if err != nil {
			return fmt.Errorf("disk %s: %w", d.ID, err)
		}
	}
	k.switched = true
	for i, d := range k.disks {
		if next[i] == nil {
			continue
		}
		d.root.Swap(next[i])
		if d.base == nil {
			continue
		}
		if err := d.base.Freeze(); err != nil {
			return fmt.Errorf("disk %s: %w", d.ID, err)
		}
	}
	return nil
}

// finish makes durable what is kept, and notes how its files are left.
func (k *keeper) finish(ctx context.Context) error {
	for i := range k.disks {
		d := &k.disks[i]
		var err error
		switch {
		case d.copier != nil:
			if err = d.copier.Copy(ctx, nil); err == nil {
				target := d.target
				d.target = nil
				err = target.Close()
			}
		case d.base != nil:
			err = d.base.Flush()
		}
		if err == nil {
			d.Files, err = savedFiles(d.chain)
		}
		if err != nil {
			return fmt.Errorf("disk %s: %w", d.ID, err)
		}
	}
	return nil
}

// undo takes copiers away, and removes what no complete checkpoint and no machine
// uses. After switchOver machines use their overlays: then their disks are right
// as they are, with one more image each.
func (k *keeper) undo() {
	defer func() {
		for _, root := range k.claimed {
			root.Release()
		}
		k.claimed = nil
		k.release()
	}()
	for i := range k.disks {
		d := &k.disks[i]
		if d.copier != nil {
			d.root.Swap(d.copier.Node)
		}
		if d.target != nil {
			d.target.Close()
		}
		switch {
		case k.done:
		case d.copy != "":
			os.Remove(d.copy)
		case d.Overlay != "" && !k.switched:
			os.Remove(d.Overlay)
		}
	}
}

// SwitchedError is a save that failed when the machine had gone on in its overlays.
// They hold what it wrote since, and stay its disks.
type SwitchedError struct {
	Err   error
	Disks []SavedDisk // those with overlays
}

// Error tells in which images the machine goes on.
func (e *SwitchedError) Error() string { return e.Err.Error() + e.GoesOn() }

// GoesOn is what Error adds to the cause.
func (e *SwitchedError) GoesOn() string {
	var text strings.Builder
	for i, d := range e.Disks {
		text.WriteString([]string{": the machine goes on in new overlays: disk ", ", disk "}[min(i, 1)])
		text.WriteString(d.ID + " in " + d.Overlay)
	}
	return text.String()
}

// Unwrap is the cause.
func (e *SwitchedError) Unwrap() error { return e.Err }

// explain tells of overlays that a save which failed leaves in use.
func (k *keeper) explain(err error) error {
	var overlays []SavedDisk
	for _, d := range k.disks {
		if d.base != nil && k.switched {
			overlays = append(overlays, d.SavedDisk)
		}
	}
	if overlays == nil {
		return err
	}
	return &SwitchedError{Err: err, Disks: overlays}
}

func (k *keeper) saved() []SavedDisk {
	all := []SavedDisk{}
	for _, d := range k.disks {
		all = append(all, d.SavedDisk)
	}
	return all
}

// leftDisks are the disks that a machine has, as one that is restored finds them
// again: by absolute paths.
func leftDisks(m *vmm.Machine) []SavedDisk {
	all := []SavedDisk{}
	for _, d := range m.Disks() {
		info := d.Node.Info()
		left := SavedDisk{ID: d.ID, Format: info.Format, ReadOnly: d.Node.ReadOnly(), Size: d.Node.Size()}
		path, err := filepath.Abs(info.Filename)
		if err == nil {
			_, err = os.Stat(path)
		}
		if err == nil && (info.Format == "raw" || info.Format == "qcow2") {
			left.File = path // else it is at a server, or in memory
		}
		all = append(all, left)
	}
	return all
}

func decodeDisks(section string, data []byte) ([]SavedDisk, error) {
	var disks []SavedDisk
	if err := json.Unmarshal(data, &disks); err != nil {
		return nil, fmt.Errorf("section %q: %w", section, err)
	}
	for _, d := range disks {
		unnamed := section == sectionLeft && d.File == ""
		if d.ID == "" || !unnamed && (!filepath.IsAbs(d.File) || d.Format != "raw" && d.Format != "qcow2") {
			return nil, fmt.Errorf("section %q: disk %q is at %q, of format %q", section, d.ID, d.File, d.Format)
		}
	}
	return disks, nil
}

// savedFiles are the files of a chain of images; those that are no regular files
// have no such marks.
func savedFiles(chain block.Info) ([]SavedFile, error) {
	var files []SavedFile
	for i := &chain; i != nil; i = i.Backing {
		path, err := filepath.Abs(i.Filename)
		if err != nil {
			return nil, err
		}
		st, err := os.Stat(path)
		if err != nil {
			return nil, err
		}
		if st.Mode().IsRegular() {
			files = append(files, SavedFile{path, st.Size(), st.ModTime().UnixNano()})
		}
	}
	return files, nil
}

// At is the disk with its image at another path, where it was moved or copied to. It
// lies there on the images that it names itself. format is the image's; "": that which
// it had. The error is ErrDiskChanged if it cannot be the same image; the disk that is
// returned with it is for who accepts that.
func (d *SavedDisk) At(path, format string) (*SavedDisk, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	moved := *d
	moved.File = path
	if format != "" {
		moved.Format = format
	}
	node, err := disk.Open(path, disk.Options{Format: moved.Format, ReadOnly: true})
	if err != nil {
		return nil, fmt.Errorf("disk %s of the checkpoint: %w", d.ID, err)
	}
	defer node.Close()
	files, err := savedFiles(node.Info())
	if err != nil {
		return nil, fmt.Errorf("disk %s of the checkpoint: %w", d.ID, err)
	}
	if moved.Format != d.Format {
		return &moved, fmt.Errorf("disk %s of the checkpoint: %s is named as %s and was %s: %w", d.ID, path, moved.Format, d.Format, ErrDiskChanged)
	}
	if d.Files == nil {
		return &moved, nil
	}
	if len(files) != len(d.Files) {
		return &moved, fmt.Errorf("disk %s of the checkpoint: %s is a chain of %d files and was one of %d: %w", d.ID, path, len(files), len(d.Files), ErrDiskChanged)
	}
	for i := range files {
		files[i].Size, files[i].Modified = d.Files[i].Size, d.Files[i].Modified
	}
	moved.Files = files
	return &moved, nil
}

// Unchanged refuses, with ErrDiskChanged, a disk of which a file was written to
// since the checkpoint was taken. It goes by sizes and times.
func (d *SavedDisk) Unchanged() error {
	st, err := os.Stat(d.File)
	if err != nil {
		return fmt.Errorf("disk %s of the checkpoint: %w", d.ID, err)
	}
	if d.Format == "raw" && st.Mode().IsRegular() && (st.Size()+511)/512*512 != d.Size {
		return fmt.Errorf("disk %s of the checkpoint: %s has %d bytes and had %d: %w", d.ID, d.File, st.Size(), d.Size, ErrDiskChanged)
	}
	for _, was := range d.Files {
		st, err := os.Stat(was.File)
		if err != nil {
			return fmt.Errorf("disk %s of the checkpoint: %w", d.ID, err)
		}
		then, now := time.Unix(0, was.Modified), st.ModTime()
		// Some archives and copies keep whole seconds only.
		same := now.Equal(then) || now.Equal(then.Truncate(time.Second))
		switch {
		case st.Size() != was.Size:
			return fmt.Errorf("disk %s of the checkpoint: %s has %d bytes and had %d: %w", d.ID, was.File, st.Size(), was.Size, ErrDiskChanged)
		case !same:
			return fmt.Errorf("disk %s of the checkpoint: %s was last written to at %s, not at %s: %w", d.ID, was.File,
				now.Format(time.RFC3339Nano), then.Format(time.RFC3339Nano), ErrDiskChanged)
		}
	}
	return nil
}

// OverlayDisk makes an image at path in which a restored machine can write to the
// disk, and which leaves what the checkpoint needs as it is. The disk must be
// Unchanged.
func (d *SavedDisk) OverlayDisk(path string) error {
	if err := d.Unchanged(); err != nil {
		return err
	}
	return d.OverlayChangedDisk(path)
}

// OverlayChangedDisk is OverlayDisk for a caller that vouches for the disk.
func (d *SavedDisk) OverlayChangedDisk(path string) error {
	return qcow2.Create(path, qcow2.CreateOptions{Size: d.Size, Backing: d.File, BackingFormat: d.Format})
}
