package netdev

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync"
	"testing"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/link/channel"
	"gvisor.dev/gvisor/pkg/tcpip/link/ethernet"
	"gvisor.dev/gvisor/pkg/tcpip/network/arp"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"

	"github.com/gnomon-vmm/gnomon/vmm/virtio"
)

// guestMAC is the guest's address.
var guestMAC = net.HardwareAddr{0x52, 0x54, 0x00, 0x12, 0x34, 0x56}

// wire connects a test to a backend as a device with a driver would.
type wire struct {
	backend  virtio.NetBackend
	readable chan struct{}
	writable chan struct{}
}

func newWire(t testing.TB, b virtio.NetBackend, features uint64) *wire {
	t.Helper()
	w := &wire{backend: b, readable: make(chan struct{}, 1), writable: make(chan struct{}, 1)}
	signal := func(c chan struct{}) func() {
		return func() {
			select {
			case c <- struct{}{}:
			default:
			}
		}
	}
	if err := b.Start(features, signal(w.readable), signal(w.writable)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Stop)
	return w
}

// receive waits for a frame and returns its header and itself.
func (w *wire) receive(ctx context.Context) (virtio.NetHeader, []byte, error) {
	var head [20]byte // so that frames cross pieces
	rest := make([]byte, virtio.MaxFrameSize)
	for {
		n, err := w.backend.Receive([][]byte{head[:], rest})
		if err == nil {
			frame := append(head[:], rest...)[:n]
			return virtio.ParseNetHeader(frame), frame[virtio.NetHeaderSize:], nil
		}
		if !errors.Is(err, virtio.ErrAgain) {
			return virtio.NetHeader{}, nil, err
		}
		select {
		case <-w.readable:
		case <-ctx.Done():
			return virtio.NetHeader{}, nil, ctx.Err()
		}
	}
}

// send sends a frame, in two pieces, waiting while the backend must.
func (w *wire) send(h virtio.NetHeader, frame []byte) error {
	var head [virtio.NetHeaderSize]byte
	h.Put(head[:])
	cut := len(frame) / 3
	for {
		err := w.backend.Send([][]byte{head[:], frame[:cut], frame[cut:]})
		if !errors.Is(err, virtio.ErrAgain) {
			return err
		}
		<-w.writable
	}
}

// guestStack is a guest's network stack on a wire.
type guestStack struct {
	*stack.Stack
	ep     *channel.Endpoint
	cancel context.CancelFunc
	pumps  sync.WaitGroup

	mu      sync.Mutex
	largest int // frame received; guarded by mu
}

func newGuestStack(t testing.TB, b virtio.NetBackend, features uint64, ip netip.Prefix, gateway netip.Addr) *guestStack {
	t.Helper()
	w := newWire(t, b, features)
	g := &guestStack{ep: channel.New(1024, 1500+header.EthernetMinimumSize, tcpip.LinkAddress(guestMAC))}
	g.Stack = stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol, arp.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol, icmp.NewProtocol4},
	})
	if features&virtio.NetOffloadGuestCSum != 0 {
		g.ep.LinkEPCapabilities |= stack.CapabilityRXChecksumOffload
	}
	if err := g.CreateNIC(nicID, ethernet.New(g.ep)); err != nil {
		t.Fatal(err)
	}
	address := tcpip.ProtocolAddress{Protocol: ipv4.ProtocolNumber, AddressWithPrefix: stackAddr(ip.Addr()).WithPrefix()}
	if err := g.AddProtocolAddress(nicID, address, stack.AddressProperties{}); err != nil {
		t.Fatal(err)
	}
	routes := []tcpip.Route{{Destination: header.IPv4EmptySubnet, NIC: nicID}}
	if gateway.IsValid() {
		subnet, _ := tcpip.NewSubnet(stackAddr(ip.Masked().Addr()), tcpip.MaskFromBytes(net.CIDRMask(ip.Bits(), 32)))
		routes = []tcpip.Route{
			{Destination: subnet, NIC: nicID},
			{Destination: header.IPv4EmptySubnet, NIC: nicID, Gateway: stackAddr(gateway)},
		}
	}
	g.SetRouteTable(routes)
	ctx, cancel := context.WithCancel(context.Background())
	g.cancel = cancel
	g.pumps.Add(2)
	go func() {
		defer g.pumps.Done()
		for {
			_, frame, err := w.receive(ctx)
			if err != nil {
				return
			}
			g.mu.Lock()
			g.largest = max(g.largest, len(frame))
			g.mu.Unlock()
			pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(frame)})
			g.ep.InjectInbound(0, pkt)
			pkt.DecRef()
		}
	}()
	go func() {
		defer g.pumps.Done()
		for {
			pkt := g.ep.ReadContext(ctx)
			if pkt == nil {
				return
			}
			_ = w.send(virtio.NetHeader{}, pkt.ToView().AsSlice())
			pkt.DecRef()
		}
	}()
	t.Cleanup(func() {
		cancel()
		g.pumps.Wait()
		g.Destroy()
	})
	return g
}

func (g *guestStack) largestFrame() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.largest
}

// dial connects from the guest, as http.Transport.DialContext.
func (g *guestStack) dial(ctx context.Context, _, address string) (net.Conn, error) {
	a, err := netip.ParseAddrPort(address)
	if err != nil {
		return nil, err
	}
	return gonet.DialContextTCP(ctx, g.Stack, fullAddr(a), ipv4.ProtocolNumber)
}
