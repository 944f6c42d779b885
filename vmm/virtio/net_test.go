package virtio

import (
	"bytes"
	"errors"
	"net"
	"runtime"
	"sync"
	"testing"
)

// hub is a backend that a test holds the other end of.
type hub struct {
	offloads uint64

	mu                 sync.Mutex
	readable, writable func()   // guarded by mu
	sent               [][]byte // by the guest, with headers; guarded by mu
	waiting            [][]byte // for the guest, with headers; guarded by mu
	full               bool     // Send must wait; guarded by mu
	arrived            chan struct{}
}

func newHub() *hub { return &hub{arrived: make(chan struct{}, 1000)} }

func (h *hub) Offloads() uint64 { return h.offloads }

func (h *hub) Start(_ uint64, readable, writable func()) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.readable, h.writable = readable, writable
	return nil
}

func (h *hub) Stop() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.readable, h.writable = nil, nil
}

func (h *hub) Send(frame [][]byte) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.full {
		return ErrAgain
	}
	h.sent = append(h.sent, bytes.Join(frame, nil))
	select {
	case h.arrived <- struct{}{}:
	default:
	}
	return nil
}

func (h *hub) Receive(p [][]byte) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.waiting) == 0 {
		return 0, ErrAgain
	}
	frame := h.waiting[0]
	h.waiting = h.waiting[1:]
	n := 0
	for _, b := range p {
		n += copy(b, frame[n:])
	}
	return n, nil
}

func (h *hub) Describe() string { return "test" }
func (h *hub) Close() error     { return nil }

// deliver has a frame wait for the guest.
func (h *hub) deliver(frame []byte) {
	h.mu.Lock()
	h.waiting = append(h.waiting, append(make([]byte, NetHeaderSize), frame...))
	f := h.readable
	h.mu.Unlock()
	if f != nil {
		f()
	}
}

func (h *hub) setFull(full bool) {
	h.mu.Lock()
	h.full = full
	f := h.writable
	h.mu.Unlock()
	if !full {
		f()
	}
}

func (h *hub) takeSent() [][]byte {
	h.mu.Lock()
	defer h.mu.Unlock()
	s := h.sent
	h.sent = nil
	return s
}

func (h *hub) left() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.waiting)
}

var testMAC = net.HardwareAddr{0x52, 0x54, 0, 1, 2, 3}

func newNet(t testing.TB, h *hub) *Net {
	t.Helper()
	n, err := NewNet(NetConfig{Backend: h, MAC: testMAC, MTU: 1500})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// frameOf is a frame of n bytes that no other seed gives.
func frameOf(n, seed int) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(i*7 + seed*13 + i>>8)
	}
	return p
}

func TestNetSend(t *testing.T) {
	eachRingKind(t, func(t *testing.T, features uint64) {
		h := newHub()
		r := newRings(t, newNet(t, h), features|netFMAC)
		r.add(16, 1, 4096)
		tx := r.add(16, 1, 1<<17)
		r.up()
		header := make([]byte, NetHeaderSize)
		for i, size := range []int{14, 60, 1514, 65000} {
			frame := frameOf(size, i)
			tx.send(0, header, frame)
			tx.send(0, header[:5], append(append([]byte(nil), header[5:]...), frame[:9]...), frame[9:])
			sent := h.takeSent()
			if len(sent) != 2 {
				t.Fatalf("%d frames were sent", len(sent))
			}
			for _, s := range sent {
				if !bytes.Equal(s[NetHeaderSize:], frame) {
					t.Errorf("frame of %d bytes arrived as %d", size, len(s))
				}
			}
		}
	})
}

// TestNetSendScattered: more pieces than are passed on.
func TestNetSendScattered(t *testing.T) {
	h := newHub()
	r := newRings(t, newNet(t, h), 0)
	r.add(16, 1, 4096)
	tx := r.add(256, 1, 4096)
	r.up()
	frame := frameOf(200, 1)
	var segs []segment
	slot := tx.slot(0)
	copy(slot, append(make([]byte, NetHeaderSize), frame...))
	for i := range NetHeaderSize + len(frame) {
		segs = append(segs, segment{tx.base + uint64(i), 1, false})
	}
	tx.d.add(segs, false, 0)
	tx.kick()
	r.reap(tx.d, tx.index)
	if sent := h.takeSent(); len(sent) != 1 || !bytes.Equal(sent[0][NetHeaderSize:], frame) {
		t.Errorf("sent %x", sent)
	}
}

