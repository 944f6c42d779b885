package mirror

import (
	"errors"
	"fmt"

	"github.com/gnomon-vmm/gnomon/disk"
	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/disk/qcow2"
)

// base is an image that others lie on, which is written for a while: until it is
// frozen.
type base interface {
	block.Freezer
	block.Reopener
}

// openToWrite opens what an image lies on anew, to be written. When that fails the
// image lies on the node on which it lay, which is open as before. There are no
// requests meanwhile.
func openToWrite(above *qcow2.Node) (base, error) {
	old, ok := above.Backing().(base)
	info := above.Backing().Info()
	if !ok {
		return nil, fmt.Errorf("%s cannot be opened to be written while it is in use", info.Filename)
	}
	back, err := old.Lend() // its own locks would keep us from writing
	if err != nil {
		return nil, err
	}
	n, err := disk.Open(info.Filename, disk.Options{Format: info.Format, Like: old})
	if err != nil {
		return nil, errors.Join(err, takeBack(above, back))
	}
	above.SetBacking(n)
	now := n.(base) // as all that disk.Open opens
	if err := old.Close(); err != nil {
		return nil, errors.Join(err, now.Freeze())
	}
	return now, nil
}

// takeBack has what an image lies on locked again. When somebody else writes to it
// by then, it cannot be read any more: it would not be the disk.
func takeBack(above *qcow2.Node, back func() error) error {
	err := back()
	if err == nil {
		return nil
	}
	lost := above.Backing()
	above.SetBacking(block.Failed(lost, err))
	return errors.Join(err, lost.Close())
}
