package nbd

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
)

// script is a server that says what a test wants.
type script struct {
	handshake, bytes []byte // the first is nil as long as it lasts
}

func (s *script) play(f func(c *Client) error) error {
	if s.handshake == nil {
		return play(ClientOptions{}, s.bytes, nil, f)
	}
	return play(ClientOptions{}, s.handshake, [][]byte{s.bytes}, f)
}

func (s *script) u16(v ...uint16) *script {
	for _, v := range v {
		s.bytes = binary.BigEndian.AppendUint16(s.bytes, v)
	}
	return s
}

func (s *script) u32(v ...uint32) *script {
	for _, v := range v {
		s.bytes = binary.BigEndian.AppendUint32(s.bytes, v)
	}
	return s
}

func (s *script) u64(v ...uint64) *script {
	for _, v := range v {
		s.bytes = binary.BigEndian.AppendUint64(s.bytes, v)
	}
	return s
}

func (s *script) text(t string) *script {
	s.bytes = append(s.bytes, t...)
	return s
}

func (s *script) reply(option, kind, length uint32) *script {
	return s.u64(magicReply).u32(option, kind, length)
}

// greeted, structured and entered are what a good server says so far.
func greeted() *script {
	return new(script).u64(magicServer, magicOption).u16(handshakeFixed | handshakeNoZeroes)
}

func structured() *script { return greeted().reply(optStructured, repAck, 0) }

func contexted() *script {
	return structured().reply(optSetMeta, repMetaContext, 4+15).u32(5).text(ContextAllocation).reply(optSetMeta, repAck, 0)
}

func entered() *script {
	s := contexted().reply(optGo, repInfo, 12).u16(infoExport).u64(1<<20).u16(flagHasFlags|flagFlush).
		reply(optGo, repAck, 0)
	return &script{handshake: s.bytes}
}

func (s *script) chunk(flags, kind uint16, length uint32) *script {
	return s.u32(magicStructured).u16(flags, kind).u64(firstCookie).u32(length)
}

// firstCookie is that of a client's first request.
const firstCookie = maxCalls

// player is a connection to a server that says the handshake at once, and a part
// of the replies after each request, whatever it hears, and then ends.
type player struct {
	net.Conn
	said     []byte
	replies  [][]byte
	chosen   bool          // the handshake is over
	requests chan struct{} // one for each
	seen     chan struct{} // the same, for who sends them
	released chan struct{} // closed: no more come
	closed   chan struct{}
	closing  sync.Once
}

func (p *player) Write(b []byte) (int, error) {
	if len(b) == requestSize && binary.BigEndian.Uint32(b) == magicRequest {
		p.requests <- struct{}{}
		p.seen <- struct{}{}
	}
	return len(b), nil
}

func (p *player) Read(b []byte) (int, error) {
	for len(p.said) == 0 {
		if len(p.replies) == 0 || !p.chosen {
			return 0, io.EOF
		}
		select {
		case <-p.requests:
		case <-p.released:
		case <-p.closed:
			return 0, net.ErrClosed
		}
		p.said, p.replies = p.replies[0], p.replies[1:]
	}
	n := copy(b, p.said)
	p.said = p.said[n:]
	return n, nil
}

func (p *player) Close() error {
	p.closing.Do(func() { close(p.closed) })
	return nil
}

func newPlayer(handshake []byte, replies ...[]byte) *player {
	return &player{
		said: handshake, replies: replies,
		requests: make(chan struct{}, 1000), seen: make(chan struct{}, 1000),
		released: make(chan struct{}), closed: make(chan struct{}),
	}
}

// play has a client use such a server.
func play(o ClientOptions, handshake []byte, replies [][]byte, f func(c *Client) error) error {
	p := newPlayer(handshake, replies...)
	n := negotiate(context.Background(), p)
	err := n.greet()
	var a agreed
	if err == nil {
		a, err = n.choose("x", o.Contexts)
	}
	if err = n.finish(err); err != nil {
		p.Close()
		return err
	}
	p.chosen = true
	c := newClient(n, a, o)
	go c.receive()
	defer c.Close()
	return f(c)
}

