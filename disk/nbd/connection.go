package nbd

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gnomon-vmm/gnomon/internal/busypoll"
	"github.com/gnomon-vmm/gnomon/internal/passer"
)

// What a connection may have under way.
const (
	maxRequests = 64
	maxBytes    = 2 * maxPayload // of reads and writes; one request is always possible
	maxWorkers  = 16
)

// A small request that lately took no longer than a hand-over to another goroutine
// costs is done by the one that reads requests. Writes are handed over later:
// those to the page cache wait for each other anyway, by the file's lock.
const (
	quickRead   = 20 * time.Microsecond
	quickWrite  = 100 * time.Microsecond
	quickLength = 64 << 10
	// quickReplies is how many replies wait at most for each other to be sent
	// together.
	quickReplies = 16
	// quickDelay is how long they wait at most where a request takes longer than
	// was thought.
	quickDelay = time.Millisecond
)

// connection is a client of a Server.
type connection struct {
	server *Server
	conn   net.Conn
	stream net.Conn // conn, or TLS over it
	socket *socket  // what conn was, once there are requests, or nil; set under mu
	in     *bufio.Reader

	// What was negotiated.
	fixed, noZeroes bool
	encrypted       bool
	structured      bool
	contextsOf      string // the export that contexts were chosen for
	contexts        []contextID
	export          *exported
	size            int64 // bytes, as the client was told

	ring    *ring // or nil
	started bool  // the reader has begun requests that the kernel has not heard of
	alone   int   // requests lately that were the client's only one
	out     *sender
	unsent  int           // replies that the reader has not flushed
	passer  passer.Passer // the reader's, which makes nothing but system calls
	late    *time.Timer   // flushes them, should the reader be held up
	work    chan *request // for workers; its capacity is maxRequests
	workers int           // how many the reader has started
	working atomic.Int32  // requests that workers have or will have
	done    sync.WaitGroup

	// readTime and writeTime are how long small requests took lately, in
	// nanoseconds.
	readTime, writeTime atomic.Int64

	mu    sync.Mutex
	ended sync.Cond  // a request has ended
	free  []*request // guarded by mu
	made  int        // guarded by mu: requests there are
	bytes int64      // guarded by mu: those of requests under way
	own   int64      // guarded by mu: of bytes, those that are not of the server's room
	share share      // of the server's room

	moved   atomic.Int64  // when the client has sent or taken a stride last, Unix nanoseconds
	turns   atomic.Int32  // how many wait for the client to do so
	dropped atomic.Bool   // it was disconnected since it does not
	gone    chan struct{} // closed by hangUp
	closing sync.Once
}

func newConnection(s *Server, conn net.Conn) *connection {
	c := &connection{server: s, conn: conn, gone: make(chan struct{})}
	c.ended.L = &c.mu
	c.use(conn)
	return c
}

// enter makes c a client of x.
func (c *connection) enter(x *exported) bool {
	if !c.server.enter(x, c) {
		return false
	}
	c.export, c.size = x, x.Node.Size()
	if c.contextsOf != x.Name {
		c.contexts = nil
	}
	return true
}

// run serves the client until it leaves. Its error is nil if it left properly.
func (c *connection) run() (err error) {
	err = c.negotiate()
	if c.socket != nil {
		defer func() { err = errors.Join(err, c.socket.close()) }()
	}
	if c.export != nil {
		defer c.server.leave(c.export, c)
	}
	if errors.Is(err, errAborted) || errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("negotiation: %w", err)
	}
	var failure error
	c.out = newSender(c.stream, func(err error) {
		if !errors.Is(err, net.ErrClosed) { // by us, for another reason
			failure = err
		}
		c.hangUp()
	})
	c.out.socket, c.out.moves, c.out.turns = c.socket, c.moves, &c.turns
	c.late = time.AfterFunc(time.Hour, c.out.flush)
	defer c.late.Stop()
	c.work = make(chan *request, maxRequests)
	c.ring = newRing(c)
	err = c.receive()
	close(c.work)
	if err != nil {
		c.hangUp() // so that no reply waits for a client that does not read
	}
	if c.ring != nil {
		c.ring.close()
	}
	c.done.Wait()
	c.out.finish()
	if errors.Is(err, net.ErrClosed) { // by us: the export was removed, or a reply could not be sent
		err = nil
	}
	return errors.Join(err, failure)
}

