//go:build linux

package main

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/tests/guest/wire"
)

// DHCP, as far as a client that asks once needs it (RFC 2131, RFC 2132).
const (
	dhcpServerPort = 67
	dhcpClientPort = 68
	dhcpFixed      = 236 // bytes before the magic cookie
	dhcpMagic      = 0x63825363
	dhcpBroadcast  = 0x8000 // flag: answer by broadcast, we have no address yet

	optionPad       = 0
	optionMask      = 1
	optionRouter    = 3
	optionDNS       = 6
	optionRequested = 50
	optionLease     = 51
	optionType      = 53
	optionServer    = 54
	optionWanted    = 55
	optionEnd       = 255

	dhcpDiscover = 1
	dhcpOffer    = 2
	dhcpRequest  = 3
	dhcpAck      = 5
	dhcpNak      = 6
)

var errDHCPAnswer = errors.New("not an answer to us")

type dhcpMessage struct {
	kind    byte
	address netip.Addr
	options map[byte][]byte
}

// option4 is an option's first IPv4 address, if it has one.
func (m dhcpMessage) option4(code byte) (netip.Addr, bool) {
	v := m.options[code]
	if len(v) < 4 {
		return netip.Addr{}, false
	}
	return netip.AddrFrom4([4]byte(v[:4])), true
}

func encodeDHCP(kind byte, xid uint32, mac net.HardwareAddr, extra ...byte) []byte {
	p := make([]byte, dhcpFixed, 300)
	p[0], p[1], p[2] = 1, 1, 6 // BOOTREQUEST, Ethernet, 6 bytes of address
	binary.BigEndian.PutUint32(p[4:], xid)
	binary.BigEndian.PutUint16(p[10:], dhcpBroadcast)
	copy(p[28:34], mac)
	p = binary.BigEndian.AppendUint32(p, dhcpMagic)
	p = append(p, optionType, 1, kind)
	p = append(p, optionWanted, 3, optionMask, optionRouter, optionDNS)
	p = append(p, extra...)
	p = append(p, optionEnd)
	// Some servers drop what is shorter than a BOOTP packet.
	return append(p, make([]byte, max(0, 300-len(p)))...)
}

func decodeDHCP(p []byte, xid uint32) (dhcpMessage, error) {
	if len(p) < dhcpFixed+4 || p[0] != 2 || binary.BigEndian.Uint32(p[4:]) != xid ||
		binary.BigEndian.Uint32(p[dhcpFixed:]) != dhcpMagic {
		return dhcpMessage{}, errDHCPAnswer
	}
	m := dhcpMessage{address: netip.AddrFrom4([4]byte(p[16:20])), options: map[byte][]byte{}}
	for o := p[dhcpFixed+4:]; len(o) > 0 && o[0] != optionEnd; {
		if o[0] == optionPad {
			o = o[1:]
			continue
		}
		if len(o) < 2 || len(o) < 2+int(o[1]) {
			return dhcpMessage{}, fmt.Errorf("%w: option %d is cut short", errDHCPAnswer, o[0])
		}
		m.options[o[0]] = o[2 : 2+int(o[1])]
		o = o[2+int(o[1]):]
	}
	if len(m.options[optionType]) != 1 {
		return dhcpMessage{}, fmt.Errorf("%w: no message type", errDHCPAnswer)
	}
	m.kind = m.options[optionType][0]
	return m, nil
}

