package netdev

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/miekg/dns"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"

	"github.com/gnomon-vmm/gnomon/vmm/virtio"
)

// patience is how long a test waits for what must happen.
const patience = 30 * time.Second

func newUser(t testing.TB, config UserConfig) *User {
	t.Helper()
	u, err := NewUser(config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := u.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return u
}

func userGuest(t testing.TB, u *User, features uint64) *guestStack {
	return newGuestStack(t, u, features, netip.PrefixFrom(UserGuest, 24), UserGateway)
}

// udpFrame is an Ethernet frame with one UDP datagram.
func udpFrame(src, dst netip.AddrPort, dstMAC tcpip.LinkAddress, payload []byte) []byte {
	frame := make([]byte, header.EthernetMinimumSize+header.IPv4MinimumSize+header.UDPMinimumSize+len(payload))
	header.Ethernet(frame).Encode(&header.EthernetFields{SrcAddr: tcpip.LinkAddress(guestMAC), DstAddr: dstMAC, Type: header.IPv4ProtocolNumber})
	ip := header.IPv4(frame[header.EthernetMinimumSize:])
	ip.Encode(&header.IPv4Fields{
		TotalLength: uint16(len(ip)), TTL: 64, Protocol: uint8(header.UDPProtocolNumber),
		SrcAddr: stackAddr(src.Addr()), DstAddr: stackAddr(dst.Addr()),
	})
	ip.SetChecksum(^ip.CalculateChecksum())
	u := header.UDP(ip.Payload())
	u.Encode(&header.UDPFields{SrcPort: src.Port(), DstPort: dst.Port(), Length: uint16(len(u))})
	copy(u.Payload(), payload)
	sum := header.PseudoHeaderChecksum(header.UDPProtocolNumber, stackAddr(src.Addr()), stackAddr(dst.Addr()), uint16(len(u)))
	u.SetChecksum(^u.CalculateChecksum(checksum.Checksum(payload, sum)))
	return frame
}

// TestUserDHCP takes a lease as a guest's client does, frame by frame.
func TestUserDHCP(t *testing.T) {
	t.Run("first", func(t *testing.T) { takeLease(t, newUser(t, UserConfig{}), UserGuest) })
	t.Run("known", func(t *testing.T) { takeLease(t, newUser(t, UserConfig{MAC: guestMAC}), UserGuest) })
	t.Run("other", func(t *testing.T) {
		takeLease(t, newUser(t, UserConfig{MAC: net.HardwareAddr{2, 0, 0, 0, 0, 9}}), UserGuest.Next())
	})
}

func takeLease(t *testing.T, u *User, want netip.Addr) {
	w := newWire(t, u, 0)
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	exchange := func(m *dhcpv4.DHCPv4) *dhcpv4.DHCPv4 {
		t.Helper()
		if err := w.send(virtio.NetHeader{}, udpFrame(mustAddrPort("0.0.0.0", 68), mustAddrPort("255.255.255.255", 67),
			header.EthernetBroadcastAddress, m.ToBytes())); err != nil {
			t.Fatal(err)
		}
		for {
			_, frame, err := w.receive(ctx)
			if err != nil {
				t.Fatal(err)
			}
			ip := header.IPv4(frame[header.EthernetMinimumSize:])
			if header.Ethernet(frame).Type() != header.IPv4ProtocolNumber || ip.TransportProtocol() != header.UDPProtocolNumber {
				continue
			}
			reply, err := dhcpv4.FromBytes(header.UDP(ip.Payload()).Payload())
			if err != nil {
				t.Fatal(err)
			}
			if reply.TransactionID == m.TransactionID {
				return reply
			}
		}
	}
	discover, err := dhcpv4.NewDiscovery(guestMAC)
	if err != nil {
		t.Fatal(err)
	}
	offer := exchange(discover)
	if offer.MessageType() != dhcpv4.MessageTypeOffer || !offer.YourIPAddr.Equal(want.AsSlice()) {
		t.Fatalf("offer: %s", offer.Summary())
	}
	request, err := dhcpv4.NewRequestFromOffer(offer)
	if err != nil {
		t.Fatal(err)
	}
	ack := exchange(request)
	if ack.MessageType() != dhcpv4.MessageTypeAck || !ack.YourIPAddr.Equal(want.AsSlice()) {
		t.Errorf("ack: %s", ack.Summary())
	}
	if r := ack.Router(); len(r) != 1 || !r[0].Equal(UserGateway.AsSlice()) {
		t.Errorf("router %v", r)
	}
	if d := ack.DNS(); len(d) != 1 || !d[0].Equal(UserGateway.AsSlice()) {
		t.Errorf("DNS %v", d)
	}
	if m := ack.SubnetMask(); m.String() != "ffffff00" {
		t.Errorf("mask %v", m)
	}
}

// TestUserARP: the gateway and the DNS server answer, and nobody claims the
// guest's own address or another's.
func TestUserARP(t *testing.T) {
	u := newUser(t, UserConfig{})
	w := newWire(t, u, 0)
	ask := func(target netip.Addr) {
		frame := make([]byte, header.EthernetMinimumSize+header.ARPSize)
		header.Ethernet(frame).Encode(&header.EthernetFields{SrcAddr: tcpip.LinkAddress(guestMAC), DstAddr: header.EthernetBroadcastAddress, Type: header.ARPProtocolNumber})
		a := header.ARP(frame[header.EthernetMinimumSize:])
		a.SetIPv4OverEthernet()
		a.SetOp(header.ARPRequest)
		copy(a.HardwareAddressSender(), guestMAC)
		copy(a.ProtocolAddressSender(), UserGuest.AsSlice())
		copy(a.ProtocolAddressTarget(), target.AsSlice())
		if err := w.send(virtio.NetHeader{}, frame); err != nil {
			t.Fatal(err)
		}
	}
	// Replies come in order, so what is missing before the last one was not sent.
	for _, ip := range []string{"10.0.2.15", "10.0.2.77", "192.0.2.1", "10.0.2.3", "10.0.2.2"} {
		ask(netip.MustParseAddr(ip))
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for _, want := range []netip.Addr{UserDNS, UserGateway} {
		_, frame, err := w.receive(ctx)
		if err != nil {
			t.Fatal(err)
		}
		a := header.ARP(frame[header.EthernetMinimumSize:])
		got, _ := netip.AddrFromSlice(a.ProtocolAddressSender())
		if a.Op() != header.ARPReply || got != want || !bytes.Equal(a.HardwareAddressSender(), userGatewayMAC) {
			t.Errorf("reply %x says %v, want %v", frame, got, want)
		}
	}
}

// TestUserFetch fetches from a server on the host's loopback, without and with
// offloads, and checks what arrives.
func TestUserFetch(t *testing.T) {
	data := make([]byte, 4<<20)
	rng := rand.NewChaCha8([32]byte{1})
	_, _ = rng.Read(data)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		_, _ = w.Write(data)
	}))
	defer server.Close()
	_, port, _ := net.SplitHostPort(server.Listener.Addr().String())
	for name, features := range map[string]uint64{
		"plain": 0, "offloads": virtio.NetOffloadGuestCSum | virtio.NetOffloadGuestTSO4,
	} {
		t.Run(name, func(t *testing.T) {
			g := userGuest(t, newUser(t, UserConfig{}), features)
			client := http.Client{Transport: &http.Transport{DialContext: g.dial, DisableKeepAlives: true}}
			resp, err := client.Post("http://10.0.2.2:"+port+"/", "", bytes.NewReader(data[:1<<20]))
			if err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(resp.Body)
			resp.Body.Close()
			if err != nil || sha256.Sum256(got) != sha256.Sum256(data) {
				t.Fatalf("%d bytes, %v", len(got), err)
			}
			if big := g.largestFrame() > 1514; big != (features != 0) {
				t.Errorf("largest frame %d bytes", g.largestFrame())
			}
		})
	}
}

