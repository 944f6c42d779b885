package virtio

import (
	"fmt"
	"sync/atomic"
	"testing"

	"github.com/gnomon-vmm/gnomon/mm/guestmem"
)

// segment is a buffer that a driver gives the device.
type segment struct {
	gpa   uint64
	n     uint32
	write bool // for the device to write
}

// driver is a model of a guest's side of one queue, split or packed, written
// from the specification (sections 2.7.13, 2.7.14, 2.8.21 and 2.8.22).
type driver struct {
	mem      *guestmem.Memory
	state    QueueState
	packed   bool
	eventIdx bool
	fence    atomic.Uint32

	desc, drv, dev []byte

	// tables is the GPA of one indirect table for each id, of tableLen entries.
	tables   uint64
	tableLen uint64

	freeDesc []uint16         // split: free descriptors; packed: free buffer ids
	chains   map[uint16]chain // in flight
	next     uint16           // split: avail index; packed: position
	wrap     bool             // packed
	room     int              // packed: free descriptors
	added    uint16           // since the last look at whether to kick
	lastUsed uint16           // split: index; packed: position
	usedWrap bool             // packed
}

// chain is what a driver must know of a request in flight.
type chain struct {
	descs []uint16 // split: to be freed
	count uint16   // packed
	tag   int      // the test's
}

const (
	testTableLen = 64 // entries of an indirect table
)

// newDriver lays a queue out from base on and returns the next free page.
func newDriver(mem *guestmem.Memory, base uint64, size uint16, features uint64) (*driver, uint64) {
	d, end := newDriverTables(mem, base, size, testTableLen, features)
	return d, (end + 4095) &^ 4095
}

