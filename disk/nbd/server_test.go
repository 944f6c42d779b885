package nbd

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gnomon-vmm/gnomon/disk/block"
)

// A reply does not wait for the payload of a request behind.
func TestRepliesAreNotHeldBack(t *testing.T) {
	_, address := serve(t, ServerOptions{}, Export{Node: newMemory(4 << 20)})
	w := newWire(t, address)
	w.enter("", false)
	read := header{command: cmdRead, length: 4096}
	for range 40 { // so that the server knows how quick they are
		w.request(read)
		w.simple()
		w.read(4096)
	}
	for _, off := range []uint64{0, 4 << 20} { // one is done, one is refused
		write := make([]byte, requestSize, requestSize+100)
		(&header{command: cmdWrite, cookie: 78, offset: off, length: 1 << 20}).put(write)
		read.cookie = 77
		w.request(read, append(write, make([]byte, 100)...)...)
		if err := w.conn.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
			t.Fatal(err)
		}
		if code, cookie := w.simple(); code != 0 || cookie != 77 {
			t.Errorf("error %d of request %d", code, cookie)
		}
		w.read(4096)
		if _, err := w.conn.Write(make([]byte, 1<<20-100)); err != nil {
			t.Fatal(err)
		}
		if code, cookie := w.simple(); (code != 0) != (off > 0) || cookie != 78 {
			t.Errorf("error %d of request %d", code, cookie)
		}
	}
}

// wire is a client that does as it is told.
type wire struct {
	t *testing.T
	*negotiation
}

func newWire(t *testing.T, address string) wire {
	t.Helper()
	n, err := connect(context.Background(), address, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.conn.Close() })
	return wire{t, n}
}

// enter begins the transmission with structured replies, or without.
func (w wire) enter(export string, structured bool) {
	w.t.Helper()
	if structured {
		if err := w.askStructured(); err != nil {
			w.t.Fatal(err)
		}
	}
	if _, err := w.askExport(optGo, export); err != nil {
		w.t.Fatal(err)
	}
}

func (w wire) request(h header, data ...byte) {
	w.t.Helper()
	b := make([]byte, requestSize)
	h.put(b)
	if _, err := w.conn.Write(append(b, data...)); err != nil {
		w.t.Fatal(err)
	}
}

func (w wire) read(n int) []byte {
	w.t.Helper()
	b := make([]byte, n)
	if _, err := io.ReadFull(w.in, b); err != nil {
		w.t.Fatal(err)
	}
	return b
}

// simple reads a simple reply.
func (w wire) simple() (code uint32, cookie uint64) {
	w.t.Helper()
	b := w.read(simpleSize)
	if binary.BigEndian.Uint32(b) != magicSimple {
		w.t.Fatalf("a simple reply begins with %x", b)
	}
	return binary.BigEndian.Uint32(b[4:]), binary.BigEndian.Uint64(b[8:])
}

// chunk reads a chunk of a structured reply.
func (w wire) chunk() (flags, kind uint16, payload []byte) {
	w.t.Helper()
	b := w.read(structuredSize)
	if binary.BigEndian.Uint32(b) != magicStructured {
		w.t.Fatalf("a chunk begins with %x", b)
	}
	return binary.BigEndian.Uint16(b[4:]), binary.BigEndian.Uint16(b[6:]), w.read(int(binary.BigEndian.Uint32(b[16:])))
}

func (w wire) ends() {
	w.t.Helper()
	if b, err := io.ReadAll(w.in); err != nil && !errors.Is(err, unix.ECONNRESET) || len(b) > 0 {
		w.t.Errorf("the server goes on: %x, %v", b, err)
	}
}

func TestHolesAreTold(t *testing.T) {
	m := newMemory(4 << 20)
	data := bytes.Repeat([]byte{9}, granule)
	if err := m.Writev([][]byte{data}, granule); err != nil {
		t.Fatal(err)
	}
	_, address := serve(t, ServerOptions{}, Export{Node: m})
	w := newWire(t, address)
	w.enter("", true)
	w.request(header{command: cmdRead, cookie: 1, length: 4 * granule})
	want := []struct {
		kind          uint16
		start, length int
	}{{chunkHole, 0, granule}, {chunkData, granule, granule}, {chunkHole, 2 * granule, 2 * granule}}
	for i, c := range want {
		flags, kind, payload := w.chunk()
		length := len(payload) - 8
		if kind == chunkHole {
			length = int(binary.BigEndian.Uint32(payload[8:]))
		}
		if kind != c.kind || int(binary.BigEndian.Uint64(payload)) != c.start || length != c.length || (flags == chunkDone) != (i == 2) {
			t.Errorf("chunk %d: flags %d, type %d, %d bytes at %d", i, flags, kind, length, binary.BigEndian.Uint64(payload))
		}
	}
	w.request(header{command: cmdRead, flags: cmdDontFragment, cookie: 1, length: 4 * granule})
	if flags, kind, payload := w.chunk(); flags != chunkDone || kind != chunkData || len(payload) != 8+4*granule {
		t.Errorf("a read that must not be divided: flags %d, type %d, %d bytes", flags, kind, len(payload))
	}
}

