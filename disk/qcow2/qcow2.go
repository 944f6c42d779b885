// Package qcow2 reads QEMU's qcow2 images (docs/interop/qcow2.txt).
package qcow2

import (
	"errors"

	"github.com/gnomon-vmm/gnomon/disk/block"
)

// Magic is how an image starts.
const Magic = "QFI\xfb"

// Open opens the image at path, which can only be read.
func Open(path string, readOnly bool) (block.Node, error) {
	return nil, errors.ErrUnsupported
}