// newDriverTables does so with indirect tables of tableLen entries, and
// returns the GPA behind the last.
func newDriverTables(mem *guestmem.Memory, base uint64, size uint16, tableLen, features uint64) (*driver, uint64) {
	d := &driver{
		tableLen: tableLen,
		mem:      mem, packed: features&FeatureRingPacked != 0, eventIdx: features&FeatureEventIdx != 0,
		chains: map[uint16]chain{}, wrap: true, usedWrap: true, room: int(size),
	}
	d.state = QueueState{Size: size, Enabled: true, Vector: NoVector, AvailWrap: true, UsedWrap: true}
	at := base
	take := func(n, align uint64) uint64 {
		gpa := (at + align - 1) &^ (align - 1)
		at = gpa + n
		return gpa
	}
	d.state.Desc = take(16*uint64(size), 16)
	d.state.Driver = take(8+2*uint64(size), 4)
	if !d.packed {
		d.state.Driver += 2 // multiples of 2 are allowed
	}
	d.state.Device = take(6+8*uint64(size), 4)
	d.tables = take(uint64(size)*tableLen*16, 16)
	for i := range size {
		d.freeDesc = append(d.freeDesc, i)
	}
	clear(must(mem.Slice(base, at-base)))
	d.desc = must(mem.Slice(d.state.Desc, 16*uint64(size)))
	d.drv = must(mem.Slice(d.state.Driver, 6+2*uint64(size)))
	d.dev = must(mem.Slice(d.state.Device, 6+8*uint64(size)))
	return d, at
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func putDesc(b []byte, gpa uint64, n uint32, a, c uint16) {
	le.PutUint64(b, gpa)
	le.PutUint32(b[8:], n)
	le.PutUint16(b[12:], a)
	le.PutUint16(b[14:], c)
}

func (d *driver) full() { d.fence.Add(1) }

// add makes a request available; false means there is no room.
func (d *driver) add(segs []segment, indirect bool, tag int) bool {
	if d.packed {
		return d.addPacked(segs, indirect, tag)
	}
	need := len(segs)
	if indirect {
		need = 1
	}
	if len(d.freeDesc) < need {
		return false
	}
	ids := append([]uint16(nil), d.freeDesc[:need]...)
	d.freeDesc = d.freeDesc[need:]
	flag := func(i int) uint16 {
		f := uint16(0)
		if segs[i].write {
			f |= descWrite
		}
		if i < len(segs)-1 {
			f |= descNext
		}
		return f
	}
	if indirect {
		gpa := d.tables + uint64(ids[0])*d.tableLen*16
		table := must(d.mem.Slice(gpa, d.tableLen*16))
		for i, s := range segs {
			putDesc(table[16*i:], s.gpa, s.n, flag(i), uint16(i+1))
		}
		putDesc(d.desc[16*int(ids[0]):], gpa, uint32(16*len(segs)), descIndirect, 0)
	} else {
		for i, s := range segs {
			next := uint16(0)
			if i < len(segs)-1 {
				next = ids[i+1]
			}
			putDesc(d.desc[16*int(ids[i]):], s.gpa, s.n, flag(i), next)
		}
	}
	d.chains[ids[0]] = chain{descs: ids, tag: tag}
	store16(d.drv, 4+2*int(d.next%d.state.Size), ids[0])
	d.next++
	d.added++
	d.full()
	store16(d.drv, 2, d.next)
	d.full()
	return true
}

func (d *driver) addPacked(segs []segment, indirect bool, tag int) bool {
	need := len(segs)
	if indirect {
		need = 1
	}
	if d.room < need || len(d.freeDesc) == 0 {
		return false
	}
	id := d.freeDesc[0]
	d.freeDesc = d.freeDesc[1:]
	d.chains[id] = chain{count: uint16(need), tag: tag}
	d.room -= need
	avail := func() uint16 {
		if d.wrap {
			return descAvail
		}
		return descUsed
	}
	if indirect {
		gpa := d.tables + uint64(id)*d.tableLen*16
		table := must(d.mem.Slice(gpa, d.tableLen*16))
		for i, s := range segs {
			f := uint16(0)
			if s.write {
				f = descWrite
			}
			putDesc(table[16*i:], s.gpa, s.n, 0, f)
		}
		segs = []segment{{gpa: gpa, n: uint32(16 * len(segs))}}
	}
	first := d.next
	var firstWord uint32
	for i, s := range segs {
		f := avail()
		if s.write {
			f |= descWrite
		}
		if i < len(segs)-1 {
			f |= descNext
		}
		if indirect {
			f |= descIndirect
		}
		b := d.desc[16*int(d.next):]
		le.PutUint64(b, s.gpa)
		le.PutUint32(b[8:], s.n)
		if i == 0 {
			firstWord = uint32(id) | uint32(f)<<16
		} else {
			le.PutUint16(b[12:], id)
			le.PutUint16(b[14:], f)
		}
		if d.next++; d.next == d.state.Size {
			d.next, d.wrap = 0, !d.wrap
		}
		d.added++
	}
	store32(d.desc, 16*int(first)+12, firstWord)
	return true
}

// wantsKick tells whether the device is to be notified of what was added since
// the last call.
func (d *driver) wantsKick() bool {
	added := d.added
	d.added = 0
	if added == 0 {
		return false
	}
	d.full()
	if !d.packed {
		if !d.eventIdx {
			return load16(d.dev, 0)&usedNoNotify == 0
		}
		event := load16(d.dev, 4+8*int(d.state.Size))
		return d.next-event-1 < added
	}
	flags, event := load16(d.dev, 2)&3, load16(d.dev, 0)
	switch flags {
	case eventEnable:
		return true
	case eventDisable:
		return false
	}
	off := int(event &^ eventWrap)
	if (event&eventWrap != 0) != d.wrap {
		off -= int(d.state.Size)
	}
	return uint16(int(d.next)-off-1) < added
}

// used takes a request the device has returned.
func (d *driver) used() (tag int, written uint32, ok bool) {
	if !d.packed {
		if load16(d.dev, 2) == d.lastUsed {
			return 0, 0, false
		}
		b := d.dev[4+8*int(d.lastUsed%d.state.Size):]
		id := uint16(le.Uint32(b))
		c, known := d.chains[id]
		if !known {
			panic(fmt.Sprintf("device returned chain %d, which is not in flight", id))
		}
		delete(d.chains, id)
		d.freeDesc = append(d.freeDesc, c.descs...)
		d.lastUsed++
		return c.tag, le.Uint32(b[4:]), true
	}
	flags := load16(d.desc, 16*int(d.lastUsed)+14)
	if (flags&descAvail != 0) != d.usedWrap || (flags&descUsed != 0) != d.usedWrap {
		return 0, 0, false
	}
	b := d.desc[16*int(d.lastUsed):]
	id := le.Uint16(b[12:])
	c, known := d.chains[id]
	if !known {
		panic(fmt.Sprintf("device returned buffer %d, which is not in flight", id))
	}
	delete(d.chains, id)
	d.freeDesc = append(d.freeDesc, id)
	d.room += int(c.count)
	if d.lastUsed += c.count; d.lastUsed >= d.state.Size {
		d.lastUsed, d.usedWrap = d.lastUsed-d.state.Size, !d.usedWrap
	}
	return c.tag, le.Uint32(b[8:]), true
}

// wantInterrupts asks for an interrupt at the next used request, and returns
// true where one is there already.
func (d *driver) wantInterrupts() bool {
	switch {
	case d.packed && d.eventIdx:
		event := d.lastUsed
		if d.usedWrap {
			event |= eventWrap
		}
		store32(d.drv, 0, uint32(event)|eventDesc<<16)
	case d.packed:
		store32(d.drv, 0, eventEnable<<16)
	case d.eventIdx:
		store16(d.drv, 4+2*int(d.state.Size), d.lastUsed)
	default:
		store16(d.drv, 0, 0)
	}
	d.full()
	return d.hasUsed()
}

// refuseInterrupts asks for none. With event indices in a split ring that
// cannot be said, only that the next is far away.
func (d *driver) refuseInterrupts() {
	switch {
	case d.packed:
		store32(d.drv, 0, eventDisable<<16)
	case d.eventIdx:
		store16(d.drv, 4+2*int(d.state.Size), d.lastUsed-1)
	default:
		store16(d.drv, 0, availNoInterrupt)
	}
	d.full()
}

func (d *driver) hasUsed() bool {
	if !d.packed {
		return load16(d.dev, 2) != d.lastUsed
	}
	flags := load16(d.desc, 16*int(d.lastUsed)+14)
	return (flags&descAvail != 0) == d.usedWrap && (flags&descUsed != 0) == d.usedWrap
}

func testMemory(t testing.TB, ranges ...guestmem.Range) *guestmem.Memory {
	t.Helper()
	if ranges == nil {
		ranges = []guestmem.Range{{GPA: 0, Size: 8 << 20}}
	}
	mem, err := guestmem.New(ranges)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = mem.Close() })
	return mem
}
