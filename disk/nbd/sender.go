package nbd

import (
	"bufio"
	"crypto/tls"
	"net"
	"sync"
	"sync/atomic"
)

// packet is a message that a sender sends.
type packet interface {
	// vectors appends the message's parts to bufs.
	vectors(bufs [][]byte) [][]byte
	// sent tells that the parts are not needed any more, sent or not.
	sent()
}

// sender sends packets in the order in which they were queued, as many with one
// system call as there are. Whoever finds nobody sending does it for all, so no
// goroutine waits for another's packet to go out.
type sender struct {
	conn    net.Conn
	socket  *socket       // in conn's place, or nil
	buffer  *bufio.Writer // for TLS, which has no vectored writes, or nil
	failing func(error)   // called once, when sending fails

	mu     sync.Mutex
	ended  sync.Cond // busy became false
	queue  []packet  // guarded by mu
	busy   bool      // guarded by mu: someone sends
	failed bool      // guarded by mu: nothing more is sent

	// What the one who sends uses.
	batch   []packet
	parts   [][]byte
	vectors net.Buffers
	piece   [][]byte

	// For who wants to know whether the other side takes what is sent, or nil: what is
	// called when it has, and how many wait for that.
	moves func()
	turns *atomic.Int32
}

func newSender(conn net.Conn, failing func(error)) *sender {
	s := &sender{conn: conn, failing: failing}
	s.ended.L = &s.mu
	if _, ok := conn.(*tls.Conn); ok {
		s.buffer = bufio.NewWriterSize(conn, 64<<10)
	}
	return s
}

// add queues a packet, for the next flush.
func (s *sender) add(p packet) {
	s.mu.Lock()
	s.queue = append(s.queue, p)
	s.mu.Unlock()
}

// flush sends what is queued, or leaves it to who is sending already.
func (s *sender) flush() {
	s.mu.Lock()
	if s.busy {
		s.mu.Unlock()
		return
	}
	s.busy = true
	for len(s.queue) > 0 {
		s.batch, s.queue = s.queue, s.batch[:0]
		failed := s.failed
		s.mu.Unlock()
		if !failed {
			if err := s.send(); err != nil {
				s.failing(err)
				failed = true
			}
		}
		for i, p := range s.batch {
			p.sent()
			s.batch[i] = nil
		}
		s.mu.Lock()
		s.failed = s.failed || failed
	}
	s.busy = false
	s.ended.Broadcast()
	s.mu.Unlock()
}

// finish sends what is queued, and waits for who is sending already.
func (s *sender) finish() {
	s.flush()
	s.mu.Lock()
	for s.busy {
		s.ended.Wait()
	}
	s.mu.Unlock()
}

// send sends the batch.
func (s *sender) send() error {
	s.parts = s.parts[:0]
	for _, p := range s.batch {
		s.parts = p.vectors(s.parts)
	}
	defer clear(s.parts)
	if s.moves != nil {
		s.moves()
		s.turns.Add(1)
		defer s.turns.Add(-1)
	}
	if s.buffer == nil {
		return s.sendParts()
	}
	for _, part := range s.parts {
		for len(part) > 0 {
			n := min(len(part), stride)
			if _, err := s.buffer.Write(part[:n]); err != nil {
				return err
			}
			part = part[n:]
			if s.moves != nil {
				s.moves()
			}
		}
	}
	return s.buffer.Flush()
}

// sendParts sends the parts, a stride at a time.
func (s *sender) sendParts() error {
	for rest := (stretch{bufs: s.parts}); len(rest.bufs) > 0; {
		s.piece = rest.next(s.piece[:0], stride)
		if err := s.sendPiece(); err != nil {
			return err
		}
		if len(rest.bufs) > 0 && s.moves != nil {
			s.moves()
		}
	}
	clear(s.piece)
	return nil
}

func (s *sender) sendPiece() error {
	if s.socket != nil {
		return s.socket.writev(s.piece)
	}
	s.vectors = s.piece
	_, err := s.vectors.WriteTo(s.conn)
	return err
}