func TestExtentsThatAreAlikeAreOne(t *testing.T) {
	b := runsBitmap{"b", [][2]int64{{0, 512}, {512, 1024}, {1024, 1536}, {2048, 4096}}}
	_, address := serve(t, ServerOptions{}, Export{Name: "a", Node: newMemory(1 << 20), Bitmaps: []Bitmap{b}})
	c := use(t, address, "a", ClientOptions{Contexts: []string{ContextDirtyBitmap + "b"}})
	for _, s := range []struct {
		off, n int64
		want   []StatusExtent
	}{
		{0, 8192, []StatusExtent{{1536, StateDirty}, {512, 0}, {2048, StateDirty}, {4096, 0}}},
		{100, 1000, []StatusExtent{{1000, StateDirty}}},
		{1536, 513, []StatusExtent{{512, 0}, {1, StateDirty}}},
		{1<<20 - 1, 1, []StatusExtent{{1, 0}}},
	} {
		if got, err := c.Status(ContextDirtyBitmap+"b", s.off, s.n); err != nil || !slices.Equal(got, s.want) {
			t.Errorf("%d bytes at %d: %v, %v", s.n, s.off, got, err)
		}
	}
	if got, err := c.status(ContextDirtyBitmap+"b", 0, 8192, cmdReqOne); err != nil || !slices.Equal(got, []StatusExtent{{1536, StateDirty}}) {
		t.Errorf("one extent: %v, %v", got, err)
	}
}

func TestRequestsThatCannotBe(t *testing.T) {
	m := newMemory(1 << 20)
	_, address := serve(t, ServerOptions{}, Export{Name: "a", Node: m}, Export{Name: "ro", Node: m, ReadOnly: true})
	w := newWire(t, address)
	w.enter("a", false)
	ro := newWire(t, address)
	ro.enter("ro", true)
	size := uint64(1 << 20)
	for i, c := range []struct {
		w    wire
		h    header
		data int
		code uint32
	}{
		{w, header{command: cmdRead, offset: size - 1, length: 2}, 0, codeInvalid},
		{w, header{command: cmdRead, offset: 1 << 63, length: 1}, 0, codeInvalid},
		{w, header{command: cmdRead, offset: 0, length: maxPayload + 1}, 0, codeInvalid},
		{w, header{command: cmdRead, flags: cmdDontFragment, length: 1}, 0, codeInvalid},
		{w, header{command: cmdWrite, offset: size - 1, length: 2}, 2, codeNoSpace},
		{w, header{command: cmdWrite, offset: 1<<64 - 1, length: 2}, 2, codeNoSpace},
		{w, header{command: cmdWrite, flags: cmdNoHole, length: 2}, 2, codeInvalid},
		{w, header{command: cmdTrim, offset: size, length: 1}, 0, codeNoSpace},
		{w, header{command: cmdWriteZeroes, flags: cmdFastZero, length: 1}, 0, codeNotSup},
		{w, header{command: cmdWriteZeroes, flags: cmdReqOne, length: 1}, 0, codeInvalid},
		{w, header{command: cmdFlush, length: 1}, 0, codeInvalid},
		{w, header{command: cmdBlockStatus, length: 1}, 0, codeInvalid},
		{w, header{command: 99}, 0, codeInvalid},
		{w, header{command: cmdCache, length: 1 << 20}, 0, 0},
		{w, header{command: cmdWrite, flags: cmdFUA, length: 4}, 4, 0},
		{ro, header{command: cmdWrite, length: 4}, 4, codePerm},
		{ro, header{command: cmdTrim, length: 4}, 0, codePerm},
		{ro, header{command: cmdWriteZeroes, length: 4}, 0, codePerm},
	} {
		c.h.cookie = uint64(i) << 40
		c.w.request(c.h, make([]byte, c.data)...)
		var code uint32
		if c.w == ro {
			_, kind, payload := ro.chunk()
			if kind != chunkError {
				t.Errorf("%+v: a chunk of type %d", c.h, kind)
			}
			code = binary.BigEndian.Uint32(payload)
		} else {
			var cookie uint64
			if code, cookie = w.simple(); cookie != c.h.cookie {
				t.Errorf("%+v: the reply to %#x", c.h, cookie)
			}
		}
		if code != c.code {
			t.Errorf("%+v: error %d, not %d", c.h, code, c.code)
		}
	}
	if m.flushCount() != 1 {
		t.Errorf("%d flushes for one write with FUA", m.flushCount())
	}
	m.failWith(fmt.Errorf("the platter: %w", unix.ENOSPC))
	c := use(t, address, "a", ClientOptions{})
	if err := c.Writev([][]byte{{1}}, 0); !errorIs(err, unix.ENOSPC, ErrRemote) || !strings.Contains(err.Error(), "the platter") {
		t.Errorf("a write that fails: %v", err)
	}
	m.failWith(errors.New("broken"))
	if err := c.Readv([][]byte{{1}}, 0); !errorIs(err, unix.EIO, ErrRemote) {
		t.Errorf("a read that fails: %v", err)
	}
}

