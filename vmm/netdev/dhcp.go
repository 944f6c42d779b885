package netdev

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
	"gvisor.dev/gvisor/pkg/waiter"
)

const dhcpLease = time.Hour

// serveDHCP answers on the stack until that is closed. The guest with the given
// MAC address, or the first to ask when that is nil, is offered UserGuest; others,
// as there are behind a bridge in the guest, get the addresses behind it.
//
// The server is our own: that of gvisor-tap-vsock brings a packet decoder along
// whose tables take megabytes and most of the time until a guest starts.
func serveDHCP(s *stack.Stack, guest net.HardwareAddr) error {
	conn, err := listenDHCP(s)
	if err != nil {
		return fmt.Errorf("listen on udp port %d: %w", dhcpv4.ServerPort, err)
	}
	leases := leases{}
	if guest != nil {
		leases.lease(guest)
	}
	go func() {
		defer conn.Close()
		buf := make([]byte, userMTU)
		for {
			n, peer, err := conn.ReadFrom(buf)
			if err != nil {
				return // the stack is closed
			}
			reply := leases.answer(buf[:n])
			from, ok := peer.(*net.UDPAddr)
			if reply == nil || !ok {
				continue
			}
			if from.IP == nil || from.IP.IsUnspecified() {
				from = &net.UDPAddr{IP: net.IPv4bcast, Port: from.Port} // it has no address yet
			}
			_, _ = conn.WriteTo(reply, from) // what is lost the client asks for again
		}
	}()
	return nil
}

// listenDHCP returns a socket that gets broadcasts and may send them.
func listenDHCP(s *stack.Stack) (*gonet.UDPConn, error) {
	var wq waiter.Queue
	ep, tcpErr := s.NewEndpoint(udp.ProtocolNumber, ipv4.ProtocolNumber, &wq)
	if tcpErr != nil {
		return nil, errors.New(tcpErr.String())
	}
	ep.SocketOptions().SetBroadcast(true)
	if tcpErr := ep.Bind(tcpip.FullAddress{NIC: nicID, Port: dhcpv4.ServerPort}); tcpErr != nil {
		ep.Close()
		return nil, errors.New(tcpErr.String())
	}
	return gonet.NewUDPConn(&wq, ep), nil
}

// leases holds the address of each MAC address that asked, for the life of the
// network: as many as the subnet has.
type leases map[[6]byte]netip.Addr

// lease is the address for mac; false when none is left.
func (l leases) lease(mac net.HardwareAddr) (netip.Addr, bool) {
	var key [6]byte
	if len(mac) != len(key) {
		return netip.Addr{}, false
	}
	copy(key[:], mac)
	if ip, ok := l[key]; ok {
		return ip, true
	}
	ip := UserGuest
	for range l {
		ip = ip.Next()
	}
	if !UserSubnet.Contains(ip.Next()) { // the last of the subnet is for broadcasts
		return netip.Addr{}, false
	}
	l[key] = ip
	return ip, true
}

// answer is the reply to a client's message (RFC 2131, section 4.3); nil: none.
func (l leases) answer(message []byte) []byte {
	m, err := dhcpv4.FromBytes(message)
	if err != nil || m.OpCode != dhcpv4.OpcodeBootRequest {
		return nil
	}
	var kind dhcpv4.MessageType
	switch m.MessageType() {
	case dhcpv4.MessageTypeDiscover:
		kind = dhcpv4.MessageTypeOffer
	case dhcpv4.MessageTypeRequest:
		kind = dhcpv4.MessageTypeAck
	default:
		return nil
	}
	ip, ok := l.lease(m.ClientHWAddr)
	if !ok {
		return nil
	}
	gateway := net.IP(UserGateway.AsSlice())
	reply, err := dhcpv4.NewReplyFromRequest(m,
		dhcpv4.WithMessageType(kind),
		dhcpv4.WithYourIP(ip.AsSlice()),
		dhcpv4.WithOption(dhcpv4.OptServerIdentifier(gateway)),
		dhcpv4.WithLeaseTime(uint32(dhcpLease/time.Second)),
		dhcpv4.WithNetmask(net.CIDRMask(UserSubnet.Bits(), 32)),
		dhcpv4.WithRouter(gateway),
		dhcpv4.WithDNS(gateway),
		dhcpv4.WithOption(dhcpv4.Option{Code: dhcpv4.OptionInterfaceMTU, Value: dhcpv4.Uint16(userMTU)}),
	)
	if err != nil {
		return nil
	}
	return reply.ToBytes()
}