// TestNetSendBad: frames no driver should send get lost and are returned.
func TestNetSendBad(t *testing.T) {
	h := newHub()
	h.offloads = netOffloads
	dev := newNet(t, h)
	r := newRings(t, dev, NetOffloadHostCSum|NetOffloadHostTSO4|FeatureIndirectDesc)
	r.add(16, 1, 4096)
	tx := r.add(16, 1, 1<<18)
	r.up()
	header := func(h NetHeader) []byte { p := make([]byte, NetHeaderSize); h.Put(p); return p }
	frame := frameOf(100, 0)
	bad := [][][]byte{
		{{1}},
		{header(NetHeader{})},
		{header(NetHeader{}), frame[:13]},
		{header(NetHeader{}), frameOf(MaxFrameSize, 0)},
		{header(NetHeader{Flags: NetNeedsChecksum, ChecksumStart: 99}), frame},
		{header(NetHeader{Flags: NetNeedsChecksum, ChecksumStart: 0xFFFF, ChecksumOffset: 0xFFFF}), frame},
		{header(NetHeader{GSOType: NetGSOTCPv6, GSOSize: 1, Flags: NetNeedsChecksum}), frame},
		{header(NetHeader{GSOType: NetGSOTCPv4 | NetGSOECN, GSOSize: 1, Flags: NetNeedsChecksum}), frame},
		{header(NetHeader{GSOType: NetGSOTCPv4, Flags: NetNeedsChecksum}), frame},
		{header(NetHeader{GSOType: NetGSOTCPv4, GSOSize: 10}), frame},
		{header(NetHeader{GSOType: 3}), frame},
		{header(NetHeader{GSOType: NetGSOECN}), frame},
	}
	for _, b := range bad {
		tx.send(0, b...)
	}
	if sent := h.takeSent(); len(sent) != 0 || dev.Stats().TxDropped != uint64(len(bad)) {
		t.Errorf("%d frames passed, %d of %d dropped", len(sent), dev.Stats().TxDropped, len(bad))
	}
	tx.send(0, header(NetHeader{GSOType: NetGSOTCPv4, GSOSize: 10, Flags: NetNeedsChecksum | 0xF0, ChecksumStart: 34, ChecksumOffset: 16, Buffers: 77}), frame)
	sent := h.takeSent()
	if len(sent) != 1 {
		t.Fatal("a good frame was dropped")
	}
	if got := ParseNetHeader(sent[0]); got.Flags != NetNeedsChecksum || got.Buffers != 0 || got.GSOSize != 10 {
		t.Errorf("header %+v", got)
	}
}

// TestNetSendWaits: a full backend holds frames in the queue, in order.
func TestNetSendWaits(t *testing.T) {
	eachRingKind(t, func(t *testing.T, features uint64) {
		h := newHub()
		r := newRings(t, newNet(t, h), features)
		r.add(16, 1, 4096)
		tx := r.add(64, 1, 4096)
		r.up()
		h.setFull(true)
		slot := tx.slot(0)
		for i := range 20 {
			slot[100*i+NetHeaderSize] = byte(i)
			tx.d.add([]segment{{tx.base + uint64(100*i), 60, false}}, false, i)
			tx.kick()
		}
		h.setFull(false)
		for i := range 20 {
			if tag, _ := r.reap(tx.d, tx.index); tag != i {
				t.Fatalf("frame %d returned as number %d", tag, i)
			}
		}
		for i, s := range h.takeSent() {
			if int(s[NetHeaderSize]) != i {
				t.Fatalf("frame %d sent as number %d", s[NetHeaderSize], i)
			}
		}
	})
}

