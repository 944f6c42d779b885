package archive

import (
	"fmt"
	"slices"

	"github.com/gnomon-vmm/gnomon/disk/bitmap"
	"github.com/gnomon-vmm/gnomon/disk/block"
)

// changed is a raw file as long as the disk which is given what changed, by whole
// granules, and tells what it was given: the file alone does not tell zeroes that were
// written from what was not. Zeroes take no space.
type changed struct {
	block.Mapper // the file
	held         *bitmap.Bitmap
}

func newChanged(file block.Mapper, size int64) (*changed, error) {
	held, err := bitmap.New("", size, granule)
	if err != nil {
		return nil, err
	}
	return &changed{file, held}, nil
}

// whole refuses a part of a granule: what the rest of it holds is not known here.
func (c *changed) whole(off, n int64) error {
	if off < 0 || n < 0 || off%granule != 0 || n%granule != 0 && off+n != c.Size() {
		return fmt.Errorf("%d bytes at %d: changes come in blocks of %d bytes", n, off, granule)
	}
	return nil
}

// Writev implements block.Node.
func (c *changed) Writev(bufs [][]byte, off int64) error {
	p := bufs[0]
	if len(bufs) > 1 {
		p = slices.Concat(bufs...)
	}
	if err := c.whole(off, int64(len(p))); err != nil {
		return err
	}
	for len(p) > 0 {
		// A run of granules that are zero, or not.
		run, zero := 0, block.IsZero(p[:min(granule, len(p))])
		for run < len(p) && block.IsZero(p[run:min(run+granule, len(p))]) == zero {
			run = min(run+granule, len(p))
		}
		var err error
		if zero {
			err = c.Mapper.WriteZeroes(off, int64(run), true)
		} else {
			err = c.Mapper.Writev([][]byte{p[:run]}, off)
		}
		if err != nil {
			return err
		}
		c.held.Set(off, int64(run))
		p, off = p[run:], off+int64(run)
	}
	return nil
}

// WriteZeroes implements block.Node.
func (c *changed) WriteZeroes(off, n int64, _ bool) error {
	if err := c.whole(off, n); err != nil {
		return err
	}
	if err := c.Mapper.WriteZeroes(off, n, true); err != nil {
		return err
	}
	c.held.Set(off, n)
	return nil
}

// Map implements block.Mapper: what it was not given is not present.
func (c *changed) Map(off, n int64) (block.Extent, error) {
	start, length := c.held.Next(off)
	switch {
	case length == 0 || start >= off+n:
		return block.Extent{Start: off, Length: n, Offset: -1}, nil
	case start > off:
		return block.Extent{Start: off, Length: start - off, Offset: -1}, nil
	}
	return c.Mapper.Map(off, min(n, length))
}
