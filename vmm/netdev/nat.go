package netdev

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// What one guest can hold of the host.
const (
	maxConnections = 1024 // TCP, both directions
	maxConnecting  = 64   // of those, not yet answered by the other end
	maxUDPFlows    = 1024 // the idlest goes when there is one more
	dialTimeout    = 10 * time.Second
	udpIdle        = 90 * time.Second
	dnsIdle        = 10 * time.Second // for flows to port 53, which are many and short
	keepAliveIdle  = 2 * time.Minute
)

// nat moves data between connections in the stack and sockets on the host.
type nat struct {
	stack  *stack.Stack
	ctx    context.Context // ends with close
	cancel context.CancelFunc
	work   sync.WaitGroup // everything that runs for a connection, a flow or a forward

	mu     sync.Mutex
	closed bool                   // guarded by mu
	open   map[io.Closer]struct{} // what close closes: listeners and connections; guarded by mu
	conns  int                    // TCP connections; guarded by mu
	flows  map[*udpFlow]struct{}  // guarded by mu
}

func newNAT(s *stack.Stack) *nat {
	n := &nat{stack: s, open: map[io.Closer]struct{}{}, flows: map[*udpFlow]struct{}{}}
	n.ctx, n.cancel = context.WithCancel(context.Background())
	return n
}

// install lets the guest reach the host and beyond.
func (n *nat) install() {
	forwarder := tcp.NewForwarder(n.stack, 0, maxConnecting, n.acceptTCP)
	n.stack.SetTransportProtocolHandler(tcp.ProtocolNumber, forwarder.HandlePacket)
	udpForwarder := udp.NewForwarder(n.stack, n.acceptUDP)
	n.stack.SetTransportProtocolHandler(udp.ProtocolNumber, udpForwarder.HandlePacket)
}

// hostAddr is the host address that stands behind one the guest sends to. Of
// the virtual network itself, only the gateway leads anywhere: to the host.
func hostAddr(addr tcpip.Address, port uint16) (netip.AddrPort, bool) {
	ip, ok := netip.AddrFromSlice(addr.AsSlice())
	switch {
	case !ok || ip.IsUnspecified() || ip.IsLoopback() || ip.IsMulticast() || ip == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		return netip.AddrPort{}, false
	case ip == UserGateway:
		ip = netip.AddrFrom4([4]byte{127, 0, 0, 1})
	case UserSubnet.Contains(ip):
		return netip.AddrPort{}, false
	case ip.IsLinkLocalUnicast():
		// Cloud metadata services answer there, and trust who asks.
		return netip.AddrPort{}, false
	}
	return netip.AddrPortFrom(ip, port), true
}

// acceptTCP connects to the host address the guest wants, on a goroutine of
// the forwarder's, and answers the guest by how that went.
func (n *nat) acceptTCP(r *tcp.ForwarderRequest) {
	id := r.ID()
	target, ok := hostAddr(id.LocalAddress, id.LocalPort)
	if !ok || !n.beginConn() {
		r.Complete(true)
		return
	}
	defer n.endConn()
	ctx, cancel := context.WithTimeout(n.ctx, dialTimeout)
	defer cancel()
	var dialer net.Dialer
	host, err := dialer.DialContext(ctx, "tcp", target.String())
	if err != nil {
		r.Complete(true)
		return
	}
	var wq waiter.Queue
	ep, stackErr := r.CreateEndpoint(&wq)
	if stackErr != nil {
		r.Complete(true)
		host.Close()
		return
	}
	r.Complete(false)
	keepAlive(ep)
	n.splice(gonet.NewTCPConn(&wq, ep), host.(*net.TCPConn))
}

// keepAlive has the stack notice that a guest went away without a word.
func keepAlive(ep tcpip.Endpoint) {
	idle := tcpip.KeepaliveIdleOption(keepAliveIdle)
	_ = ep.SetSockOpt(&idle)
	ep.SocketOptions().SetKeepAlive(true)
}

// beginConn takes one of the TCP connections there may be.
func (n *nat) beginConn() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed || n.conns >= maxConnections {
		return false
	}
	n.conns++
	n.work.Add(1)
	return true
}

func (n *nat) endConn() {
	n.mu.Lock()
	n.conns--
	n.mu.Unlock()
	n.work.Done()
}

// track has close close c; it returns false, with c closed, when that is over.
func (n *nat) track(c io.Closer) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		c.Close()
		return false
	}
	n.open[c] = struct{}{}
	return true
}

func (n *nat) untrack(c io.Closer) {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.open, c)
}

// halfCloser is a connection whose two directions end separately.
type halfCloser interface {
	net.Conn
	CloseWrite() error
}

// splice moves data both ways between a and b until both directions ended or
// one failed, and closes them.
func (n *nat) splice(a, b halfCloser) {
	defer a.Close()
	defer b.Close()
	if !n.track(a) {
		return
	}
	defer n.untrack(a)
	if !n.track(b) {
		return
	}
	defer n.untrack(b)
	done := make(chan struct{})
	go func() {
		defer close(done)
		oneWay(a, b)
	}()
	oneWay(b, a)
	<-done
}

// oneWay copies from src to dst; an end is passed on, a failure ends both.
func oneWay(dst, src halfCloser) {
	if _, err := io.Copy(dst, src); err != nil {
		dst.Close()
		src.Close()
		return
	}
	if err := dst.CloseWrite(); err != nil {
		dst.Close()
		src.Close()
	}
}

// close ends everything and waits for it.
func (n *nat) close() error {
	n.cancel()
	n.mu.Lock()
	n.closed = true
	var errs []error
	for c := range n.open {
		if err := c.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
			errs = append(errs, err)
		}
	}
	for f := range n.flows {
		f.stop()
	}
	n.mu.Unlock()
	n.work.Wait()
	return errors.Join(errs...)
}
