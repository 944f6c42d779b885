package virtio

import (
	"errors"
	"io"
	"slices"
)

// handleRx gives the guest what there is for it.
func (v *Vsock) handleRx(q *Queue) error {
	for v.hasPackets() {
		ok, err := q.Pop(&v.rx.chain)
		if err != nil || !ok {
			return err
		}
		n := 0
		// A buffer with no room behind the header is of no use.
		if writable(&v.rx.chain) > vsockHeaderSize {
			if n = v.give(v.rx.chain.Write); n == 0 {
				q.Undo(&v.rx.chain)
				return nil
			}
		}
		if err := q.Push(&v.rx.chain, uint32(n)); err != nil {
			return err
		}
	}
	return nil
}

func (v *Vsock) hasPackets() bool {
	v.mu.Lock()
	defer v.unlock()
	return len(v.resets) > 0 || len(v.ready) > 0
}

// give puts one packet into the memory in bufs, which has room for more than a
// header, and returns its length; 0 when there turned out to be none.
func (v *Vsock) give(bufs []Buffer) int {
	// The payload goes behind the header, which is known when the payload is.
	var skip [vsockHeaderSize]byte
	v.rx.pieces, _ = takeHead(bufs, skip[:], v.rx.pieces[:0])
	v.mu.Lock()
	defer v.unlock()
	h, ok := v.next(v.rx.pieces)
	if !ok {
		return 0
	}
	var head [vsockHeaderSize]byte
	h.put(&head)
	rest := head[:]
	for i := range bufs {
		rest = rest[copy(bufs[i].Data, rest):]
	}
	return vsockHeaderSize + int(h.length)
}

// next is the next packet for the guest, its payload put in room; with mu held,
// but for the reading.
func (v *Vsock) next(room [][]byte) (vsockHeader, bool) {
	if len(v.resets) > 0 {
		key := v.resets[0]
		v.resets = append(v.resets[:0], v.resets[1:]...)
		if v.stalled && len(v.resets) < vsockMaxResets/2 {
			v.wake(vsockTxQueue)
		}
		return v.header(key, vsockReset), true
	}
	for len(v.ready) > 0 {
		c := v.ready[0]
		v.ready = slices.Delete(v.ready, 0, 1)
		c.queued = false
		h, ok := v.serve(c, room)
		v.enqueue(c)
		if ok {
			return h, true
		}
		if len(v.resets) > 0 {
			return v.next(room)
		}
	}
	return vsockHeader{}, false
}

// header is that of a packet to the guest.
func (v *Vsock) header(key vsockKey, op uint16) vsockHeader {
	return vsockHeader{
		srcCID: vsockHostCID, dstCID: v.state.CID, srcPort: key.host, dstPort: key.guest,
		kind: vsockTypeStream, op: op,
	}
}

// serve is c's next packet; with mu held, but for the reading.
func (v *Vsock) serve(c *vsockConn, room [][]byte) (vsockHeader, bool) {
	h := v.header(c.key, 0)
	switch {
	case c.send&sendRequest != 0:
		c.send &^= sendRequest
		h.op = vsockRequest
	case c.send&sendResponse != 0:
		c.send &^= sendResponse
		h.op = vsockResponse
	case c.send&sendCredit != 0:
		h.op = vsockCreditUpdate
	case c.send&sendCreditRequest != 0:
		c.send &^= sendCreditRequest
		h.op = vsockCreditRequest
	case c.send&sendShutdown != 0:
		c.send &^= sendShutdown
		h.op, h.flags = vsockShutdown, c.told
	case c.readable && c.mayRead():
		n, ok := v.read(c, room)
		if !ok {
			return h, false
		}
		h.op, h.length = vsockData, uint32(n)
	default:
		return h, false
	}
	// Every packet tells of the credit, so that this is told.
	c.send &^= sendCredit
	c.forwardedTold = c.forwarded
	h.bufAlloc, h.fwdCnt = vsockBuffer, c.forwarded
	return h, true
}

// read reads from c's host side; with mu held, but for the reading. It returns
// false where there is no data, with c.send saying what there is instead.
func (v *Vsock) read(c *vsockConn, room [][]byte) (int, bool) {
	credit := c.credit()
	if credit == 0 {
		c.asked = true
		c.send |= sendCreditRequest
		return 0, false
	}
	v.rx.limited, _ = limitPieces(append(v.rx.limited[:0], room...), min(credit, vsockMaxPayload))
	c.readable = false // unless the callback says otherwise from here on
	v.mu.Unlock()
	n, err := c.stream.Readv(v.rx.limited)
	v.mu.Lock()
	switch {
	case !c.live:
		return 0, false
	case err == nil:
		c.sent += uint32(n)
		c.readable = true
		return n, true
	case errors.Is(err, ErrAgain):
		return 0, false
	case errors.Is(err, io.EOF):
		c.hostEnd = true
		c.told |= vsockNoSend
		if c.stream.HungUp() {
			c.told = vsockNeither
		}
		c.send |= sendShutdown
		return 0, false
	default:
		v.refuse(c)
		return 0, false
	}
}
