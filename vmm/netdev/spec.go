// Package netdev has the host's end of guests' networks: a tap interface, or a
// network in user mode that needs no privilege.
package netdev

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"

	"github.com/gnomon-vmm/gnomon/vmm/virtio"
)

// ErrSpec is the stage of errors in the text of a network option.
var ErrSpec = errors.New("network option")

// Kind is a sort of backend.
type Kind string

// Kinds of backend.
const (
	KindNone Kind = "none"
	KindUser Kind = "user"
	KindTap  Kind = "tap"
)

// Spec is a network option: what a machine's network device is connected to.
type Spec struct {
	Kind     Kind
	MAC      net.HardwareAddr // the guest's; nil: the machine chooses
	Tap      string           // KindTap: the interface
	Forwards []Forward        // KindUser
	Restrict bool             // KindUser
}

// Parse reads a network option:
//
//	none
//	user[,forward=tcp|udp:[HOSTADDR:]HOSTPORT:GUESTPORT]...[,restrict=on|off][,mac=MAC]
//	tap=NAME[,mac=MAC]
//
// A forward without HOSTADDR listens on 127.0.0.1. Errors wrap ErrSpec and say
// what is allowed.
func Parse(text string) (Spec, error) {
	kind, rest, _ := strings.Cut(text, ",")
	name, value, hasValue := strings.Cut(kind, "=")
	spec := Spec{Kind: Kind(name)}
	switch {
	case name == string(KindNone) && !hasValue:
		if rest != "" {
			return Spec{}, fmt.Errorf("%w %q: none takes no options", ErrSpec, text)
		}
		return Spec{Kind: KindNone}, nil
	case name == string(KindUser) && !hasValue:
	case name == string(KindTap):
		if err := checkTapName(value); err != nil {
			return Spec{}, fmt.Errorf("%w %q: %w", ErrSpec, text, err)
		}
		spec.Tap = value
	default:
		return Spec{}, fmt.Errorf("%w %q: want user[,...], tap=NAME[,...] or none", ErrSpec, text)
	}
	if rest == "" {
		if strings.HasSuffix(text, ",") {
			return Spec{}, fmt.Errorf("%w %q: nothing follows the comma", ErrSpec, text)
		}
		return spec, nil
	}
	seen := map[string]bool{}
	for _, option := range strings.Split(rest, ",") {
		key, value, _ := strings.Cut(option, "=")
		if seen[key] && key != "forward" {
			return Spec{}, fmt.Errorf("%w %q: %s is given twice", ErrSpec, text, key)
		}
		seen[key] = true
		if err := spec.set(key, value); err != nil {
			return Spec{}, fmt.Errorf("%w %q: %w", ErrSpec, text, err)
		}
	}
	return spec, nil
}

// set applies one key=value.
func (s *Spec) set(key, value string) error {
	switch {
	case key == "mac":
		mac, err := net.ParseMAC(value)
		if err != nil || len(mac) != 6 {
			return fmt.Errorf("mac=%s: want six hexadecimal bytes, such as 52:54:00:12:34:56", value)
		}
		if mac[0]&1 != 0 {
			return fmt.Errorf("mac=%s: the first byte must be even (an odd one means multicast)", value)
		}
		if bytes.Equal(mac, make(net.HardwareAddr, 6)) {
			return fmt.Errorf("mac=%s: all zero is nobody's address", value)
		}
		s.MAC = mac
	case key == "forward" && s.Kind == KindUser:
		f, err := parseForward(value)
		if err != nil {
			return err
		}
		s.Forwards = append(s.Forwards, f)
	case key == "restrict" && s.Kind == KindUser:
		if value != "on" && value != "off" {
			return fmt.Errorf("restrict=%s: want on or off", value)
		}
		s.Restrict = value == "on"
	case s.Kind == KindUser:
		return fmt.Errorf("unknown option %q: user takes forward=, restrict= and mac=", key)
	default:
		return fmt.Errorf("unknown option %q: tap takes mac=", key)
	}
	return nil
}

// parseForward reads PROTOCOL:[HOSTADDR:]HOSTPORT:GUESTPORT.
func parseForward(text string) (Forward, error) {
	bad := func(why string) (Forward, error) {
		return Forward{}, fmt.Errorf("forward=%s: %s: want tcp or udp:[HOSTADDR:]HOSTPORT:GUESTPORT, such as tcp:8080:80", text, why)
	}
	protocol, rest, _ := strings.Cut(text, ":")
	if protocol != "tcp" && protocol != "udp" {
		return bad(fmt.Sprintf("unknown protocol %q", protocol))
	}
	colon := strings.LastIndexByte(rest, ':')
	if colon < 0 {
		return bad("two ports are needed")
	}
	guest, err := strconv.ParseUint(rest[colon+1:], 10, 16)
	if err != nil || guest == 0 {
		return bad(fmt.Sprintf("guest port %q", rest[colon+1:]))
	}
	host := rest[:colon]
	addr := netip.AddrFrom4([4]byte{127, 0, 0, 1})
	port := host
	if colon = strings.LastIndexByte(host, ':'); colon >= 0 {
		port = host[colon+1:]
		literal := strings.TrimSuffix(strings.TrimPrefix(host[:colon], "["), "]")
		if literal != "" { // as in QEMU's option, no address is a default, not an error
			if addr, err = netip.ParseAddr(literal); err != nil {
				return bad(fmt.Sprintf("host address %q is not an IP address", literal))
			}
		}
	}
	hostPort, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return bad(fmt.Sprintf("host port %q", port))
	}
	return Forward{Protocol: protocol, Host: netip.AddrPortFrom(addr, uint16(hostPort)), Guest: uint16(guest)}, nil
}

// Open makes the backend that s describes; nil for KindNone.
func (s Spec) Open() (virtio.NetBackend, error) {
	switch s.Kind {
	case KindUser:
		u, err := NewUser(UserConfig{MAC: s.MAC, Forwards: s.Forwards, Restrict: s.Restrict})
		if err != nil {
			return nil, err
		}
		return u, nil
	case KindTap:
		t, err := OpenTap(s.Tap)
		if err != nil {
			return nil, err
		}
		return t, nil
	case KindNone:
		return nil, nil
	}
	return nil, fmt.Errorf("%w: unknown kind %q", ErrSpec, s.Kind)
}
