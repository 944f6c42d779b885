package virtio

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/vmm/nbio"
)

const testCID = 42

// vsockSide is the host of a test: what the guest dials arrives on accepted.
type vsockSide struct {
	t        testing.TB
	refuse   map[uint32]bool
	accepted chan *net.UnixConn
}

func newVsockSide(t testing.TB) *vsockSide {
	return &vsockSide{t: t, refuse: map[uint32]bool{}, accepted: make(chan *net.UnixConn, 10)}
}

// hostStream is a socket as vsockhost makes one.
type hostStream struct{ *nbio.File }

func (s hostStream) CloseWrite() error {
	return s.Control(func(fd uintptr) { _ = unix.Shutdown(int(fd), unix.SHUT_WR) })
}

func (s hostStream) HungUp() bool {
	up := false
	_ = s.Control(func(fd uintptr) {
		p := []unix.PollFd{{Fd: int32(fd)}}
		_, _ = unix.Poll(p, 0)
		up = p[0].Revents&unix.POLLHUP != 0
	})
	return up
}

// streamPair is a stream and the test's end of it.
func streamPair(readable, writable func()) (VsockStream, *net.UnixConn, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	f := os.NewFile(uintptr(fds[1]), "host program")
	defer f.Close()
	conn, err := net.FileConn(f)
	if err != nil {
		return nil, nil, err
	}
	file, err := nbio.New(fds[0], "stream", readable, writable)
	if err != nil {
		return nil, nil, err
	}
	return hostStream{file}, conn.(*net.UnixConn), nil
}

func (s *vsockSide) Dial(port uint32, readable, writable func()) (VsockStream, error) {
	if s.refuse[port] {
		return nil, unix.ECONNREFUSED
	}
	stream, conn, err := streamPair(readable, writable)
	if err == nil {
		s.t.Cleanup(func() { conn.Close() })
		s.accepted <- conn
	}
	return stream, err
}

// outCall is a call from the host.
type outCall struct {
	port chan uint32 // of the host; 0 when refused
	conn *net.UnixConn
}

func newOutCall() *outCall { return &outCall{port: make(chan uint32, 1)} }

func (c *outCall) Accepted(hostPort uint32, readable, writable func()) (VsockStream, error) {
	stream, conn, err := streamPair(readable, writable)
	c.conn = conn
	c.port <- hostPort
	return stream, err
}

func (c *outCall) Refused() { c.port <- 0 }

// vsockGuest is a guest's driver.
type vsockGuest struct {
	*rings
	dev    *Vsock
	side   *vsockSide
	rx, tx *ring
	event  *ring
}

func newVsockGuest(t testing.TB, features uint64) *vsockGuest {
	t.Helper()
	side := newVsockSide(t)
	dev, err := NewVsock(testCID, side)
	if err != nil {
		t.Fatal(err)
	}
	g := &vsockGuest{rings: newRings(t, dev, features), dev: dev, side: side}
	g.rx, g.tx, g.event = g.add(64, 32, 4096+vsockHeaderSize), g.add(16, 1, 1<<17), g.add(16, 2, 16)
	return g
}

func (g *vsockGuest) begin() {
	g.t.Helper()
	g.up()
	g.rx.postAll()
	g.event.postAll()
}

func (g *vsockGuest) header(op uint16, guestPort, hostPort uint32) vsockHeader {
	return vsockHeader{srcCID: testCID, dstCID: vsockHostCID, srcPort: guestPort, dstPort: hostPort, kind: vsockTypeStream, op: op, bufAlloc: 1 << 20}
}

func (g *vsockGuest) sendPacket(h vsockHeader, payload []byte) {
	g.t.Helper()
	var head [vsockHeaderSize]byte
	h.put(&head)
	cut := len(payload) / 2
	g.tx.send(0, head[:20], head[20:], payload[:cut], payload[cut:])
}

func (g *vsockGuest) sendOp(op uint16, guestPort, hostPort uint32) {
	g.t.Helper()
	g.sendPacket(g.header(op, guestPort, hostPort), nil)
}