func TestNetReceive(t *testing.T) {
	for name, merge := range map[string]uint64{"whole": 0, "merged": netFMergeRxBuf | netFGuestCSum | netFGuestTSO4} {
		t.Run(name, func(t *testing.T) {
			eachRingKind(t, func(t *testing.T, features uint64) {
				h := newHub()
				h.offloads = netOffloads
				dev := newNet(t, h)
				r := newRings(t, dev, features|merge)
				rx := r.add(128, 100, 1600)
				r.add(16, 1, 4096)
				r.up()
				sizes := []int{14, 60, 1514, 1588, 64, 1500}
				if merge != 0 {
					sizes = append(sizes, 1589, 9000, 65000, 15, 65535, 3188)
				}
				// Some wait before there are buffers.
				h.deliver(frameOf(sizes[0], 0))
				h.deliver(frameOf(sizes[1], 1))
				rx.postAll()
				for i, size := range sizes {
					if i > 1 {
						h.deliver(frameOf(size, i))
					}
					var got []byte
					buffers := 1
					for k := 0; k < buffers; k++ {
						p := rx.take()
						if k == 0 {
							if buffers = int(ParseNetHeader(p).Buffers); buffers < 1 || merge == 0 && buffers != 1 {
								t.Fatalf("header says %d buffers", buffers)
							}
							p = p[NetHeaderSize:]
						}
						got = append(got, p...)
					}
					if !bytes.Equal(got, frameOf(size, i)) {
						t.Fatalf("frame of %d bytes arrived as %d in %d buffers", size, len(got), buffers)
					}
				}
				if merge == 0 { // what fits no buffer is lost, and no more than that
					h.deliver(frameOf(1589, 1))
					h.deliver(frameOf(20, 2))
					if p := rx.take(); !bytes.Equal(p[NetHeaderSize:], frameOf(20, 2)) {
						t.Errorf("%d bytes", len(p))
					}
					if s := dev.Stats(); s.RxDropped != 1 || s.RxFrames != uint64(len(sizes)+1) {
						t.Errorf("counters %+v", s)
					}
				}
			})
		})
	}
}

// TestNetReceiveShort: with fewer buffers than a frame may need, the frame is lost
// whole, the buffers stay the driver's, and the worker comes to rest.
func TestNetReceiveShort(t *testing.T) {
	eachRingKind(t, func(t *testing.T, features uint64) {
		h := newHub()
		h.offloads = netOffloads
		r := newRings(t, newNet(t, h), features|netFMergeRxBuf|netFGuestCSum|netFGuestTSO4)
		rx := r.add(16, 3, 1000)
		r.add(16, 1, 4096)
		r.up()
		rx.postAll()
		h.deliver(frameOf(5000, 1))
		h.deliver(frameOf(1500, 2))
		first, second := rx.take(), rx.take()
		if got := append(first[NetHeaderSize:], second...); !bytes.Equal(got, frameOf(1500, 2)) {
			t.Fatalf("%d bytes", len(got))
		}
	})
}

// TestNetLink: while the cable is out nothing passes, and what came meanwhile
// does not come later.
func TestNetLink(t *testing.T) {
	h := newHub()
	dev := newNet(t, h)
	r := newRings(t, dev, netFStatus|netFMAC)
	rx, tx := r.add(16, 8, 2048), r.add(16, 1, 4096)
	r.up()
	rx.postAll()
	status := func() uint64 { return r.read(barDevice+6, 2) }
	if status() != netStatusLinkUp {
		t.Fatalf("status %d", status())
	}
	config := r.msi.count[0x40]
	dev.SetLink(false)
	dev.SetLink(false)
	if status() != 0 || dev.LinkUp() {
		t.Errorf("status %d with the cable out", status())
	}
	r.msi.mu.Lock()
	if n := r.msi.count[0x40] - config; n != 1 {
		t.Errorf("%d configuration interrupts", n)
	}
	r.msi.mu.Unlock()
	frame := frameOf(100, 1)
	tx.send(0, make([]byte, NetHeaderSize), frame)
	h.deliver(frame)
	for dev.Stats().RxDropped == 0 { // until the worker has thrown it away
		runtime.Gosched()
	}
	dev.SetLink(true)
	h.deliver(frameOf(80, 2))
	if p := rx.take(); !bytes.Equal(p[NetHeaderSize:], frameOf(80, 2)) {
		t.Errorf("received %d bytes", len(p))
	}
	tx.send(0, make([]byte, NetHeaderSize), frameOf(70, 3))
	if sent := h.takeSent(); len(sent) != 1 || !bytes.Equal(sent[0][NetHeaderSize:], frameOf(70, 3)) {
		t.Errorf("sent %d frames", len(sent))
	}
}

