package virtio

import "fmt"

// Event suppression (section 2.8.14): a 16-bit position and wrap bit, then flags.
const (
	eventEnable  = 0
	eventDisable = 1
	eventDesc    = 2
	eventWrap    = 1 << 15
)

// availAt tells whether the descriptor at a position was made available: its
// AVAIL bit is our wrap counter and its USED bit the opposite.
func (q *Queue) availAt(pos uint16, wrap bool) bool {
	flags := load16(q.desc, int(pos)*descSize+14)
	return (flags&descAvail != 0) == wrap && (flags&descUsed != 0) != wrap
}

func (q *Queue) hasAvailPacked() bool { return q.availAt(q.avail, q.availWrap) }

// readPacked takes a copy of descriptor i of a table, which has it.
func readPacked(table []byte, i uint16) descriptor {
	b := table[int(i)*descSize:][:descSize]
	return descriptor{gpa: le.Uint64(b), length: le.Uint32(b[8:]), next: le.Uint16(b[12:]), flags: le.Uint16(b[14:])}
}

// step moves a position on by n, at most a ring's length.
func (q *Queue) step(pos uint16, wrap bool, n uint16) (uint16, bool) {
	if pos += n; pos >= q.size {
		return pos - q.size, !wrap
	}
	return pos, wrap
}

func (q *Queue) popPacked(c *Chain) (bool, error) {
	if !q.hasAvailPacked() {
		q.emptied = true
		return false, nil
	}
	pos := q.avail
	for n := uint16(1); ; n++ {
		// The driver makes the first descriptor available last, so the rest
		// of the chain is there.
		d := readPacked(q.desc, pos)
		if d.flags&descIndirect != 0 {
			if n > 1 || d.flags&descNext != 0 {
				return false, fmt.Errorf("%w %d: indirect table inside a chain", ErrQueue, q.index)
			}
			if err := q.followPacked(c, &d); err != nil {
				return false, err
			}
		} else if err := q.add(c, &d); err != nil {
			return false, err
		}
		if d.flags&descNext == 0 {
			c.head, c.count = d.next, n
			break
		}
		if n == q.size {
			return false, fmt.Errorf("%w %d: chain longer than the ring of %d", ErrQueue, q.index, q.size)
		}
		pos, _ = q.step(pos, false, 1)
	}
	q.avail, q.availWrap = q.step(q.avail, q.availWrap, c.count)
	return true, nil
}

// followPacked collects an indirect table: all of it, in order.
func (q *Queue) followPacked(c *Chain, d *descriptor) error {
	table, err := q.table(d)
	if err != nil {
		return err
	}
	for i := range uint16(len(table) / descSize) {
		entry := readPacked(table, i)
		if entry.flags&descIndirect != 0 {
			return fmt.Errorf("%w %d: indirect table inside another", ErrQueue, q.index)
		}
		if err := q.add(c, &entry); err != nil {
			return err
		}
	}
	return nil
}

func (q *Queue) undoPacked(c *Chain) {
	if q.avail < c.count {
		q.avail, q.availWrap = q.avail+q.size, !q.availWrap
	}
	q.avail -= c.count
}

func (q *Queue) pushPacked(c *Chain, written uint32) {
	off := int(q.used) * descSize
	le.PutUint32(q.desc[off+8:], written)
	flags := uint32(0)
	if q.usedWrap {
		flags = descAvail | descUsed
	}
	if written > 0 {
		flags |= descWrite
	}
	// The buffer id shares a word with the flags. This store comes after
	// those of the length and of the data.
	store32(q.desc, off+12, uint32(c.head)|flags<<16)
	q.used, q.usedWrap = q.step(q.used, q.usedWrap, c.count)
	q.unsignalled += uint32(c.count)
	q.mem.MarkDirty(q.descGPA+uint64(off), descSize)
}

// wantInterruptPacked follows section 2.8.14. The store of the used
// descriptor was a fence, so what the driver asked for is read after it is visible.
func (q *Queue) wantInterruptPacked() bool {
	// The driver writes the position before the flags.
	flags := load16(q.driver, 2)
	event := load16(q.driver, 0)
	switch {
	case flags&3 == eventDisable:
		return false
	case flags&3 != eventDesc || !q.eventIdx:
		return true
	}
	// Positions on two laps of the ring: how far behind us is the event?
	laps := 2 * uint32(q.size)
	now, then := uint32(q.used), uint32(event&^eventWrap)
	if q.usedWrap {
		now += uint32(q.size)
	}
	if event&eventWrap != 0 {
		then += uint32(q.size)
	}
	behind := (now + laps - then%laps) % laps
	return behind-1 < q.unsignalled || q.unsignalled >= laps
}

func (q *Queue) suppressKicksPacked() { q.storeEvent(0, eventDisable) }

func (q *Queue) wantKicksPacked() {
	if !q.eventIdx {
		q.storeEvent(0, eventEnable)
		return
	}
	pos := q.avail
	if q.availWrap {
		pos |= eventWrap
	}
	q.storeEvent(pos, eventDesc)
}

func (q *Queue) storeEvent(pos, flags uint16) {
	store32(q.device, 0, uint32(pos)|uint32(flags)<<16)
	q.mem.MarkDirty(q.deviceGPA, 4)
}
