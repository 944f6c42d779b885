// Package extfs tells which bytes of a disk its file systems use: the used-block
// maps of ext2, ext3 and ext4, read from the disk itself without mounting it.
// What it does not know counts as used.
//
// The format is that of the Linux kernel's Documentation/filesystems/ext4.
package extfs

import (
	"context"
	"errors"
	"fmt"

	"github.com/gnomon-vmm/gnomon/disk/block"
)

// Errors of reading a file system, wrapped with the byte of the disk they are about.
var (
	// ErrNone: there is no ext2, ext3 or ext4 superblock.
	ErrNone = errors.New("no ext file system")
	// ErrUnsupported: it has a feature that this package does not know, or is
	// larger than the map may be.
	ErrUnsupported = errors.New("unsupported ext file system")
	// ErrCorrupt: it contradicts itself, its checksums or the disk's size.
	ErrCorrupt = errors.New("corrupt ext file system")
	// ErrUnreliable: what the disk says of it may be old or wrong; see State.
	ErrUnreliable = errors.New("ext file system not to be trusted")
	// ErrRead is the stage of reading the disk.
	ErrRead = errors.New("read file system")
)

// State is whether the disk itself tells what the file system uses.
type State int

const (
	// Clean: unmounted, or frozen with its journal empty.
	Clean State = iota
	// Recovered: the journal held transactions; the map is what it becomes when
	// they are replayed.
	Recovered
	// NotUnmounted: it has no journal, and is mounted or was not unmounted. What
	// the disk says may be old.
	NotUnmounted
	// HasErrors: the kernel found errors in it, and fsck has not run since.
	HasErrors
)

func (s State) String() string {
	switch s {
	case Clean:
		return "clean"
	case Recovered:
		return "recovered"
	case NotUnmounted:
		return "not-unmounted"
	case HasErrors:
		return "has-errors"
	}
	return fmt.Sprintf("state %d", int(s))
}

// Reliable tells that the map can be trusted.
func (s State) Reliable() bool { return s == Clean || s == Recovered }

// FileSystem describes one that was found.
type FileSystem struct {
	Kind        string // "ext2", "ext3" or "ext4"
	Label       string
	UUID        string
	Offset      int64 // of its first byte on the disk
	Size        int64 // bytes: its blocks, which may be fewer than its partition's
	BlockSize   int64 // bytes
	ClusterSize int64 // bytes of a bit of the map; BlockSize unless it has bigalloc
	FreeBytes   int64 // as the map has it; its first and last cluster may be cut short
	State       State
}

// Used maps size bytes of a disk from offset on, which hold one file system:
// what its metadata and files use, and all behind its end. The file system must
// not change meanwhile: it is unmounted, frozen, or on a snapshot. Of one whose
// journal needs recovery the map is that after recovery; whether it can be
// trusted FileSystems()[0].State tells.
func Used(ctx context.Context, node block.Node, offset, size int64) (*Map, error) {
	if offset < 0 || size < 0 || offset > node.Size() || size > node.Size()-offset {
		return nil, fmt.Errorf("%w: %d bytes at %d of %d", block.ErrOutOfRange, size, offset, node.Size())
	}
	f, err := open(&area{node: node, base: offset, size: size})
	if err != nil {
		return nil, err
	}
	r, err := f.load(ctx)
	if err != nil {
		return nil, err
	}
	return &Map{start: offset, end: offset + size, regions: []*region{r}}, nil
}

// area is the part of a disk that a file system is on.
type area struct {
	node       block.Node
	base, size int64
}

// read fills p from byte off of the area on.
func (a *area) read(p []byte, off int64) error {
	if off < 0 || off > a.size || int64(len(p)) > a.size-off {
		return fmt.Errorf("%w: %d bytes at %d lie outside its %d bytes", ErrCorrupt, len(p), a.base+off, a.size)
	}
	if err := a.node.Readv([][]byte{p}, a.base+off); err != nil {
		return fmt.Errorf("%w: %d bytes at %d: %w", ErrRead, len(p), a.base+off, err)
	}
	return nil
}
