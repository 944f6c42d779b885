package virtio

import (
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
)

// ErrNet is the stage of errors from network devices.
var ErrNet = errors.New("virtio-net")

// Queues of the device (section 5.1.2).
const (
	netRxQueue = iota
	netTxQueue
	netCtrlQueue
)

// Bits of the status field in configuration space.
const (
	netStatusLinkUp   = 1
	netStatusAnnounce = 2
)

const (
	netQueueSize  = 256
	netConfigSize = 12
	ethHeaderSize = 14
	// netMaxPieces is how many pieces a frame is passed to the backend in;
	// a driver that scatters it more pays for a copy.
	netMaxPieces = 64
	// netMaxChains is how many buffers may hold one received frame.
	netMaxChains = 64
	// netRxFrame is the most a frame needs when the driver takes none that are
	// unsegmented and no MTU was agreed: a VLAN tag and a page of data or so.
	netRxFrame = NetHeaderSize + 18 + 1500
)

// NetConfig describes a network device.
type NetConfig struct {
	Backend NetBackend
	MAC     net.HardwareAddr // six bytes
	MTU     uint16           // largest IP packet the driver is told of; 0: it is not told
}

// NetState is what survives a checkpoint of a network device.
type NetState struct {
	MAC      [6]byte // the driver may have changed it
	LinkDown bool
	Announce bool // the driver is asked to announce itself and has not yet
}

// NetStats counts what went through a network device since it was made.
type NetStats struct {
	RxFrames, RxBytes, RxDropped uint64 // to the guest
	TxFrames, TxBytes, TxDropped uint64 // from the guest
}

// Net is a network device (section 5.1).
type Net struct {
	backend NetBackend
	mtu     uint16

	mu    sync.Mutex
	state NetState // guarded by mu
	host  Host     // nil while stopped; guarded by mu
	rxq   *Queue   // guarded by mu

	features uint64 // negotiated; written while no worker runs
	linkUp   atomic.Bool
	stats    struct{ rxFrames, rxBytes, rxDropped, txFrames, txBytes, txDropped atomic.Uint64 }

	// incoming says that the backend may have a frame. Without one the receive
	// worker leaves the queue alone.
	incoming atomic.Bool
	rx       netReceiver // used by the receive queue's worker alone
	tx       netSender   // used by the transmit queue's worker alone
	ctrl     Chain       // used by the control queue's worker alone
}

// NewNet makes a network device whose cable ends in config.Backend. The
// backend stays the caller's to close, after the device has been stopped.
func NewNet(config NetConfig) (*Net, error) {
	if config.Backend == nil {
		return nil, fmt.Errorf("%w: no backend", ErrNet)
	}
	if len(config.MAC) != 6 || config.MAC[0]&1 != 0 {
		return nil, fmt.Errorf("%w: MAC address %q: want six bytes, the first one even", ErrNet, config.MAC)
	}
	if config.MTU != 0 && config.MTU < 68 {
		return nil, fmt.Errorf("%w: MTU %d: the least is 68", ErrNet, config.MTU)
	}
	n := &Net{backend: config.Backend, mtu: config.MTU}
	n.state.MAC = [6]byte(config.MAC)
	n.linkUp.Store(true)
	n.tx.pieces = make([][]byte, 0, netMaxPieces)
	n.rx.pieces = make([][]byte, 0, netMaxPieces)
	n.rx.spill = make([]byte, MaxFrameSize)
	return n, nil
}

// ID is IDNet.
func (n *Net) ID() DeviceID { return IDNet }

// Features are the device's own and the offloads the backend can carry.
func (n *Net) Features() uint64 {
	f := uint64(netFMAC | netFStatus | netFMergeRxBuf | netFCtrlVQ | netFCtrlRx | netFCtrlRxExtra | netFCtrlMACAddr | netFGuestAnnounce)
	if n.mtu != 0 {
		f |= netFMTU
	}
	return f | n.backend.Offloads()&netOffloads
}

// QueueSizes are those of receiveq, transmitq and controlq.
func (n *Net) QueueSizes() []uint16 { return []uint16{netQueueSize, netQueueSize, 64} }

