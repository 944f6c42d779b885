//go:build linux

package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/gnomon-vmm/gnomon/tests/guest/wire"
)

// dhcpAnswer is a server's message, made apart from the client's code.
func dhcpAnswer(xid uint32, kind byte, options ...byte) []byte {
	p := make([]byte, 236)
	p[0] = 2
	binary.BigEndian.PutUint32(p[4:], xid)
	copy(p[16:], []byte{192, 168, 7, 9})
	p = append(p, 0x63, 0x82, 0x53, 0x63, 53, 1, kind)
	return append(append(p, options...), 255)
}

func TestDecodeDHCP(t *testing.T) {
	m, err := decodeDHCP(dhcpAnswer(5, dhcpOffer, 0, 54, 4, 192, 168, 7, 1, 3, 8, 192, 168, 7, 2, 1, 1, 1, 1), 5)
	if err != nil {
		t.Fatal(err)
	}
	if m.kind != dhcpOffer || m.address != netip.MustParseAddr("192.168.7.9") {
		t.Fatalf("got %+v", m)
	}
	for code, want := range map[byte]string{optionServer: "192.168.7.1", optionRouter: "192.168.7.2"} {
		if got, ok := m.option4(code); !ok || got.String() != want {
			t.Errorf("option %d is %v", code, got)
		}
	}
	for name, p := range map[string][]byte{
		"of another transaction": dhcpAnswer(6, dhcpOffer),
		"of a client":            encodeDHCP(dhcpDiscover, 5, net.HardwareAddr{1, 2, 3, 4, 5, 6}),
		"cut short":              dhcpAnswer(5, dhcpOffer)[:239],
		"an option cut short":    dhcpAnswer(5, dhcpOffer, 3, 200, 1)[:246],
	} {
		if _, err := decodeDHCP(p, 5); !errors.Is(err, errDHCPAnswer) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzDecodeDHCP(f *testing.F) {
	f.Add(dhcpAnswer(5, dhcpAck, 1, 4, 255, 255, 255, 0, 6, 4, 8, 8, 8, 8))
	f.Add(dhcpAnswer(5, dhcpOffer, 54, 3, 1, 2, 3))
	f.Fuzz(func(t *testing.T, p []byte) {
		m, err := decodeDHCP(p, 5)
		if err != nil {
			return
		}
		for code := range m.options {
			_, _ = m.option4(code)
		}
	})
}

func TestReadHTTP(t *testing.T) {
	r, err := readHTTP(strings.NewReader("HTTP/1.1 200 OK\r\ncontent-length: 3\r\nX: y\r\n\r\nabc"))
	if err != nil || r.Status != 200 || r.Size != 3 {
		t.Fatalf("got %+v, %v", r, err)
	}
	for name, answer := range map[string]string{
		"not HTTP":       "SSH-2.0\r\n\r\n",
		"no end of head": "HTTP/1.0 200 OK\r\n",
		"a short body":   "HTTP/1.0 200 OK\r\nContent-Length: 9\r\n\r\nabc",
		"a long body":    "HTTP/1.0 200 OK\r\nContent-Length: 1\r\n\r\nabc",
		"nothing":        "",
	} {
		if _, err := readHTTP(strings.NewReader(answer)); err == nil {
			t.Errorf("%s is taken for an answer", name)
		}
	}
}

func TestAnswerHTTP(t *testing.T) {
	for _, c := range []struct {
		request string
		status  int
		want    wire.SumResult
	}{
		{"GET /pattern?seed=4&size=70000 HTTP/1.1\r\nHost: x\r\n\r\n", 200, wire.PatternSum(4, 70000)},
		{"GET /pattern?seed=4&size=-1 HTTP/1.1\r\n\r\n", 400, wire.PatternSum(0, 0)},
		{"POST / HTTP/1.1\r\n\r\n", 400, wire.PatternSum(0, 0)},
	} {
		ours, theirs := net.Pipe()
		go func() {
			_ = answerHTTP(theirs)
			_ = theirs.Close()
		}()
		go func() { _, _ = io.WriteString(ours, c.request) }()
		got, err := readHTTP(ours)
		if err != nil || got.Status != c.status || got.SumResult != c.want {
			t.Errorf("%q: got %+v, %v", c.request, got, err)
		}
		_ = ours.Close()
	}
}

func TestWaitPowerKey(t *testing.T) {
	event := func(kind, code uint16, value uint32) []byte {
		p := make([]byte, 24)
		binary.LittleEndian.PutUint16(p[16:], kind)
		binary.LittleEndian.PutUint16(p[18:], code)
		binary.LittleEndian.PutUint32(p[20:], value)
		return p
	}
	others := bytes.Join([][]byte{event(0, 0, 0), event(1, 116, 0), event(1, 30, 1)}, nil)
	if err := waitPowerKey(bytes.NewReader(others)); !errors.Is(err, io.EOF) {
		t.Errorf("other events: %v", err)
	}
	if err := waitPowerKey(bytes.NewReader(append(others, event(1, 116, 1)...))); err != nil {
		t.Error(err)
	}
}

func TestLimitedKeepsTheBeginning(t *testing.T) {
	var l limited
	chunk := bytes.Repeat([]byte("a"), wire.MaxOutput-1)
	for range 3 {
		if n, err := l.Write(chunk); n != len(chunk) || err != nil {
			t.Fatal(n, err)
		}
	}
	if l.Len() != wire.MaxOutput {
		t.Fatalf("kept %d bytes", l.Len())
	}
}
