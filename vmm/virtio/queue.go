package virtio

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"

	"github.com/gnomon-vmm/gnomon/mm/guestmem"
)

// Bounds on what a driver may ask for.
const (
	// MaxQueueSize is the largest size of a queue.
	MaxQueueSize = 1024
	// MaxChain is how many buffers a chain may have: by an indirect table it
	// can be longer than the queue.
	MaxChain = 1024
)

// ErrQueue is the stage of following what a driver put in a queue. The device
// is broken after it.
var ErrQueue = errors.New("virtqueue")

// Descriptor flags (sections 2.7.5 and 2.8.5).
const (
	descNext     = 1 << 0
	descWrite    = 1 << 1
	descIndirect = 1 << 2
	descAvail    = 1 << 7  // packed
	descUsed     = 1 << 15 // packed
	descSize     = 16
)

// Buffer is one descriptor's memory.
type Buffer struct {
	GPA  uint64
	Data []byte
}

// Chain is one request popped from a Queue: what the driver lets the device
// read and then what it may write. A Chain is reused from Pop to Pop and so
// needs no allocation.
type Chain struct {
	Read  []Buffer
	Write []Buffer
	head  uint16
	count uint16 // descriptors taken, for packed rings
}

// reset empties the chain and keeps its memory.
func (c *Chain) reset() {
	c.Read, c.Write, c.count = c.Read[:0], c.Write[:0], 0
}

// writable is how many bytes the driver lets the device write.
func (c *Chain) writable() (n uint64) {
	for i := range c.Write {
		n += uint64(len(c.Write[i].Data))
	}
	return n
}

// QueueState is what survives a checkpoint of one queue: how the driver set it
// up, and how far the device got.
type QueueState struct {
	Size    uint16
	Enabled bool
	Vector  uint16 // MSI-X vector, or NoVector
	// GPAs of the descriptor area, the driver area and the device area.
	Desc, Driver, Device uint64
	// Avail is the next chain to pop and Used the next to push: free-running
	// indices for a split ring, positions for a packed one, with their wrap counters.
	Avail, Used         uint16
	AvailWrap, UsedWrap bool
}

// Queue is one virtqueue (section 2.7 split, 2.8 packed), used only by its worker, or
// after share by other goroutines too, which push.
type Queue struct {
	index    int
	mem      *guestmem.Memory
	size     uint16
	packed   bool
	eventIdx bool
	indirect bool

	// The ring. A split ring's driver area is the available ring and its
	// device area the used ring; a packed ring has event suppression there.
	desc, driver, device          []byte
	descGPA, driverGPA, deviceGPA uint64

	avail, used         uint16 // see QueueState
	availWrap, usedWrap bool

	seen        uint16 // split: the driver's index when last read
	emptied     bool   // Pop found nothing since this was cleared
	quiet       bool   // the driver was told not to kick
	unsignalled uint32 // descriptors (packed) or chains (split) pushed since the last look at whether to interrupt

	shared  bool       // set by the worker, for good
	pushing sync.Mutex // held, where shared, for used, usedWrap, unsignalled and quiet, and where the driver sees these
	aside   bool       // others go on with chains after Handle; the worker's
	begun   int        // parts of chains under way after Handle that it ends itself; the worker's
	ends    ends       // tells of those; the worker's
	broken  bool       // Pop finds nothing any more; the worker's

	event *eventFD // has the worker call Handle; may be nil
	gate  *gate    // Pop finds nothing while it holds; may be nil
	wake  func()   // may be nil
	intr  func()   // interrupts the driver; may be nil
}

