package owner

import (
	"bufio"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
)

// The release protocol: docs/owner-format.md, "Asking for a release". Each message
// is a line with a JSON object.

// ErrProtocol is a peer that does not speak the release protocol.
var ErrProtocol = errors.New("release protocol")

// messageLimit is the longest line in bytes.
const messageLimit = 4096

// greeting is what an owner says first.
type greeting struct {
	Owner string `json:"gnomon-owner"`
	Nonce string `json:"nonce"`
}

// request is what who wants the disk says.
type request struct {
	Execute string `json:"execute"` // "release"
	Owner   string `json:"owner"`
	Epoch   uint64 `json:"epoch"`
	// Proof is the HMAC-SHA256 of nonce, owner and epoch under the token.
	Proof string `json:"proof"`
}

// answer is what the owner says then: any number of draining, one of the others.
type answer struct {
	State  string `json:"state"`
	Reason string `json:"reason,omitempty"`
}

const (
	executeRelease = "release"

	stateDraining = "draining" // the owner is at it
	stateReleased = "released" // it has let go; the owner file tells
	stateRefused  = "refused"  // it keeps the disk
)

func proof(token [32]byte, nonce, owner string, epoch uint64) string {
	h := hmac.New(sha256.New, token[:])
	fmt.Fprintf(h, "%s %s %d", nonce, owner, epoch)
	return hex.EncodeToString(h.Sum(nil))
}

// check tells whether the request is for the owner of r and comes from who may ask.
// trusted: the kernel says that the peer may.
func (q *request) check(r *Record, nonce string, trusted bool) error {
	switch {
	case q.Execute != executeRelease:
		return fmt.Errorf("%w: %q: only release is known", ErrProtocol, q.Execute)
	case q.Owner != r.Owner.String() || q.Epoch != r.Epoch:
		return fmt.Errorf("%w: there is another owner here", ErrProtocol)
	case !trusted && !hmac.Equal([]byte(q.Proof), []byte(proof(r.token, nonce, q.Owner, q.Epoch))):
		return fmt.Errorf("%w: no proof of having read the owner file", ErrProtocol)
	}
	return nil
}

// readMessage reads a line of a reader with a buffer of messageLimit bytes into m.
func readMessage(r *bufio.Reader, m any) error {
	line, err := r.ReadSlice('\n')
	if errors.Is(err, bufio.ErrBufferFull) {
		return fmt.Errorf("%w: a line of more than %d bytes", ErrProtocol, messageLimit)
	}
	if err != nil {
		return err
	}
	if err := json.Unmarshal(line, m); err != nil {
		return fmt.Errorf("%w: %w", ErrProtocol, err)
	}
	return nil
}

func writeMessage(c net.Conn, m any) error {
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	_, err = c.Write(append(b, '\n'))
	return err
}

// splitAddress makes of an address of an owner file one of package net. A TCP address
// is a number, so no names are looked up for what a file says.
func splitAddress(address string) (network, target string, err error) {
	network, target, ok := strings.Cut(address, ":")
	switch {
	case len(address) > addressLimit:
	case ok && network == "unix" && len(target) > 1 && (target[0] == '@' || target[0] == '/'):
		return network, target, nil
	case ok && network == "tcp":
		if _, err := netip.ParseAddrPort(target); err == nil {
			return network, target, nil
		}
	}
	return "", "", fmt.Errorf("%w: address %q: unix:/PATH, unix:@NAME and tcp:IP:PORT are possible", ErrProtocol, address)
}

// listen opens the address, or one of its own if it is "", and returns it as
// others reach it.
func listen(address string) (net.Listener, string, error) {
	if address == "" {
		// An abstract name needs no file that a killed owner would leave.
		address = "unix:@gnomon-owner-" + hex.EncodeToString(random(12))
	}
	network, target, err := splitAddress(address)
	if err != nil {
		return nil, "", err
	}
	if network == "tcp" && netip.MustParseAddrPort(target).Addr().IsUnspecified() {
		return nil, "", fmt.Errorf("%w: address %q: others need one that leads here", ErrProtocol, address)
	}
	l, err := net.Listen(network, target)
	if err != nil {
		return nil, "", fmt.Errorf("%w: %w", ErrProtocol, err)
	}
	if network == "tcp" {
		address = "tcp:" + l.Addr().String() // port 0 has become one
	}
	return l, address, nil
}

func random(n int) []byte {
	b := make([]byte, n)
	rand.Read(b)
	return b
}
