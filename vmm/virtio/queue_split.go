package virtio

import "fmt"

// Flags of the available and used rings (section 2.7.6, 2.7.8).
const (
	availNoInterrupt = 1 << 0
	usedNoNotify     = 1 << 0
)

// readSplit takes a copy of descriptor i of a table, which has it.
func readSplit(table []byte, i uint16) descriptor {
	b := table[int(i)*descSize:][:descSize]
	return descriptor{gpa: le.Uint64(b), length: le.Uint32(b[8:]), flags: le.Uint16(b[12:]), next: le.Uint16(b[14:])}
}

func (q *Queue) hasAvailSplit() bool { return load16(q.driver, 2) != q.avail }

func (q *Queue) popSplit(c *Chain) (bool, error) {
	if q.seen == q.avail {
		q.seen = load16(q.driver, 2)
		if n := q.seen - q.avail; n == 0 {
			q.emptied = true
			return false, nil
		} else if n > q.size {
			q.seen = q.avail
			return false, fmt.Errorf("%w %d: available index moved by %d in a ring of %d", ErrQueue, q.index, n, q.size)
		}
	}
	head := load16(q.driver, 4+2*int(q.avail&(q.size-1)))
	if err := q.followSplit(c, head); err != nil {
		return false, err
	}
	c.head, c.count = head, 1
	q.avail++
	return true, nil
}

// followSplit collects the chain that begins at head. Each table bounds how
// many of its descriptors can be seen, so a loop ends.
func (q *Queue) followSplit(c *Chain, head uint16) error {
	table, n, i := q.desc, q.size, head
	for left, inner := n, false; ; left-- {
		if i >= n {
			return fmt.Errorf("%w %d: descriptor %d in a table of %d", ErrQueue, q.index, i, n)
		}
		if left == 0 {
			return fmt.Errorf("%w %d: descriptors form a loop", ErrQueue, q.index)
		}
		d := readSplit(table, i)
		if d.flags&descIndirect != 0 {
			if inner || d.flags&descNext != 0 {
				return fmt.Errorf("%w %d: indirect table inside a chain", ErrQueue, q.index)
			}
			t, err := q.table(&d)
			if err != nil {
				return err
			}
			// left is n+1 so that the loop's step makes it n.
			table, n, i, inner = t, uint16(len(t)/descSize), 0, true
			left = n + 1
			continue
		}
		if err := q.add(c, &d); err != nil {
			return err
		}
		if d.flags&descNext == 0 {
			return nil
		}
		i = d.next
	}
}

func (q *Queue) pushSplit(c *Chain, written uint32) {
	off := 4 + 8*int(q.used&(q.size-1))
	le.PutUint64(q.device[off:], uint64(c.head)|uint64(written)<<32)
	q.used++
	// The index shares a word with the flags, which only we write. This store
	// comes after those of the element and of the data.
	store32(q.device, 0, q.usedFlags()|uint32(q.used)<<16)
	q.unsignalled++
	q.mem.MarkDirty(q.deviceGPA, 4)
	q.mem.MarkDirty(q.deviceGPA+uint64(off), 8)
}

func (q *Queue) usedFlags() uint32 {
	if q.quiet && !q.eventIdx {
		return usedNoNotify
	}
	return 0
}

// wantInterruptSplit follows section 2.7.7.2. The store of the used index was
// a fence, so what the driver asked for is read after it is visible.
func (q *Queue) wantInterruptSplit() bool {
	if !q.eventIdx {
		return load16(q.driver, 0)&availNoInterrupt == 0
	}
	event := load16(q.driver, 4+2*int(q.size))
	return uint32(q.used-event-1) < q.unsignalled
}

// With event indices the driver kicks only for the chain at the event index,
// so nothing need be done to keep it quiet.
func (q *Queue) suppressKicksSplit() {
	if !q.eventIdx {
		q.storeUsedFlags()
	}
}

func (q *Queue) wantKicksSplit() {
	if q.eventIdx {
		off := 4 + 8*int(q.size)
		store16(q.device, off, q.avail)
		q.mem.MarkDirty(q.deviceGPA+uint64(off), 2)
	}
	q.storeUsedFlags() // and a fence
}

func (q *Queue) storeUsedFlags() {
	store32(q.device, 0, q.usedFlags()|uint32(q.used)<<16)
	q.mem.MarkDirty(q.deviceGPA, 4)
}
