package mirror

import (
	"sync"

	"github.com/gnomon-vmm/gnomon/disk/block"
)

// handOverBytes is how much the pass copies, of a large disk, before that is made durable
// and handed over to the target. Each time, writes of the disk's user wait for more of the
// host's writeback than otherwise: fewer times are better, though until then they go to
// both.
const handOverBytes = 64 << 20

// coverer is a source that lies on the target and can stop holding what the target
// has too, which is read from there then.
type coverer interface {
	block.Node
	// Uncover has the source not hold what the target has, and has made durable.
	Uncover(off, n int64) error
	// StoreTables has the source's image on the host tell so.
	StoreTables() error
}

// handOver has the source uncover what the pass has copied, while the pass goes on:
// the disk's user writes there to the target alone then, and no more to both.
//
// Whatever order the host makes things durable in, the image reads as the disk that
// was flushed: the target holds it durably before the source's image can tell that it
// does not. From then on either place will do, until a flush of the disk's user, which
// makes durable first what went to the target alone, and then that the source does not
// hold it.
type handOver struct {
	f    *Filter
	from coverer
	unit int64 // bytes that are kept from being written meanwhile, a cluster of the source's at least
	most int64 // bytes that the pass may be ahead

	mu     sync.Mutex
	change sync.Cond // on mu
	done   int64     // what lies before it was handed over; guarded by mu
	upTo   int64     // what lies before it shall be; guarded by mu
	last   bool      // there will be no more; guarded by mu
	err    error     // guarded by mu
	ended  chan struct{}
}

// startHandOver begins to hand over, where the source can: else it returns nil, which
// hands nothing over.
func (f *Filter) startHandOver() *handOver {
	from, ok := f.Node.(coverer)
	if f.o.Depth != 1 || !ok || from.ReadOnly() {
		return nil
	}
	h := &handOver{f: f, from: from, unit: max(f.o.Step, from.Info().ClusterSize), ended: make(chan struct{})}
	h.most = max(h.unit, min(handOverBytes, f.Size()/8))
	h.change.L = &h.mu
	f.handsOver.Store(true)
	go h.run()
	return h
}

// passed tells that the pass has copied what lies before at.
func (h *handOver) passed(at int64) error {
	if h == nil {
		return nil
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.upTo = at; at < h.f.Size() {
		h.upTo = at / h.unit * h.unit
	}
	h.change.Signal()
	return h.err
}

// end waits until all that was copied is handed over; where that does not matter any
// more, only until nothing is being handed over.
func (h *handOver) end(all bool) error {
	if h == nil {
		return nil
	}
	h.mu.Lock()
	h.last = true
	if !all {
		h.upTo = h.done
	}
	h.change.Signal()
	h.mu.Unlock()
	<-h.ended
	return h.err
}

func (h *handOver) run() {
	defer close(h.ended)
	h.mu.Lock()
	defer h.mu.Unlock()
	for h.err == nil {
		for !h.last && h.upTo-h.done < h.most {
			h.change.Wait()
		}
		from, upTo := h.done, h.upTo
		if from >= upTo {
			return
		}
		h.mu.Unlock()
		err := h.once(from, upTo)
		h.mu.Lock()
		h.done, h.err = upTo, err
	}
}

// once hands over what lies from a place of the disk up to another.
func (h *handOver) once(from, upTo int64) error {
	if err := h.f.target.Flush(); err != nil {
		return err
	}
	for from < upTo {
		next := min(from+h.unit, upTo)
		if err := h.part(from, next-from); err != nil {
			return err
		}
		from = next
	}
	return h.from.StoreTables()
}

// part is once, but for what the source's image is to be told.
func (h *handOver) part(off, n int64) error {
	h.f.lock(off, n)
	defer h.f.unlock(off, n)
	// After an error of the target's, writes go to the source alone.
	if err := h.f.Err(); err != nil {
		return err
	}
	if err := h.from.Uncover(off, n); err != nil {
		return err
	}
	for c := off / clusterSize; c <= (off+n-1)/clusterSize; c++ {
		h.f.held[c/64].And(^uint64(1 << (c % 64)))
	}
	return nil
}