func TestHostileClients(t *testing.T) {
	_, address := serve(t, ServerOptions{}, Export{Name: "a", Node: newMemory(1 << 20)})
	option := func(kind, length uint32, data ...byte) []byte {
		b := binary.BigEndian.AppendUint64(nil, magicOption)
		b = binary.BigEndian.AppendUint32(b, kind)
		return append(binary.BigEndian.AppendUint32(b, length), data...)
	}
	huge := bytes.Repeat([]byte{0xff}, 4)
	for _, c := range []struct {
		name string
		data []byte
		kind uint32 // of the reply; 0: the connection ends
	}{
		{"magic", make([]byte, 16), 0},
		{"unknown option", option(77, 3, 1, 2, 3), repErrUnsupported},
		{"too long", option(optGo, 1<<31), repErrTooBig},
		{"no such export", option(optExportName, 1, 'z'), 0},
		{"info of nothing", option(optInfo, 0), repErrInvalid},
		{"name longer than the option", option(optGo, 6, append(huge, 0, 0)...), repErrInvalid},
		{"count longer than the option", option(optInfo, 7, 0, 0, 0, 1, 'a', 255, 255), repErrInvalid},
		{"bytes too many", option(optInfo, 8, 0, 0, 0, 1, 'a', 0, 0, 1), repErrInvalid},
		{"unknown export", option(optGo, 7, 0, 0, 0, 1, 'z', 0, 0), repErrUnknown},
		{"contexts without structured replies", option(optSetMeta, 9, 0, 0, 0, 1, 'a', 0, 0, 0, 0), repErrInvalid},
		{"list with data", option(optList, 1, 0), repErrInvalid},
		{"structured with data", option(optStructured, 1, 0), repErrInvalid},
		{"TLS", option(optStartTLS, 0), repErrPolicy},
		{"abort", option(optAbort, 0), repAck},
	} {
		w := newWire(t, address)
		if _, err := w.conn.Write(c.data); err != nil {
			t.Fatal(err)
		}
		if c.kind == 0 {
			w.ends()
			continue
		}
		head := w.read(replySize)
		if kind := binary.BigEndian.Uint32(head[12:]); kind != c.kind {
			t.Errorf("%s: reply %#x, not %#x", c.name, kind, c.kind)
		}
	}
	w := newWire(t, address)
	w.enter("a", false)
	w.request(header{command: cmdWrite, length: maxPayload + 1})
	w.ends()
	w = newWire(t, address)
	w.enter("a", false)
	if _, err := w.conn.Write(make([]byte, requestSize)); err != nil {
		t.Fatal(err)
	}
	w.ends()
}

func TestSlowRequestsRunAtOnce(t *testing.T) {
	m := newMemory(1 << 20)
	const together = 8
	var waiting sync.WaitGroup
	waiting.Add(together)
	m.holdWith(func(int64) {
		waiting.Done()
		waiting.Wait() // for the others
	})
	s, address := serve(t, ServerOptions{}, Export{Name: "a", Node: m})
	c := use(t, address, "a", ClientOptions{})
	s.mu.Lock()
	for c := range s.connections {
		c.readTime.Store(int64(quickRead) * 2)
	}
	s.mu.Unlock()
	var readers sync.WaitGroup
	for i := range together {
		readers.Go(func() {
			if err := c.Readv([][]byte{make([]byte, 512)}, int64(i)*512); err != nil {
				t.Error(err)
			}
		})
	}
	readers.Wait()
}

