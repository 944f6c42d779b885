package virtio

import (
	"errors"
	"fmt"
	"io"
	"sync"
)

// ErrConsole is the stage of errors from the console.
var ErrConsole = errors.New("virtio-console")

// Feature bits (section 5.3.3).
const (
	consoleFSize      = 1 << 0
	consoleFMultiport = 1 << 1
	consoleFEmergency = 1 << 2
)

// Queues (section 5.3.2): those of port 0, the control queues, and those of
// the other ports.
const (
	consoleControlRx = 2
	consoleControlTx = 3
)

const (
	consoleConfigSize = 12
	// MaxConsolePorts bounds the ports: each takes two queues.
	MaxConsolePorts = 15
	// consoleInput is how much input waits for the guest, by port.
	consoleInput = 64 << 10
	// consolePortName is the longest name of a port.
	consolePortName = 64
)

// ConsolePort is a port beside the console's own.
type ConsolePort struct {
	Name   string    // what the guest finds it by: /dev/virtio-ports/NAME
	Output io.Writer // gets what the guest writes; should not block for long
}

// ConsoleConfig describes a console device. Port 0 is the console.
type ConsoleConfig struct {
	Output     io.Writer // gets what the guest writes to the console; should not block for long
	Cols, Rows uint16    // 0: the driver is told no size
	Ports      []ConsolePort
}

// ConsolePortState is what survives a checkpoint of one port.
type ConsolePortState struct {
	Open  bool   // by the guest
	Input []byte // not yet read by the guest
}

// ConsoleState is what survives a checkpoint of a console.
type ConsoleState struct {
	Cols, Rows uint16
	Ports      []ConsolePortState
	Messages   [][]byte // control messages not yet read by the guest
}

// consolePort is a port at work.
type consolePort struct {
	name   string
	output io.Writer
	state  ConsolePortState // guarded by Console.mu
	rxq    *Queue           // nil where there is none; guarded by Console.mu

	rx, tx Chain // each used by its queue's worker alone
}

// Console is a console device with a console on port 0, and further ports
// where they are asked for (section 5.3).
type Console struct {
	ports []*consolePort

	mu         sync.Mutex
	room       sync.Cond // there may be room in a port's input, or the device is closed
	closed     bool      // guarded by mu
	cols, rows uint16    // guarded by mu
	messages   [][]byte  // for the driver, oldest first; guarded by mu
	controlRx  *Queue    // nil where there is none; guarded by mu
	host       Host      // nil while stopped; guarded by mu

	ctrlRx, ctrlTx Chain // each used by its queue's worker alone
}

// NewConsole makes a console device.
func NewConsole(config ConsoleConfig) (*Console, error) {
	if len(config.Ports) >= MaxConsolePorts {
		return nil, fmt.Errorf("%w: %d ports: %d are possible", ErrConsole, len(config.Ports)+1, MaxConsolePorts)
	}
	c := &Console{cols: config.Cols, rows: config.Rows}
	c.room.L = &c.mu
	for _, p := range append([]ConsolePort{{Output: config.Output}}, config.Ports...) {
		if len(p.Name) > consolePortName {
			return nil, fmt.Errorf("%w: port name %q: %d bytes are possible", ErrConsole, p.Name, consolePortName)
		}
		if p.Output == nil {
			p.Output = io.Discard
		}
		c.ports = append(c.ports, &consolePort{name: p.Name, output: p.Output})
	}
	return c, nil
}

// ID is IDConsole.
func (c *Console) ID() DeviceID { return IDConsole }

// Features are early output, the size, and several ports where there are.
func (c *Console) Features() uint64 {
	f := uint64(consoleFEmergency)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cols != 0 && c.rows != 0 {
		f |= consoleFSize
	}
	if len(c.ports) > 1 {
		f |= consoleFMultiport
	}
	return f
}

// QueueSizes are those of port 0 and, where there are more ports, of the
// control queues and the others'.
func (c *Console) QueueSizes() []uint16 {
	sizes := []uint16{128, 128}
	if len(c.ports) > 1 {
		sizes = append(sizes, 64, 64)
		for range c.ports[1:] {
			sizes = append(sizes, 128, 128)
		}
	}
	return sizes
}

