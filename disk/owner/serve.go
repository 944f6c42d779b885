package owner

import (
	"bufio"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// peersLimit bounds the connections that are served at a time.
	peersLimit = 16
	// requestTime is how long a peer may take to ask.
	requestTime = 5 * time.Second
	// silenceFloor is the least time without a word after which an owner is taken
	// to be dead or cut off; else it is its lease.
	silenceFloor = 200 * time.Millisecond
)

// server answers those who want the disk.
type server struct {
	listener net.Listener
	record   Record // with the owner, epoch, token and address
	// release lets go of the disk and returns when it has.
	release func(ctx context.Context) error
	wg      sync.WaitGroup
}

func (s *server) serve(ctx context.Context) {
	slots := make(chan struct{}, peersLimit)
	for {
		c, err := s.listener.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil { // out of descriptors, say
			if pause(ctx, 10*time.Millisecond) != nil {
				return
			}
			continue
		}
		select {
		case slots <- struct{}{}:
		default:
			c.Close()
			continue
		}
		s.wg.Go(func() {
			defer func() { c.Close(); <-slots }()
			s.answer(ctx, c)
		})
	}
}

func (s *server) answer(ctx context.Context, c net.Conn) {
	trusted := false
	if u, ok := c.(*net.UnixConn); ok {
		if trusted = mayAsk(u); !trusted {
			writeMessage(c, answer{State: stateRefused, Reason: "you are another user"})
			return
		}
	}
	c.SetDeadline(time.Now().Add(requestTime))
	defer context.AfterFunc(ctx, func() { c.SetReadDeadline(time.Unix(1, 0)) })() // who has not asked by then need not
	nonce := hex.EncodeToString(random(16))
	if err := writeMessage(c, greeting{Owner: s.record.Owner.String(), Nonce: nonce}); err != nil {
		return
	}
	var q request
	err := readMessage(bufio.NewReaderSize(c, messageLimit), &q)
	if err == nil {
		err = q.check(&s.record, nonce, trusted)
	}
	if err == nil {
		done := make(chan error, 1)
		go func() { done <- s.release(ctx) }()
		err = s.keepTelling(c, done)
	}
	last := answer{State: stateReleased}
	if err != nil {
		last = answer{State: stateRefused, Reason: shorten(err.Error())}
	}
	c.SetWriteDeadline(time.Now().Add(requestTime))
	writeMessage(c, last)
}

// keepTelling tells the peer that the disk is being let go of until it is.
func (s *server) keepTelling(c net.Conn, done <-chan error) error {
	t := time.NewTicker(max(silenceFloor, s.record.Lease) / 4)
	defer t.Stop()
	for {
		c.SetWriteDeadline(time.Now().Add(requestTime))
		writeMessage(c, answer{State: stateDraining}) // who has gone away has no need to know
		select {
		case err := <-done:
			return err
		case <-t.C:
		}
	}
}

func shorten(s string) string { return s[:min(len(s), 1000)] }

// mayAsk tells whether the peer is of this user, or root.
func mayAsk(c *net.UnixConn) bool {
	raw, err := c.SyscallConn()
	if err != nil {
		return false
	}
	ok := false
	raw.Control(func(fd uintptr) {
		cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
		ok = err == nil && (cred.Uid == 0 || int(cred.Uid) == os.Geteuid())
	})
	return ok
}

func refusal(reason string) error { return fmt.Errorf("%w: %q", ErrRefused, shorten(reason)) }

// ask asks the owner of r to release and waits until it says that it has. Errors
// wrap ErrSilent, ErrRefused or ctx's.
func ask(ctx context.Context, r *Record) error {
	network, target, err := splitAddress(r.Address)
	if err != nil {
		return silent(ctx, err)
	}
	dialer := net.Dialer{Timeout: max(silenceFloor, r.Lease)}
	c, err := dialer.DialContext(ctx, network, target)
	if err != nil {
		return silent(ctx, err)
	}
	defer c.Close()
	return converse(ctx, c, r, network != "unix")
}

// converse does what ask is for over a connection. prove: the kernel does not tell the
// owner who asks.
func converse(ctx context.Context, c net.Conn, r *Record, prove bool) error {
	defer context.AfterFunc(ctx, func() { c.Close() })()
	silence := max(silenceFloor, r.Lease)
	in := bufio.NewReaderSize(c, messageLimit)
	c.SetDeadline(time.Now().Add(silence))
	var g struct {
		greeting
		answer
	}
	if err := readMessage(in, &g); err != nil {
		return silent(ctx, err)
	}
	if g.State == stateRefused {
		return refusal(g.Reason)
	}
	q := request{Execute: executeRelease, Owner: r.Owner.String(), Epoch: r.Epoch}
	if g.Owner != q.Owner {
		return silent(ctx, errors.New("somebody else is at its address"))
	}
	if prove {
		q.Proof = proof(r.token, g.Nonce, q.Owner, q.Epoch)
	}
	if err := writeMessage(c, q); err != nil {
		return silent(ctx, err)
	}
	for {
		c.SetDeadline(time.Now().Add(silence))
		var a answer
		if err := readMessage(in, &a); err != nil {
			return silent(ctx, err)
		}
		switch a.State {
		case stateDraining:
		case stateReleased:
			return nil
		case stateRefused:
			return refusal(a.Reason)
		default:
			return silent(ctx, errors.New("it answers something unknown"))
		}
	}
}

func silent(ctx context.Context, cause error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	return fmt.Errorf("%w: %w", ErrSilent, cause)
}