func TestHostileServers(t *testing.T) {
	read := func(c *Client) error { return c.Readv([][]byte{make([]byte, 100), make([]byte, 4000)}, 1000) }
	status := func(c *Client) error { _, err := c.Map(0, 1<<20); return err }
	for _, c := range []struct {
		name   string
		script *script
		use    func(c *Client) error
		says   string
	}{
		{"another protocol", new(script).text("HTTP/1.1 400 Bad Request\r\n"), read, "no NBD server"},
		{"oldstyle", new(script).u64(magicServer, 0x420281861253).u64(0, 0), read, "newstyle"},
		{"reply magic", greeted().u64(1, 2, 3, 4), read, "magic 0x1"},
		{"reply to another option", greeted().reply(optGo, repAck, 0), read, "option 7"},
		{"reply too long", greeted().reply(optStructured, repErrPolicy, 1<<31), read, "2147483648 bytes"},
		{"acknowledgement with data", greeted().reply(optStructured, repAck, 1).text("x"), read, "1 bytes"},
		{"information for nothing", greeted().reply(optStructured, repInfo, 0), read, "type 0x3"},
		{"two contexts of one ID", structured().reply(optSetMeta, repMetaContext, 5).u32(1).text("a").reply(optSetMeta, repMetaContext, 5).u32(1).text("b"), read, "metadata context"},
		{"context without name", structured().reply(optSetMeta, repMetaContext, 2).u16(1), read, "metadata context"},
		{"more contexts than asked for", structured().reply(optSetMeta, repMetaContext, 5).u32(1).text("a").reply(optSetMeta, repMetaContext, 5).u32(2).text("b"), read, "more metadata contexts"},
		{"no size", contexted().reply(optGo, repAck, 0), read, "no size"},
		{"size beyond 63 bits", contexted().reply(optGo, repInfo, 12).u16(infoExport).u64(1<<63).u16(1).reply(optGo, repAck, 0), read, "9223372036854775808"},
		{"short information", contexted().reply(optGo, repInfo, 3).u16(infoExport).text("x"), read, "3 bytes of information 0"},
		{"blocks of 3", contexted().reply(optGo, repInfo, 14).u16(infoBlockSize).u32(3, 4096, 8192).
			reply(optGo, repInfo, 12).u16(infoExport).u64(1<<20).u16(1).reply(optGo, repAck, 0), read, "block sizes 3"},
		{"blocks of 0", contexted().reply(optGo, repInfo, 14).u16(infoBlockSize).u32(0, 0, 0).
			reply(optGo, repInfo, 12).u16(infoExport).u64(1<<20).u16(1).reply(optGo, repAck, 0), read, "block sizes 0"},
		{"size with half a block", contexted().reply(optGo, repInfo, 14).u16(infoBlockSize).u32(4096, 4096, 8192).
			reply(optGo, repInfo, 12).u16(infoExport).u64(4097).u16(1).reply(optGo, repAck, 0), read, "4097 bytes with blocks of 4096"},

		{"reply magic in transmission", entered().u64(1, 2, 3), read, "begins with 0x0"},
		{"another cookie", entered().u32(magicStructured).u16(1, chunkNone).u64(firstCookie + 1).u32(0), read, "no request"},
		{"a cookie not used yet", entered().u32(magicStructured).u16(1, chunkNone).u64(firstCookie + maxCalls).u32(0), read, "no request"},
		{"simple reply to a read", entered().u32(magicSimple, 0).u64(firstCookie).text(strings.Repeat("x", 4100)), read, "simple reply"},
		{"nothing of a read", entered().chunk(chunkDone, chunkNone, 0), read, "lacks 4100 bytes at 1000"},
		{"empty chunk with data", entered().chunk(chunkDone, chunkNone, 4).u32(0), read, "empty chunk"},
		{"empty chunk without end", entered().chunk(0, chunkNone, 0), read, "empty chunk"},
		{"data before the read", entered().chunk(chunkDone, chunkData, 8+10).u64(999).text("0123456789"), read, "10 bytes at 999"},
		{"data behind the read", entered().chunk(chunkDone, chunkData, 8+10).u64(5091).text("0123456789"), read, "10 bytes at 5091"},
		{"data at the end of numbers", entered().chunk(chunkDone, chunkData, 8+10).u64(1<<64 - 5).text("0123456789"), read, "18446744073709551611"},
		{"data longer than memory", entered().chunk(chunkDone, chunkData, 1<<32-1).u64(1000), read, "4294967287 bytes"},
		{"data of nothing", entered().chunk(chunkDone, chunkData, 8).u64(1000), read, "data chunk of 8"},
		{"data twice", entered().chunk(0, chunkHole, 12).u64(1000).u32(4000).chunk(chunkDone, chunkHole, 12).u64(4999).u32(101), read, "comes twice"},
		{"a gap", entered().chunk(0, chunkHole, 12).u64(1000).u32(4000).chunk(chunkDone, chunkHole, 12).u64(5001).u32(99), read, "lacks 1 bytes at 5000"},
		{"hole of nothing", entered().chunk(chunkDone, chunkHole, 12).u64(1000).u32(0), read, "0 bytes at 1000"},
		{"hole with data", entered().chunk(chunkDone, chunkHole, 13).u64(1000).u32(1).text("x"), read, "hole chunk of 13"},
		{"block status of a read", entered().chunk(chunkDone, chunkBlockStatus, 12).u32(5, 1, 0), read, "type 5"},
		{"unknown chunk", entered().chunk(chunkDone, 77, 0), read, "type 77"},
		{"error without end of message", entered().chunk(chunkDone, chunkError, 8).u32(5).u16(3).text("ab"), read, "a message of 3"},
		{"error 0", entered().chunk(chunkDone, chunkError, 6).u32(0).u16(0), read, "error 0"},
		{"error longer than messages are", entered().chunk(chunkDone, chunkError, 1<<20), read, "1048576 bytes"},
		{"data in a block status", entered().chunk(chunkDone, chunkData, 9).u64(0).text("x"), status, "type 1"},
		{"status of nothing", entered().chunk(chunkDone, chunkBlockStatus, 12).u32(5, 0, 0), status, "extent of 0 bytes"},
		{"status without extents", entered().chunk(chunkDone, chunkBlockStatus, 4).u32(5), status, "status chunk of 4"},
		{"status of half an extent", entered().chunk(chunkDone, chunkBlockStatus, 16).u32(5, 1, 0, 1), status, "status chunk of 16"},
		{"status beyond the request", entered().chunk(chunkDone, chunkBlockStatus, 20).u32(5, 1<<20, 0, 1, 0), status, "extent of 1 bytes at 1048576"},
		{"status of gigabytes", entered().chunk(chunkDone, chunkBlockStatus, 1<<31+4).u32(5), status, "status chunk of 2147483652"},
		{"status of another context", entered().chunk(chunkDone, chunkBlockStatus, 12).u32(6, 1, 0), status, "lacks the context"},
		{"status twice", entered().chunk(0, chunkBlockStatus, 12).u32(5, 1, 0).chunk(0, chunkBlockStatus, 12).u32(5, 1, 0), status, "two block status"},
		{"no status", entered().chunk(chunkDone, chunkNone, 0), status, "lacks the context"},
	} {
		err := c.script.play(c.use)
		if !errors.Is(err, ErrProtocol) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v; it should say %q", c.name, err, c.says)
		}
	}
	if err := entered().chunk(chunkDone, chunkError, 6+5).u32(codeNoSpace).u16(5).text("sorry").play(read); !errors.Is(err, ErrRemote) || !strings.Contains(err.Error(), "sorry") {
		t.Errorf("an error: %v", err)
	}
	err := entered().chunk(chunkDone, chunkHole, 12).u64(1000).u32(4100).chunk(chunkDone, chunkHole, 12).u64(1000).u32(4100).play(func(c *Client) error {
		if err := read(c); err != nil {
			t.Errorf("a read that is replied to twice: %v", err)
		}
		<-c.received
		return read(c)
	})
	if !errors.Is(err, ErrProtocol) || !strings.Contains(err.Error(), "no request") {
		t.Errorf("a second reply to a request: %v", err)
	}
	if err := entered().play(read); !errors.Is(err, ErrLost) {
		t.Errorf("a server that ends: %v", err)
	}
	err = entered().chunk(0, chunkHole, 12).u64(2000).u32(3100).chunk(0, chunkHole, 12).u64(1001).u32(999).
		chunk(chunkDone, chunkData, 9).u64(1000).text("x").play(func(c *Client) error {
		got := bytes.Repeat([]byte{9}, 4100)
		if err := c.Readv([][]byte{got[:3], got[3:]}, 1000); err != nil {
			return err
		}
		if got[0] != 'x' || !bytes.Equal(got[1:], make([]byte, 4099)) {
			t.Error("chunks out of order are read wrong")
		}
		return nil
	})
	if err != nil {
		t.Errorf("chunks out of order: %v", err)
	}
}

