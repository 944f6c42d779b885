package virtio

import (
	"fmt"
	"sync"
)

// blkLanes serve requests of one queue side by side, for a node whose requests wait.
// The queue's worker only hands requests out, so that it hears of those that come
// while all others wait.
type blkLanes struct {
	blk   *Blk
	queue *Queue

	mu     sync.Mutex
	free   []*blkLane // guarded by mu
	made   int        // lanes there are; guarded by mu
	busy   int        // of those, how many are not free; guarded by mu
	wanted bool       // the worker found none that is free; guarded by mu
}

// blkLane is a goroutine that serves one request after the other.
type blkLane struct {
	blkQueue
	begin chan struct{} // its chain is there
}

// dispatch hands requests out until the queue is empty, or no lane free. One that
// becomes free has the worker call it again then.
func (l *blkLanes) dispatch() error {
	q := l.queue
	q.share()
	q.aside = true
	for {
		lane := l.take()
		if lane == nil {
			return nil
		}
		ok, err := q.Pop(&lane.chain)
		if err != nil || !ok {
			l.put(lane)
			return err
		}
		lane.begin <- struct{}{}
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
	case l.made < l.blk.cfg.Depth:
		l.made++
		lane = &blkLane{begin: make(chan struct{}, 1)}
		go l.run(lane)
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

// underWay tells whether lanes serve requests.
func (l *blkLanes) underWay() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.busy > 0
}

// run serves the requests of a lane until end.
func (l *blkLanes) run(lane *blkLane) {
	q := l.queue
	for range lane.begin {
		written, err := l.blk.request(&lane.blkQueue)
		if err == nil {
			err = q.Push(&lane.chain, written)
		} else {
			err = fmt.Errorf("%w: queue %d: %w", ErrBlk, q.Index(), err)
		}
		if err == nil {
			q.Flush()
		} else {
			(*l.blk.host.Load()).Fail(err)
		}
		l.put(lane)
	}
}

// end has the lanes end, which are all free, for good.
func (l *blkLanes) end() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, lane := range l.free {
		close(lane.begin)
	}
	l.free = nil
}
