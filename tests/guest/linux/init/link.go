//go:build linux

package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/tests/guest/wire"
)

const defaultInterface = "eth0"

func interfaceName(name string) string {
	if name == "" {
		return defaultInterface
	}
	return name
}

// withSocket runs f with a socket for interface ioctls.
func withSocket(f func(fd int) error) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	return f(fd)
}

// bringUp switches an interface on.
func bringUp(name string) error {
	return withSocket(func(fd int) error {
		ifr, err := unix.NewIfreq(name)
		if err != nil {
			return err
		}
		if err := unix.IoctlIfreq(fd, unix.SIOCGIFFLAGS, ifr); err != nil {
			return err
		}
		if ifr.Uint16()&unix.IFF_UP != 0 {
			return nil
		}
		ifr.SetUint16(ifr.Uint16() | unix.IFF_UP)
		return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr)
	})
}

// network is what an interface is given, by hand or by DHCP.
type network struct {
	address netip.Prefix
	router  netip.Addr // zero: none
	dns     []netip.Addr
}

// apply gives an interface its address, the default route and the resolvers.
func (n network) apply(name string) error {
	if err := bringUp(name); err != nil {
		return fmt.Errorf("switch on %s: %w", name, err)
	}
	err := withSocket(func(fd int) error {
		mask := net.CIDRMask(n.address.Bits(), 32)
		address := n.address.Addr().As4()
		for _, set := range []struct {
			request uint
			value   []byte
		}{
			{unix.SIOCSIFADDR, address[:]},
			{unix.SIOCSIFNETMASK, mask},
		} {
			ifr, err := unix.NewIfreq(name)
			if err != nil {
				return err
			}
			if err := ifr.SetInet4Addr(set.value); err != nil {
				return err
			}
			if err := unix.IoctlIfreq(fd, set.request, ifr); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("give %s the address %s: %w", name, n.address, err)
	}
	if n.router.IsValid() {
		if err := addDefaultRoute(n.router); err != nil {
			return fmt.Errorf("route by %s: %w", n.router, err)
		}
	}
	var conf strings.Builder
	for _, d := range n.dns {
		fmt.Fprintf(&conf, "nameserver %s\n", d)
	}
	_ = os.Mkdir("/etc", 0o755)
	return os.WriteFile("/etc/resolv.conf", []byte(conf.String()), 0o644)
}

// addDefaultRoute sends one RTM_NEWROUTE (rtnetlink(7)) and reads its
// acknowledgement.
func addDefaultRoute(router netip.Addr) error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	gateway := router.As4()
	const size = unix.SizeofNlMsghdr + unix.SizeofRtMsg + unix.SizeofRtAttr + len(gateway)
	m := make([]byte, 0, size)
	le := binary.LittleEndian
	m = le.AppendUint32(m, uint32(size))
	m = le.AppendUint16(m, unix.RTM_NEWROUTE)
	m = le.AppendUint16(m, unix.NLM_F_REQUEST|unix.NLM_F_ACK|unix.NLM_F_CREATE|unix.NLM_F_REPLACE)
	m = le.AppendUint32(m, 1) // sequence
	m = le.AppendUint32(m, 0) // the kernel fills in our port
	m = append(m, unix.AF_INET, 0, 0, 0, unix.RT_TABLE_MAIN, unix.RTPROT_BOOT, unix.RT_SCOPE_UNIVERSE, unix.RTN_UNICAST)
	m = le.AppendUint32(m, 0) // flags
	m = le.AppendUint16(m, uint16(unix.SizeofRtAttr+len(gateway)))
	m = le.AppendUint16(m, unix.RTA_GATEWAY)
	m = append(m, gateway[:]...)
	if err := unix.Sendto(fd, m, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	answer := make([]byte, 512)
	n, _, err := unix.Recvfrom(fd, answer, 0)
	if err != nil {
		return err
	}
	if n < unix.SizeofNlMsghdr+4 || le.Uint16(answer[4:]) != unix.NLMSG_ERROR {
		return fmt.Errorf("%d bytes of an answer to RTM_NEWROUTE are not an acknowledgement", n)
	}
	if errno := int32(le.Uint32(answer[unix.SizeofNlMsghdr:])); errno != 0 {
		return unix.Errno(-errno)
	}
	return nil
}

func setAddress(_ context.Context, args wire.AddressArgs) (any, error) {
	prefix, err := netip.ParsePrefix(args.Address)
	if err != nil {
		return nil, err
	}
	if !prefix.Addr().Is4() {
		return nil, fmt.Errorf("%s: this kernel speaks IPv4 only", prefix)
	}
	n := network{address: prefix}
	if args.Router != "" {
		if n.router, err = netip.ParseAddr(args.Router); err != nil {
			return nil, err
		}
	}
	for _, d := range args.DNS {
		a, err := netip.ParseAddr(d)
		if err != nil {
			return nil, err
		}
		n.dns = append(n.dns, a)
	}
	return nil, n.apply(interfaceName(args.Interface))
}

func linkState(_ context.Context, args wire.LinkArgs) (any, error) {
	name := interfaceName(args.Interface)
	// A link that is administratively down has no carrier to show.
	if err := bringUp(name); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	i, err := net.InterfaceByName(name)
	if err != nil {
		return nil, err
	}
	carrier, err := os.ReadFile("/sys/class/net/" + name + "/carrier")
	if err != nil {
		return nil, err
	}
	r := wire.LinkResult{
		MAC:     i.HardwareAddr.String(),
		MTU:     i.MTU,
		Up:      i.Flags&net.FlagUp != 0,
		Carrier: strings.TrimSpace(string(carrier)) == "1",
	}
	addresses, err := i.Addrs()
	if err != nil {
		return nil, err
	}
	if len(addresses) > 0 {
		r.Address = addresses[0].String()
	}
	return r, nil
}
