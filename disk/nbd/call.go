package nbd

import (
	"fmt"
	"sync/atomic"
)

// call is a request of a Client and what came of it.
type call struct {
	client *Client
	index  uint64
	header // its cookie is index and how often the call was used

	frame [requestSize]byte
	data  [][]byte // sent behind the header
	bufs  [][]byte // where a read goes to

	// left counts who still uses the call, the sender and the receiver; the last
	// one fills done.
	left atomic.Int32
	done chan struct{}
	// awaited tells that the receiver may take replies for it; current is the
	// cookie then.
	awaited atomic.Bool
	current atomic.Uint64

	// What the receiver fills; awaited is what hands them over.
	err     error
	gaps    []gap // what of a read has not come
	chunks  int
	wanted  contextID // of block status
	extents []StatusExtent
}

// gap is a part of a read, counted from its beginning.
type gap struct{ start, end int64 }

func (r *call) init(c *Client, index int) {
	r.client, r.index = c, uint64(index)
	r.cookie = r.index
	r.done = make(chan struct{}, 1)
}

// start makes the call a new request.
func (r *call) start(h header, data, bufs [][]byte) {
	cookie := r.cookie + maxCalls // none that was used before
	r.header = h
	r.cookie = cookie
	r.data, r.bufs, r.err, r.chunks = data, bufs, nil, 0
	r.gaps = append(r.gaps[:0], gap{0, int64(h.length)})
	r.put(r.frame[:])
	r.left.Store(2)
}

// do has the server do h, and waits for that.
func (r *call) do(h header, data, bufs [][]byte) error {
	r.start(h, data, bufs)
	r.current.Store(r.cookie)
	r.awaited.Store(true)
	if r.client.gone.Load() && r.awaited.CompareAndSwap(true, false) {
		return r.client.whyLost() // the receiver will not see the call
	}
	r.client.out.add(r)
	r.client.out.flush()
	<-r.done
	r.data, r.bufs = nil, nil
	if r.err != nil {
		return fmt.Errorf("%s of %d bytes at %d: %w", commandName(h.command), h.length, h.offset, r.err)
	}
	return nil
}

func commandName(command uint16) string {
	names := [...]string{"read", "write", "disconnect", "flush", "trim", "cache", "write of zeroes", "block status"}
	return names[command]
}

// vectors implements packet.
func (r *call) vectors(bufs [][]byte) [][]byte {
	return append(append(bufs, r.frame[:]), r.data...)
}

// sent implements packet.
func (r *call) sent() { r.release() }

func (r *call) release() {
	if r.left.Add(-1) == 0 {
		r.done <- struct{}{}
	}
}

// fill takes the n bytes at start of a read as come, and tells whether they had
// not.
func (r *call) fill(start, n int64) error {
	for i, g := range r.gaps {
		if start < g.start || start+n > g.end {
			continue
		}
		switch {
		case start == g.start && start+n == g.end:
			r.gaps = append(r.gaps[:i], r.gaps[i+1:]...)
		case start == g.start:
			r.gaps[i].start += n
		case start+n == g.end:
			r.gaps[i].end -= n
		case len(r.gaps) == maxGaps:
			return fmt.Errorf("%w: a read's reply is in too many pieces", ErrProtocol)
		default:
			r.gaps = append(r.gaps, gap{start + n, g.end})
			r.gaps[i].end = start
		}
		return nil
	}
	return fmt.Errorf("%w: a chunk of %d bytes at %d is outside the read of %d bytes at %d, or comes twice",
		ErrProtocol, n, int64(r.offset)+start, r.length, r.offset)
}

// maxGaps is in how many places a read's reply may have holes at a time.
const maxGaps = 256

// region calls f for the pieces of bufs that hold n bytes from start on.
func (r *call) region(start, n int64, f func(piece []byte) error) error {
	for _, b := range r.bufs {
		if start >= int64(len(b)) {
			start -= int64(len(b))
			continue
		}
		piece := b[start:min(start+n, int64(len(b)))]
		start = 0
		if err := f(piece); err != nil {
			return err
		}
		if n -= int64(len(piece)); n == 0 {
			break
		}
	}
	return nil
}
