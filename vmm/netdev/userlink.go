package netdev

import (
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/gnomon-vmm/gnomon/vmm/virtio"
)

const (
	// What may wait for the guest to take it.
	userQueueFrames = 1024
	userQueueBytes  = 4 << 20

	// userGSOSize is the most payload the stack puts in one unsegmented frame.
	userGSOSize = 1<<16 - 1 - 128
)

var errFrame = errors.New("bad frame")

// userLink is the stack's Ethernet interface; its other end is the guest's
// network device.
type userLink struct {
	mac      tcpip.LinkAddress
	mtu      atomic.Uint32
	features atomic.Uint64 // negotiated with the guest; 0 while stopped

	mu         sync.Mutex
	dispatcher stack.NetworkDispatcher // guarded by mu
	readable   func()                  // guarded by mu; nil while stopped
	hungry     bool                    // the guest found nothing: tell it; guarded by mu
	waiting    []*stack.PacketBuffer   // frames for the guest, oldest first from head on; guarded by mu
	head       int                     // guarded by mu
	bytes      int                     // in waiting; guarded by mu
}

var (
	_ stack.LinkEndpoint = (*userLink)(nil)
	_ stack.GSOEndpoint  = (*userLink)(nil)
)

func newUserLink(mtu uint32, mac net.HardwareAddr) *userLink {
	l := &userLink{mac: tcpip.LinkAddress(mac)}
	l.mtu.Store(mtu)
	return l
}

func (l *userLink) start(features uint64, readable func()) {
	l.features.Store(features)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.readable, l.hungry = readable, true
}

func (l *userLink) stop() {
	l.features.Store(0)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.readable = nil
	for _, pkt := range l.waiting[l.head:] {
		pkt.DecRef()
	}
	l.waiting, l.head, l.bytes = nil, 0, 0
}

// send gives the stack a frame from the guest.
func (l *userLink) send(frame [][]byte) error {
	total := 0
	for _, b := range frame {
		total += len(b)
	}
	if total < virtio.NetHeaderSize+header.EthernetMinimumSize || total > virtio.MaxFrameSize {
		return fmt.Errorf("%w: %d bytes", errFrame, total)
	}
	// One copy, into the stack's own memory: the guest may change its at any time.
	view := buffer.NewView(total)
	for _, b := range frame {
		_, _ = view.Write(b)
	}
	view.TrimFront(virtio.NetHeaderSize)
	eth := header.Ethernet(view.AsSlice())
	if dst := eth.DestinationAddress(); dst != l.mac && dst != header.EthernetBroadcastAddress {
		view.Release()
		return nil // for nobody here
	}
	protocol := eth.Type()
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithView(view)})
	defer pkt.DecRef()
	if !l.ParseHeader(pkt) {
		return fmt.Errorf("%w: no Ethernet header", errFrame)
	}
	if eth.DestinationAddress() == header.EthernetBroadcastAddress {
		pkt.PktType = tcpip.PacketBroadcast
	}
	l.mu.Lock()
	d := l.dispatcher
	l.mu.Unlock()
	if d != nil {
		d.DeliverNetworkPacket(protocol, pkt)
	}
	return nil
}

// receive puts the oldest waiting frame into p.
func (l *userLink) receive(p [][]byte) (int, error) {
	for {
		pkt := l.next()
		if pkt == nil {
			return 0, virtio.ErrAgain
		}
		n, err := l.put(pkt, p)
		pkt.DecRef()
		if err == nil {
			return n, nil
		}
		// Built for a driver that has since been replaced by one that wants less.
	}
}

func (l *userLink) next() *stack.PacketBuffer {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.head == len(l.waiting) {
		l.hungry = true
		return nil
	}
	pkt := l.waiting[l.head]
	l.waiting[l.head] = nil
	l.head++
	l.bytes -= pkt.Size()
	if l.head == len(l.waiting) {
		l.waiting, l.head = l.waiting[:0], 0
	}
	return pkt
}

// put writes pkt with its header into p and returns the length.
func (l *userLink) put(pkt *stack.PacketBuffer, p [][]byte) (int, error) {
	h, err := receiveHeader(pkt, l.features.Load())
	if err != nil {
		return 0, err
	}
	var head [virtio.NetHeaderSize]byte
	h.Put(head[:])
	w := scatter{pieces: p}
	w.write(head[:])
	views, skip := pkt.AsViewList()
	for v := views.Front(); v != nil; v = v.Next() {
		b := v.AsSlice()
		n := min(skip, len(b))
		skip -= n
		w.write(b[n:])
	}
	if w.full {
		return 0, fmt.Errorf("%w: %d bytes do not fit", errFrame, pkt.Size())
	}
	return w.n, nil
}

// receiveHeader is the header for a frame from the stack, or an error when a
// driver that negotiated features cannot take it.
func receiveHeader(pkt *stack.PacketBuffer, features uint64) (virtio.NetHeader, error) {
	var h virtio.NetHeader
	gso := pkt.GSOOptions
	headers := pkt.HeaderSize()
	if gso.Type == stack.GSOTCPv4 && gso.NeedsCsum {
		// The stack left the checksum to us (of the pseudo header alone).
		if features&virtio.NetOffloadGuestCSum == 0 {
			return h, fmt.Errorf("%w: driver takes no partial checksums", errFrame)
		}
		h.Flags = virtio.NetNeedsChecksum
		h.ChecksumStart = header.EthernetMinimumSize + gso.L3HdrLen
		h.ChecksumOffset = gso.CsumOffset
		if gso.MSS > 0 && pkt.Data().Size() > int(gso.MSS) {
			if features&virtio.NetOffloadGuestTSO4 == 0 {
				return h, fmt.Errorf("%w: driver takes no unsegmented frames", errFrame)
			}
			h.GSOType = virtio.NetGSOTCPv4
			h.GSOSize = gso.MSS
			h.HeaderLength = uint16(headers)
		}
	} else if features&virtio.NetOffloadGuestCSum != 0 {
		h.Flags = virtio.NetDataValid
	}
	return h, nil
}