// ReadConfig reads struct virtio_console_config (section 5.3.4).
func (c *Console) ReadConfig(off int, p []byte) {
	var b [consoleConfigSize]byte
	c.mu.Lock()
	le.PutUint16(b[0:], c.cols)
	le.PutUint16(b[2:], c.rows)
	c.mu.Unlock()
	le.PutUint32(b[4:], uint32(len(c.ports)))
	readConfig(b[:], off, p)
}

// WriteConfig takes a character of early output.
func (c *Console) WriteConfig(off int, p []byte) {
	if off == 8 && len(p) > 0 {
		_, _ = c.ports[0].output.Write(p[:1])
	}
}

// Start finds the ports' queues.
func (c *Console) Start(_ uint64, queues []*Queue, host Host) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.host = host
	for i, p := range c.ports {
		p.rxq = queues[consolePortQueue(i)]
	}
	if len(queues) > consoleControlRx {
		c.controlRx = queues[consoleControlRx]
	}
	return nil
}

// consolePortQueue is the number of a port's receive queue; its transmit queue is the next.
func consolePortQueue(port int) int {
	if port == 0 {
		return 0
	}
	return 2 + 2*port
}

// Stop forgets the queues. Input still waits for the driver that comes next.
func (c *Console) Stop() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.host, c.controlRx, c.messages = nil, nil, nil
	for _, p := range c.ports {
		p.rxq, p.state.Open = nil, false
	}
}

// Close ends calls of Input that wait.
func (c *Console) Close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	c.room.Broadcast()
}

// Input passes p on to the console, and waits for room as long as it needs to.
func (c *Console) Input(p []byte) { _ = c.InputTo(0, p) }

// InputTo is Input for any port.
func (c *Console) InputTo(port int, p []byte) error {
	if port < 0 || port >= len(c.ports) {
		return fmt.Errorf("%w: port %d of %d", ErrConsole, port, len(c.ports))
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.ports[port]
	for len(p) > 0 {
		for len(s.state.Input) >= consoleInput && !c.closed {
			c.room.Wait()
		}
		if c.closed {
			return fmt.Errorf("%w: device is closed", ErrConsole)
		}
		n := min(len(p), consoleInput-len(s.state.Input))
		s.state.Input = append(s.state.Input, p[:n]...)
		p = p[n:]
		if s.rxq != nil {
			s.rxq.Wake()
		}
	}
	return nil
}

// Resize tells the driver the console's size.
func (c *Console) Resize(cols, rows uint16) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cols == cols && c.rows == rows {
		return
	}
	c.cols, c.rows = cols, rows
	if c.host == nil {
		return
	}
	c.host.ConfigChanged()
	if c.controlRx != nil {
		c.say(0, consoleResize, 0, c.sizeMessage())
	}
}

// PortOpen tells whether the guest has a port open, which is known only
// where there are several.
func (c *Console) PortOpen(port int) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return port >= 0 && port < len(c.ports) && c.ports[port].state.Open
}

// State is what a checkpoint keeps.
func (c *Console) State() ConsoleState {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := ConsoleState{Cols: c.cols, Rows: c.rows}
	for _, p := range c.ports {
		s.Ports = append(s.Ports, ConsolePortState{Open: p.state.Open, Input: append([]byte(nil), p.state.Input...)})
	}
	for _, m := range c.messages {
		s.Messages = append(s.Messages, append([]byte(nil), m...))
	}
	return s
}

// SetState restores what a checkpoint kept; before Start.
func (c *Console) SetState(s ConsoleState) error {
	if len(s.Ports) != len(c.ports) {
		return fmt.Errorf("%w: state of %d ports, device with %d", ErrConsole, len(s.Ports), len(c.ports))
	}
	if len(s.Messages) > c.maxMessages() {
		return fmt.Errorf("%w: state with %d control messages", ErrConsole, len(s.Messages))
	}
	for i, p := range s.Ports {
		if len(p.Input) > consoleInput {
			return fmt.Errorf("%w: state of port %d: %d bytes of input", ErrConsole, i, len(p.Input))
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.cols, c.rows = s.Cols, s.Rows
	c.messages = append([][]byte(nil), s.Messages...)
	for i, p := range c.ports {
		p.state = ConsolePortState{Open: s.Ports[i].Open, Input: append([]byte(nil), s.Ports[i].Input...)}
	}
	return nil
}
