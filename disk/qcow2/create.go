package qcow2

import (
	"encoding/binary"
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

	Version      int         // 2 or 3; 0: 3
	Compression  Compression // of clusters that are written compressed; version 2 has Zlib
	RefcountBits int         // a power of two up to 64; 0: 16, which version 2 has
	// LazyRefcounts lets QEMU leave counts behind until the image is closed. This
	// package does not.
	LazyRefcounts bool
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
	if err := RoomBelow(path, o.Backing, o.BackingFormat); err != nil {
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

// header is the header of an image that is to be made, of which only places are
// missing.
func (o *CreateOptions) header() (*Header, error) {
	size := o.ClusterSize
	if size == 0 {
		size = 64 << 10
	}
	h := &Header{Version: uint32(o.Version), Size: o.Size, RefcountOrder: 4, Compression: o.Compression, BackingFile: o.Backing, BackingFormat: o.BackingFormat}
	if h.Version == 0 {
		h.Version = 3
	}
	for h.ClusterBits = minClusterBits; h.ClusterBits < maxClusterBits && h.ClusterSize() != size; h.ClusterBits++ {
	}
	if o.RefcountBits != 0 {
		for h.RefcountOrder = 0; h.RefcountOrder < maxRefcountLog && 1<<h.RefcountOrder != o.RefcountBits; h.RefcountOrder++ {
		}
	}
	if o.LazyRefcounts {
		h.Compatible = 1
	}
	if h.Compression != Zlib {
		h.Incompatible = FeatureCompression
	}
	switch {
	case h.Version != 2 && h.Version != 3:
		return nil, fmt.Errorf("%w: version %d: 2 and 3 are possible", ErrHeader, h.Version)
	case h.Compression > Zstd:
		return nil, fmt.Errorf("%w: compression type %d", ErrHeader, h.Compression)
	case o.RefcountBits != 0 && 1<<h.RefcountOrder != o.RefcountBits:
		return nil, fmt.Errorf("%w: reference counts of %d bits: powers of two up to 64 are possible", ErrHeader, o.RefcountBits)
	case h.Version == 2 && (h.Compression != Zlib || h.RefcountOrder != 4 || o.LazyRefcounts):
		return nil, fmt.Errorf("%w: version 2 has zlib, reference counts of 16 bits, and none that are lazy", ErrHeader)
	case h.ClusterSize() != size:
		return nil, fmt.Errorf("%w: clusters of %d bytes: powers of two from 512 to 2097152 are possible", ErrHeader, size)
	case o.Size < 0 || o.Size%sector != 0:
		return nil, fmt.Errorf("%w: virtual size %d: multiples of 512 are possible", ErrHeader, o.Size)
	case o.Backing != "" && o.BackingFormat != "raw" && o.BackingFormat != "qcow2":
		return nil, fmt.Errorf("%w: format %q of the backing file: raw and qcow2 are possible", ErrBacking, o.BackingFormat)
	case len(o.Backing) > maxBackingName || int64(headerLenV3+64+len(o.Backing)) > size:
		return nil, fmt.Errorf("%w: its name has %d bytes", ErrBacking, len(o.Backing))
	case h.l1Needed()*entrySize > maxL1Bytes:
		return nil, fmt.Errorf("%w: virtual size %d needs larger clusters", ErrHeader, o.Size)
	}
	h.L1Entries = uint32(h.l1Needed())
	return h, nil
}

// encode makes an empty image: header, reference count table, blocks of counts, L1
// table.
func (o *CreateOptions) encode() ([]byte, error) {
	h, err := o.header()
	if err != nil {
		return nil, err
	}
	size := h.ClusterSize()
	l1 := (h.l1Needed()*entrySize + size - 1) / size
	perBlock := size * 8 >> h.RefcountOrder
	blocks, table := int64(1), int64(1)
	for blocks*perBlock < 1+table+blocks+l1 || table*size < blocks*entrySize {
		blocks = (1 + table + blocks + l1 + perBlock - 1) / perBlock
		table = (blocks*entrySize + size - 1) / size
	}
	clusters := 1 + table + blocks + l1
	h.RefcountOffset, h.RefcountTables = size, uint32(table)
	l1At := (1 + table + blocks) * size
	if l1 > 0 {
		h.L1Offset = l1At
	}
	b := make([]byte, clusters*size)
	copy(b, h.encode())
	for i := range blocks {
		binary.BigEndian.PutUint64(b[size+i*entrySize:], uint64((1+table+i)*size))
	}
	counts := b[(1+table)*size : l1At]
	for i := range clusters {
		setCount(counts[i/perBlock*size:], h.RefcountOrder, i%perBlock, 1)
	}
	return b, nil
}

// CreateOver makes an empty image at path that lies on a node which is open, for
// OpenOver.
func CreateOver(path string, backing block.Node) error {
	if err := RoomOver(backing); err != nil {
		return fmt.Errorf("create disk %s: %w", path, err)
	}
	info := backing.Info()
	name, err := filepath.Abs(info.Filename)
	if err != nil {
		return err
	}
	return Create(path, CreateOptions{Size: backing.Size(), Backing: name, BackingFormat: info.Format})
}

// OpenOver opens an image of CreateOver to be written, on the very node that it
// lies on, which nobody writes any more: see block.Freezer. Closing the image
// closes that node. It is read and written as that node is.
func OpenOver(path string, backing block.Node) (*Node, error) {
	return OpenOverWith(path, backing, OptionsOver(backing))
}

// OpenOverWith is OpenOver for a file that is read and written with options.
func OpenOverWith(path string, backing block.Node, o raw.Options) (*Node, error) {
	n, err := newChainWith(o).openWritable(path)
	if err != nil {
		return nil, err
	}
	n.backing = backing
	n.rules.KeepDiscarded = block.RulesOf(backing).KeepDiscarded
	return n, nil
}

// OptionsOver are those of an image that is read and written as another node is,
// which as in QEMU does not say what becomes of zeroes.
func OptionsOver(n block.Node) raw.Options {
	o := raw.OptionsOf(n)
	o.Rules = block.WriteRules{} // the image's, not the file's
	return o
}