// A reply must not wait for a later request that takes long.
func TestRepliesDoNotWaitForASlowRequest(t *testing.T) {
	m := newMemory(1 << 20)
	release := make(chan struct{})
	m.holdWith(func(off int64) {
		if off == 512 {
			<-release
		}
	})
	_, address := serve(t, ServerOptions{}, Export{Name: "a", Node: m})
	w := newWire(t, address)
	w.enter("a", false)
	first, second := make([]byte, requestSize), make([]byte, requestSize)
	header{command: cmdRead, cookie: 1, length: 1}.put(first)
	header{command: cmdRead, cookie: 2, offset: 512, length: 1}.put(second)
	if _, err := w.conn.Write(append(first, second...)); err != nil { // in one read of the server's
		t.Fatal(err)
	}
	if _, cookie := w.simple(); cookie != 1 {
		t.Errorf("the reply to %d comes first", cookie)
	}
	w.read(1)
	close(release)
	if _, cookie := w.simple(); cookie != 2 {
		t.Errorf("the reply to %d comes second", cookie)
	}
}

func TestMoreRequestsThanAreBuffered(t *testing.T) {
	m := newMemory(1 << 20)
	_, address := serve(t, ServerOptions{}, Export{Name: "a", Node: m})
	w := newWire(t, address)
	w.enter("a", false)
	const count = 5 * maxRequests
	go func() {
		for i := range uint64(count) {
			b := make([]byte, requestSize)
			command := uint16(cmdRead)
			if i%3 == 0 {
				command = cmdFlush
			}
			h := header{command: command, cookie: i}
			if command == cmdRead {
				h.length = 100 << 10
			}
			h.put(b)
			if _, err := w.conn.Write(b); err != nil {
				t.Error(err)
				return
			}
		}
	}()
	seen := map[uint64]bool{}
	for range count {
		code, cookie := w.simple()
		if code != 0 || seen[cookie] || cookie >= count {
			t.Fatalf("reply to %d, error %d", cookie, code)
		}
		seen[cookie] = true
		if cookie%3 != 0 {
			w.read(100 << 10)
		}
	}
}

func TestRemove(t *testing.T) {
	ctx := context.Background()
	m := newMemory(1 << 20)
	s, address := serve(t, ServerOptions{}, Export{Name: "a", Node: m})
	if err := s.Add(Export{Name: "a", Node: m}); !errors.Is(err, ErrExport) {
		t.Errorf("two exports of one name: %v", err)
	}
	if err := s.Remove(ctx, "b", RemoveHard); !errors.Is(err, ErrExport) {
		t.Errorf("an export that is not there: %v", err)
	}
	c := use(t, address, "a", ClientOptions{})
	if err := s.Remove(ctx, "a", RemoveIfUnused); !errors.Is(err, ErrInUse) {
		t.Errorf("an export in use: %v", err)
	}
	gone, cancel := context.WithCancel(ctx)
	cancel()
	if err := s.Remove(gone, "a", RemoveWaiting); !errorIs(err, ErrInUse, context.Canceled) {
		t.Errorf("waiting for a client: %v", err)
	}
	use(t, address, "a", ClientOptions{}).Close() // it is served again

	removed := make(chan error, 1)
	go func() { removed <- s.Remove(ctx, "a", RemoveWaiting) }()
	if err := c.Flush(); err != nil {
		t.Error(err)
	}
	c.Close()
	if err := <-removed; err != nil {
		t.Error(err)
	}
	if _, err := Dial(ctx, address, "a", ClientOptions{}); !errors.Is(err, ErrRefused) {
		t.Errorf("a removed export: %v", err)
	}

	if err := s.Add(Export{Name: "a", Node: m}); err != nil {
		t.Fatal(err)
	}
	c = use(t, address, "a", ClientOptions{})
	reading, release := make(chan struct{}), make(chan struct{})
	var ended atomic.Bool
	m.holdWith(func(int64) {
		close(reading)
		<-release
		ended.Store(true)
	})
	failed := make(chan error, 1)
	go func() { failed <- c.Readv([][]byte{make([]byte, 512)}, 0) }()
	<-reading
	go func() { removed <- s.Remove(ctx, "a", RemoveHard) }()
	if err := <-failed; !errors.Is(err, ErrLost) {
		t.Errorf("the client's read: %v", err)
	}
	select {
	case err := <-removed:
		t.Errorf("removed while a read is under way: %v", err)
	default:
	}
	close(release)
	if err := <-removed; err != nil || !ended.Load() {
		t.Errorf("removed: %v", err)
	}
	if err := c.Writev([][]byte{{1}}, 0); !errors.Is(err, ErrLost) {
		t.Errorf("a write after that: %v", err)
	}
}

