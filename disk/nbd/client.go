package nbd

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/gnomon-vmm/gnomon/disk/block"
)

// ClientOptions say how a server's export is used.
type ClientOptions struct {
	// TLS, where it is not nil, encrypts the connection, and refuses servers that
	// cannot. Without ServerName it is the address's host.
	TLS *tls.Config
	// Contexts are metadata contexts to ask for besides base:allocation, say
	// "qemu:dirty-bitmap:b0". A server that lacks one is refused.
	Contexts []string
	// ReadOnly makes writes fail here.
	ReadOnly bool
}

// maxCalls is how many requests a client has under way; more wait.
const maxCalls = 64

// Client is an export of a server. It is a block.Mapper, where the server tells
// base:allocation; else all bytes are data.
type Client struct {
	address, name string
	conn          net.Conn
	in            *bufio.Reader
	out           *sender
	export        agreed
	contexts      map[string]contextID
	readOnly      bool

	// partial is held to be written by writes of parts of the server's smallest
	// block, which read, change and write it, and to be read by other writes;
	// where the smallest block is a byte nobody holds it.
	partial sync.RWMutex

	free  chan *call
	calls [maxCalls]call

	mu       sync.Mutex
	lost     error         // guarded by mu: why there is no connection any more
	closing  bool          // guarded by mu
	received chan struct{} // closed when the receiver has ended
	gone     atomic.Bool   // the receiver looks at no call any more, except to end it
}

var _ block.Mapper = (*Client)(nil)

// Dial uses the export of the server at address, "unix:PATH" or "HOST:PORT". ctx
// is for the connecting. Errors wrap ErrAddress, ErrRefused or ErrProtocol.
func Dial(ctx context.Context, address, export string, o ClientOptions) (*Client, error) {
	n, err := connect(ctx, address, o.TLS)
	if err != nil {
		return nil, err
	}
	a, err := n.choose(export, o.Contexts)
	if err = n.finish(err); err != nil {
		n.conn.Close()
		return nil, fmt.Errorf("NBD server %s, export %q: %w", address, export, err)
	}
	c := newClient(n, a, o)
	c.address, c.name = address, export
	go c.receive()
	return c, nil
}

// DialURI is Dial with what ParseURI makes of uri.
func DialURI(ctx context.Context, uri string, o ClientOptions) (*Client, error) {
	address, export, err := ParseURI(uri)
	if err != nil {
		return nil, err
	}
	return Dial(ctx, address, export, o)
}

// newClient makes a client, whose receiver is to be started.
func newClient(n *negotiation, export agreed, o ClientOptions) *Client {
	c := &Client{
		conn: n.stream, in: n.in, export: export, contexts: n.contexts,
		readOnly: o.ReadOnly || export.flags&flagReadOnly != 0,
		free:     make(chan *call, maxCalls),
		received: make(chan struct{}),
	}
	c.out = newSender(n.stream, c.fail)
	for i := range c.calls {
		c.calls[i].init(c, i)
		c.free <- &c.calls[i]
	}
	return c
}

// fail ends the connection for a reason; the first one counts.
func (c *Client) fail(why error) {
	c.mu.Lock()
	if c.lost == nil {
		if c.closing {
			c.lost = ErrClosed
		} else {
			c.lost = fmt.Errorf("%w: %w", ErrLost, why)
		}
	}
	c.mu.Unlock()
	c.conn.Close()
}

func (c *Client) whyLost() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.lost
}

// Close implements block.Node: it flushes, and takes leave of the server.
func (c *Client) Close() error {
	c.mu.Lock()
	again := c.closing
	c.mu.Unlock()
	if again {
		return nil
	}
	err := c.Flush()
	c.mu.Lock()
	again, c.closing = c.closing, true
	c.mu.Unlock()
	if again {
		return nil
	}
	if c.whyLost() == nil {
		r := <-c.free
		r.start(header{command: cmdDisconnect}, nil, nil)
		r.left.Store(1) // it has no reply
		c.out.add(r)
		c.out.flush()
		<-r.done
		c.free <- r
	}
	c.fail(ErrClosed)
	<-c.received
	return err
}

