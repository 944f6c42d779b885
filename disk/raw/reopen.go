package raw

import (
	"errors"
	"fmt"
	"os"

	"github.com/gnomon-vmm/gnomon/disk/block"
)

// ErrMoved is a file that its name does not lead to any more.
var ErrMoved = errors.New("image was moved or replaced while in use")

var _ block.Reopener = (*Node)(nil)

// Named implements block.Reopener.
func (n *Node) Named() error {
	mine, err := n.file.Stat()
	if err != nil {
		return err
	}
	named, err := os.Stat(n.file.Name())
	if err == nil && !os.SameFile(mine, named) {
		err = errors.New("another file has its name")
	}
	if err != nil {
		return fmt.Errorf("disk %s: %w: give it its name back: %w", n.file.Name(), ErrMoved, err)
	}
	return nil
}

// Lend implements block.Reopener.
func (n *Node) Lend() (back func() error, err error) {
	if err := n.Named(); err != nil {
		return nil, err
	}
	if err := unlock(n.fd); err != nil {
		return nil, err
	}
	return func() error {
		if err := lock(n.fd, n.readOnly); err != nil {
			return fmt.Errorf("disk %s: %w", n.file.Name(), err)
		}
		return nil
	}, nil
}
