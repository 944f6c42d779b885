package archive

import (
	"errors"
	"fmt"
	"os"
	"sort"

	"github.com/gnomon-vmm/gnomon/disk/block"
)

// maxSegments bounds what is kept in memory of a chain.
const maxSegments = 16 << 20

// segment is a part of a disk, and which file of the chain holds it.
type segment struct {
	start, length int64
	file          int // -1: it reads as zero
}

// chain is what a disk was at a backup kept in raw files. It is read only.
type chain struct {
	info     block.Info
	files    []*os.File // of the backups that lie on one another; nil where it is not needed
	segments []segment  // ascending; what is in none reads as zero
}

// openChain opens what the disk was at the step with an index.
func (a plain) openChain(i int) (_ *chain, err error) {
	steps := a.chain(i)
	if len(steps) > maxPlain {
		return nil, fmt.Errorf("it is the last of %d that lie on one another, and %d may", len(steps), maxPlain)
	}
	last := &steps[len(steps)-1]
	c := &chain{info: block.Info{Format: FormatRaw, Filename: a.path(dataOf(last)), VirtualSize: last.Size}}
	for k := range steps {
		m, err := a.manifest(i - len(steps) + 1 + k)
		if err != nil {
			return nil, err
		}
		if c.segments = over(c.segments, m.extents, k); len(c.segments) > maxSegments {
			return nil, fmt.Errorf("its parts lie in more than %d places: make a full backup from time to time", maxSegments)
		}
	}
	c.files = make([]*os.File, len(steps))
	for _, s := range c.segments {
		if s.file < 0 || c.files[s.file] != nil {
			continue
		}
		if c.files[s.file], err = a.openData(&steps[s.file]); err != nil {
			return nil, errors.Join(err, c.Close())
		}
		c.info.ActualSize += steps[s.file].Bytes
	}
	return c, nil
}

// over is what one file's extents make of a chain when they are laid on it.
func over(below []segment, extents []extent, file int) []segment {
	out := make([]segment, 0, len(below)+len(extents))
	add := func(s segment) {
		if s.length <= 0 {
			return
		}
		if last := len(out) - 1; last >= 0 && out[last].file == s.file && out[last].start+out[last].length == s.start {
			out[last].length += s.length
			return
		}
		out = append(out, s)
	}
	for i := range extents {
		e := &extents[i]
		for len(below) > 0 && below[0].start < e.start {
			s := below[0]
			first := min(s.length, e.start-s.start)
			add(segment{s.start, first, s.file})
			if first < s.length {
				below[0].start, below[0].length = s.start+first, s.length-first
				break
			}
			below = below[1:]
		}
		for len(below) > 0 && below[0].start < e.end() { // it is covered
			s := &below[0]
			if end := s.start + s.length; end > e.end() {
				s.start, s.length = e.end(), end-e.end()
				break
			}
			below = below[1:]
		}
		s := segment{e.start, e.length, file}
		if e.zero {
			s.file = -1
		}
		add(s)
	}
	for _, s := range below {
		add(s)
	}
	return out
}

// at is what there is from off on, n bytes at most; file -1: zeroes.
func (c *chain) at(off, n int64) segment {
	i := sort.Search(len(c.segments), func(i int) bool { return c.segments[i].start+c.segments[i].length > off })
	if i == len(c.segments) {
		return segment{off, n, -1}
	}
	s := c.segments[i]
	if s.start > off {
		return segment{off, min(n, s.start-off), -1}
	}
	return segment{off, min(n, s.start+s.length-off), s.file}
}

func (c *chain) check(off, n int64) error {
	if off < 0 || n < 0 || off > c.info.VirtualSize || n > c.info.VirtualSize-off {
		return fmt.Errorf("%w: %d bytes at %d of %d", block.ErrOutOfRange, n, off, c.info.VirtualSize)
	}
	return nil
}

// Readv implements block.Node.
func (c *chain) Readv(bufs [][]byte, off int64) error {
	for _, b := range bufs {
		if err := c.check(off, int64(len(b))); err != nil {
			return err
		}
		for len(b) > 0 {
			s := c.at(off, int64(len(b)))
			part := b[:s.length]
			if s.file < 0 {
				clear(part)
			} else if _, err := c.files[s.file].ReadAt(part, off); err != nil {
				return err
			}
			off, b = off+s.length, b[s.length:]
		}
	}
	return nil
}

// Map implements block.Mapper.
func (c *chain) Map(off, n int64) (block.Extent, error) {
	if err := c.check(off, n); err != nil {
		return block.Extent{}, err
	}
	s := c.at(off, n)
	if s.file < 0 {
		return block.Extent{Start: off, Length: s.length, Present: true, Zero: true, Offset: -1}, nil
	}
	return block.Extent{Start: off, Length: s.length, Present: true, Data: true, Depth: len(c.files) - 1 - s.file, File: c.files[s.file].Name(), Offset: off}, nil
}

// Close implements block.Node.
func (c *chain) Close() (err error) {
	for i, f := range c.files {
		if f != nil {
			err = errors.Join(err, f.Close())
			c.files[i] = nil
		}
	}
	return err
}

func (c *chain) Size() int64                          { return c.info.VirtualSize }
func (c *chain) ReadOnly() bool                       { return true }
func (c *chain) Info() block.Info                     { return c.info }
func (c *chain) Flush() error                         { return nil }
func (c *chain) Writev([][]byte, int64) error         { return block.ErrReadOnly }
func (c *chain) Discard(int64, int64) error           { return block.ErrReadOnly }
func (c *chain) WriteZeroes(int64, int64, bool) error { return block.ErrReadOnly }
