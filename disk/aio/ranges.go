package aio

import "sync"

// ranges are the parts of a file that are being written. Who writes blocks as a
// whole of which only a part is new is alone in them; others may overlap each other.
type ranges struct {
	mu      sync.Mutex
	changed sync.Cond // on mu: a part is not being written any more
	active  []span    // guarded by mu
}

type span struct {
	start, end int64
	alone      bool
}

// lock waits until start to end can be written.
func (r *ranges) lock(start, end int64, alone bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for r.conflict(start, end, alone) {
		r.changed.Wait()
	}
	r.active = append(r.active, span{start, end, alone})
}

// tryLock is lock that does not wait; it tells whether the part can be written.
func (r *ranges) tryLock(start, end int64, alone bool) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.conflict(start, end, alone) {
		return false
	}
	r.active = append(r.active, span{start, end, alone})
	return true
}

// conflict tells whether somebody is in the way. Preconditions: mu is held.
func (r *ranges) conflict(start, end int64, alone bool) bool {
	for _, s := range r.active {
		if (alone || s.alone) && start < s.end && s.start < end {
			return true
		}
	}
	return false
}

// unlock ends what lock of the same part began.
func (r *ranges) unlock(start, end int64, alone bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i, s := range r.active {
		if s == (span{start, end, alone}) {
			last := len(r.active) - 1
			r.active[i] = r.active[last]
			r.active = r.active[:last]
			break
		}
	}
	r.changed.Broadcast()
}