// TestNetPause: paused, nothing passes; resumed, nothing is missing.
func TestNetPause(t *testing.T) {
	h := newHub()
	dev := newNet(t, h)
	r := newRings(t, dev, 0)
	rx, tx := r.add(64, 32, 2048), r.add(16, 1, 4096)
	r.up()
	rx.postAll()
	for round := range 50 {
		r.pci.Pause()
		for i := range 10 {
			h.deliver(frameOf(60+i, round))
		}
		tx.put(0, make([]byte, NetHeaderSize), frameOf(60, round))
		if h.left() != 10 || len(h.takeSent()) != 0 {
			t.Fatal("frames passed a paused device")
		}
		r.pci.Resume()
		for i := range 10 {
			if p := rx.take(); !bytes.Equal(p[NetHeaderSize:], frameOf(60+i, round)) {
				t.Fatalf("round %d: frame %d is another", round, i)
			}
		}
		r.reap(tx.d, tx.index)
		if sent := h.takeSent(); len(sent) != 1 {
			t.Fatalf("round %d: %d frames sent", round, len(sent))
		}
	}
}

func TestNetControl(t *testing.T) {
	h := newHub()
	dev := newNet(t, h)
	r := newRings(t, dev, netFCtrlVQ|netFCtrlRx|netFCtrlMACAddr|netFStatus|netFGuestAnnounce)
	r.add(16, 1, 4096)
	r.add(16, 1, 4096)
	ctrl := r.add(16, 1, 4096)
	r.up()
	command := func(want byte, p ...byte) {
		t.Helper()
		if got := ctrl.send(1, p[:min(len(p), 2)], p[min(len(p), 2):]); len(got) != 1 || got[0] != want {
			t.Errorf("command %v: answer %v, want %d", p, got, want)
		}
	}
	for c := range byte(6) {
		command(netCtrlOK, netCtrlRx, c, 1)
	}
	command(netCtrlErr, netCtrlRx, 6, 1)
	command(netCtrlErr, netCtrlRx, 0)
	command(netCtrlErr, netCtrlRx, 0, 2)
	command(netCtrlOK, netCtrlMAC, netCtrlMACTable, 0, 0, 0, 0, 0, 0, 0, 0)
	command(netCtrlErr, netCtrlMAC, netCtrlMACAddress, 1, 2, 3, 4, 5, 6)
	command(netCtrlErr, netCtrlMAC, netCtrlMACAddress, 2, 3)
	command(netCtrlOK, netCtrlMAC, netCtrlMACAddress, 2, 2, 3, 4, 5, 6)
	if got := dev.MAC(); !bytes.Equal(got, []byte{2, 2, 3, 4, 5, 6}) || r.read(barDevice, 4) != 0x04030202 {
		t.Errorf("address %v", got)
	}
	command(netCtrlErr, 77, 0, 0)
	command(netCtrlErr, 4)
	dev.Announce()
	if s := r.read(barDevice+6, 2); s != netStatusLinkUp|netStatusAnnounce {
		t.Errorf("status %d", s)
	}
	command(netCtrlOK, netCtrlAnnounce, 0)
	if s := r.read(barDevice+6, 2); s != netStatusLinkUp {
		t.Errorf("status %d", s)
	}
	other := newNet(t, newHub())
	dev.SetLink(false)
	if err := other.SetState(dev.State()); err != nil || other.LinkUp() || !bytes.Equal(other.MAC(), dev.MAC()) {
		t.Errorf("state %+v, %v", other.State(), err)
	}
}