// TestUserRefused: what nobody listens on, and what the guest must not reach,
// is refused at once.
func TestUserRefused(t *testing.T) {
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_, port, _ := net.SplitHostPort(free.Addr().String())
	free.Close()
	server := httptest.NewServer(http.NotFoundHandler())
	defer server.Close()
	_, served, _ := net.SplitHostPort(server.Listener.Addr().String())
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()

	g := userGuest(t, newUser(t, UserConfig{}), 0)
	for _, address := range []string{"10.0.2.2:" + port, "10.0.2.9:" + served, "169.254.169.254:80"} {
		if c, err := g.dial(ctx, "tcp", address); err == nil || errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("dial %s: %v %v", address, c, err)
		}
	}
	restricted := userGuest(t, newUser(t, UserConfig{Restrict: true}), 0)
	if c, err := restricted.dial(ctx, "tcp", "10.0.2.2:"+served); err == nil || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("restricted guest: %v %v", c, err)
	}
}

// TestUserDNS asks both addresses, by UDP and TCP, for the host's name.
func TestUserDNS(t *testing.T) {
	g := userGuest(t, newUser(t, UserConfig{}), 0)
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for _, server := range []netip.Addr{UserGateway, UserDNS} {
		for _, network := range []string{"udp", "tcp"} {
			var conn net.Conn
			var err error
			address := netip.AddrPortFrom(server, 53)
			if network == "tcp" {
				conn, err = g.dial(ctx, "tcp", address.String())
			} else {
				remote := fullAddr(address)
				conn, err = gonet.DialUDP(g.Stack, nil, &remote, ipv4.ProtocolNumber)
			}
			if err != nil {
				t.Fatal(err)
			}
			m := new(dns.Msg).SetQuestion("host.gnomon.internal.", dns.TypeA)
			client := dns.Client{Net: network, Timeout: patience}
			reply, _, err := client.ExchangeWithConn(m, &dns.Conn{Conn: conn})
			conn.Close()
			if err != nil {
				t.Fatalf("%s %s: %v", network, server, err)
			}
			if len(reply.Answer) != 1 || !reply.Answer[0].(*dns.A).A.Equal(UserGateway.AsSlice()) {
				t.Errorf("%s %s: %v", network, server, reply)
			}
		}
	}
}

