package virtio

import (
	"runtime"
	"sync/atomic"
	"time"

	"github.com/gnomon-vmm/gnomon/internal/busypoll"
	"github.com/gnomon-vmm/gnomon/internal/passer"
)

const (
	// blkLarge is from how many bytes on a request is worth another goroutine: it takes
	// as long to copy as a thread takes to wake.
	blkLarge = 128 << 10
	// blkAhead is how many large reads are taken from a queue ahead of being served.
	blkAhead = 4
	// blkMateLooks is for how long the mate looks for more before it sleeps.
	blkMateLooks = 100 * time.Microsecond
)

// blkMate is a goroutine that serves large reads of a queue beside its worker, for a node
// whose requests are copies, so that two processors copy. Writes are left to the worker:
// file systems let in one writer at a time.
//
// The worker takes requests from the queue for both, and each serves the oldest that is
// ready. The mate gives its processor to whoever needs it after each: a guest that waits by
// looking at its queue needs one to ask for more.
type blkMate struct {
	lanes  *blkLanes
	line   chan *blkLane // requests that are ready; the mate is awake while there are some; nil: the host has one processor
	wake   chan struct{} // nil: there is no goroutine yet; the worker's
	asleep atomic.Bool   // the goroutine waits for wake, or is about to
}

func newBlkLanes(b *Blk, q *Queue) *blkLanes {
	l := &blkLanes{blk: b, queue: q}
	l.mate.lanes = l
	if runtime.NumCPU() > 1 {
		l.mate.line = make(chan *blkLane, blkAhead)
	}
	return l
}

// ready tells whether there are requests that nobody serves yet.
func (m *blkMate) ready() bool { return len(m.line) > 0 }

// takes makes the worker's request ready where it is a large read and not the only
// request. It returns whether it has, and the worker is to take the next from the queue.
func (m *blkMate) takes(bq *blkQueue) bool {
	if m.line == nil || bq.chain.writable() < blkLarge || len(m.line) == cap(m.line) {
		return false
	}
	l := m.lanes
	if !m.ready() && !l.queue.hasAvail() {
		return false
	}
	lane := l.take()
	if lane == nil {
		return false
	}
	lane.chain, bq.chain = bq.chain, lane.chain
	l.queue.share()
	m.line <- lane
	switch {
	case m.wake == nil:
		m.wake = make(chan struct{}, 1)
		go m.run()
	case m.asleep.Load() && m.asleep.CompareAndSwap(true, false):
		m.wake <- struct{}{}
	}
	return true
}

// serve serves the oldest request that is ready, unless the other one was faster.
func (m *blkMate) serve() error {
	select {
	case lane := <-m.line:
		err := lane.serve()
		m.lanes.put(lane)
		return err
	default:
		return nil
	}
}

// run serves what is ready until the device stops.
func (m *blkMate) run() {
	var passes passer.Passer
	for {
		for m.ready() {
			if err := m.serve(); err != nil {
				(*m.lanes.blk.host.Load()).Fail(err)
			}
			busypoll.Yield()
		}
		for start := time.Now(); !m.ready() && time.Since(start) < blkMateLooks; {
			busypoll.Yield()
		}
		passes.Pass()
		m.asleep.Store(true)
		if m.ready() && m.asleep.CompareAndSwap(true, false) {
			continue
		}
		if _, ok := <-m.wake; !ok {
			return
		}
	}
}

// end has the goroutine end, which has nothing to do.
func (m *blkMate) end() {
	if m.wake != nil {
		close(m.wake)
	}
}