// packet waits for one.
func (g *vsockGuest) packet() (vsockHeader, []byte) {
	g.t.Helper()
	p := g.rx.take()
	if len(p) < vsockHeaderSize {
		g.t.Fatalf("packet of %d bytes", len(p))
	}
	h := parseVsockHeader((*[vsockHeaderSize]byte)(p))
	if int(h.length) != len(p)-vsockHeaderSize || h.srcCID != vsockHostCID || h.dstCID != testCID || h.kind != vsockTypeStream {
		g.t.Fatalf("packet of %d bytes: %+v", len(p), h)
	}
	return h, p[vsockHeaderSize:]
}

// expect waits for a packet with op.
func (g *vsockGuest) expect(op uint16, guestPort, hostPort uint32) vsockHeader {
	g.t.Helper()
	h, _ := g.packet()
	if h.op != op || h.srcPort != hostPort || h.dstPort != guestPort {
		g.t.Fatalf("packet %+v, want operation %d to port %d from %d", h, op, guestPort, hostPort)
	}
	return h
}

// connect opens a connection from the guest.
func (g *vsockGuest) connect(guestPort, hostPort uint32) *net.UnixConn {
	g.t.Helper()
	g.sendOp(vsockRequest, guestPort, hostPort)
	if h := g.expect(vsockResponse, guestPort, hostPort); h.bufAlloc != vsockBuffer {
		g.t.Fatalf("buffer of %d bytes", h.bufAlloc)
	}
	conn := <-g.side.accepted
	_ = conn.SetDeadline(time.Now().Add(30 * time.Second))
	return conn
}

func TestVsockEcho(t *testing.T) {
	eachRingKind(t, func(t *testing.T, features uint64) {
		g := newVsockGuest(t, features)
		if err := g.dev.Open(5, newOutCall()); !errors.Is(err, ErrVsock) {
			t.Errorf("call before there is a driver: %v", err)
		}
		g.begin()
		if cid := g.read(barDevice, 8); cid != testCID {
			t.Errorf("context id %d", cid)
		}
		// From the guest.
		conn := g.connect(1000, 52)
		h := g.header(vsockData, 1000, 52)
		h.length = 5
		g.sendPacket(h, []byte("hello and more"))
		got := make([]byte, 5)
		if _, err := io.ReadFull(conn, got); err != nil || string(got) != "hello" {
			t.Fatalf("host read %q, %v", got, err)
		}
		if _, err := conn.Write([]byte("world")); err != nil {
			t.Fatal(err)
		}
		if h, p := g.packet(); h.op != vsockData || string(p) != "world" || h.fwdCnt != 5 {
			t.Fatalf("guest got %+v %q", h, p)
		}
		// From the host.
		call := newOutCall()
		if err := g.dev.Open(80, call); err != nil {
			t.Fatal(err)
		}
		req, _ := g.packet()
		if req.op != vsockRequest || req.dstPort != 80 || req.srcPort < vsockFirstPort {
			t.Fatalf("packet %+v", req)
		}
		g.sendOp(vsockResponse, 80, req.srcPort)
		if port := <-call.port; port != req.srcPort {
			t.Fatalf("host's port is %d, request came from %d", port, req.srcPort)
		}
		defer call.conn.Close()
		if _, err := call.conn.Write([]byte("GET")); err != nil {
			t.Fatal(err)
		}
		if h, p := g.packet(); h.op != vsockData || string(p) != "GET" || h.dstPort != 80 {
			t.Fatalf("guest got %+v %q", h, p)
		}
		if n := g.dev.Connections(); n != 2 {
			t.Errorf("%d connections", n)
		}
	})
}

