package virtio

import (
	"testing"
)

// rings are a guest's driver for a device with several queues: those it sends
// on and those it receives on, each with slots of memory.
type rings struct {
	*guest
	features uint64
	next     uint64 // free memory
	queues   []*ring
}

// ring is one queue with memory for its requests.
type ring struct {
	g     *rings
	index int
	d     *driver
	size  uint32 // of a slot
	base  uint64
	slots int
}

func newRings(t testing.TB, dev Device, features uint64) *rings {
	return &rings{guest: newGuest(t, dev), features: features | FeatureVersion1, next: 0x10000}
}

// add makes the next queue, with slots of size bytes.
func (r *rings) add(queueSize uint16, slots int, size uint32) *ring {
	q := &ring{g: r, index: len(r.queues), size: size, slots: slots}
	q.d, r.next = newDriver(r.mem, r.next, queueSize, r.features)
	q.base = r.next
	r.next += (uint64(slots)*uint64(size) + 4095) &^ 4095
	r.queues = append(r.queues, q)
	return q
}

func (r *rings) up() {
	r.t.Helper()
	var drivers []*driver
	for _, q := range r.queues {
		drivers = append(drivers, q.d)
	}
	r.start(r.features, drivers...)
}

// slot is the memory of slot i.
func (q *ring) slot(i int) []byte {
	return must(q.g.mem.Slice(q.base+uint64(i)*uint64(q.size), uint64(q.size)))
}

// post offers slot i to the device for writing.
func (q *ring) post(i int) {
	q.g.t.Helper()
	if !q.d.add([]segment{{q.base + uint64(i)*uint64(q.size), q.size, true}}, false, i) {
		q.g.t.Fatal("ring is full")
	}
	q.kick()
}

func (q *ring) kick() {
	if q.d.wantsKick() {
		q.g.kick(q.index)
	}
}

func (q *ring) postAll() {
	for i := range q.slots {
		q.post(i)
	}
}

// take waits for a slot the device has written, copies it and offers it again.
func (q *ring) take() []byte {
	q.g.t.Helper()
	i, n := q.g.reap(q.d, q.index)
	p := append([]byte(nil), q.slot(i)[:n]...)
	q.post(i)
	return p
}

// send gives the device pieces to read, with room for answer bytes behind
// them, and waits until it has been returned. It returns the answer.
func (q *ring) send(answer int, pieces ...[]byte) []byte {
	q.g.t.Helper()
	q.put(answer, pieces...)
	_, n := q.g.reap(q.d, q.index)
	if int(n) > answer {
		q.g.t.Fatalf("device says it wrote %d bytes of %d", n, answer)
	}
	return append([]byte(nil), q.slot(0)[q.size-uint32(answer):][:n]...)
}

// put is send without the wait.
func (q *ring) put(answer int, pieces ...[]byte) {
	q.g.t.Helper()
	var segs []segment
	slot, at := q.slot(0), 0
	for _, p := range pieces {
		if len(p) == 0 {
			continue
		}
		copy(slot[at:], p)
		segs = append(segs, segment{q.base + uint64(at), uint32(len(p)), false})
		at += len(p)
	}
	if answer > 0 {
		segs = append(segs, segment{q.base + uint64(q.size) - uint64(answer), uint32(answer), true})
	}
	if !q.d.add(segs, len(segs) > 8, 0) {
		q.g.t.Fatal("ring is full")
	}
	q.kick()
}

// eachRingKind runs a test with each of ringKinds, and indirect tables.
func eachRingKind(t *testing.T, f func(t *testing.T, features uint64)) {
	for name, features := range ringKinds {
		t.Run(name, func(t *testing.T) { f(t, features|FeatureIndirectDesc) })
	}
}

// checkAllocs fails where a request served by device allocates more than one
// served by plain: that much is the driver model's. round makes one request of a
// way to serve it.
func checkAllocs(t *testing.T, round func(serve func() error) func(), plain, device func() error) {
	t.Helper()
	model := testing.AllocsPerRun(200, round(plain))
	if all := testing.AllocsPerRun(200, round(device)); all > model {
		t.Errorf("%v allocations a request, %v of them the driver model's", all, model)
	}
}
