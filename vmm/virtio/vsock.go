package virtio

import (
	"errors"
	"fmt"
	"sync"
	"time"
)

// ErrVsock is the stage of errors from socket devices.
var ErrVsock = errors.New("virtio-vsock")

// Queues of the device (section 5.10.2).
const (
	vsockRxQueue = iota
	vsockTxQueue
	vsockEventQueue
)

const (
	vsockFStream = 1 << 0

	// vsockBuffer is how much of what the guest sends waits for each
	// connection's host side; the guest is told so.
	vsockBuffer = 256 << 10
	// vsockMaxPayload is the most one packet to the guest carries.
	vsockMaxPayload = 64 << 10
	// vsockMaxConns bounds the connections, and with vsockBuffer the memory.
	vsockMaxConns = 1023
	// vsockMaxResets bounds the refusals that wait for the guest to read them.
	// While there are so many, what the guest sends waits in its queue.
	vsockMaxResets = 256
	// vsockFirstPort is where the ports of connections from the host begin.
	vsockFirstPort = 1 << 30
	// vsockOpenTimeout is how long a guest has to answer a connection from the host.
	vsockOpenTimeout = 20 * time.Second
)

// VsockStream is the host side of a connection. Its calls never wait: they
// return ErrAgain, and the callback it was opened with tells when to go on.
// Readv and Writev are called by one goroutine each.
type VsockStream interface {
	// Readv reads into the pieces of p; io.EOF says that the other side sends no more.
	Readv(p [][]byte) (int, error)
	// Writev writes some of p and returns how much.
	Writev(p [][]byte) (int, error)
	// CloseWrite tells the other side that no more comes.
	CloseWrite() error
	// HungUp tells whether the other side takes no more either.
	HungUp() bool
	// Close may wait for a callback that is running.
	Close() error
}

// VsockHost is what the guest's connections to the host lead to.
type VsockHost interface {
	// Dial connects to port without waiting. readable and writable may be
	// called from any goroutine, at any time until Close returns.
	Dial(port uint32, readable, writable func()) (VsockStream, error)
}

// VsockCall is a connection from the host that waits for the guest's answer. One
// of its methods is called, once.
type VsockCall interface {
	// Accepted gives the stream, now that the guest has taken the connection.
	// hostPort is its port on the host's side.
	Accepted(hostPort uint32, readable, writable func()) (VsockStream, error)
	// Refused says that the guest has not.
	Refused()
}

// VsockState is what survives a checkpoint of a socket device. Connections do
// not: the driver is told so after a restore (section 5.10.6.7).
type VsockState struct {
	CID uint64
}

// Vsock is a socket device for stream sockets (section 5.10).
type Vsock struct {
	host VsockHost

	mu       sync.Mutex
	state    VsockState                  // guarded by mu
	conns    map[vsockKey]*vsockConn     // guarded by mu
	ready    []*vsockConn                // have something for the guest, oldest first; guarded by mu
	resets   []vsockKey                  // refusals for the guest; guarded by mu
	flush    map[*vsockConn]struct{}     // may write what waits for the host; guarded by mu
	later    []func()                    // for unlock to run; guarded by mu
	nextPort uint32                      // guarded by mu
	started  bool                        // guarded by mu
	stalled  bool                        // the transmit worker waits for room in resets; guarded by mu
	restored bool                        // the driver must hear that its connections are gone; guarded by mu
	queues   [vsockEventQueue + 1]*Queue // guarded by mu

	rx struct { // used by the receive queue's worker alone
		chain   Chain
		pieces  [][]byte // room for payload
		limited [][]byte // of that, what one read may fill
	}
	tx struct { // used by the transmit queue's worker alone
		chain  Chain
		pieces [][]byte
		list   []*vsockConn
	}
	event Chain // used by the event queue's worker alone
}

