// Package raw holds disks that are a plain file or a host block device: byte n
// of the disk is byte n of the file.
package raw

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/disk/aio"
	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/internal/iovec"
)

// sector is what virtual sizes are rounded up to; the file's missing tail
// reads as zero.
const sector = 512

// Node is a raw disk.
type Node struct {
	file     *os.File
	fd       int
	size     atomic.Int64 // virtual: a multiple of sector
	readOnly bool
	frozen   bool      // it was written before it became readOnly
	options  Options   // changed only while there are no requests
	io       *aio.File // or nil: preadv and pwritev by way of the page cache
	granule  int64     // bytes that space is given back by: a device's logical block, 1 for files
	closing  sync.Once
}

var (
	_ block.Node    = (*Node)(nil)
	_ block.Evictor = (*Node)(nil)
)

// Open opens the image at path by way of the page cache and locks it as QEMU does,
// so that neither QEMU nor another Gnomon machine writes to it meanwhile.
func Open(path string, readOnly bool) (*Node, error) {
	return OpenWith(path, readOnly, Options{})
}

// OpenWith is Open with options. Errors wrap aio.ErrDirect where the host's file
// system has no direct I/O, and aio.ErrRing where there is no io_uring.
func OpenWith(path string, readOnly bool, o Options) (*Node, error) {
	flags := os.O_RDWR
	if readOnly {
		flags = os.O_RDONLY
	}
	// Not to wait for the other end of a FIFO, which init refuses.
	flags |= unix.O_NONBLOCK
	if o.Direct {
		flags |= unix.O_DIRECT
	}
	f, err := os.OpenFile(path, flags, 0)
	if err != nil {
		return nil, explain(path, readOnly, o.Direct, err)
	}
	n := &Node{file: f, fd: int(f.Fd()), readOnly: readOnly, options: o, granule: 1}
	if err = n.init(); err == nil {
		err = n.bypass(o)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("disk %s: %w", path, err)
	}
	return n, nil
}

func explain(path string, readOnly, direct bool, err error) error {
	switch {
	case direct && errors.Is(err, unix.EINVAL):
		return fmt.Errorf("disk %s: %w: its file system has none: use cache=writeback, or another file system: %w", path, aio.ErrDirect, err)
	case errors.Is(err, fs.ErrNotExist):
		if path == "" {
			return fmt.Errorf("the name of a disk is empty: %w", fs.ErrNotExist)
		}
		return fmt.Errorf("disk %s does not exist: check the path: %w", path, fs.ErrNotExist)
	case errors.Is(err, fs.ErrPermission) && !readOnly:
		return fmt.Errorf("disk %s: no permission to write it: change its owner or mode, or open it with readonly=on: %w", path, fs.ErrPermission)
	}
	return fmt.Errorf("open disk: %w", err)
}

func (n *Node) init() error {
	info, err := n.file.Stat()
	if err != nil {
		return err
	}
	size := info.Size()
	switch mode := info.Mode(); {
	case mode.IsRegular():
	case mode&fs.ModeDevice != 0 && mode&fs.ModeCharDevice == 0:
		if size, err = n.file.Seek(0, io.SeekEnd); err != nil {
			return err
		}
		block, err := unix.IoctlGetInt(n.fd, unix.BLKSSZGET)
		if err != nil {
			return fmt.Errorf("ask for the device's block size: %w", err)
		}
		n.granule = int64(block)
	default:
		return errors.New("is neither a regular file nor a block device")
	}
	n.size.Store((size + sector - 1) / sector * sector)
	return lock(n.fd, n.readOnly)
}

// check refuses what lies outside the disk.
func (n *Node) check(off, length int64) error {
	if size := n.size.Load(); off < 0 || length < 0 || off > size || length > size-off {
		return fmt.Errorf("%w: %d bytes at %d of %d", block.ErrOutOfRange, length, off, size)
	}
	return nil
}

func total(bufs [][]byte) int64 {
	var t int64
	for _, b := range bufs {
		t += int64(len(b))
	}
	return t
}