// A server that never comes to the end of a reply is refused.
func TestEndlessServers(t *testing.T) {
	for name, s := range map[string]struct {
		begin, again *script
		use          func(n *negotiation) error
	}{
		"exports": {greeted(), new(script).reply(optList, repServer, 4+1000).u32(1000).text(strings.Repeat("x", 1000)), func(n *negotiation) error {
			_, err := n.list()
			return err
		}},
		"information": {contexted(), new(script).reply(optGo, repInfo, 2).u16(99), func(n *negotiation) error {
			_, err := n.choose("x", nil)
			return err
		}},
		"errors": {entered(), new(script).chunk(0, chunkError, 6).u32(5).u16(0), func(n *negotiation) error {
			a, err := n.choose("x", nil)
			if err != nil {
				return err
			}
			c := newClient(n, a, ClientOptions{})
			c.conn.(*player).chosen = true
			go c.receive()
			defer c.Close()
			return c.Flush()
		}},
	} {
		endless := bytes.Repeat(s.again.bytes, 20<<20/len(s.again.bytes))
		p := newPlayer(append(s.begin.bytes, endless...))
		if s.begin.handshake != nil {
			p = newPlayer(s.begin.handshake, endless)
		}
		n := negotiate(context.Background(), p)
		err := n.greet()
		if err == nil {
			err = s.use(n)
		}
		if !errors.Is(err, ErrProtocol) {
			t.Errorf("%s without end: %v", name, err)
		}
		n.stop()
		p.Close()
	}
}