// NewVsock makes a socket device for the guest with context id cid. host is
// asked for the guest's connections.
func NewVsock(cid uint32, host VsockHost) (*Vsock, error) {
	if cid < 3 || cid == 1<<32-1 {
		return nil, fmt.Errorf("%w: context id %d: 3 to 4294967294 are possible", ErrVsock, cid)
	}
	if host == nil {
		return nil, fmt.Errorf("%w: no host side", ErrVsock)
	}
	return &Vsock{
		host: host, state: VsockState{CID: uint64(cid)}, nextPort: vsockFirstPort,
		conns: map[vsockKey]*vsockConn{}, flush: map[*vsockConn]struct{}{},
	}, nil
}

// ID is IDVsock.
func (v *Vsock) ID() DeviceID { return IDVsock }

// Features are stream sockets.
func (v *Vsock) Features() uint64 { return vsockFStream }

// QueueSizes are those of rx, tx and event.
func (v *Vsock) QueueSizes() []uint16 { return []uint16{128, 128, 16} }

// ReadConfig reads struct virtio_vsock_config (section 5.10.4).
func (v *Vsock) ReadConfig(off int, p []byte) {
	var c [8]byte
	le.PutUint64(c[:], v.State().CID)
	readConfig(c[:], off, p)
}

// WriteConfig does nothing.
func (v *Vsock) WriteConfig(int, []byte) {}

// Start begins to take packets.
func (v *Vsock) Start(_ uint64, queues []*Queue, _ Host) error {
	v.mu.Lock()
	defer v.unlock()
	v.started = true
	copy(v.queues[:], queues)
	return nil
}

// Stop ends all connections.
func (v *Vsock) Stop() {
	v.mu.Lock()
	defer v.unlock()
	for _, c := range v.conns {
		v.drop(c)
	}
	v.started, v.stalled, v.restored = false, false, false
	v.ready, v.resets = nil, nil
	v.queues = [vsockEventQueue + 1]*Queue{}
}

// Open connects the host to a port of the guest. call hears how that goes, unless
// Open returns an error.
func (v *Vsock) Open(guestPort uint32, call VsockCall) error {
	v.mu.Lock()
	defer v.unlock()
	if !v.started || v.queues[vsockRxQueue] == nil || v.queues[vsockTxQueue] == nil {
		return fmt.Errorf("%w: the guest has no driver running", ErrVsock)
	}
	if len(v.conns) >= vsockMaxConns {
		return fmt.Errorf("%w: %d connections are open", ErrVsock, len(v.conns))
	}
	key := vsockKey{host: v.nextPort, guest: guestPort}
	for v.conns[key] != nil {
		key.host = max(key.host+1, vsockFirstPort)
	}
	v.nextPort = max(key.host+1, vsockFirstPort)
	c := &vsockConn{key: key, call: call, send: sendRequest, live: true}
	v.conns[key] = c
	c.timer = time.AfterFunc(vsockOpenTimeout, func() {
		v.mu.Lock()
		defer v.unlock()
		if c.live && c.call != nil {
			v.refuse(c)
		}
	})
	v.enqueue(c)
	return nil
}

// State is what a checkpoint keeps.
func (v *Vsock) State() VsockState {
	v.mu.Lock()
	defer v.unlock()
	return v.state
}

// SetState restores what a checkpoint kept; before Start, after which the driver
// hears that its connections are gone and reads its context id anew: it keeps
// the one given to NewVsock.
func (v *Vsock) SetState(s VsockState) error {
	if s.CID < 3 || s.CID >= 1<<32-1 {
		return fmt.Errorf("%w: saved context id %d", ErrVsock, s.CID)
	}
	v.mu.Lock()
	defer v.unlock()
	v.restored = true
	return nil
}

// Connections counts those that are open.
func (v *Vsock) Connections() int {
	v.mu.Lock()
	defer v.unlock()
	return len(v.conns)
}

// unlock unlocks mu and then does what must not be done with it held: closing
// streams, whose callbacks take it, and answering callers.
func (v *Vsock) unlock() {
	later := v.later
	v.later = nil
	v.mu.Unlock()
	for _, f := range later {
		f()
	}
}

// wake has a queue's worker look again; with mu held.
func (v *Vsock) wake(queue int) {
	if q := v.queues[queue]; q != nil {
		q.Wake()
	}
}