// Readv implements block.Node.
func (n *Node) Readv(bufs [][]byte, off int64) error {
	if err := n.check(off, total(bufs)); err != nil {
		return err
	}
	if n.io != nil {
		done, err := n.io.Readv(bufs, off)
		behind(bufs, done).clear()
		return err
	}
	rest, err := transfer(preadv, n.fd, bufs, off)
	rest.clear() // behind the file's end, within the last sector
	return err
}

// Writev implements block.Node.
func (n *Node) Writev(bufs [][]byte, off int64) error {
	if n.readOnly {
		return block.ErrReadOnly
	}
	if err := n.check(off, total(bufs)); err != nil {
		return err
	}
	if n.options.Rules.Detects(bufs) {
		return n.WriteZeroes(off, total(bufs), n.options.Rules.Zeroes == block.ZeroesUnmap)
	}
	return n.after(n.write(bufs, off))
}

func (n *Node) write(bufs [][]byte, off int64) error {
	if n.io != nil {
		return n.io.Writev(bufs, off, n.size.Load())
	}
	rest, err := transfer(pwritev, n.fd, bufs, off)
	if err == nil && len(rest.bufs) > 0 {
		return io.ErrShortWrite
	}
	return err
}

// remainder is what a transfer did not move: bufs without its first skip bytes,
// which lie in bufs[0].
type remainder struct {
	bufs [][]byte
	skip int
}

// behind is what is left of bufs behind the first done bytes.
func behind(bufs [][]byte, done int64) remainder {
	rest, skip := iovec.Rest(bufs, int(done))
	return remainder{rest, skip}
}

func (r remainder) clear() {
	skip := r.skip
	for _, b := range r.bufs {
		clear(b[skip:])
		skip = 0
	}
}

// transfer moves bufs by as many system calls as it takes, until one moves
// nothing. It leaves bufs as it was.
func transfer(move func(fd int, bufs [][]byte, skip int, off int64) (int, error), fd int, bufs [][]byte, off int64) (remainder, error) {
	r := remainder{bufs: bufs}
	for {
		if r.bufs, r.skip = iovec.Rest(r.bufs, r.skip); len(r.bufs) == 0 {
			return remainder{}, nil
		}
		got, err := move(fd, r.bufs, r.skip, off)
		switch {
		case err == syscall.EINTR:
			continue
		case err != nil:
			return remainder{}, err
		case got == 0:
			return r, nil
		}
		off += int64(got)
		r.skip += got
	}
}

// Flush implements block.Node.
func (n *Node) Flush() error {
	if n.readOnly && !n.frozen || n.options.NoFlush {
		return nil
	}
	return ignoringEINTR(func() error { return unix.Fdatasync(n.fd) })
}

// Discard implements block.Node: the space goes back to the host's file system
// where that can be done.
func (n *Node) Discard(off, length int64) error {
	if err := n.checkWrite(off, length); err != nil {
		return err
	}
	first, end := n.granules(off, length)
	if first >= end || n.options.Rules.KeepDiscarded {
		return nil
	}
	err := n.fallocate(unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, first, end-first)
	if unsupported(err) {
		return nil // a hint that this host cannot take
	}
	return n.after(err)
}

// after ends a change that had err.
func (n *Node) after(err error) error {
	if err != nil || !n.options.WriteThrough {
		return err
	}
	return n.Flush()
}

// WriteZeroes implements block.Node.
func (n *Node) WriteZeroes(off, length int64, unmap bool) error {
	if err := n.checkWrite(off, length); err != nil {
		return err
	}
	first, end := n.granules(off, length)
	if first >= end {
		return n.zero(off, length)
	}
	mode := uint32(unix.FALLOC_FL_ZERO_RANGE | unix.FALLOC_FL_KEEP_SIZE)
	if n.options.Rules.Unmaps(unmap) {
		mode = unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE
	}
	err := n.fallocate(mode, first, end-first)
	if unsupported(err) {
		return n.zero(off, length)
	}
	if err != nil {
		return err
	}
	return n.after(errors.Join(n.zero(off, first-off), n.zero(end, off+length-end)))
}

