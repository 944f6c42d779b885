package netdev

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/containers/gvisor-tap-vsock/pkg/services/dns"
	"github.com/containers/gvisor-tap-vsock/pkg/types"
	"golang.org/x/net/netutil"
	"golang.org/x/time/rate"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// What a guest can keep busy of the host's resolver.
const (
	dnsQueriesPerSecond = 200
	dnsBurst            = 200
	dnsConnections      = 32
)

// hostName is the gateway's name for guests that would rather not know its address.
const hostDomain, hostName = "gnomon.internal.", "host"

// serveDNS answers on the gateway's and the DNS server's addresses with what
// the host's resolver says, until the stack is closed.
func serveDNS(s *stack.Stack) error {
	zones := []types.Zone{{
		Name:    hostDomain,
		Records: []types.Record{{Name: hostName, IP: UserGateway.AsSlice()}},
	}}
	limit := rate.NewLimiter(dnsQueriesPerSecond, dnsBurst)
	for _, ip := range []string{UserGateway.String(), UserDNS.String()} {
		address := fullAddr(mustAddrPort(ip, 53))
		udpConn, err := gonet.DialUDP(s, &address, nil, ipv4.ProtocolNumber)
		if err != nil {
			return fmt.Errorf("listen on udp %s:53: %w", ip, err)
		}
		listener, err := gonet.ListenTCP(s, address, ipv4.ProtocolNumber)
		if err != nil {
			udpConn.Close()
			return fmt.Errorf("listen on tcp %s:53: %w", ip, err)
		}
		server, err := dns.New(&limitedPacketConn{PacketConn: udpConn, limit: limit},
			netutil.LimitListener(listener, dnsConnections), zones)
		if err != nil {
			return errors.Join(err, udpConn.Close(), listener.Close())
		}
		go func() { _ = server.Serve() }()
		go func() { _ = server.ServeTCP() }()
	}
	return nil
}

// limitedPacketConn hands out datagrams no faster than its limiter lets it, so
// that a guest cannot pile up look-ups. What comes meanwhile waits in, and then
// overflows, the socket's bounded buffer.
type limitedPacketConn struct {
	net.PacketConn
	limit *rate.Limiter
}

// ReadFrom waits for the limiter after each datagram.
func (c *limitedPacketConn) ReadFrom(p []byte) (int, net.Addr, error) {
	n, from, err := c.PacketConn.ReadFrom(p)
	if err == nil {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		_ = c.limit.Wait(ctx)
	}
	return n, from, err
}