// TestVsockRefused: nobody there, on either side.
func TestVsockRefused(t *testing.T) {
	g := newVsockGuest(t, 0)
	g.side.refuse[7] = true
	g.begin()
	g.sendOp(vsockRequest, 1000, 7)
	g.expect(vsockReset, 1000, 7)
	call := newOutCall()
	if err := g.dev.Open(80, call); err != nil {
		t.Fatal(err)
	}
	req, _ := g.packet()
	g.sendOp(vsockReset, 80, req.srcPort)
	if port := <-call.port; port != 0 {
		t.Error("refused call was accepted")
	}
	call = newOutCall()
	if err := g.dev.Open(80, call); err != nil {
		t.Fatal(err)
	}
	g.write(commonStatus, 1, 0) // the guest resets the device instead
	if port := <-call.port; port != 0 {
		t.Error("call was accepted by a reset")
	}
	if n := g.dev.Connections(); n != 0 {
		t.Errorf("%d connections", n)
	}
}

// TestVsockShutdown: each direction ends on its own, and both end the connection.
func TestVsockShutdown(t *testing.T) {
	g := newVsockGuest(t, 0)
	g.begin()
	// The host ends its direction first, and still reads.
	conn := g.connect(1000, 52)
	if err := conn.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if h := g.expect(vsockShutdown, 1000, 52); h.flags != vsockNoSend {
		t.Errorf("flags %d", h.flags)
	}
	h := g.header(vsockData, 1000, 52)
	h.length = 4
	g.sendPacket(h, []byte("last"))
	h = g.header(vsockShutdown, 1000, 52)
	h.flags = vsockNoSend
	g.sendPacket(h, nil)
	if got, err := io.ReadAll(conn); err != nil || string(got) != "last" {
		t.Errorf("host read %q, %v", got, err)
	}
	h.flags = vsockNoReceive
	g.sendPacket(h, nil)
	g.expect(vsockReset, 1000, 52)

	// The host closes.
	conn = g.connect(1001, 52)
	conn.Close()
	if h := g.expect(vsockShutdown, 1001, 52); h.flags != vsockNeither {
		t.Errorf("flags %d", h.flags)
	}
	g.sendOp(vsockReset, 1001, 52)
	// The guest resets: the host sees the end.
	conn = g.connect(1002, 52)
	g.sendOp(vsockReset, 1002, 52)
	if n, err := conn.Read(make([]byte, 1)); n != 0 || err == nil {
		t.Errorf("host read %d, %v", n, err)
	}
	if n := g.dev.Connections(); n != 0 {
		t.Errorf("%d connections", n)
	}
}

// TestVsockFlowControl moves 4 MiB each way: the host's program does not read at first,
// the guest has a small buffer.
func TestVsockFlowControl(t *testing.T) {
	const total = 4 << 20
	eachRingKind(t, func(t *testing.T, features uint64) {
		g := newVsockGuest(t, features)
		g.begin()
		conn := g.connect(1000, 52)
		data := make([]byte, total)
		_, _ = rand.NewChaCha8([32]byte{7}).Read(data)

		// To the host, as far as the credit goes: that is all that is taken
		// without a reader, and a byte more is an offence.
		var sent, credit uint32 = 0, vsockBuffer
		push := func() {
			n := min(credit, 60_000, uint32(total)-sent)
			h := g.header(vsockData, 1000, 52)
			h.length = n
			g.sendPacket(h, data[sent:sent+n])
			sent, credit = sent+n, credit-n
		}
		for credit > 0 {
			push()
		}
		got := make([]byte, total)
		read := make(chan error, 1)
		go func() { _, err := io.ReadFull(conn, got); read <- err }()
		for sent < total {
			h, _ := g.packet()
			if h.op != vsockCreditUpdate {
				t.Fatalf("packet %+v", h)
			}
			credit = h.bufAlloc - (sent - h.fwdCnt)
			for credit > 0 && sent < total {
				push()
			}
		}
		if err := <-read; err != nil || !bytes.Equal(got, data) {
			t.Fatalf("the host read something else, %v", err)
		}

		// To the guest: 10,000 bytes of buffer, emptied now and then.
		const window = 10_000
		tell := func(taken uint32) {
			h := g.header(vsockCreditUpdate, 1000, 52)
			h.bufAlloc, h.fwdCnt = window, taken
			g.sendPacket(h, nil)
		}
		tell(0)
		go func() { _, err := conn.Write(data); read <- err }()
		var received []byte
		var taken uint32
		for len(received) < total {
			h, p := g.packet()
			switch h.op {
			case vsockData:
				received = append(received, p...)
				if n := uint32(len(received)) - taken; n > window {
					t.Fatalf("%d bytes in a buffer of %d", n, window)
				}
			case vsockCreditRequest:
				taken = uint32(len(received))
				tell(taken)
			case vsockCreditUpdate: // for the last of the other direction
			default:
				t.Fatalf("packet %+v", h)
			}
		}
		if err := <-read; err != nil || !bytes.Equal(received, data) {
			t.Fatalf("the guest read something else, %v", err)
		}
	})
}