// granules returns the first and the end of the whole granules among length
// bytes from off on.
func (n *Node) granules(off, length int64) (first, end int64) {
	return (off + n.granule - 1) / n.granule * n.granule, (off + length) / n.granule * n.granule
}

// zero writes length zeroes.
func (n *Node) zero(off, length int64) error {
	zeroes := make([]byte, min(length, 1<<20))
	for length > 0 {
		chunk := zeroes[:min(length, int64(len(zeroes)))]
		if err := n.after(n.write([][]byte{chunk}, off)); err != nil {
			return err
		}
		off, length = off+int64(len(chunk)), length-int64(len(chunk))
	}
	return nil
}

func (n *Node) checkWrite(off, length int64) error {
	if n.readOnly {
		return block.ErrReadOnly
	}
	return n.check(off, length)
}

func (n *Node) fallocate(mode uint32, off, length int64) error {
	change := func() error {
		return ignoringEINTR(func() error { return unix.Fallocate(n.fd, mode, off, length) })
	}
	if n.io != nil {
		return n.io.Change(off, length, change)
	}
	return change()
}

func unsupported(err error) bool {
	return errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.ENODEV)
}

func ignoringEINTR(f func() error) error {
	for {
		if err := f(); err != syscall.EINTR {
			return err
		}
	}
}

// Size implements block.Node.
func (n *Node) Size() int64 { return n.size.Load() }

// Grow makes room for a format that keeps its image in the file: the disk is at
// least size bytes long, whole sectors, and the file becomes so when it is written.
func (n *Node) Grow(size int64) {
	for {
		old := n.size.Load()
		if size <= old || n.size.CompareAndSwap(old, size) {
			return
		}
	}
}

// Freeze implements block.Freezer.
func (n *Node) Freeze() error {
	if n.readOnly {
		return nil
	}
	n.readOnly, n.frozen = true, true
	return downgrade(n.fd)
}

// Waits implements block.Waiter: past the page cache, requests wait for the device.
func (n *Node) Waits() bool { return n.io != nil }

// Evict implements block.Evictor.
func (n *Node) Evict(off, length int64) {
	if length > 0 && n.io == nil {
		_ = unix.Fadvise(n.fd, off, length, unix.FADV_DONTNEED) // without which it is slower
	}
}

// ReadOnly implements block.Node.
func (n *Node) ReadOnly() bool { return n.readOnly }

// Map implements block.Mapper: what the host's file system holds nothing for reads
// as zero.
func (n *Node) Map(off, length int64) (block.Extent, error) {
	if err := n.check(off, length); err != nil {
		return block.Extent{}, err
	}
	e := block.Extent{Start: off, Length: length, Present: true, Data: true, File: n.file.Name(), Offset: off}
	data, err := unix.Seek(n.fd, off, unix.SEEK_DATA)
	switch {
	case err == unix.ENXIO:
		e.Data, e.Zero = false, true
	case err != nil: // no holes here, or no telling: a block device
	case data > off:
		e.Data, e.Zero, e.Length = false, true, min(length, data-off)
	default:
		if hole, err := unix.Seek(n.fd, off, unix.SEEK_HOLE); err == nil && hole > off {
			e.Length = min(length, hole-off)
		}
	}
	return e, nil
}

// Info implements block.Node.
func (n *Node) Info() block.Info {
	info := block.Info{Format: "raw", Filename: n.file.Name(), VirtualSize: n.size.Load(), Cache: n.options.cache(), Rules: n.options.Rules}
	var st unix.Stat_t
	if unix.Fstat(n.fd, &st) == nil {
		info.ActualSize = st.Blocks * 512
	}
	return info
}

// Close implements block.Node.
func (n *Node) Close() error {
	var err error
	n.closing.Do(func() {
		err = n.Flush()
		if n.io != nil {
			err = errors.Join(err, n.io.Close())
		}
		err = errors.Join(err, n.file.Close())
	})
	return err
}
