package monitor

import (
	"fmt"

	"github.com/gnomon-vmm/gnomon/disk/block"
)

// nullNode reads as zero and forgets what is written.
type nullNode struct {
	size     int64
	readOnly bool
}

func (n *nullNode) check(off, length int64) error {
	if off < 0 || length < 0 || off > n.size || length > n.size-off {
		return fmt.Errorf("%w: %d bytes at %d of %d", block.ErrOutOfRange, length, off, n.size)
	}
	return nil
}

func (n *nullNode) checkWrite(off, length int64) error {
	if n.readOnly {
		return block.ErrReadOnly
	}
	return n.check(off, length)
}

func lengthOf(bufs [][]byte) (n int64) {
	for _, b := range bufs {
		n += int64(len(b))
	}
	return n
}

func (n *nullNode) Readv(bufs [][]byte, off int64) error {
	if err := n.check(off, lengthOf(bufs)); err != nil {
		return err
	}
	for _, b := range bufs {
		clear(b)
	}
	return nil
}

func (n *nullNode) Writev(bufs [][]byte, off int64) error { return n.checkWrite(off, lengthOf(bufs)) }
func (n *nullNode) Flush() error                          { return nil }
func (n *nullNode) Discard(off, length int64) error       { return n.checkWrite(off, length) }
func (n *nullNode) WriteZeroes(off, length int64, _ bool) error {
	return n.checkWrite(off, length)
}
func (n *nullNode) Size() int64    { return n.size }
func (n *nullNode) ReadOnly() bool { return n.readOnly }
func (n *nullNode) Close() error   { return nil }
func (n *nullNode) Info() block.Info {
	return block.Info{Format: "null-co", Filename: "null-co://", VirtualSize: n.size}
}

func (n *nullNode) Map(off, length int64) (block.Extent, error) {
	return block.Extent{Start: off, Length: length, Present: true, Zero: true, Offset: -1}, n.check(off, length)
}