// scatter writes into pieces of memory, in order.
type scatter struct {
	pieces [][]byte
	at     int // in pieces[0]
	n      int // written in all
	full   bool
}

func (s *scatter) write(b []byte) {
	for len(b) > 0 {
		if len(s.pieces) == 0 {
			s.full = true
			return
		}
		n := copy(s.pieces[0][s.at:], b)
		b, s.at, s.n = b[n:], s.at+n, s.n+n
		if s.at == len(s.pieces[0]) {
			s.pieces, s.at = s.pieces[1:], 0
		}
	}
}

// WritePackets queues frames for the guest and drops what does not fit.
func (l *userLink) WritePackets(pkts stack.PacketBufferList) (int, tcpip.Error) {
	var wake func()
	sent := 0
	l.mu.Lock()
	for _, pkt := range pkts.AsSlice() {
		if foreignARPReply(pkt) {
			sent++
			continue
		}
		if l.readable == nil || len(l.waiting)-l.head >= userQueueFrames || l.bytes+pkt.Size() > userQueueBytes {
			break
		}
		if len(l.waiting) == cap(l.waiting) && l.head > 0 {
			kept := copy(l.waiting, l.waiting[l.head:])
			clear(l.waiting[kept:])
			l.waiting, l.head = l.waiting[:kept], 0
		}
		l.waiting = append(l.waiting, pkt.IncRef())
		l.bytes += pkt.Size()
		sent++
		if l.hungry {
			l.hungry, wake = false, l.readable
		}
	}
	l.mu.Unlock()
	if wake != nil {
		wake()
	}
	return sent, nil
}

// foreignARPReply tells whether pkt claims an address for the gateway that is
// not its own. The stack answers for every address, and a guest that probes for
// its own would find it taken.
func foreignARPReply(pkt *stack.PacketBuffer) bool {
	if pkt.NetworkProtocolNumber != header.ARPProtocolNumber {
		return false
	}
	h := header.ARP(pkt.NetworkHeader().Slice())
	if !h.IsValid() || h.Op() != header.ARPReply {
		return false
	}
	sender := tcpip.AddrFromSlice(h.ProtocolAddressSender())
	return sender != stackAddr(UserGateway) && sender != stackAddr(UserDNS)
}

// AddHeader puts the Ethernet header before a frame.
func (l *userLink) AddHeader(pkt *stack.PacketBuffer) {
	header.Ethernet(pkt.LinkHeader().Push(header.EthernetMinimumSize)).Encode(&header.EthernetFields{
		SrcAddr: l.mac,
		DstAddr: pkt.EgressRoute.RemoteLinkAddress,
		Type:    pkt.NetworkProtocolNumber,
	})
}

// ParseHeader takes the Ethernet header off a frame.
func (l *userLink) ParseHeader(pkt *stack.PacketBuffer) bool {
	_, ok := pkt.LinkHeader().Consume(header.EthernetMinimumSize)
	return ok
}

// Capabilities: frames from the guest come over no wire that could damage them.
func (l *userLink) Capabilities() stack.LinkEndpointCapabilities {
	return stack.CapabilityResolutionRequired | stack.CapabilityRXChecksumOffload
}

// SupportedGSO is segmentation by the guest, where it negotiated that.
func (l *userLink) SupportedGSO() stack.SupportedGSO {
	const needs = virtio.NetOffloadGuestCSum | virtio.NetOffloadGuestTSO4
	if l.features.Load()&needs == needs {
		return stack.HostGSOSupported
	}
	return stack.GSONotSupported
}

// GSOMaxSize is the most payload of an unsegmented frame.
func (l *userLink) GSOMaxSize() uint32 { return userGSOSize }

// Attach gives the link the stack to deliver to; nil when it goes.
func (l *userLink) Attach(d stack.NetworkDispatcher) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.dispatcher = d
}

// IsAttached tells whether there is a stack to deliver to.
func (l *userLink) IsAttached() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.dispatcher != nil
}

// MTU is the largest IP packet.
func (l *userLink) MTU() uint32 { return l.mtu.Load() }

// SetMTU changes the largest IP packet.
func (l *userLink) SetMTU(mtu uint32) { l.mtu.Store(mtu) }

// MaxHeaderLength is the Ethernet header's.
func (l *userLink) MaxHeaderLength() uint16 { return header.EthernetMinimumSize }

// LinkAddress is the gateway's MAC address.
func (l *userLink) LinkAddress() tcpip.LinkAddress { return l.mac }

// SetLinkAddress does nothing: the gateway's address is fixed.
func (l *userLink) SetLinkAddress(tcpip.LinkAddress) {}

// ARPHardwareType is Ethernet.
func (l *userLink) ARPHardwareType() header.ARPHardwareType { return header.ARPHardwareEther }

// Wait returns at once: the link has no goroutines.
func (l *userLink) Wait() {}

// Close does nothing more than stop.
func (l *userLink) Close() { l.stop() }

// SetOnCloseAction does nothing: nothing hangs on the link.
func (l *userLink) SetOnCloseAction(func()) {}
