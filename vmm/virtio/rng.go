package virtio

import (
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// ErrRNG is the stage of errors from the entropy device.
var ErrRNG = errors.New("virtio-rng")

const (
	// rngMaxRequest is the most one request is given. A device may fill less
	// than it was offered (section 5.4.6.1), and drivers ask again.
	rngMaxRequest = 4096
	// DefaultRNGRate is enough to seed anything at once and too little to keep
	// a host CPU busy.
	DefaultRNGRate = 1 << 20
)

// RNG is an entropy device (section 5.4). It has no state that a checkpoint
// must keep.
type RNG struct {
	rate int // bytes a second, and the most that may be saved up

	// Used by the queue's worker alone.
	chain  Chain
	budget int
	filled time.Time // when budget was last topped up
	now    func() time.Time

	mu    sync.Mutex
	timer *time.Timer // wakes the queue when there is budget again; guarded by mu
}

// NewRNG makes an entropy device that hands out at most bytesPerSecond from the
// host's generator; 0 means DefaultRNGRate.
func NewRNG(bytesPerSecond int) *RNG {
	if bytesPerSecond <= 0 {
		bytesPerSecond = DefaultRNGRate
	}
	return &RNG{rate: bytesPerSecond, now: time.Now}
}

// ID is IDRNG.
func (r *RNG) ID() DeviceID { return IDRNG }

// Features are none.
func (r *RNG) Features() uint64 { return 0 }

// QueueSizes is the one request queue.
func (r *RNG) QueueSizes() []uint16 { return []uint16{64} }

// ReadConfig reads zeroes: the device has no configuration.
func (r *RNG) ReadConfig(_ int, p []byte) { clear(p) }

// WriteConfig does nothing.
func (r *RNG) WriteConfig(int, []byte) {}

// Start begins with a full second's budget.
func (r *RNG) Start(_ uint64, _ []*Queue, _ Host) error {
	r.budget, r.filled = r.rate, r.now()
	return nil
}

// Handle fills what the driver offers until the budget is used up; the rest
// stays in the queue until there is budget again.
func (r *RNG) Handle(q *Queue) error {
	for {
		if wait := r.refill(); wait > 0 {
			r.wakeIn(wait, q)
			return nil
		}
		ok, err := q.Pop(&r.chain)
		if err != nil {
			return fmt.Errorf("%w: %w", ErrRNG, err)
		}
		if !ok {
			return nil
		}
		n, err := r.fill(&r.chain)
		if err != nil {
			return fmt.Errorf("%w: %w", ErrRNG, err)
		}
		r.budget -= n
		if err := q.Push(&r.chain, uint32(n)); err != nil {
			return fmt.Errorf("%w: %w", ErrRNG, err)
		}
	}
}

// refill adds what time has brought to the budget, and returns how long to
// wait when there is too little for a request.
func (r *RNG) refill() time.Duration {
	if r.budget > 0 {
		return 0
	}
	now := r.now()
	passed := min(max(now.Sub(r.filled), 0), time.Second)
	r.budget = min(r.budget+int(int64(r.rate)*int64(passed)/int64(time.Second)), r.rate)
	r.filled = now
	if r.budget > 0 {
		return 0
	}
	return time.Duration(int64(1-r.budget)*int64(time.Second)/int64(r.rate)) + time.Millisecond
}

// wakeIn has the worker look at q again after d.
func (r *RNG) wakeIn(d time.Duration, q *Queue) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.timer != nil {
		r.timer.Stop()
	}
	r.timer = time.AfterFunc(d, q.Wake)
}

// fill puts random bytes in c's buffers and returns how many.
func (r *RNG) fill(c *Chain) (int, error) {
	left := min(rngMaxRequest, r.budget)
	total := 0
	for _, b := range c.Write {
		p := b.Data[:min(len(b.Data), left)]
		for len(p) > 0 {
			n, err := unix.Getrandom(p, 0)
			if errors.Is(err, unix.EINTR) {
				continue
			}
			if err != nil {
				return total, fmt.Errorf("getrandom: %w", err)
			}
			p, left, total = p[n:], left-n, total+n
		}
		if left == 0 {
			break
		}
	}
	return total, nil
}

// Stop cancels a wake-up that is due.
func (r *RNG) Stop() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.timer != nil {
		r.timer.Stop()
		r.timer = nil
	}
}
