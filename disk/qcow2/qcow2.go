// Package qcow2 reads and writes QEMU's qcow2 images (QEMU's
// docs/interop/qcow2.txt): plain, zero and compressed clusters, persistent
// bitmaps, and backing chains of qcow2 and raw images, of versions 2 and 3. Images
// with internal snapshots, subclusters, or an external data file are only read.
package qcow2

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/raw"
)

// Errors of opening and reading, wrapped with what they concern.
var (
	ErrHeader      = errors.New("bad qcow2 header")
	ErrUnsupported = errors.New("qcow2 feature not supported")
	ErrBacking     = errors.New("backing file")
	ErrCorrupt     = errors.New("damaged qcow2 image")
)

// sector is what virtual sizes are counted in, and streams of compressed clusters.
const sector = 512

// Node is an image with its backing chain.
type Node struct {
	image
	path    string
	size    atomic.Int64 // virtual, a multiple of sector
	backing block.Node   // or nil
	bitmaps bitmaps
	through bool             // each change is durable when it ends
	rules   block.WriteRules // changed only while there are no requests

	holes    sync.Once
	hasHoles bool // found by holes
}

// image is an open qcow2 file: what turns offsets of the disk into places in
// the file.
type image struct {
	file     block.Node
	external block.Node // the data file, or nil if the data is in file
	header   *Header
	l1       []uint64 // entries of the active L1 table
	id       int      // the image's own in the caches
	tables   *cache
	clusters *cache
	w        *writer // nil: the image is only read
}

var _ block.Node = (*Node)(nil)

// Open opens the image at path and all images it lies on, and locks their
// files against writers. Errors wrap one of this package's or block.ErrInUse. An
// image that is marked as corrupt, or as not having been closed, can be read;
// see Header. To be written it must not be corrupt; one that was not closed is
// repaired.
func Open(path string, readOnly bool) (*Node, error) {
	return OpenWith(path, readOnly, raw.Options{})
}

// OpenWith is Open for files that are read and written with options.
func OpenWith(path string, readOnly bool, o raw.Options) (*Node, error) {
	c := newChainWith(o)
	if readOnly {
		file, err := c.open(path, true)
		if err != nil {
			return nil, err
		}
		return c.openImage(file, path)
	}
	return c.openWhole(path)
}

// OpenAlone opens the image at path without what it lies on, which need not be there: for
// who asks about the image itself. What it does not hold reads as zero.
func OpenAlone(path string) (*Node, error) {
	return newChain().openOne(path, false)
}

// openWhole opens the image at path to be written, and what it lies on.
func (c *chain) openWhole(path string) (*Node, error) {
	n, err := c.openWritable(path)
	if err != nil {
		return nil, err
	}
	if n.backing, err = c.openBacking(path, n.header); err != nil {
		n.abandon()
		return nil, err
	}
	return n, nil
}

// abandon closes an image whose opening failed; the chain below is not open.
func (n *Node) abandon() {
	_ = n.finish()
	n.file.Close()
	if n.external != nil {
		n.external.Close()
	}
}

// openWritable opens the image at path, without its backing chain.
func (c *chain) openWritable(path string) (*Node, error) {
	file, err := c.open(path, false)
	if err != nil {
		return nil, err
	}
	n := c.node(file, path)
	if err = n.init(); err == nil {
		err = n.makeWritable(file.(store))
	}
	if err != nil {
		file.Close()
		return nil, fmt.Errorf("disk %s: %w", path, err)
	}
	return n, nil
}

// node is a node for an image that is not read yet.
func (c *chain) node(file block.Node, path string) *Node {
	return &Node{path: path, through: c.through, image: image{file: file, id: len(c.opened), tables: c.tables, clusters: c.clusters}}
}

// openImage opens the image in file, which it closes if it fails.
func (c *chain) openImage(file block.Node, path string) (*Node, error) {
	n := c.node(file, path)
	if err := n.init(); err != nil {
		file.Close()
		return nil, fmt.Errorf("disk %s: %w", path, err)
	}
	var err error
	if n.header.Incompatible&FeatureDataFile != 0 {
		n.external, err = c.openDataFile(path, n.header)
	}
	if err == nil {
		n.backing, err = c.openBacking(path, n.header)
	}
	if err != nil {
		n.abandon()
		return nil, err
	}
	return n, nil
}