// ReadConfig reads struct virtio_net_config (section 5.1.4).
func (n *Net) ReadConfig(off int, p []byte) {
	var c [netConfigSize]byte
	n.mu.Lock()
	copy(c[:], n.state.MAC[:])
	if !n.state.LinkDown {
		c[6] |= netStatusLinkUp
	}
	if n.state.Announce {
		c[6] |= netStatusAnnounce
	}
	n.mu.Unlock()
	le.PutUint16(c[8:], 1) // max_virtqueue_pairs
	le.PutUint16(c[10:], n.mtu)
	readConfig(c[:], off, p)
}

// readConfig answers a read of off in a configuration space of bytes c.
func readConfig(c []byte, off int, p []byte) {
	clear(p)
	if off >= 0 && off < len(c) {
		copy(p, c[off:])
	}
}

// WriteConfig does nothing: drivers of this version set the address by the
// control queue.
func (n *Net) WriteConfig(int, []byte) {}

// Start connects the queues with the backend.
func (n *Net) Start(features uint64, queues []*Queue, host Host) error {
	n.features = features
	rxq, txq := queues[netRxQueue], queues[netTxQueue]
	n.mu.Lock()
	n.host, n.rxq = host, rxq
	n.mu.Unlock()
	n.incoming.Store(true)
	readable := func() {
		n.incoming.Store(true)
		if rxq != nil {
			rxq.Wake()
		}
	}
	writable := func() {
		if txq != nil {
			txq.Wake()
		}
	}
	if err := n.backend.Start(features, readable, writable); err != nil {
		return fmt.Errorf("%w: %w", ErrNet, err)
	}
	return nil
}

// Stop disconnects the backend.
func (n *Net) Stop() {
	n.backend.Stop()
	n.mu.Lock()
	defer n.mu.Unlock()
	n.host, n.rxq = nil, nil
	n.state.Announce = false
}

// Handle serves one queue.
func (n *Net) Handle(q *Queue) error {
	var err error
	switch q.Index() {
	case netRxQueue:
		err = n.receive(q)
	case netTxQueue:
		err = n.transmit(q)
	case netCtrlQueue:
		err = n.control(q)
	}
	if err != nil {
		return fmt.Errorf("%w: %w", ErrNet, err)
	}
	return nil
}

// SetLink plugs the cable in or pulls it out. The driver is told; no frame
// passes while it is out.
func (n *Net) SetLink(up bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.state.LinkDown != up {
		return
	}
	n.state.LinkDown = !up
	n.linkUp.Store(up)
	if n.host != nil {
		n.host.ConfigChanged()
	}
	if n.rxq != nil { // so that what waits is thrown away now, not delivered later
		n.incoming.Store(true)
		n.rxq.Wake()
	}
}

// LinkUp tells whether the cable is in.
func (n *Net) LinkUp() bool { return n.linkUp.Load() }

// Announce asks the driver to tell the network where it is (section
// 5.1.6.5.4), as is right after a restore elsewhere. Drivers that cannot are
// not asked.
func (n *Net) Announce() {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.host == nil || n.features&netFGuestAnnounce == 0 {
		return
	}
	n.state.Announce = true
	n.host.ConfigChanged()
}

// MAC is the guest's address, as the driver last set it.
func (n *Net) MAC() net.HardwareAddr {
	n.mu.Lock()
	defer n.mu.Unlock()
	return append(net.HardwareAddr(nil), n.state.MAC[:]...)
}

// Backend is the other end of the cable.
func (n *Net) Backend() NetBackend { return n.backend }

// Stats are the counters.
func (n *Net) Stats() NetStats {
	return NetStats{
		RxFrames: n.stats.rxFrames.Load(), RxBytes: n.stats.rxBytes.Load(), RxDropped: n.stats.rxDropped.Load(),
		TxFrames: n.stats.txFrames.Load(), TxBytes: n.stats.txBytes.Load(), TxDropped: n.stats.txDropped.Load(),
	}
}

// State is what a checkpoint keeps.
func (n *Net) State() NetState {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.state
}

// SetState restores what a checkpoint kept; before Start.
func (n *Net) SetState(s NetState) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.state = s
	n.linkUp.Store(!s.LinkDown)
	return nil
}
