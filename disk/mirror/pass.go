package mirror

import (
	"context"
	"fmt"
	"time"

	"github.com/gnomon-vmm/gnomon/disk/block"
)

const (
	// What the pass copies at once, keeping writers from it.
	defaultStep = 256 << 10

	// While the disk is in use the pass rests restShare times as long as it copies. It
	// does so at the priority of all: one of less would keep writers waiting for what it
	// has locked.
	restShare = 2
	minRest   = 100 * time.Microsecond
	maxRest   = 5 * time.Millisecond
	// How long after a request the disk counts as in use.
	inUse = 20 * time.Millisecond
)

// Run makes the pass. When it returns without an error the target holds all that
// the disk reads as, and every later write goes to it too, until Err is not nil.
func (f *Filter) Run(ctx context.Context) error {
	f.turns.mu.Lock()
	f.turns.buf = make([]byte, max(f.o.Step, turnSize))
	f.turns.cost.Store(int64(2 * maxTurn)) // until it is known
	f.over = f.startHandOver()
	f.turns.mu.Unlock()
	err := f.pass(ctx)
	f.endTurns()
	if failed := f.over.end(err == nil); err == nil && failed != nil {
		f.fail(failed)
	}
	if err != nil {
		return err
	}
	return f.Err()
}

// rest leaves the host's processors to the disk's user after a step. Short rests
// add up to one that the host's clocks can measure.
func (f *Filter) rest(took time.Duration) {
	now := time.Now()
	if requests := f.requests.Load(); requests != f.seen {
		f.seen, f.lastUse = requests, now
	}
	if !f.alwaysRest && now.Sub(f.lastUse) >= inUse {
		f.owed = 0
		return
	}
	if f.owed = min(f.owed+restShare*took, maxRest); f.owed >= minRest {
		time.Sleep(f.owed)
		f.owed -= time.Since(now)
	}
}

// step copies n bytes from at on, and returns how far it came: what nothing is held of is
// passed over at once. Preconditions: turns.mu is held.
func (f *Filter) step(at, n int64, buf []byte) (end int64, err error) {
	if err := f.Err(); err != nil {
		return 0, err
	}
	end = min(at+n, f.Size())
	if e, err := f.extent(at, end-at); err != nil {
		return 0, err
	} else if !e.take && at+e.length == end { // nor will it be, as writes there go to the target
		if e, err = f.extent(at, f.Size()-at); err != nil {
			return 0, err
		}
		end = max(end, (at+e.length)/clusterSize*clusterSize)
	}
	f.lock(at, end-at)
	defer f.unlock(at, end-at)
	for pos := at; pos < end; {
		e, err := f.extent(pos, end-pos)
		if err != nil {
			return 0, err
		}
		if e.take {
			if !e.zero {
				e.length = min(e.length, n)
			}
			if err := f.copy(e, buf); err != nil {
				return 0, err
			}
			for c := pos / clusterSize; c <= (pos+e.length-1)/clusterSize; c++ {
				f.held[c/64].Or(1 << (c % 64))
			}
		}
		pos += e.length
	}
	f.cursor.Store(end)
	return end, nil
}

// extent is what is done about length bytes.
type extent struct {
	start, length int64
	take, zero    bool
}

func (f *Filter) extent(off, n int64) (extent, error) {
	m, ok := f.Node.(block.Mapper)
	if !ok {
		return extent{start: off, length: n, take: true}, nil
	}
	e, err := m.Map(off, n)
	if err != nil {
		return extent{}, err
	}
	if e.Length <= 0 || e.Length > n {
		return extent{}, fmt.Errorf("the source names an extent of %d bytes at %d", e.Length, off)
	}
	// What lies behind the end of an image before the target is not the target's: it
	// reads as zero.
	take := f.o.Depth == 0 || e.Depth < f.o.Depth
	return extent{start: off, length: e.Length, take: take, zero: e.Zero}, nil
}

// copy has the target hold what the source does. Preconditions: turns.mu is held.
func (f *Filter) copy(e extent, buf []byte) error {
	if e.zero {
		if f.o.TargetIsZero {
			return nil
		}
		f.copied.Add(e.length)
		return f.target.WriteZeroes(e.start, e.length, true)
	}
	data := buf[:e.length]
	f.turns.bufs[0] = data
	bufs := f.turns.bufs[:]
	if err := f.Node.Readv(bufs, e.start); err != nil {
		return err
	}
	for at := e.start; len(data) > 0; {
		bufs[0] = data[:min(writeSize, len(data))]
		if !f.o.TargetIsZero || !block.IsZero(bufs[0]) {
			if err := f.target.Writev(bufs, at); err != nil {
				return err
			}
			f.copied.Add(int64(len(bufs[0])))
		}
		at, data = at+int64(len(bufs[0])), data[len(bufs[0]):]
	}
	return nil
}