// TestVsockHostile: what no driver should send is answered with a reset or
// not at all, and breaks nothing.
func TestVsockHostile(t *testing.T) {
	g := newVsockGuest(t, 0)
	g.side.refuse[99] = true
	g.begin()
	with := func(h vsockHeader, f func(*vsockHeader)) vsockHeader { f(&h); return h }
	good := g.header(vsockData, 1000, 52)
	// Ignored: from another guest, for another host, cut short, a reset of nothing.
	for _, h := range []vsockHeader{
		with(good, func(h *vsockHeader) { h.srcCID = 41 }), with(good, func(h *vsockHeader) { h.srcCID |= 1 << 32 }),
		with(good, func(h *vsockHeader) { h.dstCID = 1 }), with(good, func(h *vsockHeader) { h.dstCID = testCID }),
		g.header(vsockReset, 1000, 52),
	} {
		g.sendPacket(h, nil)
	}
	g.tx.send(0, make([]byte, vsockHeaderSize-1))
	// Reset: of connections there are none.
	for _, op := range []uint16{0, vsockResponse, vsockShutdown, vsockData, vsockCreditUpdate, vsockCreditRequest, 8, 0xFFFF} {
		g.sendOp(op, 1000, 52)
		g.expect(vsockReset, 1000, 52)
	}
	g.sendPacket(with(g.header(vsockRequest, 1000, 52), func(h *vsockHeader) { h.kind = 2 }), nil)
	g.expect(vsockReset, 1000, 52)
	// Reset: of a connection there is.
	for name, h := range map[string]vsockHeader{
		"longer than its packet": with(good, func(h *vsockHeader) { h.length = 100 }),
		"longer than anything":   with(good, func(h *vsockHeader) { h.length = 1<<32 - 1 }),
		"no such operation":      with(good, func(h *vsockHeader) { h.op = 99 }),
		"a second request":       with(good, func(h *vsockHeader) { h.op = vsockRequest }),
		"an answer":              with(good, func(h *vsockHeader) { h.op = vsockResponse }),
		"another type":           with(good, func(h *vsockHeader) { h.kind = 9 }),
	} {
		conn := g.connect(1000, 52)
		g.sendPacket(h, make([]byte, 99))
		g.expect(vsockReset, 1000, 52)
		if n, err := conn.Read(make([]byte, 1)); n != 0 || err == nil {
			t.Errorf("%s: host read %d, %v", name, n, err)
		}
	}
	// More than the credit, with nobody reading.
	g.connect(1000, 52)
	chunk := with(good, func(h *vsockHeader) { h.length = 1 << 16 })
	for range 64 { // the socket's own buffer takes some
		g.sendPacket(chunk, make([]byte, 1<<16))
	}
	g.sendOp(vsockRequest, 1, 99) // the answer to this is the last
	resets := 0
	for last := false; !last; {
		h, _ := g.packet()
		if last = h.dstPort == 1; !last && h.op == vsockReset {
			resets++
		} else if h.op != vsockCreditUpdate && h.op != vsockReset {
			t.Fatalf("packet %+v", h)
		}
	}
	if resets == 0 || g.dev.Connections() != 0 {
		t.Errorf("%d resets, %d connections", resets, g.dev.Connections())
	}
	// Lies about credit: claims of having taken what was never sent give none.
	conn := g.connect(1001, 52)
	g.sendPacket(with(g.header(vsockCreditUpdate, 1001, 52), func(h *vsockHeader) { h.fwdCnt = 1 << 31 }), nil)
	if _, err := conn.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	for {
		h, _ := g.packet()
		if h.op == vsockCreditRequest {
			break
		}
		if h.op == vsockData {
			t.Fatal("data without credit")
		}
	}
}

