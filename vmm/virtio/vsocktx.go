package virtio

import (
	"errors"
	"fmt"
)

// Handle serves one queue.
func (v *Vsock) Handle(q *Queue) error {
	var err error
	switch q.Index() {
	case vsockRxQueue:
		err = v.handleRx(q)
	case vsockTxQueue:
		err = v.handleTx(q)
	case vsockEventQueue:
		err = v.handleEvent(q)
	}
	if err != nil {
		return fmt.Errorf("%w: %w", ErrVsock, err)
	}
	return nil
}

// handleEvent tells the driver, once, that connections are gone.
func (v *Vsock) handleEvent(q *Queue) error {
	v.mu.Lock()
	restored := v.restored
	v.mu.Unlock()
	if !restored {
		return nil
	}
	ok, err := q.Pop(&v.event)
	if err != nil || !ok {
		return err
	}
	var reset [4]byte // VIRTIO_VSOCK_EVENT_TRANSPORT_RESET is 0
	n := 0
	for i := range v.event.Write {
		n += copy(v.event.Write[i].Data, reset[n:])
	}
	v.mu.Lock()
	v.restored = false
	v.mu.Unlock()
	return q.Push(&v.event, uint32(n))
}

// handleTx takes the guest's packets.
func (v *Vsock) handleTx(q *Queue) error {
	t := &v.tx
	v.flushAll()
	for {
		if v.stall() {
			return nil
		}
		ok, err := q.Pop(&t.chain)
		if err != nil || !ok {
			return err
		}
		var head [vsockHeaderSize]byte
		t.pieces, ok = takeHead(t.chain.Read, head[:], t.pieces[:0])
		if ok {
			v.take(parseVsockHeader(&head), t.pieces)
		}
		if err := q.Push(&t.chain, 0); err != nil {
			return err
		}
	}
}

// stall tells whether the guest must read before it may send.
func (v *Vsock) stall() bool {
	v.mu.Lock()
	defer v.unlock()
	v.stalled = len(v.resets) >= vsockMaxResets
	return v.stalled
}

// take acts on one packet from the guest, of which payload may hold more or
// less than its header says.
func (v *Vsock) take(h vsockHeader, payload [][]byte) {
	v.mu.Lock()
	defer v.unlock()
	if h.srcCID != v.state.CID || h.dstCID != vsockHostCID {
		return // not from this guest, or not for this host
	}
	key := vsockKey{host: h.dstPort, guest: h.srcPort}
	c := v.conns[key]
	switch {
	case h.op == vsockReset:
		if c != nil {
			v.drop(c)
		}
		return
	case h.kind != vsockTypeStream:
		if c != nil {
			v.drop(c)
		}
		v.reset(key)
		return
	case h.op == vsockRequest && c == nil:
		v.accept(key, h)
		return
	case c == nil:
		v.reset(key)
		return
	}
	c.guestAlloc, c.guestFwd = h.bufAlloc, h.fwdCnt
	if c.credit() > 0 {
		c.asked = false
	}
	if c.call != nil { // the guest has not answered yet
		if h.op == vsockResponse {
			v.accepted(c)
		} else {
			v.refuse(c)
		}
		return
	}
	switch h.op {
	case vsockData:
		v.forward(c, h.length, payload)
	case vsockCreditUpdate:
	case vsockCreditRequest:
		c.send |= sendCredit
	case vsockShutdown:
		c.heard |= h.flags & vsockNeither
		v.finish(c)
	default: // a second request or answer, or what does not exist
		v.refuse(c)
	}
	v.enqueue(c)
}

// accept connects the guest to the host; with mu held, but for the connecting.
func (v *Vsock) accept(key vsockKey, h vsockHeader) {
	if len(v.conns) >= vsockMaxConns {
		v.reset(key)
		return
	}
	c := &vsockConn{key: key, guestAlloc: h.bufAlloc, guestFwd: h.fwdCnt, send: sendResponse}
	readable, writable := v.callbacks(c)
	v.mu.Unlock()
	stream, err := v.host.Dial(key.host, readable, writable)
	v.mu.Lock()
	switch {
	case err != nil:
		v.reset(key)
	case !v.started || v.conns[key] != nil:
		v.later = append(v.later, func() { _ = stream.Close() })
	default:
		c.stream, c.live = stream, true
		v.conns[key] = c
		v.enqueue(c)
	}
}