func (n *Node) init() error {
	start := make([]byte, min(n.file.Size(), sector))
	if err := n.file.Readv([][]byte{start}, 0); err != nil {
		return fmt.Errorf("read header: %w", err)
	}
	bits, err := clusterBits(start)
	if err != nil {
		return err
	}
	first := make([]byte, min(n.file.Size(), 1<<bits))
	if err := n.file.Readv([][]byte{first}, 0); err != nil {
		return fmt.Errorf("read header: %w", err)
	}
	if n.header, err = ParseHeader(first); err != nil {
		return err
	}
	if err := n.header.supported(); err != nil {
		return err
	}
	n.size.Store(n.header.Size / sector * sector) // as QEMU rounds
	n.l1, err = readL1(n.file, n.header, n.header.l1Needed())
	return err
}

// Header is the image's header; its Dirty and Corrupt are worth a warning.
func (n *Node) Header() *Header { return n.header }

// Readv implements block.Node.
func (n *Node) Readv(bufs [][]byte, off int64) error {
	length, size := total(bufs), n.size.Load()
	if off < 0 || off > size || length > size-off {
		return fmt.Errorf("%w: %d bytes at %d of %d", block.ErrOutOfRange, length, off, size)
	}
	c := cursor{bufs: bufs}
	for length > 0 {
		e, epoch, err := n.lookup(off, length)
		if err == nil {
			err = n.readExtent(&c, e, off)
			n.leave(epoch)
		}
		if err != nil {
			return fmt.Errorf("disk %s: at %d: %w", n.path, off, err)
		}
		off, length = off+e.length, length-e.length
	}
	return nil
}

// readExtent fills the next e.length bytes of c, which are at off of the disk.
func (n *Node) readExtent(c *cursor, e extent, off int64) error {
	switch e.kind {
	case data:
		return readFrom(n.dataFile(), c, e.host, e.length)
	case unallocated:
		if n.backing == nil {
			break
		}
		return readFrom(n.backing, c, off, e.length)
	case compressed:
		cluster, err := n.cluster(e)
		if err != nil {
			return err
		}
		c.copy(cluster[e.within : e.within+e.length])
		return nil
	}
	c.zero(e.length)
	return nil
}

// readFrom fills the next length bytes of c from off of node on; what lies
// behind node's end is zero.
func readFrom(node block.Node, c *cursor, off, length int64) error {
	there := max(0, min(length, node.Size()-off))
	if there > 0 {
		v := c.take(there)
		err := node.Readv(v.bufs, off)
		v.release()
		if err != nil {
			return err
		}
	}
	c.zero(length - there)
	return nil
}

// Size implements block.Node.
func (n *Node) Size() int64 { return n.size.Load() }

// Waits implements block.Waiter.
func (n *Node) Waits() bool { return block.Waits(n.dataFile()) }

// ReadOnly implements block.Node.
func (n *Node) ReadOnly() bool { return n.w == nil }

// Info implements block.Node.
func (n *Node) Info() block.Info {
	info := block.Info{
		Format:      "qcow2",
		Filename:    n.path,
		VirtualSize: n.Size(),
		ActualSize:  n.file.Info().ActualSize,
		ClusterSize: n.header.ClusterSize(),
		Cache:       n.file.Info().Cache,
		Rules:       n.rules,
	}
	info.Cache.WriteThrough = n.through
	if n.backing != nil {
		backing := n.backing.Info()
		info.Backing = &backing
	}
	return info
}

// Close implements block.Node; it closes the whole chain.
func (n *Node) Close() error {
	err := errors.Join(n.finish(), n.file.Close())
	if n.external != nil {
		err = errors.Join(err, n.external.Close())
	}
	if n.backing != nil {
		err = errors.Join(err, n.backing.Close())
	}
	return err
}
