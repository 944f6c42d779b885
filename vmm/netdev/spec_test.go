package netdev

import (
	"errors"
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

func TestParse(t *testing.T) {
	forward := func(protocol, host string, guest uint16) Forward {
		return Forward{Protocol: protocol, Host: netip.MustParseAddrPort(host), Guest: guest}
	}
	mac := net.HardwareAddr{2, 0, 0, 0, 0, 9}
	for text, want := range map[string]Spec{
		"none":                           {Kind: KindNone},
		"user":                           {Kind: KindUser},
		"user,restrict=on":               {Kind: KindUser, Restrict: true},
		"user,restrict=off":              {Kind: KindUser},
		"tap=tap0":                       {Kind: KindTap, Tap: "tap0"},
		"tap=tap0,mac=02:00:00:00:00:09": {Kind: KindTap, MAC: mac, Tap: "tap0"},
		"user,forward=tcp:8080:80": {Kind: KindUser, Forwards: []Forward{
			forward("tcp", "127.0.0.1:8080", 80),
		}},
		"user,forward=tcp::8080:80,forward=udp:0.0.0.0:53:5353,mac=02:00:00:00:00:09,forward=tcp:[::1]:0:22": {
			Kind: KindUser, MAC: mac, Forwards: []Forward{
				forward("tcp", "127.0.0.1:8080", 80), forward("udp", "0.0.0.0:53", 5353), forward("tcp", "[::1]:0", 22),
			},
		},
	} {
		got, err := Parse(text)
		if err != nil {
			t.Errorf("%s: %v", text, err)
		}
		if d := cmp.Diff(want, got, cmpopts.EquateComparable(netip.AddrPort{})); d != "" {
			t.Errorf("%s: %s", text, d)
		}
	}
}

func TestParseRefuses(t *testing.T) {
	for text, want := range map[string]string{
		"":                               "want user[,...], tap=NAME[,...] or none",
		"bridge":                         "want user[,...], tap=NAME[,...] or none",
		"user=x":                         "want user[,...], tap=NAME[,...] or none",
		"none=1":                         "want user[,...], tap=NAME[,...] or none",
		"none,mac=02:00:00:00:00:09":     "none takes no options",
		"tap":                            "interface name",
		"tap=":                           "interface name",
		"tap=a b":                        "interface name",
		"tap=tap0,forward=tcp:1:2":       "tap takes mac=",
		"user,":                          "nothing follows the comma",
		"user,hostfwd=tcp::1-:2":         "user takes forward=, restrict= and mac=",
		"user,restrict=yes":              "want on or off",
		"user,restrict=on,restrict=on":   "given twice",
		"user,mac=1:2":                   "six hexadecimal bytes",
		"user,mac=03:00:00:00:00:00":     "multicast",
		"user,mac=00:00:00:00:00:00:0:0": "six hexadecimal bytes",
		"user,forward=":                  "unknown protocol",
		"user,forward=sctp:1:2":          "unknown protocol",
		"user,forward=tcp:80":            "two ports",
		"user,forward=tcp:80:0":          "guest port",
		"user,forward=tcp:80:65536":      "guest port",
		"user,forward=tcp:x:80":          "host port",
		"user,forward=tcp:host:1:80":     "not an IP address",
	} {
		if _, err := Parse(text); !errors.Is(err, ErrSpec) || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{"none", "user,forward=tcp:[::1]:0:22,restrict=on", "tap=tap0,mac=02:00:00:00:00:09", "user,forward=udp::1:2"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		s, err := Parse(text)
		if err != nil {
			if !errors.Is(err, ErrSpec) {
				t.Errorf("%q: %v", text, err)
			}
			return
		}
		for _, fw := range s.Forwards {
			again, err := Parse("user,forward=" + fw.String())
			if err != nil || len(again.Forwards) != 1 || again.Forwards[0] != fw {
				t.Errorf("%q: forward %v reads as %v, %v", text, fw, again.Forwards, err)
			}
		}
	})
}
