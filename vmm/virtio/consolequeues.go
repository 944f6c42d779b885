package virtio

import "fmt"

// Control messages (section 5.3.6.2).
const (
	consoleDeviceReady = 0
	consoleDeviceAdd   = 1
	consolePortReady   = 3
	consoleConsolePort = 4
	consoleResize      = 5
	consolePortOpen    = 6
	consoleName        = 7

	consoleMessageSize = 8
)

// Handle serves one queue.
func (c *Console) Handle(q *Queue) error {
	var err error
	switch i := q.Index(); {
	case i == consoleControlRx:
		err = c.sendMessages(q)
	case i == consoleControlTx:
		err = eachChain(q, &c.ctrlTx, c.takeMessage)
	default:
		port := c.ports[0]
		if i > consoleControlTx {
			port = c.ports[i/2-1]
		}
		if i%2 == 0 {
			err = c.sendInput(q, port)
		} else {
			err = eachChain(q, &port.tx, port.takeOutput)
		}
	}
	if err != nil {
		return fmt.Errorf("%w: %w", ErrConsole, err)
	}
	return nil
}

// takeOutput passes on what the guest wrote. A backend that cannot take it
// loses it: the guest goes on.
func (p *consolePort) takeOutput(chain *Chain) {
	for i := range chain.Read {
		_, _ = p.output.Write(chain.Read[i].Data)
	}
}

// sendInput gives the guest what waits for it.
func (c *Console) sendInput(q *Queue, p *consolePort) error {
	for {
		c.mu.Lock()
		waiting := len(p.state.Input)
		c.mu.Unlock()
		if waiting == 0 {
			return nil
		}
		ok, err := q.Pop(&p.rx)
		if err != nil || !ok {
			return err
		}
		c.mu.Lock()
		n := 0
		for i := range p.rx.Write {
			n += copy(p.rx.Write[i].Data, p.state.Input[n:])
		}
		p.state.Input = append(p.state.Input[:0], p.state.Input[n:]...)
		c.room.Broadcast()
		c.mu.Unlock()
		if err := q.Push(&p.rx, uint32(n)); err != nil {
			return err
		}
	}
}

// maxMessages bounds the control messages that wait for the driver: what one
// DEVICE_READY and one PORT_READY of each port bring, twice. A driver that wants
// more without reading gets none.
func (c *Console) maxMessages() int { return 2 * (5*len(c.ports) + 1) }

// say queues a control message; with mu held.
func (c *Console) say(port uint32, event, value uint16, rest []byte) {
	if len(c.messages) >= c.maxMessages() {
		return
	}
	m := make([]byte, consoleMessageSize, consoleMessageSize+len(rest))
	le.PutUint32(m, port)
	le.PutUint16(m[4:], event)
	le.PutUint16(m[6:], value)
	c.messages = append(c.messages, append(m, rest...))
	if c.controlRx != nil {
		c.controlRx.Wake()
	}
}

// sizeMessage is what a RESIZE message carries; with mu held.
func (c *Console) sizeMessage() []byte {
	return le.AppendUint16(le.AppendUint16(nil, c.cols), c.rows)
}

// sendMessages gives the driver the control messages that wait.
func (c *Console) sendMessages(q *Queue) error {
	for {
		c.mu.Lock()
		waiting := len(c.messages)
		c.mu.Unlock()
		if waiting == 0 {
			return nil
		}
		ok, err := q.Pop(&c.ctrlRx)
		if err != nil || !ok {
			return err
		}
		c.mu.Lock()
		m := c.messages[0]
		c.messages = append(c.messages[:0], c.messages[1:]...)
		c.mu.Unlock()
		n := 0
		for i := range c.ctrlRx.Write {
			n += copy(c.ctrlRx.Write[i].Data, m[n:])
		}
		if err := q.Push(&c.ctrlRx, uint32(n)); err != nil {
			return err
		}
	}
}

// takeMessage acts on a control message from the driver.
func (c *Console) takeMessage(chain *Chain) {
	var m [consoleMessageSize]byte
	n := 0
	for i := range chain.Read {
		n += copy(m[n:], chain.Read[i].Data)
	}
	if n < len(m) {
		return
	}
	port, event, value := le.Uint32(m[:]), le.Uint16(m[4:]), le.Uint16(m[6:])
	c.mu.Lock()
	defer c.mu.Unlock()
	if event == consoleDeviceReady {
		for i := range c.ports {
			if value == 1 {
				c.say(uint32(i), consoleDeviceAdd, 1, nil)
			}
		}
		return
	}
	if port >= uint32(len(c.ports)) {
		return
	}
	p := c.ports[port]
	switch event {
	case consolePortReady:
		if value != 1 {
			return
		}
		if port == 0 {
			c.say(port, consoleConsolePort, 1, nil)
			if c.cols != 0 && c.rows != 0 {
				c.say(port, consoleResize, 0, c.sizeMessage())
			}
		}
		if p.name != "" {
			c.say(port, consoleName, 1, []byte(p.name))
		}
		c.say(port, consolePortOpen, 1, nil)
	case consolePortOpen:
		p.state.Open = value == 1
	}
}