func TestNetConfig(t *testing.T) {
	for _, c := range []NetConfig{
		{MAC: testMAC},
		{Backend: newHub()},
		{Backend: newHub(), MAC: testMAC[:5]},
		{Backend: newHub(), MAC: net.HardwareAddr{1, 0, 0, 0, 0, 0}},
		{Backend: newHub(), MAC: testMAC, MTU: 67},
	} {
		if _, err := NewNet(c); !errors.Is(err, ErrNet) {
			t.Errorf("%+v: %v", c, err)
		}
	}
}

func TestNetAllocates(t *testing.T) {
	h := &nullHub{}
	dev, err := NewNet(NetConfig{Backend: h, MAC: testMAC})
	if err != nil {
		t.Fatal(err)
	}
	mem := testMemory(t)
	queues := make([]*Queue, 2)
	drivers := make([]*driver, 2)
	next := uint64(0x10000)
	for i := range queues {
		drivers[i], next = newDriver(mem, next, 16, 0)
		queues[i] = must(newQueue(mem, i, 0, &drivers[i].state))
	}
	if err := dev.Start(0, queues, nil); err != nil {
		t.Fatal(err)
	}
	var c Chain
	for i, q := range queues {
		checkAllocs(t, func(serve func() error) func() {
			return func() {
				drivers[i].add([]segment{{next, 2000, i == 0}}, false, 0)
				h.frames = 1
				dev.incoming.Store(true)
				if err := serve(); err != nil {
					t.Fatal(err)
				}
				if _, _, ok := drivers[i].used(); !ok {
					t.Fatal("not served")
				}
			}
		}, func() error { _, err := q.Pop(&c); return errors.Join(err, q.Push(&c, 0)) },
			func() error { return dev.Handle(q) })
	}
}

// nullHub takes everything and has a number of frames of 100 bytes.
type nullHub struct{ frames int }

func (h *nullHub) Offloads() uint64                   { return 0 }
func (h *nullHub) Start(uint64, func(), func()) error { return nil }
func (h *nullHub) Stop()                              {}
func (h *nullHub) Send([][]byte) error                { return nil }
func (h *nullHub) Describe() string                   { return "null" }
func (h *nullHub) Close() error                       { return nil }

func (h *nullHub) Receive([][]byte) (int, error) {
	if h.frames == 0 {
		return 0, ErrAgain
	}
	h.frames--
	return 100, nil
}

// FuzzNetHeader: what CheckSent lets pass stays inside the frame and the
// negotiated features.
func FuzzNetHeader(f *testing.F) {
	// From traffic of a Linux guest: a plain frame, one with a partial checksum, and
	// one that is unsegmented.
	f.Add([]byte{0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}, uint64(0), uint16(60))
	f.Add([]byte{1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0}, uint64(netOffloads), uint16(1514))
	f.Add([]byte{1, 1, 66, 0, 0xA8, 5, 34, 0, 16, 0, 0, 0}, uint64(netOffloads), uint16(65226))
	f.Fuzz(func(t *testing.T, p []byte, features uint64, size uint16) {
		if len(p) < NetHeaderSize {
			return
		}
		h := ParseNetHeader(p)
		var back [NetHeaderSize]byte
		h.Put(back[:])
		if !bytes.Equal(back[:], p[:NetHeaderSize]) {
			t.Fatalf("%x becomes %x", p[:NetHeaderSize], back)
		}
		if h.CheckSent(features, int(size)) != nil {
			return
		}
		if h.Flags&NetNeedsChecksum != 0 && (features&netFCSum == 0 || int(h.ChecksumStart)+int(h.ChecksumOffset)+2 > int(size)) {
			t.Errorf("checksum: %+v in %d bytes with %#x", h, size, features)
		}
		if h.GSOType != 0 && (features&(netFHostTSO4|netFHostTSO6) == 0 || h.GSOSize == 0 || h.Flags&NetNeedsChecksum == 0) {
			t.Errorf("segmentation: %+v with %#x", h, features)
		}
	})
}
