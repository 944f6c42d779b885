package snapshot

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"

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
}

// keeper keeps a machine's disks as they are at one instant, each under an
// overlay in which the machine goes on.
type keeper struct {
	disks    []keptDisk
	switched bool
}

type keptDisk struct {
	SavedDisk
	root *block.Root
	base block.Freezer // nil: the disk cannot be written
}

// keepDisks prepares it, ahead of the pause: overlays are made, and what is to be
// kept is written to the disk, so that little is left to do.
func keepDisks(m *vmm.Machine, checkpoint string) (k *keeper, err error) {
	k = &keeper{}
	defer func() {
		if err != nil {
			k.undo()
		}
	}()
	for _, d := range m.Disks() {
		info := d.Node.Info()
		kept := keptDisk{root: d.Root, SavedDisk: SavedDisk{ID: d.ID, Format: info.Format, ReadOnly: d.Node.ReadOnly(), Size: d.Node.Size()}}
		if kept.File, err = filepath.Abs(info.Filename); err != nil {
			return nil, err
		}
		if !kept.ReadOnly {
			base, ok := d.Root.Current().(block.Freezer)
			if !ok {
				return nil, fmt.Errorf("disk %s: a disk of format %s cannot be kept", d.ID, info.Format)
			}
			if err := base.Flush(); err != nil {
				return nil, fmt.Errorf("disk %s: %w", d.ID, err)
			}
			overlay := kept.File + "." + filepath.Base(checkpoint) + ".qcow2"
			if err := qcow2.CreateOver(overlay, base); err != nil {
				return nil, fmt.Errorf("disk %s: %w", d.ID, err)
			}
			kept.base, kept.Overlay = base, overlay
		}
		k.disks = append(k.disks, kept)
	}
	return k, nil
}

// switchOver puts the overlays in place. The machine is paused.
func (k *keeper) switchOver() error {
	overlays := make([]*qcow2.Node, len(k.disks))
	for i, d := range k.disks {
		if d.base == nil {
			continue
		}
		var err error
		if overlays[i], err = qcow2.OpenOver(d.Overlay, d.base); err != nil {
			return fmt.Errorf("disk %s: %w", d.ID, err)
		}
	}
	k.switched = true
	for i, d := range k.disks {
		if d.base == nil {
			continue
		}
		d.root.Swap(overlays[i])
		if err := d.base.Freeze(); err != nil {
			return fmt.Errorf("disk %s: %w", d.ID, err)
		}
	}
	return nil
}

// flush makes durable what is kept.
func (k *keeper) flush() error {
	for _, d := range k.disks {
		if d.base == nil {
			continue
		}
		if err := d.base.Flush(); err != nil {
			return fmt.Errorf("disk %s: %w", d.ID, err)
		}
	}
	return nil
}

// undo removes overlays that are not in use. After switchOver they are: then the
// machine's disks are right as they are, with one more image each.
func (k *keeper) undo() {
	if k.switched {
		return
	}
	for _, d := range k.disks {
		if d.Overlay != "" {
			os.Remove(d.Overlay)
		}
	}
}

func (k *keeper) saved() []SavedDisk {
	all := []SavedDisk{}
	for _, d := range k.disks {
		all = append(all, d.SavedDisk)
	}
	return all
}

func decodeDisks(data []byte) ([]SavedDisk, error) {
	var disks []SavedDisk
	if err := json.Unmarshal(data, &disks); err != nil {
		return nil, fmt.Errorf("section %q: %w", sectionDisks, err)
	}
	for _, d := range disks {
		if d.ID == "" || !filepath.IsAbs(d.File) || d.Format != "raw" && d.Format != "qcow2" {
			return nil, fmt.Errorf("section %q: disk %q is at %q, of format %q", sectionDisks, d.ID, d.File, d.Format)
		}
	}
	return disks, nil
}

// OverlayDisk makes an image at path in which a restored machine can write to the
// disk, and which leaves what the checkpoint needs as it is.
func (d *SavedDisk) OverlayDisk(path string) error {
	st, err := os.Stat(d.File)
	if err != nil {
		return fmt.Errorf("disk %s of the checkpoint: %w", d.ID, err)
	}
	if d.Format == "raw" && st.Mode().IsRegular() && (st.Size()+511)/512*512 != d.Size {
		return fmt.Errorf("disk %s of the checkpoint: %s has %d bytes and had %d: it was changed", d.ID, d.File, st.Size(), d.Size)
	}
	return qcow2.Create(path, qcow2.CreateOptions{Size: d.Size, Backing: d.File, BackingFormat: d.Format})
}
