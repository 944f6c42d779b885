// Package disk opens virtual disks by path and format.
package disk

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"

	"github.com/gnomon-vmm/gnomon/disk/aio"
	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/qcow2"
	"github.com/gnomon-vmm/gnomon/disk/raw"
)

// Formats of disk images.
const (
	FormatRaw   = "raw"
	FormatQcow2 = "qcow2"
)

// ErrFormat is an image whose format was not given and cannot be assumed.
var ErrFormat = errors.New("disk format")

// Options say how an image is opened.
type Options struct {
	// Format is FormatRaw or FormatQcow2; "": what the file's name says, .qcow2 or
	// anything else, which is raw. The content never decides: the guest
	// writes it, and a raw disk on which it has written a qcow2 header must
	// not make the host open the backing file named there.
	Format   string
	ReadOnly bool
	// Cache is what becomes of writes, and whether the host's page cache is used; "":
	// CacheWriteback.
	Cache Cache
	// Engine is how requests that pass the page cache by get to the kernel.
	Engine aio.Engine
	// Like, where not nil, is a node that tells in place of Cache and Engine how the
	// image is read and written, and by what rules.
	Like block.Node
}

// Cache is a cache mode in QEMU's words.
type Cache string

// Cache modes.
const (
	CacheWriteback    Cache = "writeback"    // by the page cache; durable when flushed
	CacheNone         Cache = "none"         // past it; durable when flushed
	CacheWriteThrough Cache = "writethrough" // by it; durable when written
	CacheDirectSync   Cache = "directsync"   // past it; durable when written
	// CacheUnsafe has flushes do nothing: for what can be made again if the host ends.
	CacheUnsafe Cache = "unsafe"
)

// Direct tells that the page cache is passed by.
func (c Cache) Direct() bool { return c == CacheNone || c == CacheDirectSync }

// Files are the options of the image's files.
func (o *Options) Files() raw.Options {
	if o.Like != nil {
		return qcow2.OptionsOver(o.Like)
	}
	return raw.Options{
		Direct: o.Cache.Direct(), Engine: o.Engine, NoFlush: o.Cache == CacheUnsafe,
		WriteThrough: o.Cache == CacheWriteThrough || o.Cache == CacheDirectSync,
	}
}

// Open opens the image at path. Errors wrap block.ErrInUse where another
// machine has it.
func Open(path string, o Options) (block.Node, error) {
	n, err := open(path, o)
	if err == nil && o.Like != nil {
		n.(block.Ruled).SetRules(block.RulesOf(o.Like))
	}
	return n, err
}

func open(path string, o Options) (block.Node, error) {
	switch o.Format {
	case FormatRaw:
		return node(raw.OpenWith(path, o.ReadOnly, o.Files()))
	case FormatQcow2:
		return node(qcow2.OpenWith(path, o.ReadOnly, o.Files()))
	case "":
	default:
		return nil, fmt.Errorf("%w: %q: raw and qcow2 are possible", ErrFormat, o.Format)
	}
	if strings.HasSuffix(path, ".qcow2") {
		return node(qcow2.OpenWith(path, o.ReadOnly, o.Files()))
	}
	if looksLikeQcow2(path) {
		return nil, fmt.Errorf("%w: %s starts with a qcow2 header: say format=qcow2, or format=raw if the guest wrote that itself", ErrFormat, path)
	}
	return node(raw.OpenWith(path, o.ReadOnly, o.Files()))
}

// node makes a failed open a nil Node, not an interface that holds a nil pointer.
func node[N block.Node](n N, err error) (block.Node, error) {
	if err != nil {
		return nil, err
	}
	return n, nil
}

func looksLikeQcow2(path string) bool {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // not to wait for a FIFO's other end
	if err != nil {
		return false // raw.Open tells
	}
	defer f.Close()
	var magic [4]byte
	_, err = io.ReadFull(f, magic[:])
	return err == nil && string(magic[:]) == qcow2.Magic
}