// accepted gives the host the connection that the guest has taken; with mu
// held, but for the giving.
func (v *Vsock) accepted(c *vsockConn) {
	call := c.call
	c.call = nil
	c.timer.Stop()
	readable, writable := v.callbacks(c)
	v.mu.Unlock()
	stream, err := call.Accepted(c.key.host, readable, writable)
	v.mu.Lock()
	switch {
	case err != nil:
		v.refuse(c)
	case !c.live:
		v.later = append(v.later, func() { _ = stream.Close() })
	default:
		c.stream = stream
		v.enqueue(c)
	}
}

// forward passes length bytes of payload to the host; with mu held, but for
// the writing.
func (v *Vsock) forward(c *vsockConn, length uint32, payload [][]byte) {
	payload, size := limitPieces(payload, int(length))
	if size < int(length) || // less than promised
		c.received-c.forwarded+length > vsockBuffer || length > vsockBuffer || // more than there was room for
		c.heard&vsockNoSend != 0 {
		v.refuse(c)
		return
	}
	c.received += length
	if c.told&vsockNoReceive != 0 {
		c.forwarded += length // the host takes no more: it is lost
		return
	}
	if len(c.waiting) == 0 && size > 0 {
		v.mu.Unlock()
		n, err := c.stream.Writev(payload)
		v.mu.Lock()
		if err != nil && !errors.Is(err, ErrAgain) {
			v.refuse(c)
			return
		}
		c.forwarded += uint32(n)
		for ; len(payload) > 0 && n >= len(payload[0]); payload = payload[1:] {
			n -= len(payload[0])
		}
		if len(payload) > 0 {
			payload[0] = payload[0][n:]
		}
	}
	for _, b := range payload {
		c.waiting = append(c.waiting, b...)
	}
	if len(c.waiting) > 0 {
		// A short write does not promise a callback; the next one does.
		v.flush[c] = struct{}{}
		v.wake(vsockTxQueue)
	}
	c.tellCredit()
}

// tellCredit has the guest told when it may believe the buffer half full
// though it is not.
func (c *vsockConn) tellCredit() {
	if c.forwarded-c.forwardedTold >= vsockBuffer/2 {
		c.send |= sendCredit
	}
}

// flushAll writes what waits for host sides that may take it.
func (v *Vsock) flushAll() {
	v.mu.Lock()
	defer v.unlock()
	v.tx.list = v.tx.list[:0]
	for c := range v.flush {
		v.tx.list = append(v.tx.list, c)
	}
	clear(v.flush)
	for i, c := range v.tx.list {
		v.tx.list[i] = nil
		if !c.live || c.stream == nil {
			continue
		}
		for len(c.waiting) > 0 && c.live {
			v.tx.pieces = append(v.tx.pieces[:0], c.waiting)
			v.mu.Unlock()
			n, err := c.stream.Writev(v.tx.pieces)
			v.mu.Lock()
			if errors.Is(err, ErrAgain) {
				break
			}
			if err != nil {
				v.refuse(c)
				break
			}
			c.forwarded += uint32(n)
			if c.waiting = c.waiting[n:]; len(c.waiting) == 0 {
				c.waiting = nil
			}
		}
		c.tellCredit()
		v.finish(c)
		v.enqueue(c)
	}
}

// finish passes the guest's shutdown on when all it sent before has been; with mu held.
func (v *Vsock) finish(c *vsockConn) {
	if !c.live || len(c.waiting) > 0 || c.heard&vsockNoSend == 0 {
		return
	}
	if c.heard == vsockNeither {
		v.refuse(c) // the answer that lets the guest forget the connection
		return
	}
	if !c.ended {
		c.ended = true
		stream := c.stream
		v.later = append(v.later, func() { _ = stream.CloseWrite() })
	}
}
