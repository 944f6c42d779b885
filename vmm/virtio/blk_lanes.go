package virtio

import (
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gnomon-vmm/gnomon/disk/aio"
	"github.com/gnomon-vmm/gnomon/disk/block"
)

// blkLanes serve requests of one queue side by side, for a node whose requests wait.
// The queue's worker only begins requests, so that it hears of those that come while
// all others wait. What can be begun by the worker's io_uring is, and ends in the worker;
// for all else there are goroutines.
type blkLanes struct {
	blk   *Blk
	queue *Queue

	ring *aio.Ring // the worker's; nil: there is none
	made bool      // it was tried to make one; the worker's

	held      *blkLane  // waits until the ring's requests have ended, to gather its memory; the worker's
	heldSince time.Time // the worker's
	noHold    time.Time // until when none is to wait; the worker's

	mate blkMate // for a node whose requests do not wait

	mu     sync.Mutex
	free   []*blkLane // guarded by mu
	all    int        // lanes there are; guarded by mu
	busy   int        // of those, how many are not free; guarded by mu
	wanted bool       // the worker found none that is free; guarded by mu

	handed atomic.Int32 // requests that goroutines have
}

const (
	// gatherBytes is what a request has at least whose memory is gathered.
	gatherBytes = 256 << 10
	// holdShare is the part of the time in which requests may be held for that.
	holdShare = 10
)

// blkLane is what a request has while it is under way.
type blkLane struct {
	blkQueue
	lanes *blkLanes

	// Of a request that the worker began.
	request block.Request
	began   time.Time
	bytes   int64

	begin chan struct{} // has the goroutine serve what is in chain; nil: there is none yet
}

// serve begins requests until the queue is empty, or no lane free, and ends those of the
// ring. A lane that becomes free has the worker call it again then.
func (l *blkLanes) serve() error {
	q := l.queue
	if !l.made {
		l.made = true
		if q.event != nil {
			if ring, err := aio.NewRing(q.event.fd); err == nil { // without one there are the goroutines
				l.ring, q.ends = ring, ring
			}
		}
	}
	if l.ring != nil && l.ring.UnderWay() > 0 {
		l.ring.Reap()
		q.Flush()
	}
	err := l.dispatch()
	if l.ring != nil {
		l.ring.Submit()
		q.begun = l.ring.UnderWay()
	}
	q.aside = l.handed.Load() > 0
	return err
}

// dispatch begins requests.
func (l *blkLanes) dispatch() error {
	for {
		if l.held != nil && l.ring.UnderWay() > 0 {
			return nil
		}
		lane := l.release()
		if lane == nil {
			if lane = l.take(); lane == nil {
				return nil
			}
			ok, err := l.queue.Pop(&lane.chain)
			if err != nil || !ok {
				l.put(lane)
				return err
			}
		}
		if l.ring == nil || !lane.start() {
			lane.handOver()
		}
	}
}

// take returns a lane that is free, or else a new one, or nil.
func (l *blkLanes) take() *blkLane {
	l.mu.Lock()
	defer l.mu.Unlock()
	var lane *blkLane
	switch last := len(l.free) - 1; {
	case last >= 0: // the one that has slept least
		lane, l.free = l.free[last], l.free[:last]
	case l.all < l.blk.cfg.Depth:
		l.all++
		lane = &blkLane{lanes: l}
	default:
		l.wanted = true
		return nil
	}
	if l.busy++; l.busy == 1 {
		l.queue.join()
	}
	return lane
}

// put gives a lane back. The queue is not used by it any more.
func (l *blkLanes) put(lane *blkLane) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.free = append(l.free, lane)
	if l.wanted {
		l.wanted = false
		l.queue.Wake()
	}
	if l.busy--; l.busy == 0 {
		l.queue.leave()
	}
}

// underWay tells whether requests are.
func (l *blkLanes) underWay() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.busy > 0
}

