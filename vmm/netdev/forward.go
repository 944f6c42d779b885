package netdev

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// Forward is a port of the host that leads to one of the guest.
type Forward struct {
	Protocol string         // "tcp" or "udp"
	Host     netip.AddrPort // port 0: any free one
	Guest    uint16
}

// String is the forward as Parse reads it.
func (f Forward) String() string { return fmt.Sprintf("%s:%s:%d", f.Protocol, f.Host, f.Guest) }

// mustAddrPort is for addresses that are constants of this package.
func mustAddrPort(ip string, port uint16) netip.AddrPort {
	return netip.AddrPortFrom(netip.MustParseAddr(ip), port)
}

// forward opens f's host port and returns f with the port that was opened.
func (n *nat) forward(f Forward) (Forward, error) {
	guest := fullAddr(netip.AddrPortFrom(UserGuest, f.Guest))
	switch f.Protocol {
	case "tcp":
		listener, err := net.Listen("tcp", f.Host.String())
		if err != nil {
			return f, forwardError(f, err)
		}
		if !n.track(listener) {
			return f, forwardError(f, net.ErrClosed)
		}
		f.Host = listener.Addr().(*net.TCPAddr).AddrPort()
		n.work.Add(1)
		go n.forwardTCP(listener, guest)
	case "udp":
		conn, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(f.Host))
		if err != nil {
			return f, forwardError(f, err)
		}
		if !n.track(conn) {
			return f, forwardError(f, net.ErrClosed)
		}
		f.Host = conn.LocalAddr().(*net.UDPAddr).AddrPort()
		n.work.Add(1)
		go n.forwardUDP(conn, guest)
	default:
		return f, fmt.Errorf("forward %s: protocol must be tcp or udp", f)
	}
	return f, nil
}

// forwardError says what to do about a port that cannot be had.
func forwardError(f Forward, err error) error {
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return fmt.Errorf("forward %s: %s port %d is taken on this host: choose another", f, f.Protocol, f.Host.Port())
	case errors.Is(err, syscall.EACCES):
		return fmt.Errorf("forward %s: ports below 1024 need privilege on this host: choose a higher one", f)
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		return fmt.Errorf("forward %s: %s is not an address of this host", f, f.Host.Addr())
	}
	return fmt.Errorf("forward %s: %w", f, err)
}

// forwardTCP connects every client of listener to the guest.
func (n *nat) forwardTCP(listener net.Listener, guest tcpip.FullAddress) {
	defer n.work.Done()
	for {
		client, err := listener.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil { // the client went, or the process is out of descriptors for now
			select {
			case <-n.ctx.Done():
				return
			case <-time.After(10 * time.Millisecond):
			}
			continue
		}
		if !n.beginConn() {
			client.Close()
			continue
		}
		go func() {
			defer n.endConn()
			ctx, cancel := context.WithTimeout(n.ctx, dialTimeout)
			defer cancel()
			conn, err := gonet.DialContextTCP(ctx, n.stack, guest, ipv4.ProtocolNumber)
			if err != nil {
				client.Close()
				return
			}
			n.splice(conn, client.(*net.TCPConn))
		}()
	}
}

// forwardUDP gives every client of conn a flow to the guest.
func (n *nat) forwardUDP(conn *net.UDPConn, guest tcpip.FullAddress) {
	defer n.work.Done()
	var mu sync.Mutex
	flows := map[netip.AddrPort]*udpFlow{} // guarded by mu
	var buf [65535]byte
	for {
		size, client, err := conn.ReadFromUDPAddrPort(buf[:])
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue
		}
		mu.Lock()
		f := flows[client]
		if f == nil {
			f = n.flowToGuest(conn, client, guest, func() {
				mu.Lock()
				defer mu.Unlock()
				delete(flows, client)
			})
			if f != nil {
				flows[client] = f
			}
		}
		mu.Unlock()
		if f != nil {
			f.toGuest(buf[:size])
		}
	}
}

// flowToGuest opens a flow from the gateway to the guest, whose answers go to
// client.
func (n *nat) flowToGuest(conn *net.UDPConn, client netip.AddrPort, guest tcpip.FullAddress, onEnd func()) *udpFlow {
	wq := new(waiter.Queue)
	ep, err := n.stack.NewEndpoint(udp.ProtocolNumber, ipv4.ProtocolNumber, wq)
	if err != nil {
		return nil
	}
	if err := ep.Connect(guest); err != nil {
		ep.Close()
		return nil
	}
	toHost := func(p []byte) error { _, err := conn.WriteToUDPAddrPort(p, client); return err }
	f := n.addFlow(ep, wq, udpIdle, toHost, onEnd)
	if f == nil {
		ep.Close()
	}
	return f
}
