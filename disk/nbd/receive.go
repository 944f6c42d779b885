package nbd

import (
	"encoding/binary"
	"fmt"
	"io"
)

// receive takes replies until the connection ends, and then ends all calls.
func (c *Client) receive() {
	defer close(c.received)
	err := error(nil)
	for err == nil {
		err = c.reply()
	}
	c.fail(err)
	c.gone.Store(true)
	lost := c.whyLost()
	for i := range c.calls {
		if r := &c.calls[i]; r.awaited.CompareAndSwap(true, false) {
			r.err = lost
			r.release()
		}
	}
}

// find returns the call that a reply is for.
func (c *Client) find(cookie uint64) (*call, error) {
	r := &c.calls[cookie%maxCalls]
	if !r.awaited.Load() || r.current.Load() != cookie {
		return nil, fmt.Errorf("%w: a reply to no request, cookie %#x", ErrProtocol, cookie)
	}
	return r, nil
}

// finish ends a call.
func (r *call) finish() {
	if r.awaited.CompareAndSwap(true, false) {
		r.release()
	}
}

// reply takes one reply, or one chunk of a reply.
func (c *Client) reply() error {
	head, err := c.in.Peek(simpleSize) // the shortest
	if err != nil {
		return err
	}
	switch magic := binary.BigEndian.Uint32(head); {
	case magic == magicSimple:
		code, cookie := binary.BigEndian.Uint32(head[4:]), binary.BigEndian.Uint64(head[8:])
		if _, err := c.in.Discard(simpleSize); err != nil {
			return err
		}
		return c.simple(code, cookie)
	case magic == magicStructured && c.export.structured:
		head, err := c.in.Peek(structuredSize)
		if err != nil {
			return err
		}
		flags, kind := binary.BigEndian.Uint16(head[4:]), binary.BigEndian.Uint16(head[6:])
		cookie, length := binary.BigEndian.Uint64(head[8:]), binary.BigEndian.Uint32(head[16:])
		if _, err := c.in.Discard(structuredSize); err != nil {
			return err
		}
		return c.chunk(flags, kind, cookie, length)
	default:
		return fmt.Errorf("%w: a reply begins with %#x", ErrProtocol, magic)
	}
}

// simple takes a simple reply: "Simple reply message".
func (c *Client) simple(code uint32, cookie uint64) error {
	r, err := c.find(cookie)
	if err != nil {
		return err
	}
	if c.export.structured && (r.command == cmdRead || r.command == cmdBlockStatus) && code == 0 {
		return fmt.Errorf("%w: a simple reply to a %s where structured ones were agreed on", ErrProtocol, commandName(r.command))
	}
	switch {
	case r.chunks > 0:
		return fmt.Errorf("%w: a simple reply follows chunks", ErrProtocol)
	case code != 0:
		r.err = remoteError(code, "")
	case r.command == cmdRead:
		if err := c.readInto(r, 0, int64(r.length)); err != nil {
			return err
		}
	}
	r.finish()
	return nil
}

func (c *Client) readInto(r *call, start, n int64) error {
	return r.region(start, n, func(piece []byte) error {
		_, err := io.ReadFull(c.in, piece)
		return err
	})
}

// chunk takes a chunk: "Structured reply chunk message".
func (c *Client) chunk(flags, kind uint16, cookie uint64, length uint32) error {
	r, err := c.find(cookie)
	if err != nil {
		return err
	}
	r.chunks++
	switch {
	case kind == chunkNone:
		if length != 0 || flags&chunkDone == 0 {
			err = fmt.Errorf("%w: an empty chunk of %d bytes, flags %#x", ErrProtocol, length, flags)
		}
	case kind == chunkData && r.command == cmdRead:
		err = c.dataChunk(r, length)
	case kind == chunkHole && r.command == cmdRead:
		err = c.holeChunk(r, length)
	case kind == chunkBlockStatus && r.command == cmdBlockStatus:
		err = c.statusChunk(r, length)
	case kind&chunkIsError != 0:
		err = c.errorChunk(r, kind, length)
	default:
		err = fmt.Errorf("%w: a chunk of type %d in the reply to a %s", ErrProtocol, kind, commandName(r.command))
	}
	if err != nil {
		return err
	}
	if flags&chunkDone == 0 {
		return nil
	}
	if r.err == nil {
		switch {
		case r.command == cmdRead && len(r.gaps) > 0:
			return fmt.Errorf("%w: the reply to a read lacks %d bytes at %d",
				ErrProtocol, r.gaps[0].end-r.gaps[0].start, int64(r.offset)+r.gaps[0].start)
		case r.command == cmdBlockStatus && len(r.extents) == 0:
			return fmt.Errorf("%w: the reply to a block status lacks the context", ErrProtocol)
		}
	}
	r.finish()
	return nil
}

