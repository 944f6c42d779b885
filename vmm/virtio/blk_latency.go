package virtio

import (
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"time"
)

// Latency names the kinds of requests that histograms of latency are kept of.
type Latency int

// The kinds, in QEMU's sense: zeroes are written, and discards are in none.
const (
	LatencyRead Latency = iota
	LatencyWrite
	LatencyFlush
)

// maxBoundaries bounds a histogram.
const maxBoundaries = 1024

// ErrBoundaries are boundaries that no histogram has.
var ErrBoundaries = errors.New("boundaries of a latency histogram")

// Histogram counts requests by how long they took: bin i has those from boundary i-1
// on, or 0, to below boundary i, or without end.
type Histogram struct {
	Boundaries []uint64 // nanoseconds, ascending
	bins       []atomic.Uint64
}

// NewHistogram makes a histogram without requests.
func NewHistogram(boundaries []uint64) (*Histogram, error) {
	if len(boundaries) == 0 || len(boundaries) > maxBoundaries {
		return nil, fmt.Errorf("%w: there are %d: 1 to %d are possible", ErrBoundaries, len(boundaries), maxBoundaries)
	}
	for i, b := range boundaries {
		if b == 0 || i > 0 && b <= boundaries[i-1] {
			return nil, fmt.Errorf("%w: they must be above 0 and ascend", ErrBoundaries)
		}
	}
	return &Histogram{Boundaries: slices.Clone(boundaries), bins: make([]atomic.Uint64, len(boundaries)+1)}, nil
}

func (h *Histogram) observe(took time.Duration) {
	i, exact := slices.BinarySearch(h.Boundaries, uint64(max(took, 0)))
	if exact {
		i++
	}
	h.bins[i].Add(1)
}

// Bins are the numbers of requests, one more than there are boundaries.
func (h *Histogram) Bins() []uint64 {
	bins := make([]uint64, len(h.bins))
	for i := range h.bins {
		bins[i] = h.bins[i].Load()
	}
	return bins
}

// SetLatency has requests of a kind counted from now on, or, with nil, not any more.
func (b *Blk) SetLatency(kind Latency, h *Histogram) { b.latency[kind].Store(h) }

// Latency is the histogram of a kind of requests, or nil.
func (b *Blk) Latency(kind Latency) *Histogram {
	if kind > LatencyFlush {
		return nil
	}
	return b.latency[kind].Load()
}

// latencyOf is the kind that a request counts for; discards count for one that is
// never kept.
func latencyOf(op BlkOp) Latency {
	switch op {
	case BlkRead:
		return LatencyRead
	case BlkFlush:
		return LatencyFlush
	case BlkDiscard:
		return latencyNone
	}
	return LatencyWrite
}

const latencyNone = LatencyFlush + 1
