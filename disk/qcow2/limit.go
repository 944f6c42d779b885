package qcow2

import (
	"fmt"
	"io"
	"os"
	"syscall"

	"github.com/gnomon-vmm/gnomon/disk/block"
)

// maxChain is how many images may lie one on another: a longer chain is not opened,
// and so none is made.
const maxChain = 64

// RoomOver tells whether another image may lie on a node. Errors wrap ErrBacking.
func RoomOver(backing block.Node) error {
	return roomFor(1+filesOf(backing), backing.Info().Filename)
}

// filesOf is how many files opening a node's chain opens.
func filesOf(node block.Node) (files int) {
	type image interface{ files() int }
	if n, ok := node.(image); ok {
		return n.files()
	}
	info := node.Info()
	for i := &info; i != nil; i = i.Backing {
		files++
	}
	return files
}

func (n *Node) files() int {
	files := 1
	if n.external != nil {
		files++
	}
	if n.backing != nil {
		files += filesOf(n.backing)
	}
	return files
}

// RoomBelow tells whether an image at path may lie on another, by its name and format
// or, with "", on none. Errors wrap ErrBacking. What cannot be read
// of the chain is for who opens it to tell.
func RoomBelow(path, backing, format string) error {
	files, image := 1, path
	h := &Header{BackingFile: backing, BackingFormat: format}
	for h.BackingFile != "" && files <= maxChain {
		next, err := backingPath(image, h.BackingFile)
		if err != nil {
			break
		}
		files++
		if h.BackingFormat != "qcow2" {
			break
		}
		if h, err = headerOf(next); err != nil {
			break
		}
		if h.Incompatible&FeatureDataFile != 0 {
			files++
		}
		image = next
	}
	return roomFor(files, backing)
}

func roomFor(files int, backing string) error {
	if files <= maxChain {
		return nil
	}
	return fmt.Errorf("%w: %s is the top of a chain as long as one may be: more than %d images would lie one on another: merge snapshots first (gnomon disk consolidate; gnomon disk commit where no machine uses them), or copy the disk instead (gnomon checkpoint --disks copy)",
		ErrBacking, backing, maxChain)
}

// headerOf reads the header of an image that others may be using.
func headerOf(path string) (*Header, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // not to wait for a FIFO's other end
	if err != nil {
		return nil, err
	}
	defer f.Close()
	start := make([]byte, sector)
	if _, err := io.ReadFull(f, start); err != nil {
		return nil, err
	}
	bits, err := clusterBits(start)
	if err != nil {
		return nil, err
	}
	first := make([]byte, 1<<bits)
	n, err := f.ReadAt(first, 0)
	if err != nil && err != io.EOF {
		return nil, err
	}
	return ParseHeader(first[:n])
}
