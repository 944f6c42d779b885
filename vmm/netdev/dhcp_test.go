package netdev

import (
	"encoding/binary"
	"net"
	"net/netip"
	"testing"

	"github.com/insomniacslk/dhcp/dhcpv4"
)

// TestLeasesEnd: each client keeps its address, no two have the same, none has
// one of the network's own, and a guest that invents clients runs out of them.
func TestLeasesEnd(t *testing.T) {
	l := leases{}
	seen := map[netip.Addr]bool{UserGateway: true, UserDNS: true, netip.MustParseAddr("10.0.2.255"): true}
	mac := func(i int) net.HardwareAddr {
		return binary.BigEndian.AppendUint32([]byte{2, 0}, uint32(i))
	}
	n := 0
	for ; n < 1000; n++ {
		ip, ok := l.lease(mac(n))
		if !ok {
			break
		}
		if seen[ip] || !UserSubnet.Contains(ip) {
			t.Fatalf("client %d gets %s", n, ip)
		}
		seen[ip] = true
	}
	if n != 255-15 || len(l) != n {
		t.Errorf("%d clients have an address, %d are kept; want 240", n, len(l))
	}
	if ip, ok := l.lease(mac(0)); !ok || ip != UserGuest {
		t.Errorf("the first client's address is now %s", ip)
	}
	if _, ok := l.lease(net.HardwareAddr{1, 2, 3}); ok {
		t.Error("three bytes are a MAC address")
	}
}

func FuzzDHCP(f *testing.F) {
	discover, err := dhcpv4.NewDiscovery(guestMAC)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(discover.ToBytes())
	f.Add(discover.ToBytes()[:240])
	f.Fuzz(func(t *testing.T, message []byte) {
		l := leases{}
		reply := l.answer(message)
		if reply == nil {
			return
		}
		m, err := dhcpv4.FromBytes(reply)
		if err != nil || m.OpCode != dhcpv4.OpcodeBootReply || !m.YourIPAddr.Equal(UserGuest.AsSlice()) {
			t.Errorf("reply %x: %v", reply, err)
		}
	})
}
