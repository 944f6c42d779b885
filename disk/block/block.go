// Package block is the interface between whoever reads and writes a virtual
// disk (virtio-blk, a job, a server) and the node that holds it (raw, qcow2,
// a filter).
package block

import "errors"

// Errors a Node returns, wrapped with what failed.
var (
	ErrReadOnly   = errors.New("disk is read-only")
	ErrOutOfRange = errors.New("request passes the end of the disk")
	ErrInUse      = errors.New("disk is in use by another process")
)

// Node is one virtual disk. All offsets and lengths are bytes; a request
// within [0, Size()) needs no alignment. Methods may be called concurrently;
// requests that overlap are ordered only by their completion. A Node outlives
// any error it returns.
type Node interface {
	// Readv fills bufs, in order, from off on; bytes never written read as zero.
	Readv(bufs [][]byte, off int64) error
	// Writev writes bufs, in order, from off on. Data is durable after the
	// next Flush returns.
	Writev(bufs [][]byte, off int64) error
	// Flush makes every completed write durable.
	Flush() error
	// Discard tells that n bytes from off on are not needed; they read as zero or old data after it.
	Discard(off, n int64) error
	// WriteZeroes makes n bytes from off on read as zero. unmap allows their
	// space to be given back.
	WriteZeroes(off, n int64, unmap bool) error
	// Size is the virtual size.
	Size() int64
	// ReadOnly tells that writes fail with ErrReadOnly.
	ReadOnly() bool
	// Info describes the node, for query-block and gnomon disk info.
	Info() Info
	// Close flushes, releases locks and ends the use of the node.
	Close() error
}

// Resizer is a Node whose size can be changed.
type Resizer interface {
	Node
	// Resize makes the disk size bytes long, a multiple of 512. What is added reads
	// as zero; what is cut off is lost. There are no requests meanwhile.
	Resize(size int64) error
}

// Info describes a node in QEMU's words.
type Info struct {
	Format      string // driver: "raw", "qcow2"
	Filename    string
	VirtualSize int64 // bytes
	ActualSize  int64 // bytes allocated on the host
	ClusterSize int64 // bytes; 0 where the format has none
	Backing     *Info // the backing file's node, or nil
	Cache       CacheInfo
	Rules       WriteRules
}

// CacheInfo is what becomes of what is written.
type CacheInfo struct {
	Direct       bool // the host's page cache is passed by
	NoFlush      bool // flushes are ignored
	WriteThrough bool // what was written is durable when the write ends
}

// Extent is a run of bytes of a disk that are all kept in the same way, in the
// words of qemu-img map.
type Extent struct {
	Start, Length int64
	// Present tells that some image of the chain holds the bytes, as data or as
	// zeroes; where none does they read as zero.
	Present bool
	// Depth is the image that holds them, or the last where none does: 0 is the
	// node itself, 1 its backing file, and so on.
	Depth int
	// Data tells that they are kept as data, which may read as zeroes too.
	Data bool
	// Zero tells that they read as zeroes.
	Zero bool
	// Compressed tells that they are kept in compressed clusters.
	Compressed bool
	// File and Offset are where on the host they are as they read, or "" and -1.
	File   string
	Offset int64
}

// Mapper is a Node that knows how its bytes are kept.
type Mapper interface {
	Node
	// Map returns the extent at off. It begins there and ends at off+n at the
	// latest; it may be shorter than what is kept in the same way.
	Map(off, n int64) (Extent, error)
}