// do has the server do a request: it sends data, and fills bufs.
func (c *Client) do(h header, data, bufs [][]byte) error {
	r := <-c.free
	err := r.do(h, data, bufs)
	c.free <- r
	return err
}

// Size implements block.Node.
func (c *Client) Size() int64 { return c.export.size }

// ReadOnly implements block.Node.
func (c *Client) ReadOnly() bool { return c.readOnly }

// Info implements block.Node.
func (c *Client) Info() block.Info {
	return block.Info{Format: "nbd", Filename: uri(c.address, c.name), VirtualSize: c.export.size}
}

// Contexts are the metadata contexts that Status can be asked for.
func (c *Client) Contexts() []string {
	var names []string
	for name := range c.contexts {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// BlockSizes are the server's, in bytes: what requests should be multiples of to
// be possible without reading first, and to be fast.
func (c *Client) BlockSizes() (minimum, preferred int64) {
	return int64(c.export.minimum), int64(c.export.preferred)
}

func (c *Client) check(off, n int64) error {
	if off < 0 || n < 0 || off > c.export.size || n > c.export.size-off {
		return fmt.Errorf("%w: %d bytes at %d of %d", block.ErrOutOfRange, n, off, c.export.size)
	}
	return nil
}

func (c *Client) checkWrite(off, n int64) error {
	if c.readOnly {
		return block.ErrReadOnly
	}
	return c.check(off, n)
}

// Flush implements block.Node.
func (c *Client) Flush() error {
	if c.export.flags&flagFlush == 0 || c.export.flags&flagReadOnly != 0 {
		return c.whyLost()
	}
	return c.do(header{command: cmdFlush}, nil, nil)
}

// StatusExtent is what a metadata context tells of Length bytes.
type StatusExtent struct {
	Length int64
	Flags  uint32 // StateHole, StateZero, StateDirty
}

// Status asks what a metadata context tells of n bytes from off on. What it
// returns begins at off, and may end before or behind off+n.
func (c *Client) Status(context string, off, n int64) ([]StatusExtent, error) {
	return c.status(context, off, n, 0)
}

func (c *Client) status(context string, off, n int64, flags uint16) ([]StatusExtent, error) {
	id, ok := c.contexts[context]
	if !ok {
		return nil, fmt.Errorf("%w: no metadata context %q", ErrExport, context)
	}
	if err := c.check(off, n); err != nil || n == 0 {
		return nil, err
	}
	unit := int64(c.export.minimum)
	first := off / unit * unit
	length := min(off+n-first, maxStatus)
	length = (length + unit - 1) / unit * unit
	r := <-c.free
	defer func() { c.free <- r }()
	r.wanted = id
	r.extents = nil
	h := header{command: cmdBlockStatus, flags: flags, offset: uint64(first), length: uint32(length)}
	if err := r.do(h, nil, nil); err != nil {
		return nil, err
	}
	extents := r.extents
	r.extents = nil
	for skip := off - first; skip > 0; {
		cut := min(skip, extents[0].Length)
		skip -= cut
		if extents[0].Length -= cut; extents[0].Length == 0 {
			extents = extents[1:]
		}
		if len(extents) == 0 {
			return nil, fmt.Errorf("%w: block status ends within the smallest block", ErrProtocol)
		}
	}
	return extents, nil
}

// maxStatus is how many bytes are asked for at once.
const maxStatus = 1 << 31

// Map implements block.Mapper.
func (c *Client) Map(off, n int64) (block.Extent, error) {
	if err := c.check(off, n); err != nil {
		return block.Extent{}, err
	}
	e := block.Extent{Start: off, Length: n, Present: true, Data: true, Offset: -1}
	if _, ok := c.contexts[ContextAllocation]; !ok || n == 0 {
		return e, nil
	}
	extents, err := c.status(ContextAllocation, off, n, cmdReqOne)
	if err != nil {
		return block.Extent{}, err
	}
	e.Length = min(n, extents[0].Length)
	e.Data = extents[0].Flags&StateHole == 0
	e.Zero = extents[0].Flags&StateZero != 0
	return e, nil
}
