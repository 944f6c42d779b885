package mirror

import (
	"context"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// What the disk's user copies at once, and how much of the time of its own requests
	// that may take, in percent. A request counts no longer than longRequest.
	turnSize    = clusterSize
	turnShare   = 33
	longRequest = 100 * time.Microsecond
	// A turn that would take longer than maxTurn waits for more than the processor: the
	// pass makes it, beside the user's requests.
	maxTurn = 100 * time.Microsecond
	// turnsGranted are those that users may make until the pass looks again, which it does
	// each lookInterval; with fewer than turnsWanted of them it goes on itself.
	turnsGranted = 32
	turnsWanted  = 4
	lookInterval = 2 * time.Millisecond
)

// turns are who copies next. While the disk is in use its user does so between two
// requests, in small steps: on a host without an idle processor, that keeps requests
// waiting for less long than another thread would that takes turns with the user's.
type turns struct {
	mu  sync.Mutex // held by who copies
	at  int64      // how far the pass is; guarded by mu
	buf []byte     // guarded by mu
	// bufs is a part of buf, for a request; guarded by mu.
	bufs [1][]byte

	granted atomic.Int64 // turns that users may still make; taken with mu held
	made    atomic.Int64 // by users
	credit  atomic.Int64 // ns that users may copy
	cost    atomic.Int64 // ns that a turn took lately
}

// withTurn carries out a request of the disk's user, who may copy a piece then.
func (f *Filter) withTurn(request func() error) error {
	if f.turns.granted.Load() <= 0 {
		return request()
	}
	begin := time.Now()
	if err := request(); err != nil {
		return err
	}
	t := &f.turns
	credit := t.credit.Add(int64(min(time.Since(begin), longRequest) * turnShare / 100))
	if cost := t.cost.Load(); credit < cost || cost > int64(maxTurn) || !t.mu.TryLock() {
		return nil
	}
	defer t.mu.Unlock()
	if t.granted.Load() <= 0 || t.at >= f.Size() {
		return nil
	}
	t.granted.Add(-1)
	t.made.Add(1)
	t.credit.Store(0)
	_, _ = f.advance(turnSize) // whose error the pass finds
	return nil
}

// advance makes a step of n bytes. Preconditions: turns.mu is held.
func (f *Filter) advance(n int64) (took time.Duration, err error) {
	t := &f.turns
	begin := time.Now()
	end, err := f.step(t.at, n, t.buf)
	took = time.Since(begin)
	if err == nil {
		err = f.over.passed(end)
	}
	if err != nil {
		f.fail(err)
		return took, f.Err()
	}
	t.at = end
	cost := took * turnSize / time.Duration(n)
	t.cost.Store((3*t.cost.Load() + int64(min(cost, 2*maxTurn))) / 4)
	return took, nil
}

// pass makes the pass, or sees to it that it is made.
func (f *Filter) pass(ctx context.Context) error {
	t := &f.turns
	f.evict(0)
	for seen := int64(0); ; {
		t.granted.Store(0)
		if f.o.Pause != nil {
			if err := f.o.Pause(); err != nil {
				return err
			}
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		made := t.made.Load()
		use := made-seen >= turnsWanted
		seen = made
		at, took, err := f.turn(use)
		if err != nil {
			return err
		}
		f.evict(at)
		if f.o.Progress != nil {
			f.o.Progress(at, f.Size())
		}
		switch {
		case at >= f.Size():
			return nil
		case use:
			time.Sleep(lookInterval)
		default:
			f.rest(took)
		}
	}
}

// turn makes a step, unless that is left to the disk's user, and tells how far the pass
// is.
func (f *Filter) turn(leave bool) (at int64, took time.Duration, err error) {
	t := &f.turns
	t.mu.Lock()
	defer t.mu.Unlock()
	if err = f.Err(); err == nil && !leave && t.at < f.Size() {
		took, err = f.advance(f.o.Step)
	}
	if err == nil {
		t.granted.Store(turnsGranted)
	}
	return t.at, took, err
}

// endTurns has users make no more turns.
func (f *Filter) endTurns() {
	f.turns.mu.Lock()
	defer f.turns.mu.Unlock()
	f.turns.granted.Store(0)
}