// source reads what a connection receives.
type source struct{ *connection }

func (s source) Read(p []byte) (int, error) {
	if s.socket != nil {
		return s.socket.Read(p)
	}
	return s.stream.Read(p)
}

// useSocket goes on without Go's poller, if it can.
func (c *connection) useSocket() (err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	select {
	case <-c.gone:
		return net.ErrClosed
	default:
	}
	c.socket, err = newSocket(c.stream)
	return err
}

// receive takes requests until the client disconnects.
func (c *connection) receive() error {
	for {
		if c.in.Buffered() < requestSize || c.unsent >= quickReplies {
			c.flush()
		}
		c.passer.Pass()
		if c.in.Buffered() < requestSize {
			c.prepareToWait()
		}
		raw, err := c.in.Peek(requestSize)
		if err == io.EOF && len(raw) == 0 {
			return nil // not what the protocol wants, but what clients do
		}
		if err != nil {
			return err
		}
		h, ok := parseHeader(raw)
		if !ok {
			return fmt.Errorf("%w: a request begins with %x", ErrProtocol, raw[:4])
		}
		if h.command == cmdDisconnect {
			return nil
		}
		if h.command == cmdWrite && h.length > maxPayload {
			return fmt.Errorf("%w: a write of %d bytes; at most %d are possible", ErrProtocol, h.length, maxPayload)
		}
		if _, err := c.in.Discard(requestSize); err != nil {
			return err
		}
		c.look(h)
		if err := c.accept(h); err != nil {
			return err
		}
	}
}

// prepareToWait is called before the reader waits for what has not arrived.
func (c *connection) prepareToWait() {
	switch {
	case c.isAlone() && c.ring == nil:
		c.socket.poll()
	case !c.isAlone() && c.ring != nil:
		// If the client shares our processor it is sending more requests, and would be
		// interrupted by us at each.
		busypoll.Yield()
	}
}

// accept has a request done.
func (c *connection) accept(h header) error {
	r, err := c.begin(h)
	if err != nil {
		return err
	}
	r.refusal = c.check(h)
	if h.command == cmdWrite {
		if c.in.Buffered() < int(h.length) {
			c.flush() // nobody waits for the rest of what another sends
		}
		if r.refusal != nil {
			if _, err := c.in.Discard(int(h.length)); err != nil {
				c.end(r)
				return err
			}
		} else {
			r.data = getBuffer(int(h.length))
			if err := c.receiveInto(r.data.bytes[:h.length]); err != nil {
				c.end(r)
				return err
			}
		}
	}
	if c.ring != nil && r.refusal == nil && !c.isAlone() && c.ring.start(r) {
		c.started = true
		return nil
	}
	if r.refusal != nil || c.isQuick(h) {
		c.submit()
		if c.unsent == 1 {
			c.late.Reset(quickDelay)
		}
		r.do()
		if c.isAlone() && c.socket.pending() {
			c.alone = 0
		}
		c.out.add(r)
		c.unsent++
		return nil
	}
	if int(c.working.Add(1)) > c.workers && c.workers < maxWorkers {
		c.workers++
		c.done.Add(1)
		go c.doWork()
	}
	c.work <- r
	return nil
}

// A client that has one request at a time is served by the reader: to wake another
// goroutine takes as long as the request. It is thought to be such after minAlone requests.
const minAlone = 16

// isAlone tells whether the client has one request at a time.
func (c *connection) isAlone() bool { return c.alone >= minAlone }