// take reads n bytes of a chunk's payload, which are few.
func (c *Client) take(n int) ([]byte, error) {
	b, err := c.in.Peek(n)
	if err != nil {
		return nil, err
	}
	_, err = c.in.Discard(n)
	return b, err // until the next read
}

func (c *Client) dataChunk(r *call, length uint32) error {
	if length <= 8 {
		return fmt.Errorf("%w: a data chunk of %d bytes", ErrProtocol, length)
	}
	b, err := c.take(8)
	if err != nil {
		return err
	}
	start, err := r.fillAt(binary.BigEndian.Uint64(b), int64(length-8))
	if err != nil {
		return err
	}
	return c.readInto(r, start, int64(length-8))
}

func (c *Client) holeChunk(r *call, length uint32) error {
	if length != 12 {
		return fmt.Errorf("%w: a hole chunk of %d bytes", ErrProtocol, length)
	}
	b, err := c.take(12)
	if err != nil {
		return err
	}
	n := int64(binary.BigEndian.Uint32(b[8:]))
	start, err := r.fillAt(binary.BigEndian.Uint64(b), n)
	if err != nil {
		return err
	}
	return r.region(start, n, func(piece []byte) error {
		clear(piece)
		return nil
	})
}

// fillAt is fill with an offset of the export; it returns the read's.
func (r *call) fillAt(off uint64, n int64) (int64, error) {
	if n == 0 || off < r.offset || off > r.offset+uint64(r.length) {
		return 0, fmt.Errorf("%w: a chunk of %d bytes at %d in the reply to a read of %d bytes at %d", ErrProtocol, n, off, r.length, r.offset)
	}
	start := int64(off - r.offset)
	return start, r.fill(start, n)
}

// statusChunk takes a block status chunk: "NBD_REPLY_TYPE_BLOCK_STATUS".
func (c *Client) statusChunk(r *call, length uint32) error {
	if length < 12 || length%8 != 4 || length > 4+8*maxPeerExtents {
		return fmt.Errorf("%w: a block status chunk of %d bytes", ErrProtocol, length)
	}
	b, err := c.take(4)
	if err != nil {
		return err
	}
	wanted := binary.BigEndian.Uint32(b) == r.wanted
	if wanted && len(r.extents) > 0 {
		return fmt.Errorf("%w: two block status chunks of one context", ErrProtocol)
	}
	if r.chunks > 2*(1+len(c.contexts)) {
		return fmt.Errorf("%w: %d chunks in the reply to a block status", ErrProtocol, r.chunks)
	}
	covered := int64(0)
	for count := (length - 4) / 8; count > 0; count-- {
		if b, err = c.take(8); err != nil {
			return err
		}
		e := StatusExtent{int64(binary.BigEndian.Uint32(b)), binary.BigEndian.Uint32(b[4:])}
		if e.Length == 0 || covered >= int64(r.length) {
			return fmt.Errorf("%w: block status of %d bytes has an extent of %d bytes at %d", ErrProtocol, r.length, e.Length, covered)
		}
		covered += e.Length
		if wanted {
			r.extents = append(r.extents, e)
		}
	}
	return nil
}

// maxPeerExtents is how many extents a server may tell at once.
const maxPeerExtents = 1 << 20

// errorChunk takes an error: "NBD_REPLY_TYPE_ERROR", and others.
func (c *Client) errorChunk(r *call, kind uint16, length uint32) error {
	if length < 6 || length > 6+maxString+8 {
		return fmt.Errorf("%w: an error chunk of %d bytes", ErrProtocol, length)
	}
	if r.chunks > maxGaps {
		return fmt.Errorf("%w: %d chunks in a reply, with errors", ErrProtocol, r.chunks)
	}
	b, err := c.take(int(length))
	if err != nil {
		return err
	}
	code, n := binary.BigEndian.Uint32(b), int(binary.BigEndian.Uint16(b[4:]))
	if n > len(b)-6 || code == 0 || kind == chunkErrorOffset && n > len(b)-14 {
		return fmt.Errorf("%w: an error chunk of %d bytes, error %d, with a message of %d", ErrProtocol, length, code, n)
	}
	if r.err == nil {
		r.err = remoteError(code, string(b[6:6+n]))
	}
	return nil
}
