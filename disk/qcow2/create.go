package qcow2

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/raw"
)

// CreateOptions describe a new image.
type CreateOptions struct {
	Size        int64 // virtual, bytes, a multiple of 512
	ClusterSize int64 // a power of two from 512 B to 2 MiB; 0: 64 KiB
	// Backing is the path of the image that the new one lies on, as the new one
	// shall name it: relative to its directory, or absolute. "": none.
	Backing       string
	BackingFormat string // "raw" or "qcow2"
}

// Create makes an image at path, which must not exist. It is there whole or not
// at all.
func Create(path string, o CreateOptions) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("create disk %s: %w", path, err)
		}
	}()
	head, err := o.encode()
	if err != nil {
		return err
	}
	if _, err := os.Lstat(path); err == nil {
		return fmt.Errorf("%w: remove it, or choose another name", fs.ErrExist)
	}
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*.partial")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // its other name, or what is left of an error
	defer f.Close()
	if _, err := f.Write(head); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	return os.Link(f.Name(), path)
}

// encode makes an empty image: header, reference count table, one block of
// counts, L1 table.
func (o *CreateOptions) encode() ([]byte, error) {
	size := o.ClusterSize
	if size == 0 {
		size = 64 << 10
	}
	h := &Header{Version: 3, Size: o.Size, RefcountOrder: 4}
	for h.ClusterBits = minClusterBits; h.ClusterBits < maxClusterBits && h.ClusterSize() != size; h.ClusterBits++ {
	}
	switch {
	case h.ClusterSize() != size:
		return nil, fmt.Errorf("%w: clusters of %d bytes: powers of two from 512 to 2097152 are possible", ErrHeader, size)
	case o.Size <= 0 || o.Size%sector != 0:
		return nil, fmt.Errorf("%w: virtual size %d: multiples of 512 are possible", ErrHeader, o.Size)
	case o.Backing != "" && o.BackingFormat != "raw" && o.BackingFormat != "qcow2":
		return nil, fmt.Errorf("%w: format %q of the backing file: raw and qcow2 are possible", ErrBacking, o.BackingFormat)
	case len(o.Backing) > maxBackingName || int64(headerLenV3+64+len(o.Backing)) > size:
		return nil, fmt.Errorf("%w: its name has %d bytes", ErrBacking, len(o.Backing))
	case h.l1Needed()*entrySize > maxL1Bytes:
		return nil, fmt.Errorf("%w: virtual size %d needs larger clusters", ErrHeader, o.Size)
	}
	l1 := (h.l1Needed()*entrySize + size - 1) / size
	clusters := 3 + l1
	if clusters > size/2 {
		return nil, fmt.Errorf("%w: virtual size %d needs larger clusters", ErrHeader, o.Size)
	}
	b := make([]byte, clusters*size)
	be := binary.BigEndian
	copy(b, Magic)
	be.PutUint32(b[4:], 3)
	be.PutUint32(b[20:], h.ClusterBits)
	be.PutUint64(b[24:], uint64(o.Size))
	be.PutUint32(b[36:], uint32(h.l1Needed()))
	be.PutUint64(b[40:], uint64(3*size))
	be.PutUint64(b[48:], uint64(size))
	be.PutUint32(b[56:], 1)
	be.PutUint64(b[80:], 1) // compatible: lazy reference counts
	be.PutUint32(b[96:], h.RefcountOrder)
	be.PutUint32(b[100:], headerLenV3)
	at := headerLenV3
	if o.Backing != "" {
		be.PutUint32(b[at:], extBackingFormat)
		be.PutUint32(b[at+4:], uint32(len(o.BackingFormat)))
		copy(b[at+8:], o.BackingFormat)
		at += 8 + (len(o.BackingFormat)+7)&^7
	}
	at += 8 // extEnd
	if o.Backing != "" {
		be.PutUint64(b[8:], uint64(at))
		be.PutUint32(b[16:], uint32(len(o.Backing)))
		copy(b[at:], o.Backing)
	}
	be.PutUint64(b[size:], uint64(2*size))
	for i := range clusters {
		be.PutUint16(b[2*size+i*2:], 1)
	}
	return b, nil
}

// CreateOver makes an empty image at path that lies on a node which is open, for
// OpenOver.
func CreateOver(path string, backing block.Node) error {
	info := backing.Info()
	name, err := filepath.Abs(info.Filename)
	if err != nil {
		return err
	}
	return Create(path, CreateOptions{Size: backing.Size(), Backing: name, BackingFormat: info.Format})
}

// OpenOver opens an image of CreateOver to be written, on the very node that it
// lies on, which nobody writes any more: see block.Freezer. Closing the image
// closes that node.
func OpenOver(path string, backing block.Node) (*Node, error) {
	n, err := newChain().openWritable(path)
	if err == nil {
		n.backing = backing
	}
	return n, err
}

// Commit writes what the image at path holds itself to its backing file. The
// image stays as it is; it can then be removed, or go on being used. progress,
// where not nil, is told how many bytes of the disk are done.
func Commit(ctx context.Context, path string, progress func(done, total int64)) (err error) {
	c := newChain()
	file, err := c.open(path)
	if err != nil {
		return err
	}
	n := &Node{path: path, image: image{file: file, id: len(c.opened), tables: c.tables, clusters: c.clusters}}
	defer func() { err = errors.Join(err, file.Close()) }()
	if err := n.init(); err != nil {
		return fmt.Errorf("disk %s: %w", path, err)
	}
	if n.header.BackingFile == "" {
		return fmt.Errorf("disk %s: %w: it lies on none", path, ErrBacking)
	}
	name, err := backingPath(path, n.header.BackingFile)
	if err != nil {
		return err
	}
	var base block.Node
	if n.header.BackingFormat == "qcow2" {
		base, err = Open(name, false)
	} else {
		base, err = raw.Open(name, false)
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, base.Close()) }()
	if base.Size() < n.size {
		return fmt.Errorf("disk %s: %w: %s is smaller", path, ErrBacking, name)
	}
	buf := make([]byte, max(maxRun, n.header.ClusterSize()))
	for off := int64(0); off < n.size; {
		if err := ctx.Err(); err != nil {
			return err
		}
		e, err := n.lookup(off, min(int64(len(buf)), n.size-off))
		switch {
		case err != nil:
		case e.kind == zero:
			err = base.WriteZeroes(off, e.length, true)
		case e.kind != unallocated:
			if err = n.readExtent(&cursor{bufs: [][]byte{buf[:e.length]}}, e, off); err == nil {
				err = base.Writev([][]byte{buf[:e.length]}, off)
			}
		}
		if err != nil {
			return fmt.Errorf("commit disk %s: at %d: %w", path, off, err)
		}
		off += e.length
		if progress != nil {
			progress(off, n.size)
		}
	}
	return base.Flush()
}