// look looks at a client whose next request is h.
func (c *connection) look(h header) {
	if c.socket == nil { // so nothing would tell of requests behind one that the reader does
		return
	}
	behind := c.in.Buffered()
	if h.command == cmdWrite {
		behind -= int(h.length)
	}
	if c.working.Load() > 0 || c.ring != nil && c.ring.underWay.Load() > 0 || behind >= requestSize {
		c.alone = 0
	} else {
		c.alone++
	}
}

// receiveInto fills b.
func (c *connection) receiveInto(b []byte) error {
	if len(b) > c.in.Buffered() {
		c.itsTurn()
		defer c.turns.Add(-1)
	}
	for len(b) > stride {
		if _, err := io.ReadFull(c.in, b[:stride]); err != nil {
			return err
		}
		b = b[stride:]
		c.moves()
	}
	_, err := io.ReadFull(c.in, b)
	return err
}

// isQuick tells whether the request is likely to be done soon.
func (c *connection) isQuick(h header) bool {
	if h.length > quickLength {
		return false
	}
	switch {
	case h.command == cmdRead:
		return c.isAlone() || c.readTime.Load() < int64(quickRead)
	case h.command == cmdWrite && h.flags&cmdFUA == 0:
		return c.isAlone() || c.writeTime.Load() < int64(quickWrite)
	}
	return false
}

// observe takes how long a request of at most quickLength took into account.
func observe(average *atomic.Int64, took time.Duration) {
	old := average.Load()
	average.Store(old + (int64(min(took, time.Millisecond))-old)/4)
}

func (c *connection) doWork() {
	defer c.done.Done()
	for r := range c.work {
		r.do()
		c.working.Add(-1)
		c.out.add(r)
		c.out.flush()
	}
}

// submit tells the kernel of the requests that the reader has begun: before it waits for
// anything.
func (c *connection) submit() {
	if c.started {
		c.started = false
		c.ring.submit()
	}
}

// flush sends the replies that the reader has.
func (c *connection) flush() {
	c.submit()
	if c.unsent > 1 {
		c.late.Stop()
	}
	if c.unsent > 0 {
		c.unsent = 0
		c.out.flush()
	}
}

// begin waits until there may be one more request.
func (c *connection) begin(h header) (*request, error) {
	payload := int64(0)
	switch h.command {
	case cmdRead, cmdWrite:
		payload = bufferSize(int(min(h.length, maxPayload)))
	case cmdCache:
		payload = cacheStep
	case cmdBlockStatus:
		payload = int64(len(c.contexts)) * maxExtents * 8
	}
	c.mu.Lock()
	for len(c.free) == 0 && c.made == maxRequests || c.bytes > 0 && c.bytes+payload > maxBytes {
		if c.unsent > 0 || c.started { // they may be what keeps others from ending
			c.mu.Unlock()
			c.flush()
			c.mu.Lock()
			continue
		}
		c.ended.Wait()
	}
	c.bytes += payload
	own := c.own+payload <= c.server.own
	if own {
		c.own += payload
	}
	var r *request
	if last := len(c.free) - 1; last >= 0 {
		r, c.free = c.free[last], c.free[:last]
	} else {
		r = &request{client: c}
		c.made++
	}
	c.mu.Unlock()
	r.header, r.payload, r.refusal, r.own = h, payload, nil, own
	if own {
		return r, nil
	}
	if w := c.server.room.take(&c.share, payload); w != nil {
		c.flush()
		if err := c.await(w); err != nil {
			r.own, r.payload = true, 0
			c.mu.Lock()
			c.bytes -= payload
			c.mu.Unlock()
			c.end(r)
			return nil, err
		}
	}
	return r, nil
}

// end gives back what a request holds.
func (c *connection) end(r *request) {
	if r.data != nil {
		putBuffer(r.data)
		r.data = nil
	}
	if cap(r.body) > maxMessage*2 {
		r.body = nil // what was counted is given back
	}
	if !r.own {
		c.server.room.give(&c.share, r.payload)
	}
	c.mu.Lock()
	c.bytes -= r.payload
	if r.own {
		c.own -= r.payload
	}
	c.free = append(c.free, r)
	c.ended.Signal()
	c.mu.Unlock()
}