// TestVsockUnread: a guest that sends and never reads stalls itself.
func TestVsockUnread(t *testing.T) {
	g := newVsockGuest(t, FeatureEventIdx)
	g.up() // no buffers to receive in
	for range vsockMaxResets {
		g.sendOp(vsockData, 1000, 52)
	}
	var head [vsockHeaderSize]byte
	g.header(vsockData, 1001, 52).put(&head)
	g.tx.put(0, head[:])
	g.pci.Pause() // the worker has come to rest
	g.dev.mu.Lock()
	if n := len(g.dev.resets); n != vsockMaxResets || !g.dev.stalled {
		t.Errorf("%d refusals wait, stalled %v", n, g.dev.stalled)
	}
	g.dev.mu.Unlock()
	g.pci.Resume()
	g.rx.postAll()
	for range vsockMaxResets {
		g.expect(vsockReset, 1000, 52)
	}
	g.expect(vsockReset, 1001, 52)
	g.reap(g.tx.d, g.tx.index)
}

// TestVsockMany: connections are bounded.
func TestVsockMany(t *testing.T) {
	g := newVsockGuest(t, 0)
	g.side.accepted = make(chan *net.UnixConn, vsockMaxConns+1)
	g.begin()
	for i := range uint32(vsockMaxConns) {
		g.sendOp(vsockRequest, 1000+i, 52)
		g.expect(vsockResponse, 1000+i, 52)
	}
	g.sendOp(vsockRequest, 1, 52)
	g.expect(vsockReset, 1, 52)
	if err := g.dev.Open(80, newOutCall()); !errors.Is(err, ErrVsock) {
		t.Errorf("one more from the host: %v", err)
	}
	g.sendOp(vsockReset, 1000, 52)
	g.sendOp(vsockRequest, 1, 52)
	g.expect(vsockResponse, 1, 52)
	g.write(commonStatus, 1, 0)
	if n := g.dev.Connections(); n != 0 {
		t.Errorf("%d connections after a reset", n)
	}
}

// TestVsockRestored: after a restore the driver hears that connections are gone,
// and that its context id is the one it has now.
func TestVsockRestored(t *testing.T) {
	g := newVsockGuest(t, 0)
	for _, cid := range []uint64{0, 2, 1<<32 - 1, 1 << 32} {
		if err := g.dev.SetState(VsockState{CID: cid}); !errors.Is(err, ErrVsock) {
			t.Errorf("context id %d: %v", cid, err)
		}
	}
	if err := g.dev.SetState(VsockState{CID: testCID + 7}); err != nil {
		t.Fatal(err)
	}
	if cid := g.dev.State().CID; cid != testCID {
		t.Errorf("context id %d", cid)
	}
	g.begin()
	if p := g.event.take(); !bytes.Equal(p, make([]byte, 4)) {
		t.Errorf("event %x", p)
	}
	g.pci.Pause()
	if g.event.d.hasUsed() {
		t.Error("a second event")
	}
}

// TestVsockPause: paused, no byte passes; resumed, none is missing.
func TestVsockPause(t *testing.T) {
	g := newVsockGuest(t, FeatureEventIdx)
	g.begin()
	conn := g.connect(1000, 52)
	for i := range 100 {
		g.pci.Pause()
		if _, err := conn.Write([]byte{byte(i), 1, 2}); err != nil {
			t.Fatal(err)
		}
		if g.rx.d.hasUsed() {
			t.Fatal("a packet from a paused device")
		}
		g.pci.Resume()
		if h, p := g.packet(); h.op != vsockData || !bytes.Equal(p, []byte{byte(i), 1, 2}) {
			t.Fatalf("packet %+v %v", h, p)
		}
	}
}

