package netdev

import (
	"net"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// datagrams are buffers for one datagram each. They are held only while one is
// passed on, so that idle flows cost next to nothing.
var datagrams = sync.Pool{New: func() any { return new([65535]byte) }}

// udpFlow is a UDP conversation between one endpoint in the stack and one on
// the host.
type udpFlow struct {
	ep     tcpip.Endpoint
	wq     *waiter.Queue
	toHost func(p []byte) error
	idle   time.Duration

	lastUsed atomic.Int64 // monotonic, nanoseconds since flowEpoch
	stopOnce sync.Once
	stopped  chan struct{}
}

var flowEpoch = time.Now()

func (f *udpFlow) touch() { f.lastUsed.Store(int64(time.Since(flowEpoch))) }

// stop has the flow end soon.
func (f *udpFlow) stop() { f.stopOnce.Do(func() { close(f.stopped) }) }

// addFlow makes a flow, and room for it. onEnd runs when it has ended. It
// returns nil, and has done nothing, when the nat is closed.
func (n *nat) addFlow(ep tcpip.Endpoint, wq *waiter.Queue, idle time.Duration, toHost func([]byte) error, onEnd func()) *udpFlow {
	f := &udpFlow{ep: ep, wq: wq, toHost: toHost, idle: idle, stopped: make(chan struct{})}
	f.touch()
	n.mu.Lock()
	if n.closed {
		n.mu.Unlock()
		return nil
	}
	if len(n.flows) >= maxUDPFlows {
		var idlest *udpFlow
		for g := range n.flows {
			if idlest == nil || g.lastUsed.Load() < idlest.lastUsed.Load() {
				idlest = g
			}
		}
		delete(n.flows, idlest)
		idlest.stop()
	}
	n.flows[f] = struct{}{}
	n.work.Add(1)
	n.mu.Unlock()
	go func() {
		defer n.work.Done()
		f.run()
		n.mu.Lock()
		delete(n.flows, f)
		n.mu.Unlock()
		ep.Close()
		onEnd()
	}()
	return f
}

// run passes on what the guest sends until the flow is idle or stopped.
func (f *udpFlow) run() {
	entry, readable := waiter.NewChannelEntry(waiter.ReadableEvents | waiter.EventHUp | waiter.EventErr)
	f.wq.EventRegister(&entry)
	defer f.wq.EventUnregister(&entry)
	timer := time.NewTimer(f.idle)
	defer timer.Stop()
	for {
		if !f.drain() {
			return
		}
		select {
		case <-readable:
		case <-f.stopped:
			return
		case <-timer.C:
			left := f.idle - (time.Since(flowEpoch) - time.Duration(f.lastUsed.Load()))
			if left <= 0 {
				return
			}
			timer.Reset(left)
		}
	}
}

// drain passes on what waits; it returns false at the flow's end.
func (f *udpFlow) drain() bool {
	buf := datagrams.Get().(*[65535]byte)
	defer datagrams.Put(buf)
	for {
		w := tcpip.SliceWriter(buf[:])
		res, err := f.ep.Read(&w, tcpip.ReadOptions{})
		switch err.(type) {
		case nil:
		case *tcpip.ErrWouldBlock:
			return true
		default:
			return false
		}
		f.touch()
		_ = f.toHost(buf[:res.Count]) // a datagram may get lost
	}
}

// toGuest passes one datagram on to the guest.
func (f *udpFlow) toGuest(p []byte) {
	f.touch()
	var r payload = p
	_, _ = f.ep.Write(&r, tcpip.WriteOptions{}) // a datagram may get lost
}

// payload lets the stack take a datagram from a slice.
type payload []byte

func (p *payload) Read(b []byte) (int, error) {
	n := copy(b, *p)
	*p = (*p)[n:]
	return n, nil
}

// Len is what is left to read.
func (p *payload) Len() int { return len(*p) }

// acceptUDP opens a flow to where the guest sends its first datagram. It runs
// on the path of that datagram, and so does not wait.
func (n *nat) acceptUDP(r *udp.ForwarderRequest) {
	id := r.ID()
	target, ok := hostAddr(id.LocalAddress, id.LocalPort)
	if !ok {
		return
	}
	host, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(target))
	if err != nil {
		return
	}
	wq := new(waiter.Queue)
	ep, stackErr := r.CreateEndpoint(wq)
	if stackErr != nil {
		host.Close()
		return
	}
	idle := udpIdle
	if id.LocalPort == 53 {
		idle = dnsIdle
	}
	f := n.addFlow(ep, wq, idle, func(p []byte) error { _, err := host.Write(p); return err }, func() { host.Close() })
	if f == nil {
		ep.Close()
		host.Close()
		return
	}
	go f.answers(host)
}

// answers passes on what comes back until host is closed.
func (f *udpFlow) answers(host *net.UDPConn) {
	raw, err := host.SyscallConn()
	if err != nil {
		return
	}
	for {
		err := raw.Read(func(fd uintptr) bool {
			buf := datagrams.Get().(*[65535]byte)
			defer datagrams.Put(buf)
			n, _, err := unix.Recvfrom(int(fd), buf[:], unix.MSG_DONTWAIT)
			if err != nil {
				// Also "connection refused": the next datagram may fare better.
				return err != unix.EAGAIN && err != unix.EINTR
			}
			f.toGuest(buf[:n])
			return true
		})
		if err != nil {
			return
		}
	}
}