// TestUserUDP echoes datagrams off the host, more flows than may be open.
func TestUserUDP(t *testing.T) {
	host, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()
	go func() {
		var buf [2048]byte
		for {
			n, from, err := host.ReadFrom(buf[:])
			if err != nil {
				return
			}
			_, _ = host.WriteTo(buf[:n], from)
		}
	}()
	u := newUser(t, UserConfig{})
	g := userGuest(t, u, 0)
	remote := fullAddr(netip.AddrPortFrom(UserGateway, host.LocalAddr().(*net.UDPAddr).AddrPort().Port()))
	for i := range maxUDPFlows + 20 {
		conn, err := gonet.DialUDP(g.Stack, nil, &remote, ipv4.ProtocolNumber)
		if err != nil {
			t.Fatal(err)
		}
		_ = conn.SetDeadline(time.Now().Add(patience))
		want := []byte{byte(i), byte(i >> 8), 'x'}
		if _, err := conn.Write(want); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, 10)
		n, err := conn.Read(got)
		if err != nil || !bytes.Equal(got[:n], want) {
			t.Fatalf("flow %d: %q, %v", i, got[:n], err)
		}
		conn.Close()
	}
	u.nat.mu.Lock()
	defer u.nat.mu.Unlock()
	if len(u.nat.flows) > maxUDPFlows {
		t.Errorf("%d flows are open", len(u.nat.flows))
	}
}

// TestUserForward reaches servers in the guest through ports of the host.
func TestUserForward(t *testing.T) {
	loopback := mustAddrPort("127.0.0.1", 0)
	u := newUser(t, UserConfig{Restrict: true, Forwards: []Forward{
		{Protocol: "tcp", Host: loopback, Guest: 80}, {Protocol: "udp", Host: loopback, Guest: 7},
	}})
	g := userGuest(t, u, virtio.NetOffloadGuestCSum|virtio.NetOffloadGuestTSO4)
	listener, err := gonet.ListenTCP(g.Stack, fullAddr(netip.AddrPortFrom(UserGuest, 80)), ipv4.ProtocolNumber)
	if err != nil {
		t.Fatal(err)
	}
	// The guest echoes, and ends only after it has seen the end.
	go func() {
		for {
			c, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				_, _ = io.Copy(c, c)
				c.Close()
			}()
		}
	}()
	defer listener.Close()
	conn, err := net.Dial("tcp", u.Forwards()[0].Host.String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(patience))
	data := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
	go func() {
		_, _ = conn.Write(data)
		_ = conn.(*net.TCPConn).CloseWrite()
	}()
	got, err := io.ReadAll(conn)
	if err != nil || !bytes.Equal(got, data) {
		t.Fatalf("%d of %d bytes back, %v", len(got), len(data), err)
	}

	local := fullAddr(netip.AddrPortFrom(UserGuest, 7))
	echo, err := gonet.DialUDP(g.Stack, &local, nil, ipv4.ProtocolNumber)
	if err != nil {
		t.Fatal(err)
	}
	defer echo.Close()
	go func() {
		var buf [2048]byte
		for {
			n, from, err := echo.ReadFrom(buf[:])
			if err != nil {
				return
			}
			_, _ = echo.WriteTo(append([]byte("re: "), buf[:n]...), from)
		}
	}()
	client, err := net.Dial("udp", u.Forwards()[1].Host.String())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	_ = client.SetDeadline(time.Now().Add(patience))
	for _, s := range []string{"one", "two"} {
		if _, err := client.Write([]byte(s)); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 100)
		n, err := client.Read(buf)
		if err != nil || string(buf[:n]) != "re: "+s {
			t.Fatalf("%q, %v", buf[:n], err)
		}
	}
}

