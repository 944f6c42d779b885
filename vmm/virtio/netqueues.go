package virtio

import "errors"

// netSender is the transmit worker's memory.
type netSender struct {
	chain  Chain
	header [NetHeaderSize]byte
	pieces [][]byte
	whole  []byte // a frame that came in too many pieces; nil until there is one
}

// transmit passes what the driver sends to the backend.
func (n *Net) transmit(q *Queue) error {
	t := &n.tx
	for {
		ok, err := q.Pop(&t.chain)
		if err != nil || !ok {
			return err
		}
		if size, ok := n.gather(&t.chain); ok {
			switch err := n.backend.Send(t.pieces); {
			case err == nil:
				n.stats.txFrames.Add(1)
				n.stats.txBytes.Add(uint64(size))
			case errors.Is(err, ErrAgain):
				// The backend wakes the queue when it can go on.
				q.Undo(&t.chain)
				return nil
			default:
				n.stats.txDropped.Add(1)
			}
		} else {
			n.stats.txDropped.Add(1)
		}
		if err := q.Push(&t.chain, 0); err != nil {
			return err
		}
	}
}

// gather makes tx.pieces the frame in c, under a checked copy of its header,
// and returns the frame's size without header; false where it must be dropped.
func (n *Net) gather(c *Chain) (int, bool) {
	t := &n.tx
	total := 0
	for i := range c.Read {
		total += len(c.Read[i].Data)
		if total > MaxFrameSize {
			return 0, false
		}
	}
	size := total - NetHeaderSize
	if size < ethHeaderSize || !n.linkUp.Load() {
		return 0, false
	}
	copied := 0
	t.pieces = append(t.pieces[:0], t.header[:])
	for i := range c.Read {
		b := c.Read[i].Data
		if copied < NetHeaderSize {
			k := copy(t.header[copied:], b)
			copied += k
			b = b[k:]
		}
		if len(b) == 0 {
			continue
		}
		if len(t.pieces) == netMaxPieces {
			t.linearise(c)
			break
		}
		t.pieces = append(t.pieces, b)
	}
	// From here on the copy counts; the driver may still change its own.
	h := ParseNetHeader(t.header[:])
	h.Flags &= NetNeedsChecksum
	h.Buffers = 0
	if h.CheckSent(n.features, size) != nil {
		return 0, false
	}
	h.Put(t.header[:])
	return size, true
}

// linearise makes pieces of header and one copy of the rest.
func (t *netSender) linearise(c *Chain) {
	if t.whole == nil {
		t.whole = make([]byte, MaxFrameSize)
	}
	at := 0
	for i := range c.Read {
		at += copy(t.whole[at:], c.Read[i].Data)
	}
	t.pieces = append(t.pieces[:1], t.whole[NetHeaderSize:at])
}

// netReceiver is the receive worker's memory.
type netReceiver struct {
	// chains are those popped and not yet used, from first on, count of them.
	chains       [netMaxChains]Chain
	first, count int
	room         int // bytes in them
	pieces       [][]byte
	spill        []byte // takes what does not fit into chains
}

// at is the i-th chain that was popped and not yet used.
func (r *netReceiver) at(i int) *Chain { return &r.chains[(r.first+i)%netMaxChains] }

// writable is how many bytes a chain has for the device to write.
func writable(c *Chain) int {
	total := 0
	for i := range c.Write {
		total += len(c.Write[i].Data)
	}
	return total
}

// receive puts what the backend has into the driver's buffers.
func (n *Net) receive(q *Queue) error {
	r := &n.rx
	err := n.receiveAll(q)
	// Buffers that no frame came for stay the driver's, so that nothing is under
	// way between two calls of Handle.
	for ; r.count > 0; r.count-- {
		q.Undo(r.at(r.count - 1))
	}
	r.room = 0
	return err
}

func (n *Net) receiveAll(q *Queue) error {
	r := &n.rx
	// A frame may need as much as this; what is longer than the buffers is lost.
	need, most := netRxFrame, 1
	if n.features&netFMergeRxBuf != 0 {
		most = netMaxChains
	}
	if n.features&(netFGuestTSO4|netFGuestTSO6) != 0 || n.mtu > 1500 {
		need = MaxFrameSize
	}
	for n.incoming.Load() {
		up := n.linkUp.Load()
		for up && r.room < need && r.count < most {
			c := r.at(r.count)
			ok, err := q.Pop(c)
			if err != nil {
				return err
			}
			if !ok {
				break
			}
			r.count++
			r.room += writable(c)
		}
		if up && r.count == 0 {
			return nil // the frame waits in the backend for the driver's buffers
		}
		n.incoming.Store(false) // unless the backend says otherwise from here on
		size, err := n.backend.Receive(r.target(up))
		if errors.Is(err, ErrAgain) {
			return nil
		}
		n.incoming.Store(true)
		if err != nil {
			return err
		}
		if !up || size < NetHeaderSize+ethHeaderSize || size > r.room {
			n.stats.rxDropped.Add(1)
			continue
		}
		n.stats.rxFrames.Add(1)
		n.stats.rxBytes.Add(uint64(size - NetHeaderSize))
		if err := r.push(q, size); err != nil {
			return err
		}
	}
	return nil
}

// target is where a frame may be put: the chains, where the link is up, and behind
// them the spill.
func (r *netReceiver) target(up bool) [][]byte {
	r.pieces = r.pieces[:0]
	for i := 0; up && i < r.count; i++ {
		for j := range r.at(i).Write {
			r.pieces = append(r.pieces, r.at(i).Write[j].Data)
		}
	}
	r.pieces = append(r.pieces, r.spill)
	return r.pieces
}

// push returns the chains that hold a frame of size bytes to the driver.
func (r *netReceiver) push(q *Queue, size int) error {
	used, left := 0, size
	for left > 0 {
		left -= min(left, writable(r.at(used)))
		used++
	}
	putAt(r.at(0).Write, 10, uint16(used))
	left = size
	for ; used > 0; used-- {
		c := r.at(0)
		room := writable(c)
		written := min(left, room)
		if err := q.Push(c, uint32(written)); err != nil {
			return err
		}
		left -= written
		r.room -= room
		r.first = (r.first + 1) % netMaxChains
		r.count--
	}
	return nil
}

// putAt writes v, little-endian, at off in memory that lies in pieces.
func putAt(pieces []Buffer, off int, v uint16) {
	for _, b := range [2]byte{byte(v), byte(v >> 8)} {
		at := off
		for i := range pieces {
			if at < len(pieces[i].Data) {
				pieces[i].Data[at] = b
				break
			}
			at -= len(pieces[i].Data)
		}
		off++
	}
}