// dhcp asks for an address, takes it, and applies it.
func dhcp(ctx context.Context, args wire.LinkArgs) (any, error) {
	name := interfaceName(args.Interface)
	if err := bringUp(name); err != nil {
		return nil, fmt.Errorf("switch on %s: %w", name, err)
	}
	i, err := net.InterfaceByName(name)
	if err != nil {
		return nil, err
	}
	conn, err := dhcpSocket(name)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(0, 0)) })
	defer stop()
	var id [4]byte
	if _, err := rand.Read(id[:]); err != nil {
		return nil, err
	}
	xid := binary.BigEndian.Uint32(id[:])

	offer, err := askDHCP(ctx, conn, xid, encodeDHCP(dhcpDiscover, xid, i.HardwareAddr), dhcpOffer)
	if err != nil {
		return nil, fmt.Errorf("discover: %w", err)
	}
	server, ok := offer.option4(optionServer)
	if !ok {
		return nil, errors.New("discover: the offer names no server")
	}
	extra := []byte{optionRequested, 4}
	extra = append(extra, offer.address.AsSlice()...)
	extra = append(extra, optionServer, 4)
	extra = append(extra, server.AsSlice()...)
	ack, err := askDHCP(ctx, conn, xid, encodeDHCP(dhcpRequest, xid, i.HardwareAddr, extra...), dhcpAck)
	if err != nil {
		return nil, fmt.Errorf("request %s: %w", offer.address, err)
	}
	return ack.apply(name, server)
}

// apply gives the interface what the acknowledgement says.
func (m dhcpMessage) apply(name string, server netip.Addr) (wire.DHCPResult, error) {
	bits := 24
	if mask := m.options[optionMask]; len(mask) == 4 {
		bits, _ = net.IPMask(mask).Size()
	}
	n := network{address: netip.PrefixFrom(m.address, bits)}
	r := wire.DHCPResult{Address: n.address.String(), Server: server.String()}
	if router, ok := m.option4(optionRouter); ok {
		n.router, r.Router = router, router.String()
	}
	for v := m.options[optionDNS]; len(v) >= 4; v = v[4:] {
		d := netip.AddrFrom4([4]byte(v[:4]))
		n.dns, r.DNS = append(n.dns, d), append(r.DNS, d.String())
	}
	if v := m.options[optionLease]; len(v) == 4 {
		r.LeaseS = binary.BigEndian.Uint32(v)
	}
	return r, n.apply(name)
}

// dhcpSocket is a UDP socket that works without an address on the interface.
func dhcpSocket(name string) (net.PacketConn, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "dhcp")
	defer f.Close() // FilePacketConn has its own copy
	if err := unix.BindToDevice(fd, name); err != nil {
		return nil, fmt.Errorf("bind to %s: %w", name, err)
	}
	for _, option := range []int{unix.SO_BROADCAST, unix.SO_REUSEADDR} {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, option, 1); err != nil {
			return nil, err
		}
	}
	if err := unix.Bind(fd, &unix.SockaddrInet4{Port: dhcpClientPort}); err != nil {
		return nil, fmt.Errorf("bind to port %d: %w", dhcpClientPort, err)
	}
	return net.FilePacketConn(f)
}

// askDHCP sends a message, again every few seconds, until the wanted answer
// comes or half a minute is over.
func askDHCP(ctx context.Context, conn net.PacketConn, xid uint32, message []byte, wanted byte) (dhcpMessage, error) {
	const (
		attempts = 6
		patience = 5 * time.Second
	)
	to := &net.UDPAddr{IP: net.IPv4bcast, Port: dhcpServerPort}
	answer := make([]byte, 1500)
	for range attempts {
		if err := ctx.Err(); err != nil {
			return dhcpMessage{}, err
		}
		if _, err := conn.WriteTo(message, to); err != nil {
			return dhcpMessage{}, err
		}
		if err := conn.SetReadDeadline(time.Now().Add(patience)); err != nil {
			return dhcpMessage{}, err
		}
		for {
			n, _, err := conn.ReadFrom(answer)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				break
			}
			if err != nil {
				return dhcpMessage{}, err
			}
			m, err := decodeDHCP(answer[:n], xid)
			if err != nil {
				continue
			}
			switch m.kind {
			case wanted:
				return m, nil
			case dhcpNak:
				return dhcpMessage{}, errors.New("the server refuses")
			}
		}
	}
	return dhcpMessage{}, errors.New("no answer")
}
