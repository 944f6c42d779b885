package qcow2

import (
	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/raw"
)

// store is the file of an image that is written. Its writes are durable after
// the next Flush, in no order.
type store interface {
	block.Node
	// Grow has it be at least size bytes long; what is not written reads as zero.
	Grow(size int64)
	// Resize makes it size bytes long.
	Resize(size int64) error
	// IgnoreFlushes has Flush do nothing.
	IgnoreFlushes()
	// Freeze lets go of what keeps others from reading it.
	Freeze() error
}

var _ store = (*raw.Node)(nil)