// newQueue checks a driver's set-up and returns the queue, whose rings stay
// pinned until release. features are those negotiated.
func newQueue(mem *guestmem.Memory, index int, features uint64, s *QueueState) (*Queue, error) {
	q := &Queue{
		index:     index,
		mem:       mem,
		size:      s.Size,
		packed:    features&FeatureRingPacked != 0,
		eventIdx:  features&FeatureEventIdx != 0,
		indirect:  features&FeatureIndirectDesc != 0,
		descGPA:   s.Desc,
		driverGPA: s.Driver,
		deviceGPA: s.Device,
		avail:     s.Avail,
		used:      s.Used,
		availWrap: s.AvailWrap,
		usedWrap:  s.UsedWrap,
		seen:      s.Avail,
	}
	if s.Size == 0 || s.Size > MaxQueueSize || !q.packed && s.Size&(s.Size-1) != 0 {
		return nil, fmt.Errorf("%w %d: size %d", ErrQueue, index, s.Size)
	}
	if q.packed && (s.Avail >= s.Size || s.Used >= s.Size) {
		return nil, fmt.Errorf("%w %d: position %d or %d in a ring of %d", ErrQueue, index, s.Avail, s.Used, s.Size)
	}
	// Event words end the split rings and are there without the feature too.
	driverLen, deviceLen, driverAlign := 6+2*uint64(s.Size), 6+8*uint64(s.Size), uint64(2)
	if q.packed {
		driverLen, deviceLen, driverAlign = 4, 4, 4
	}
	areas := []struct {
		name       string
		gpa, n     uint64
		align      uint64
		sliceField *[]byte
	}{
		{"descriptor area", s.Desc, descSize * uint64(s.Size), 16, &q.desc},
		{"driver area", s.Driver, driverLen, driverAlign, &q.driver},
		{"device area", s.Device, deviceLen, 4, &q.device},
	}
	for _, a := range areas {
		if a.gpa%a.align != 0 {
			q.release()
			return nil, fmt.Errorf("%w %d: %s at GPA %#x is not aligned to %d", ErrQueue, index, a.name, a.gpa, a.align)
		}
		b, err := mem.Pin(a.gpa, a.n)
		if err != nil {
			q.release()
			return nil, fmt.Errorf("%w %d: %s: %w", ErrQueue, index, a.name, err)
		}
		*a.sliceField = b
	}
	return q, nil
}

// release lets go of the rings; the queue is not used after it.
func (q *Queue) release() {
	q.mem.Unpin(q.descGPA, uint64(len(q.desc)))
	q.mem.Unpin(q.driverGPA, uint64(len(q.driver)))
	q.mem.Unpin(q.deviceGPA, uint64(len(q.device)))
}

// progress stores how far the device got.
func (q *Queue) progress(s *QueueState) {
	s.Avail, s.Used, s.AvailWrap, s.UsedWrap = q.avail, q.used, q.availWrap, q.usedWrap
}

// Index is the queue's number in its device.
func (q *Queue) Index() int { return q.index }

// Size is how many descriptors the driver gave the queue.
func (q *Queue) Size() int { return int(q.size) }

// Wake has the queue's worker call Handle soon. Any goroutine may call it.
func (q *Queue) Wake() {
	if q.wake != nil {
		q.wake()
	}
}

// share lets other goroutines call Push and Flush from now on, too. It is called by the
// worker, in Handle. What they do between join and leave counts as the worker's.
func (q *Queue) share() {
	if !q.shared { // which the others read
		q.shared = true
	}
}

// join keeps the transport from pausing and stopping until leave, which any goroutine may
// call. It is called by the worker, in Handle.
func (q *Queue) join() {
	if q.gate != nil {
		q.gate.join()
	}
}

func (q *Queue) leave() {
	if q.gate != nil {
		q.gate.leave()
	}
}

// ends tells the worker that something ended which Handle has begun, so that Handle be
// called.
type ends interface {
	// Ended tells whether there is something for Handle.
	Ended() bool
	// Arm has the queue's event be signalled when there is. It returns true where there
	// was before that could take effect.
	Arm() bool
}

// ended tells whether something has ended that Handle has begun.
func (q *Queue) ended() bool { return q.begun > 0 && q.ends.Ended() }

// wantEnds has the event be signalled when something ends that Handle has begun. It
// returns true where something did before that could take effect.
func (q *Queue) wantEnds() bool { return q.begun > 0 && q.ends.Arm() }

// lock and unlock are around what pushing guards.
func (q *Queue) lock() {
	if q.shared {
		q.pushing.Lock()
	}
}

func (q *Queue) unlock() {
	if q.shared {
		q.pushing.Unlock()
	}
}

// Pop takes the next available chain into c. It returns false when there is
// none, or when the device shall pause and Handle return; and an error where
// the driver broke the ring (the device is then broken).
func (q *Queue) Pop(c *Chain) (bool, error) {
	c.reset()
	if q.broken || q.gate != nil && q.gate.hold.Load() {
		return false, nil
	}
	if q.packed {
		return q.popPacked(c)
	}
	return q.popSplit(c)
}