// FuzzVsockPacket gives the device packets and reads what it answers. Nothing grows
// without bound, and what is answered is well formed.
func FuzzVsockPacket(f *testing.F) {
	var g vsockGuest
	seed := func(ops ...vsockHeader) {
		var all []byte
		for _, h := range ops {
			var head [vsockHeaderSize]byte
			h.put(&head)
			all = append(append(all, head[:]...), "0123456789"...)
		}
		f.Add(all)
	}
	with := func(h vsockHeader, n, flags uint32) vsockHeader { h.length, h.flags = n, flags; return h }
	request, data := g.header(vsockRequest, 1, 2), g.header(vsockData, 1, 2)
	seed(request, with(data, 10, 0), with(g.header(vsockShutdown, 1, 2), 0, 3))
	seed(request, with(data, 11, 0), request, request)
	seed(g.header(vsockResponse, 9, vsockFirstPort), with(g.header(vsockData, 9, vsockFirstPort), 5, 0), g.header(vsockReset, 9, vsockFirstPort))
	seed(request, with(g.header(vsockShutdown, 1, 2), 0, 2), g.header(vsockCreditRequest, 1, 2))
	f.Fuzz(func(t *testing.T, input []byte) {
		dev, err := NewVsock(testCID, fuzzHost{})
		if err != nil {
			t.Fatal(err)
		}
		mem := testMemory(t)
		var queues []*Queue
		next := uint64(0x10000)
		for i := range 3 {
			var d *driver
			d, next = newDriver(mem, next, 16, 0)
			queues = append(queues, must(newQueue(mem, i, 0, &d.state)))
		}
		if err := dev.Start(0, queues, nil); err != nil {
			t.Fatal(err)
		}
		defer dev.Stop()
		_ = dev.Open(9, fuzzCall{})
		out := make([]byte, 200)
		for len(input) >= vsockHeaderSize {
			h := parseVsockHeader((*[vsockHeaderSize]byte)(input))
			input = input[vsockHeaderSize:]
			n := min(len(input), 10)
			dev.take(h, [][]byte{append([]byte(nil), input[:n/2]...), append([]byte(nil), input[n/2:n]...)})
			input = input[n:]
			dev.flushAll()
			n = dev.give([]Buffer{{Data: out[:30]}, {Data: out[30:]}})
			if n == 0 {
				continue
			}
			got := parseVsockHeader((*[vsockHeaderSize]byte)(out))
			if n > len(out) || int(got.length) != n-vsockHeaderSize || got.srcCID != vsockHostCID || got.dstCID != testCID || got.op == 0 || got.op > vsockCreditRequest {
				t.Fatalf("%d bytes: %+v", n, got)
			}
		}
		dev.mu.Lock()
		defer dev.mu.Unlock()
		for _, c := range dev.conns {
			if len(c.waiting) > vsockBuffer {
				t.Errorf("%d bytes wait", len(c.waiting))
			}
		}
	})
}

// fuzzStream takes three bytes at a time, and has a few to read.
type fuzzStream struct {
	mu    sync.Mutex
	reads int // guarded by mu
}

func (s *fuzzStream) Readv(p [][]byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.reads++; s.reads > 3 {
		return 0, io.EOF
	}
	for _, b := range p {
		if len(b) > 0 {
			b[0] = 'r'
			return 1, nil
		}
	}
	return 0, ErrAgain
}

func (s *fuzzStream) Writev(p [][]byte) (int, error) {
	n := 0
	for _, b := range p {
		n += len(b)
	}
	return min(n, 3), nil
}

func (s *fuzzStream) CloseWrite() error { return nil }
func (s *fuzzStream) HungUp() bool      { return false }
func (s *fuzzStream) Close() error      { return nil }

type fuzzHost struct{}

func (fuzzHost) Dial(port uint32, readable, _ func()) (VsockStream, error) {
	if port == 0 {
		return nil, unix.ECONNREFUSED
	}
	readable()
	return &fuzzStream{}, nil
}

type fuzzCall struct{}

func (fuzzCall) Accepted(_ uint32, readable, _ func()) (VsockStream, error) {
	readable()
	return &fuzzStream{}, nil
}
func (fuzzCall) Refused() {}