// TestUserPortTaken: the error is one line that names the port, and nothing
// stays open.
func TestUserPortTaken(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	port := taken.Addr().(*net.TCPAddr).AddrPort()
	_, err = NewUser(UserConfig{Forwards: []Forward{{Protocol: "tcp", Host: port, Guest: 80}}})
	if !errors.Is(err, ErrUser) || !strings.Contains(err.Error(), "is taken on this host: choose another") || strings.Contains(err.Error(), "\n") {
		t.Errorf("error %q", err)
	}
}

// TestUserClose frees ports and ends connections that are open.
func TestUserClose(t *testing.T) {
	u, err := NewUser(UserConfig{Forwards: []Forward{{Protocol: "tcp", Host: mustAddrPort("127.0.0.1", 0), Guest: 80}}})
	if err != nil {
		t.Fatal(err)
	}
	g := userGuest(t, u, 0)
	server, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if _, err := g.dial(ctx, "tcp", netip.AddrPortFrom(UserGateway, server.Addr().(*net.TCPAddr).AddrPort().Port()).String()); err != nil {
		t.Fatal(err)
	}
	host, err := server.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()
	if err := u.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := host.Read(make([]byte, 1)); err == nil {
		t.Error("the host's connection is still open")
	}
	again, err := net.Listen("tcp", u.Forwards()[0].Host.String())
	if err != nil {
		t.Fatalf("forwarded port is still taken: %v", err)
	}
	again.Close()
}

// TestUserHostileFrames: nothing a guest sends does more than get lost.
func TestUserHostileFrames(t *testing.T) {
	u := newUser(t, UserConfig{})
	w := newWire(t, u, 0)
	rng := rand.New(rand.NewPCG(1, 2))
	for i := range 2000 {
		frame := make([]byte, rng.IntN(200))
		for j := range frame {
			frame[j] = byte(rng.Uint32())
		}
		if len(frame) > 23 && i%2 == 0 {
			copy(frame, userGatewayMAC)
			copy(frame[12:], []byte{8, byte(6 * (i / 2 % 2)), 0x45})
			copy(frame[23:], []byte{[]byte{1, 6, 17}[i%3]})
		}
		_ = w.send(virtio.NetHeader{}, frame)
	}
	if err := w.send(virtio.NetHeader{}, make([]byte, virtio.MaxFrameSize)); err == nil {
		t.Error("a frame longer than any was taken")
	}
	u.link.mu.Lock()
	waiting := len(u.link.waiting)
	u.link.mu.Unlock()
	if waiting > userQueueFrames {
		t.Errorf("%d frames wait", waiting)
	}
}

// TestHostAddr: which host addresses stand behind those a guest names.
func TestHostAddr(t *testing.T) {
	for guest, want := range map[string]string{
		"10.0.2.2":        "127.0.0.1", // the host itself
		"10.0.2.3":        "",          // DNS alone
		"10.0.2.9":        "",          // nobody on this network
		"10.0.3.9":        "10.0.3.9",
		"93.184.216.34":   "93.184.216.34",
		"127.0.0.1":       "",
		"0.0.0.0":         "",
		"255.255.255.255": "",
		"224.0.0.251":     "",
		"169.254.169.254": "", // cloud metadata
	} {
		got, ok := hostAddr(stackAddr(netip.MustParseAddr(guest)), 80)
		if ok != (want != "") || ok && got != mustAddrPort(want, 80) {
			t.Errorf("%s leads to %v, %v", guest, got, ok)
		}
	}
}
