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
// for; for the rest requests wait in the order in which they came, one of each client.
const (
	maxAll = 256 << 20 // bytes
	maxOwn = 1 << 20   // bytes of one client; all clients' are half of maxAll at most

	// stallTime is how long a client that holds room others wait for may neither take
	// nor send a byte, where that is its turn.
	stallTime = 10 * time.Second
	// stride is how many bytes are sent or received at once, to see that it goes on.
	stride = 1 << 20
)

// room is what requests wait for before they are read.
type room struct {
	mu    sync.Mutex
	free  int64     // bytes; guarded by mu
	queue []*waiter // guarded by mu
}

type waiter struct {
	bytes int64
	ready chan struct{} // closed: it has them
}

// take takes bytes, if there is no need to wait. Else it returns who waits.
func (r *room) take(bytes int64) *waiter {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.queue) == 0 && bytes <= r.free {
		r.free -= bytes
		return nil
	}
	w := &waiter{bytes, make(chan struct{})}
	r.queue = append(r.queue, w)
	return w
}

func (r *room) give(bytes int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.free += bytes
	r.serve()
}

// serve lets wait no longer whom there is room for. Preconditions: mu is held.
func (r *room) serve() {
	for len(r.queue) > 0 && r.queue[0].bytes <= r.free {
		r.free -= r.queue[0].bytes
		close(r.queue[0].ready)
		r.queue = slices.Delete(r.queue, 0, 1)
	}
}

// leave ends a wait, and gives back what it may have come to.
func (r *room) leave(w *waiter) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if i := slices.Index(r.queue, w); i >= 0 {
		r.queue = slices.Delete(r.queue, i, i+1)
	} else {
		r.free += w.bytes
	}
	r.serve()
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
			c.server.dropStalled()
		}
	}
}

// dropStalled disconnects clients that hold room and do not go on.
func (s *Server) dropStalled() {
	now := time.Now()
	var dropped []*connection
	s.mu.Lock()
	for c := range s.connections {
		if c.turns.Load() > 0 && now.Sub(time.Unix(0, c.moved.Load())) >= s.stall && c.holdsRoom() {
			dropped = append(dropped, c)
		}
	}
	s.mu.Unlock()
	for _, c := range dropped {
		s.report(fmt.Errorf("NBD: client %s is disconnected: it has not gone on for %v, and others wait for the memory that it holds", c.conn.RemoteAddr(), s.stall))
		c.hangUp()
	}
}

func (c *connection) holdsRoom() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.bytes > c.own
}

// itsTurn tells that something waits for the client, until turns is lowered.
func (c *connection) itsTurn() {
	c.moves()
	c.turns.Add(1)
}

// moves tells that the client has sent or taken something.
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
