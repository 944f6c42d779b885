package nbd

// stretch is the part of bufs that one request moves. bufs stays as it is.
type stretch struct {
	bufs [][]byte
	skip int // bytes of bufs[0] that are done
}

// next appends to into the next n bytes of s, or as many as there are.
func (s *stretch) next(into [][]byte, n int64) [][]byte {
	for n > 0 && len(s.bufs) > 0 {
		part := s.bufs[0][s.skip:]
		if int64(len(part)) > n {
			part = part[:n]
			s.skip += len(part)
		} else {
			s.bufs, s.skip = s.bufs[1:], 0
		}
		if len(part) > 0 {
			into = append(into, part)
		}
		n -= int64(len(part))
	}
	return into
}

func total(bufs [][]byte) int64 {
	var t int64
	for _, b := range bufs {
		t += int64(len(b))
	}
	return t
}

// aligned tells whether requests can be as they are.
func (c *Client) aligned(off, n int64) bool {
	unit := int64(c.export.minimum)
	return off%unit == 0 && n%unit == 0
}

// around is the run of whole smallest blocks around n bytes at off.
func (c *Client) around(off, n int64) (first, length int64) {
	unit := int64(c.export.minimum)
	first = off / unit * unit
	return first, (off + n - first + unit - 1) / unit * unit
}

// Readv implements block.Node.
func (c *Client) Readv(bufs [][]byte, off int64) error {
	n := total(bufs)
	if err := c.check(off, n); err != nil {
		return err
	}
	if c.aligned(off, n) {
		return c.move(cmdRead, bufs, off, n)
	}
	rest := stretch{bufs: bufs}
	return c.inBlocks(off, n, func(first, length int64, block []byte, part []byte) error {
		if err := c.move(cmdRead, [][]byte{block}, first, length); err != nil {
			return err
		}
		for _, into := range rest.next(nil, int64(len(part))) {
			part = part[copy(into, part):]
		}
		return nil
	})
}

// Writev implements block.Node.
func (c *Client) Writev(bufs [][]byte, off int64) error {
	n := total(bufs)
	if err := c.checkWrite(off, n); err != nil {
		return err
	}
	if c.export.minimum == 1 {
		return c.move(cmdWrite, bufs, off, n)
	}
	if c.aligned(off, n) {
		c.partial.RLock()
		defer c.partial.RUnlock()
		return c.move(cmdWrite, bufs, off, n)
	}
	c.partial.Lock()
	defer c.partial.Unlock()
	rest := stretch{bufs: bufs}
	return c.inBlocks(off, n, func(first, length int64, block []byte, part []byte) error {
		if int64(len(part)) < length {
			if err := c.move(cmdRead, [][]byte{block}, first, length); err != nil {
				return err
			}
		}
		for _, from := range rest.next(nil, int64(len(part))) {
			part = part[copy(part, from):]
		}
		return c.move(cmdWrite, [][]byte{block}, first, length)
	})
}

// bounce is how much of a request that is not aligned is done at a time.
const bounce = 1 << 20

// inBlocks calls f for whole blocks around n bytes at off: where they begin and
// how long they are, memory for them, and the part of it that is of the n bytes.
func (c *Client) inBlocks(off, n int64, f func(first, length int64, block, part []byte) error) error {
	b := getBuffer(bounce)
	defer putBuffer(b)
	for n > 0 {
		skip := off % int64(c.export.minimum)
		step := min(n, bounce-skip) // bounce is a multiple of the smallest block
		first, length := c.around(off, step)
		if err := f(first, length, b.bytes[:length], b.bytes[skip:skip+step]); err != nil {
			return err
		}
		off, n = off+step, n-step
	}
	return nil
}

// move reads or writes n bytes, which are aligned.
func (c *Client) move(command uint16, bufs [][]byte, off, n int64) error {
	if n == 0 {
		return nil
	}
	limit := int64(c.export.maximum)
	if n <= limit {
		return c.moveOne(command, bufs, off, n)
	}
	rest := stretch{bufs: bufs}
	var parts [][]byte
	for n > 0 {
		step := min(n, limit)
		parts = rest.next(parts[:0], step)
		if err := c.moveOne(command, parts, off, step); err != nil {
			return err
		}
		off, n = off+step, n-step
	}
	return nil
}

func (c *Client) moveOne(command uint16, bufs [][]byte, off, n int64) error {
	h := header{command: command, offset: uint64(off), length: uint32(n)}
	if command == cmdRead {
		return c.do(h, nil, bufs)
	}
	return c.do(h, bufs, nil)
}

// maxZeroes is how much one request that has no data is about: a multiple of all
// block sizes.
const maxZeroes = 1 << 30

// Discard implements block.Node. It does nothing where the server cannot.
func (c *Client) Discard(off, n int64) error {
	if err := c.checkWrite(off, n); err != nil {
		return err
	}
	if c.export.flags&flagTrim == 0 {
		return nil
	}
	unit := int64(c.export.minimum)
	end := (off + n) / unit * unit
	for off = (off + unit - 1) / unit * unit; off < end; {
		step := min(end-off, maxZeroes)
		if err := c.do(header{command: cmdTrim, offset: uint64(off), length: uint32(step)}, nil, nil); err != nil {
			return err
		}
		off += step
	}
	return nil
}

// WriteZeroes implements block.Node.
func (c *Client) WriteZeroes(off, n int64, unmap bool) error {
	if err := c.checkWrite(off, n); err != nil {
		return err
	}
	unit := int64(c.export.minimum)
	first, end := (off+unit-1)/unit*unit, (off+n)/unit*unit
	if c.export.flags&flagWriteZeroes == 0 || first >= end {
		return c.writeZeroData(off, n)
	}
	if err := c.writeZeroData(off, first-off); err != nil {
		return err
	}
	var flags uint16
	if !unmap {
		flags = cmdNoHole
	}
	for at := first; at < end; {
		step := min(end-at, maxZeroes)
		if err := c.writeZeroesOne(header{command: cmdWriteZeroes, flags: flags, offset: uint64(at), length: uint32(step)}); err != nil {
			return err
		}
		at += step
	}
	return c.writeZeroData(end, off+n-end)
}

func (c *Client) writeZeroesOne(h header) error {
	if c.export.minimum > 1 {
		c.partial.RLock()
		defer c.partial.RUnlock()
	}
	return c.do(h, nil, nil)
}

func (c *Client) writeZeroData(off, n int64) error {
	if n == 0 {
		return nil
	}
	zeroes := make([]byte, min(n, bounce))
	for n > 0 {
		step := min(n, bounce)
		if err := c.Writev([][]byte{zeroes[:step]}, off); err != nil {
			return err
		}
		off, n = off+step, n-step
	}
	return nil
}