func TestConnectionsAreBounded(t *testing.T) {
	reports := make(chan error, 10)
	s, address := serve(t, ServerOptions{MaxConnections: 2, Report: func(err error) { reports <- err }}, Export{Name: "a", Node: newMemory(512)})
	a, b := use(t, address, "a", ClientOptions{}), use(t, address, "a", ClientOptions{})
	if _, err := Dial(context.Background(), address, "a", ClientOptions{}); err == nil {
		t.Error("a third of two clients")
	}
	if err := <-reports; !strings.Contains(err.Error(), "turned away") {
		t.Errorf("reported: %v", err)
	}
	if n := s.Connections(); n != 2 {
		t.Errorf("%d connections", n)
	}
	for _, c := range []*Client{a, b} {
		if err := c.Flush(); err != nil {
			t.Error(err)
		}
	}
}

func TestOldClients(t *testing.T) {
	m := newMemory(3 << 20)
	_, address := serve(t, ServerOptions{}, Export{Name: "a", Node: m})
	for _, noZeroes := range []bool{true, false} {
		conn, err := dial(context.Background(), address)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		n := negotiate(context.Background(), oldConn{conn, noZeroes})
		if err := n.greet(); err != nil {
			t.Fatal(err)
		}
		n.fixed, n.noZeroes = false, noZeroes
		a, err := n.choose("a", nil)
		if err = n.finish(err); err != nil {
			t.Fatal(err)
		}
		c := newClient(n, a, ClientOptions{})
		go c.receive()
		if c.Size() != m.Size() {
			t.Errorf("size %d", c.Size())
		}
		got := make([]byte, 100<<10)
		if err := c.Readv([][]byte{got}, 5); err != nil || !block.IsZero(got) {
			t.Error(err)
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}
}

// oldConn answers the greeting without fixed newstyle.
type oldConn struct {
	net.Conn
	noZeroes bool
}

func (c oldConn) Write(b []byte) (int, error) {
	if len(b) == 4 {
		b = slices.Clone(b)
		b[3] = 0
		if c.noZeroes {
			b[3] = handshakeNoZeroes
		}
	}
	return c.Conn.Write(b)
}

// Several goroutines on two connections write each its own part at random, and read
// it; in the end all is as the model says.
func TestModel(t *testing.T) {
	const parts, part, steps = 4, 1 << 20, 300
	m := newMemory(parts * part)
	_, address := serve(t, ServerOptions{}, Export{Name: "a", Node: m, FastZero: true})
	clients := []*Client{use(t, address, "a", ClientOptions{}), use(t, address, "a", ClientOptions{})}
	model := make([]byte, parts*part)
	var writers sync.WaitGroup
	for p := range parts {
		writers.Go(func() {
			random := rand.New(rand.NewPCG(7, uint64(p)))
			for range steps {
				c := clients[random.IntN(2)]
				off := int64(p*part) + random.Int64N(part)
				n := random.Int64N(min(1<<(4+random.IntN(16)), int64(p+1)*part-off)) + 1
				n = min(n, int64(p+1)*part-off)
				own := model[off : off+n]
				var err error
				switch random.IntN(6) {
				case 0:
					clear(own)
					err = c.WriteZeroes(off, n, random.IntN(2) == 0)
				case 1:
					clear(own)
					err = c.Discard(off, n)
				case 2:
					err = c.Flush()
				case 3:
					for i := range own {
						own[i] = byte(random.Uint32())
					}
					cut := random.Int64N(n + 1)
					err = c.Writev([][]byte{own[:cut], own[cut:]}, off)
				default:
					got := make([]byte, n)
					if err = c.Readv([][]byte{got}, off); err == nil && !bytes.Equal(got, own) {
						err = fmt.Errorf("%d bytes at %d are read wrong", n, off)
					}
				}
				if err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	writers.Wait()
	if !bytes.Equal(m.content(), model) {
		t.Error("the disk is not what was written")
	}
}