// start begins the lane's request by the worker's ring, if that can be done.
func (lane *blkLane) start() bool {
	b, r := lane.lanes.blk, &lane.request
	var header [blkHeaderSize]byte
	lane.bufs = lane.bufs[:0]
	if lastByte(lane.chain.Write) == nil || !b.header(&lane.blkQueue, header[:]) {
		return false
	}
	switch le.Uint32(header[:]) {
	case blkIn:
		b.input(&lane.blkQueue)
		r.Write = false
	case blkOut:
		if b.readOnly || b.writeThrough() {
			return false
		}
		r.Write = true
	default:
		return false
	}
	lane.bytes = total(lane.bufs)
	off, ok := b.offset(le.Uint64(header[8:]), lane.bytes)
	if !ok {
		return false
	}
	if lane.bytes >= gatherBytes && lane.hold() {
		return true
	}
	lane.began = time.Now()
	r.Bufs, r.Off, r.Ring = lane.bufs, off, lane.lanes.ring
	r.Enter(lane, 0)
	if block.Start(b.cfg.Node, r) {
		return true
	}
	r.Leave()
	return false
}

// gather has a large request's memory lie in huge pages, so that the disk gets it in a
// few pieces, this time or the next. It returns false if that may be possible when the
// requests under way have ended: some of them may have the rest of a huge page.
func (lane *blkLane) gather() bool {
	mem, done := lane.lanes.queue.mem, true
	for _, bufs := range [2][]Buffer{lane.chain.Read, lane.chain.Write} {
		for i := range bufs {
			done = mem.Gather(bufs[i].GPA, uint64(len(bufs[i].Data))) && done
		}
	}
	return done
}

// hold has the lane's request, which is to be begun, wait for those of the ring if its
// memory cannot be gathered before. It returns false if it does not wait.
func (lane *blkLane) hold() bool {
	l, now := lane.lanes, time.Now()
	others := l.ring.UnderWay() > 0
	if others && now.Before(l.noHold) || lane.gather() || !others {
		return false
	}
	l.held, l.heldSince = lane, now
	return true
}

// release returns the lane that is held, if one is.
func (l *blkLanes) release() *blkLane {
	lane := l.held
	if lane != nil {
		now := time.Now()
		l.held, l.noHold = nil, now.Add(holdShare*now.Sub(l.heldSince))
	}
	return lane
}

// Ended implements block.Ender: the worker's ring has done the request.
func (lane *blkLane) Ended(r *block.Request, _ int64, err error) {
	if err == block.ErrAgain {
		lane.handOver()
		return
	}
	b, op, c := lane.lanes.blk, BlkRead, &lane.lanes.blk.stats.read
	if r.Write {
		op, c = BlkWrite, &b.stats.write
	}
	*lastByte(lane.chain.Write) = b.done(c, op, lane.bytes, lane.began, err)
	if err := lane.lanes.queue.Push(&lane.chain, writeLen(&lane.chain)); err != nil {
		(*b.host.Load()).Fail(err)
	}
	lane.lanes.put(lane)
}

// handOver has the lane's goroutine serve the request.
func (lane *blkLane) handOver() {
	lane.lanes.queue.share()
	lane.lanes.handed.Add(1)
	if lane.begin == nil {
		lane.begin = make(chan struct{}, 1)
		go lane.run()
	}
	lane.begin <- struct{}{}
}

// run serves requests until the device stops.
func (lane *blkLane) run() {
	l := lane.lanes
	for range lane.begin {
		if err := lane.serve(); err != nil {
			(*l.blk.host.Load()).Fail(err)
		}
		l.handed.Add(-1)
		l.put(lane)
	}
}

// serve serves the lane's request.
func (lane *blkLane) serve() error {
	b, q := lane.lanes.blk, lane.lanes.queue
	written, err := b.request(&lane.blkQueue)
	if err != nil {
		return fmt.Errorf("%w: queue %d: %w", ErrBlk, q.Index(), err)
	}
	if err := q.Push(&lane.chain, written); err != nil {
		return err
	}
	q.Flush()
	return nil
}

// end has the goroutines end. All lanes are free, for good.
func (l *blkLanes) end() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, lane := range l.free {
		if lane.begin != nil {
			close(lane.begin)
		}
	}
	l.free = nil
	l.mate.end()
	if l.ring != nil {
		_ = l.ring.Close() // nothing is under way that could be lost
	}
}
