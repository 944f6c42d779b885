package virtio

import (
	"slices"
	"time"
)

// vsockKey identifies a connection by its ports.
type vsockKey struct{ host, guest uint32 }

// What a connection has to tell the guest, as bits; they go in this order.
const (
	sendRequest = 1 << iota
	sendResponse
	sendCredit
	sendCreditRequest
	sendShutdown
)

// vsockConn is one connection. Vsock.mu guards it, but for waiting.
type vsockConn struct {
	key    vsockKey
	live   bool // in Vsock.conns
	stream VsockStream
	call   VsockCall   // while the guest has not answered
	timer  *time.Timer // ends that

	send     uint8  // what the guest is to be told
	queued   bool   // in Vsock.ready
	readable bool   // stream may have data
	hostEnd  bool   // stream has no more
	told     uint32 // flags of our last shutdown
	heard    uint32 // flags of the guest's shutdowns
	ended    bool   // stream's other side has been told that no more comes
	asked    bool   // for credit

	// Flow control (section 5.10.6.3), in bytes since the beginning, modulo 2^32.
	sent                 uint32 // to the guest
	guestAlloc, guestFwd uint32 // the guest's buffer, and what it has taken out of it
	received             uint32 // from the guest
	forwarded            uint32 // of that, to stream
	forwardedTold        uint32 // what of that the guest knows

	// waiting is what stream could not take yet; used by the transmit
	// queue's worker alone.
	waiting []byte
}

// credit is how many bytes the guest has room for.
func (c *vsockConn) credit() int {
	used := c.sent - c.guestFwd
	if used >= c.guestAlloc { // also when the guest claims more than it was sent
		return 0
	}
	return int(c.guestAlloc - used)
}

// hasWork tells whether there is something for the guest.
func (c *vsockConn) hasWork() bool {
	return c.send != 0 || c.readable && c.mayRead()
}

// mayRead tells whether stream is to be read.
func (c *vsockConn) mayRead() bool {
	return c.stream != nil && !c.hostEnd && c.heard&vsockNoReceive == 0 && (c.credit() > 0 || !c.asked)
}

// enqueue has the receive worker serve c; with mu held.
func (v *Vsock) enqueue(c *vsockConn) {
	if !c.live || c.queued || !c.hasWork() {
		return
	}
	c.queued = true
	v.ready = append(v.ready, c)
	v.wake(vsockRxQueue)
}

// drop ends c without a word to the guest; with mu held.
func (v *Vsock) drop(c *vsockConn) {
	if !c.live {
		return
	}
	c.live = false
	delete(v.conns, c.key)
	if c.queued {
		v.ready = slices.DeleteFunc(v.ready, func(other *vsockConn) bool { return other == c })
	}
	delete(v.flush, c)
	if c.timer != nil {
		c.timer.Stop()
	}
	if c.call != nil {
		v.later = append(v.later, c.call.Refused)
		c.call = nil
	}
	if s := c.stream; s != nil {
		v.later = append(v.later, func() { _ = s.Close() })
	}
}

// refuse ends c and tells the guest; with mu held.
func (v *Vsock) refuse(c *vsockConn) {
	if !c.live {
		return
	}
	v.drop(c)
	if c.send&sendRequest == 0 { // or the guest has never heard of it
		v.reset(c.key)
	}
}

// reset tells the guest that there is no such connection; with mu held. The
// list stays short: the transmit worker stops while it is long, and otherwise
// only connections that the guest knows of end here.
func (v *Vsock) reset(key vsockKey) {
	v.resets = append(v.resets, key)
	v.wake(vsockRxQueue)
}

// callbacks are those for c's stream. They leave what unlock has to do to
// others: closing the stream waits for them.
func (v *Vsock) callbacks(c *vsockConn) (readable, writable func()) {
	readable = func() {
		v.mu.Lock()
		defer v.mu.Unlock()
		c.readable = true
		v.enqueue(c)
	}
	writable = func() {
		v.mu.Lock()
		defer v.mu.Unlock()
		if c.live {
			v.flush[c] = struct{}{}
			v.wake(vsockTxQueue)
		}
	}
	return readable, writable
}
