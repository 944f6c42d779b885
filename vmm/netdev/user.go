package netdev

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"

	"github.com/sirupsen/logrus"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/network/arp"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"

	"github.com/gnomon-vmm/gnomon/vmm/virtio"
)

// ErrUser is the stage of errors from user-mode networking.
var ErrUser = errors.New("user network")

// Addresses of the user-mode network, those of QEMU's.
var (
	UserSubnet  = netip.MustParsePrefix("10.0.2.0/24")
	UserGateway = netip.MustParseAddr("10.0.2.2") // also the host's loopback, as the guest sees it
	UserDNS     = netip.MustParseAddr("10.0.2.3")
	UserGuest   = netip.MustParseAddr("10.0.2.15")
)

// userMTU is the largest IP packet on the user-mode network, without offloads.
const userMTU = 1500

// userGatewayMAC is the gateway's address: QEMU's prefix and the gateway's IP.
var userGatewayMAC = net.HardwareAddr{0x52, 0x55, 10, 0, 2, 2}

const nicID = tcpip.NICID(1)

// UserConfig describes a user-mode network.
type UserConfig struct {
	MAC      net.HardwareAddr // who gets UserGuest by DHCP; nil: who asks first
	Forwards []Forward        // host ports that lead to the guest
	Restrict bool             // the guest reaches neither the host nor beyond; forwards still work
	Debug    bool             // let the network stack's libraries log
}

// User is a network that lives in this process and needs no privilege: DHCP,
// DNS and NAT on the host's own sockets, and forwarded ports.
type User struct {
	link     *userLink
	stack    *stack.Stack
	nat      *nat
	forwards []Forward

	closeOnce sync.Once
	closeErr  error
}

var _ virtio.NetBackend = (*User)(nil)

// NewUser makes the network and opens the forwarded ports.
func NewUser(config UserConfig) (*User, error) {
	if !config.Debug {
		// The DHCP and DNS services log on the package's standard logger.
		logrus.SetOutput(io.Discard)
	}
	u := &User{link: newUserLink(userMTU, userGatewayMAC)}
	u.stack = stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol, arp.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol, icmp.NewProtocol4},
	})
	u.nat = newNAT(u.stack)
	if err := u.setUp(config); err != nil {
		return nil, errors.Join(fmt.Errorf("%w: %w", ErrUser, err), u.Close())
	}
	return u, nil
}

func (u *User) setUp(config UserConfig) error {
	if err := u.stack.CreateNIC(nicID, u.link); err != nil {
		return fmt.Errorf("create interface: %s", err)
	}
	for _, ip := range []netip.Addr{UserGateway, UserDNS} {
		address := tcpip.ProtocolAddress{Protocol: ipv4.ProtocolNumber, AddressWithPrefix: stackAddr(ip).WithPrefix()}
		if err := u.stack.AddProtocolAddress(nicID, address, stack.AddressProperties{}); err != nil {
			return fmt.Errorf("add address %s: %s", ip, err)
		}
	}
	// The stack answers in the name of every host the guest talks to.
	u.stack.SetSpoofing(nicID, true)
	u.stack.SetPromiscuousMode(nicID, true)
	subnet, err := tcpip.NewSubnet(stackAddr(UserSubnet.Addr()), tcpip.MaskFromBytes(net.CIDRMask(UserSubnet.Bits(), 32)))
	if err != nil {
		return fmt.Errorf("subnet: %w", err)
	}
	u.stack.SetRouteTable([]tcpip.Route{{Destination: subnet, NIC: nicID}})

	if err := serveDHCP(u.stack, config.MAC); err != nil {
		return fmt.Errorf("DHCP service: %w", err)
	}
	if !config.Restrict {
		if err := serveDNS(u.stack); err != nil {
			return fmt.Errorf("DNS service: %w", err)
		}
		u.nat.install()
	}
	for _, f := range config.Forwards {
		opened, err := u.nat.forward(f)
		if err != nil {
			return err
		}
		u.forwards = append(u.forwards, opened)
	}
	return nil
}

// Forwards are the open forwards, with the ports the host chose for those that
// asked for port 0.
func (u *User) Forwards() []Forward { return u.forwards }

// Offloads are checksums and TCP segmentation in both directions: the stack
// needs neither from a guest, and guest kernels are slow at both.
func (u *User) Offloads() uint64 {
	return virtio.NetOffloadHostCSum | virtio.NetOffloadHostTSO4 | virtio.NetOffloadHostECN |
		virtio.NetOffloadGuestCSum | virtio.NetOffloadGuestTSO4
}

// Start is as NetBackend says.
func (u *User) Start(features uint64, readable, _ func()) error {
	u.link.start(features, readable)
	return nil
}

// Stop is as NetBackend says.
func (u *User) Stop() { u.link.stop() }

// Send is as NetBackend says; it never has to wait.
func (u *User) Send(frame [][]byte) error { return u.link.send(frame) }

// Receive is as NetBackend says.
func (u *User) Receive(p [][]byte) (int, error) { return u.link.receive(p) }

// Describe names the network and its forwards.
func (u *User) Describe() string {
	s := "user " + UserSubnet.String()
	for _, f := range u.forwards {
		s += " forward=" + f.String()
	}
	return s
}

// Close ends every connection and frees the forwarded ports.
func (u *User) Close() error {
	u.closeOnce.Do(func() {
		u.link.stop()
		u.closeErr = u.nat.close()
		u.stack.Destroy()
		u.link.Close()
	})
	return u.closeErr
}

// stackAddr is an IPv4 address as the stack has it.
func stackAddr(a netip.Addr) tcpip.Address { return tcpip.AddrFrom4(a.As4()) }

// fullAddr is a transport address as the stack has it.
func fullAddr(a netip.AddrPort) tcpip.FullAddress {
	return tcpip.FullAddress{NIC: nicID, Addr: stackAddr(a.Addr()), Port: a.Port()}
}
