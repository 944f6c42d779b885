package virtio

// Commands on the control queue (section 5.1.6.5).
const (
	netCtrlRx         = 0
	netCtrlMAC        = 1
	netCtrlAnnounce   = 3
	netCtrlMACTable   = 0
	netCtrlMACAddress = 1

	netCtrlOK  = 0
	netCtrlErr = 1

	// netCtrlMax bounds what is read of a command. Address tables are longer,
	// and are not looked at.
	netCtrlMax = 2 + 8
)

// control answers commands.
func (n *Net) control(q *Queue) error {
	for {
		ok, err := q.Pop(&n.ctrl)
		if err != nil || !ok {
			return err
		}
		var command [netCtrlMax]byte
		size := 0
		for i := range n.ctrl.Read {
			size += copy(command[size:], n.ctrl.Read[i].Data)
		}
		written := uint32(0)
		if len(n.ctrl.Write) > 0 {
			n.ctrl.Write[0].Data[0] = n.command(command[:size])
			written = 1
		}
		if err := q.Push(&n.ctrl, written); err != nil {
			return err
		}
	}
}

// command carries out one command and returns the answer.
func (n *Net) command(p []byte) byte {
	if len(p) < 2 {
		return netCtrlErr
	}
	class, command, data := p[0], p[1], p[2:]
	switch class {
	case netCtrlRx:
		// Filters are best effort (section 5.1.6.5.1), and what the backend
		// brings is meant for the guest: all pass.
		if command > 5 || len(data) < 1 || data[0] > 1 {
			return netCtrlErr
		}
		return netCtrlOK
	case netCtrlMAC:
		switch {
		case command == netCtrlMACTable && len(data) >= 4:
			return netCtrlOK
		case command == netCtrlMACAddress && len(data) >= 6 && data[0]&1 == 0:
			n.mu.Lock()
			defer n.mu.Unlock()
			n.state.MAC = [6]byte(data)
			return netCtrlOK
		}
	case netCtrlAnnounce:
		if command == 0 {
			n.mu.Lock()
			defer n.mu.Unlock()
			n.state.Announce = false
			return netCtrlOK
		}
	}
	return netCtrlErr
}
