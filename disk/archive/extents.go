package archive

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/disk/block"
)

const (
	granule  = 64 << 10 // by which zeroes are told from data
	readOnce = 1 << 20
	longest  = 16 << 20 // bytes for which there is one checksum
)

// granuleOf is by how many bytes a disk's zeroes are told from its data: of a full
// backup so that however they lie there are not too many extents.
func granuleOf(size int64, full bool) int64 {
	g := int64(granule)
	for full && size/g > maxExtents/4 {
		g *= 2
	}
	return g
}

// collector finds the extents that a backup holds.
type collector struct {
	src     block.Mapper
	granule int64
	// own: those that src's own image holds, zeroes too; else all of src but its zeroes.
	own bool

	extents []extent
	sum     hash.Hash // of the last extent, if it may go on; else nil
}

func (c *collector) collect() error {
	c.sum = nil
	buf := make([]byte, max(c.granule, readOnce))
	for off, size := int64(0), c.src.Size(); off < size; {
		e, err := c.src.Map(off, size-off)
		if err != nil {
			return err
		}
		if e.Length <= 0 || e.Length > size-off {
			return fmt.Errorf("the image names an extent of %d bytes at %d", e.Length, off)
		}
		switch {
		case c.own && (!e.Present || e.Depth > 0), !c.own && e.Zero:
		case e.Zero:
			err = c.zero(off, e.Length)
		case !c.own:
			// A granule with data in it is read as a whole.
			off -= off % c.granule
			e.Length = min((e.Start+e.Length-off+c.granule-1)/c.granule*c.granule, size-off)
			fallthrough
		default:
			err = c.data(off, e.Length, buf)
		}
		if err != nil {
			return err
		}
		off += e.Length
	}
	c.close()
	return nil
}

// data adds n bytes from off on, but for granules of zeroes.
func (c *collector) data(off, n int64, buf []byte) error {
	for end := off + n; off < end; {
		p := buf[:min(end-off, int64(len(buf))-off%int64(len(buf)))]
		if err := c.src.Readv([][]byte{p}, off); err != nil {
			return err
		}
		for len(p) > 0 {
			part := p[:min(int64(len(p)), c.granule-off%c.granule)]
			var err error
			switch zero := block.IsZero(part); {
			case !zero:
				err = c.add(part, off)
			case c.own:
				err = c.zero(off, int64(len(part)))
			}
			if err != nil {
				return err
			}
			off, p = off+int64(len(part)), p[len(part):]
		}
	}
	return nil
}

// add adds data.
func (c *collector) add(p []byte, off int64) error {
	if last := len(c.extents) - 1; c.sum == nil || c.extents[last].end() != off || c.extents[last].length+int64(len(p)) > max(longest, 16*c.granule) {
		if err := c.next(extent{start: off}); err != nil {
			return err
		}
		c.sum = sha256.New()
	}
	c.sum.Write(p)
	c.extents[len(c.extents)-1].length += int64(len(p))
	return nil
}

// zero adds n bytes that read as zero.
func (c *collector) zero(off, n int64) error {
	if last := len(c.extents) - 1; last >= 0 && c.extents[last].zero && c.extents[last].end() == off {
		c.extents[last].length += n
		return nil
	}
	return c.next(extent{start: off, length: n, zero: true})
}

func (c *collector) next(e extent) error {
	c.close()
	if len(c.extents) == maxExtents {
		return fmt.Errorf("what changed is in more than %d pieces: make a full backup", maxExtents)
	}
	c.extents = append(c.extents, e)
	return nil
}

// close completes the last extent.
func (c *collector) close() {
	if c.sum != nil {
		c.sum.Sum(c.extents[len(c.extents)-1].sum[:0])
		c.sum = nil
	}
}

// verify tells whether a data file is what the manifest says: its extents have their
// checksums, and all else is zero.
func (m *manifest) verify(ctx context.Context, f *os.File) error {
	buf := make([]byte, readOnce)
	end := int64(0)
	for i := range m.extents {
		e := &m.extents[i]
		if err := ctx.Err(); err != nil {
			return err
		}
		if e.zero {
			continue
		}
		if err := verifyZeroes(f, end, e.start, buf); err != nil {
			return err
		}
		end = e.end()
		sum := sha256.New()
		if _, err := io.CopyBuffer(struct{ io.Writer }{sum}, io.NewSectionReader(f, e.start, e.length), buf); err != nil {
			return err
		}
		if [sha256.Size]byte(sum.Sum(nil)) != e.sum {
			return fmt.Errorf("%d bytes at %d have another checksum", e.length, e.start)
		}
	}
	return verifyZeroes(f, end, m.size, buf)
}

// verifyZeroes tells whether a file is zero from off to end, by its holes where it has
// some.
func verifyZeroes(f *os.File, off, end int64, buf []byte) error {
	for off < end {
		data, err := unix.Seek(int(f.Fd()), off, unix.SEEK_DATA)
		switch {
		case errors.Is(err, unix.ENXIO): // nothing follows
			return nil
		case err != nil:
			data = off // the file system does not tell
		case data >= end:
			return nil
		}
		p := buf[:min(int64(len(buf)), end-data)]
		if _, err := f.ReadAt(p, data); err != nil {
			return err
		}
		if !block.IsZero(p) {
			return fmt.Errorf("the %d bytes at %d are not zero any more", len(p), data)
		}
		off = data + int64(len(p))
	}
	return nil
}