// Undo gives back the chain that was popped last and not pushed, so that the
// next Pop takes it again.
func (q *Queue) Undo(c *Chain) {
	if q.packed {
		q.undoPacked(c)
		return
	}
	q.avail--
}

// Push returns c to the driver, of whose Write buffers the first written bytes
// were filled, and marks those pages dirty. The worker interrupts the
// driver, if it wants that, when Handle returns; Flush does so at once.
func (q *Queue) Push(c *Chain, written uint32) error {
	left := uint64(written)
	for i := range c.Write {
		if left == 0 {
			break
		}
		n := min(left, uint64(len(c.Write[i].Data)))
		q.mem.MarkDirty(c.Write[i].GPA, n)
		left -= n
	}
	q.lock()
	defer q.unlock()
	if q.packed {
		q.pushPacked(c, written)
	} else {
		q.pushSplit(c, written)
	}
	return nil
}

// Flush interrupts the driver now for what has been pushed, if it wants that,
// where Handle has more work that takes long.
func (q *Queue) Flush() {
	if q.wantInterrupt() && q.intr != nil {
		q.intr()
	}
}

// wantInterrupt tells whether the driver wants to be interrupted for what has been
// pushed since the last call.
func (q *Queue) wantInterrupt() (want bool) {
	q.lock()
	defer q.unlock()
	switch {
	case q.unsignalled == 0:
		return false
	case q.packed:
		want = q.wantInterruptPacked()
	default:
		want = q.wantInterruptSplit()
	}
	q.unsignalled = 0
	return want
}

// hasAvail tells whether the driver has put a chain in the queue.
func (q *Queue) hasAvail() bool {
	if q.packed {
		return q.hasAvailPacked()
	}
	return q.hasAvailSplit()
}

// suppressKicks asks the driver not to kick.
func (q *Queue) suppressKicks() {
	if q.quiet {
		return
	}
	q.lock()
	defer q.unlock()
	q.quiet = true
	if q.packed {
		q.suppressKicksPacked()
	} else {
		q.suppressKicksSplit()
	}
}

// wantKicks asks the driver to kick for the next chain. It returns true where a chain
// came before that could take effect.
func (q *Queue) wantKicks() bool {
	q.lock()
	q.quiet = false
	if q.packed {
		q.wantKicksPacked()
	} else {
		q.wantKicksSplit()
	}
	q.unlock()
	return q.hasAvail()
}

// descriptor is one entry of a descriptor table. Split and packed tables
// have their address and length in the same place.
type descriptor struct {
	gpa         uint64
	length      uint32
	flags, next uint16 // next is the buffer id in a packed ring
}

// add appends a descriptor's memory to the chain.
func (q *Queue) add(c *Chain, d *descriptor) error {
	if d.length == 0 {
		return nil
	}
	if len(c.Read)+len(c.Write) >= MaxChain {
		return fmt.Errorf("%w %d: chain of more than %d buffers", ErrQueue, q.index, MaxChain)
	}
	b, err := q.mem.Slice(d.gpa, uint64(d.length))
	if err != nil {
		return fmt.Errorf("%w %d: buffer: %w", ErrQueue, q.index, err)
	}
	if d.flags&descWrite != 0 {
		c.Write = append(c.Write, Buffer{d.gpa, b})
		return nil
	}
	if len(c.Write) > 0 {
		return fmt.Errorf("%w %d: readable buffer behind a writable one", ErrQueue, q.index)
	}
	c.Read = append(c.Read, Buffer{d.gpa, b})
	return nil
}

// table returns the indirect descriptor table that d names.
func (q *Queue) table(d *descriptor) ([]byte, error) {
	if !q.indirect {
		return nil, fmt.Errorf("%w %d: indirect descriptor without the feature", ErrQueue, q.index)
	}
	if d.length == 0 || d.length%descSize != 0 || d.length > MaxChain*descSize {
		return nil, fmt.Errorf("%w %d: indirect table of %d bytes", ErrQueue, q.index, d.length)
	}
	b, err := q.mem.Slice(d.gpa, uint64(d.length))
	if err != nil {
		return nil, fmt.Errorf("%w %d: indirect table: %w", ErrQueue, q.index, err)
	}
	return b, nil
}

var le = binary.LittleEndian
