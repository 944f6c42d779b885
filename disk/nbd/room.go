package nbd

import (
	"fmt"
	"net"
	"slices"
	"sync"
	"time"
)

// Requests of all clients hold no more than this, so clients that do not read cannot make
// the server grow without end. Each client has a part of its own, which it need not wait
// for; for the rest requests wait in the order in which they came, one of each client. A
// client that has some of the rest gets more only as long as it leaves as much to others as
// it has then: a few clients that do not go on hold nobody up.
const (
	maxAll = 256 << 20 // bytes
	maxOwn = 1 << 20   // bytes of one client; all clients' are half of maxAll at most

	// stallTime is how long a client that holds room others wait for may need for a
	// stride, where it is its turn to take or send one.
	stallTime = 10 * time.Second
	stride    = 1 << 20
)

// room is what requests wait for before they are read.
type room struct {
	mu    sync.Mutex
	free  int64     // bytes; guarded by mu
	queue []*waiter // guarded by mu
}

// share is how many bytes of the room a client has; guarded by the room's mu.
type share int64

type waiter struct {
	share *share
	bytes int64
	ready chan struct{} // closed: it has them
}

// take takes bytes for a client, if there is no need to wait. Else it returns who waits.
func (r *room) take(s *share, bytes int64) *waiter {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.queue) == 0 && r.allows(s, bytes) {
		r.grant(s, bytes)
		return nil
	}
	w := &waiter{s, bytes, make(chan struct{})}
	r.queue = append(r.queue, w)
	r.serve()
	select {
	case <-w.ready:
		return nil
	default:
		return w
	}
}

// allows tells whether a client may have bytes more. Preconditions: mu is held.
func (r *room) allows(s *share, bytes int64) bool {
	left := r.free - bytes
	return left >= 0 && (*s == 0 || int64(*s)+bytes <= left)
}

// grant lets a client have bytes more. Preconditions: mu is held.
func (r *room) grant(s *share, bytes int64) {
	r.free -= bytes
	*s += share(bytes)
}

func (r *room) give(s *share, bytes int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.grant(s, -bytes)
	r.serve()
}

// serve lets wait no longer who may have what they wait for. Nobody overtakes a client that
// has nothing yet. Preconditions: mu is held.
func (r *room) serve() {
	waiting := r.queue[:0]
	inOrder := false
	for _, w := range r.queue {
		if !inOrder && r.allows(w.share, w.bytes) {
			r.grant(w.share, w.bytes)
			close(w.ready)
			continue
		}
		inOrder = inOrder || *w.share == 0
		waiting = append(waiting, w)
	}
	clear(r.queue[len(waiting):])
	r.queue = waiting
}

// leave ends a wait, and gives back what it may have come to.
func (r *room) leave(w *waiter) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if i := slices.Index(r.queue, w); i >= 0 {
		r.queue = slices.Delete(r.queue, i, i+1)
	} else {
		r.grant(w.share, -w.bytes)
	}
	r.serve()
}

// has tells whether a client has some of the room.
func (r *room) has(s *share) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return *s > 0
}

// await waits for room. It fails when the connection is closed.
func (c *connection) await(w *waiter) error {
	tick := time.NewTicker(c.server.stall)
	defer tick.Stop()
	for {
		select {
		case <-w.ready:
			return nil
		case <-c.gone:
			c.server.room.leave(w)
			return net.ErrClosed
		case <-tick.C:
			if !c.server.room.has(&c.share) { // others have what it waits for
				c.server.dropStalled()
			}
		}
	}
}

// dropStalled disconnects clients that have room and do not go on.
func (s *Server) dropStalled() {
	now := time.Now()
	var dropped []*connection
	s.mu.Lock()
	for c := range s.connections {
		if c.turns.Load() > 0 && now.Sub(time.Unix(0, c.moved.Load())) >= s.stall && s.room.has(&c.share) && c.dropped.CompareAndSwap(false, true) {
			dropped = append(dropped, c)
		}
	}
	s.mu.Unlock()
	for _, c := range dropped {
		s.report(fmt.Errorf("NBD: client %s is disconnected: it needs more than %v for 1 MiB, and others wait for the memory that it holds", c.conn.RemoteAddr(), s.stall))
		c.hangUp()
	}
}

// itsTurn tells that something waits for the client, until turns is lowered.
func (c *connection) itsTurn() {
	c.moves()
	c.turns.Add(1)
}

// moves tells that the client has sent or taken a stride.
func (c *connection) moves() { c.moved.Store(time.Now().UnixNano()) }

// hangUp closes the connection. It may be called again.
func (c *connection) hangUp() {
	c.closing.Do(func() { close(c.gone) })
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.socket != nil {
		c.socket.hangUp()
	} else {
		c.conn.Close()
	}
}
