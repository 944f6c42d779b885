package block

import (
	"errors"
	"fmt"
	"sync"
	"time"
)

// Limit bounds how fast something happens: at most Rate a second in the long run,
// and for up to BurstSeconds Max a second. A Rate of 0 is no limit, a Max of 0 a tenth
// of a second's worth at once.
type Limit struct {
	Rate, Max    int64
	BurstSeconds int64 // 0 is 1
}

// Limits bound a disk's requests; those of all do not go together with those of
// reads or writes.
type Limits struct {
	Bytes, ReadBytes, WriteBytes Limit // bytes
	Ops, ReadOps, WriteOps       Limit // requests
	// OpBytes has a request of more bytes count for several; 0: every one is one.
	OpBytes int64
}

// maxRate is the largest rate, in QEMU too.
const maxRate = 1_000_000_000_000_000

// ErrLimits are limits that cannot be.
var ErrLimits = errors.New("limits of requests")

// Check refuses limits that make no sense.
func (l *Limits) Check() error {
	for _, x := range []Limit{l.Bytes, l.ReadBytes, l.WriteBytes, l.Ops, l.ReadOps, l.WriteOps} {
		if reason := x.check(); reason != "" {
			return fmt.Errorf("%w: %s", ErrLimits, reason)
		}
	}
	switch {
	case l.Bytes.Rate != 0 && (l.ReadBytes.Rate != 0 || l.WriteBytes.Rate != 0), l.Ops.Rate != 0 && (l.ReadOps.Rate != 0 || l.WriteOps.Rate != 0):
		return fmt.Errorf("%w: bps/iops/max total values and read/write values cannot be used at the same time", ErrLimits)
	case l.OpBytes < 0:
		return fmt.Errorf("%w: iops_size cannot be negative", ErrLimits)
	}
	return nil
}

// check tells what is wrong with a limit, in QEMU's words.
func (x *Limit) check() string {
	switch {
	case x.Rate < 0 || x.Rate > maxRate || x.Max < 0 || x.Max > maxRate:
		return fmt.Sprintf("bps/iops/max values must be within [0, %d]", int64(maxRate))
	case x.BurstSeconds < 0:
		return "the burst length cannot be negative"
	case x.BurstSeconds > 1 && x.Max == 0:
		return "burst length set without burst rate"
	case x.Max != 0 && x.Rate == 0:
		return "bps_max/iops_max require corresponding bps/iops values"
	case x.Max != 0 && x.Max < x.Rate:
		return "bps_max/iops_max cannot be lower than bps/iops"
	case x.BurstSeconds > 1 && x.Max > maxRate/x.BurstSeconds:
		return "burst length too high for this burst rate"
	}
	return ""
}

// bucket is how much of a limit has been used: it leaks at the limit's rate, and a
// request waits until what is above its brim has leaked.
type bucket struct {
	Limit
	level float64
	burst float64 // leaks at Max, where bursts last longer than a second
	at    time.Time
}

func (b *bucket) leak(now time.Time) {
	passed := max(0, now.Sub(b.at).Seconds())
	b.at = now
	b.level = max(0, b.level-passed*float64(b.Rate))
	b.burst = max(0, b.burst-passed*float64(b.Max))
}

// wait is how long a request that comes now waits.
func (b *bucket) wait() time.Duration {
	if b.Rate == 0 {
		return 0
	}
	brim := float64(b.Rate) / 10
	if b.Max > 0 {
		brim = float64(b.Max) * float64(max(1, b.BurstSeconds))
	}
	wait := leaked(b.level-brim, b.Rate)
	if b.BurstSeconds > 1 {
		wait = max(wait, leaked(b.burst-float64(b.Max)/10, b.Max))
	}
	return wait
}

// leaked is how long it takes until so much has leaked.
func leaked(level float64, rate int64) time.Duration {
	return time.Duration(min(max(0, level)/float64(rate), 1e9) * float64(time.Second))
}

// throttle holds a disk's requests back.
type throttle struct {
	limits  Limits
	through chan struct{} // closed: nobody waits

	mu sync.Mutex
	// Bytes and requests of each; guarded by mu.
	all, reads, writes [2]bucket
}

func newThrottle(l Limits) *throttle {
	return &throttle{
		limits: l, through: make(chan struct{}),
		all:    [2]bucket{{Limit: l.Bytes}, {Limit: l.Ops}},
		reads:  [2]bucket{{Limit: l.ReadBytes}, {Limit: l.ReadOps}},
		writes: [2]bucket{{Limit: l.WriteBytes}, {Limit: l.WriteOps}},
	}
}

// reserve counts a request, and tells how long it waits for those before it.
func (t *throttle) reserve(write bool, n int64, now time.Time) time.Duration {
	t.mu.Lock()
	defer t.mu.Unlock()
	kind := &t.reads
	if write {
		kind = &t.writes
	}
	ops := 1.0
	if t.limits.OpBytes > 0 {
		ops = max(1, float64(n)/float64(t.limits.OpBytes))
	}
	var wait time.Duration
	for _, set := range []*[2]bucket{&t.all, kind} {
		for i, used := range [2]float64{float64(n), ops} {
			set[i].leak(now)
			wait = max(wait, set[i].wait())
			set[i].level += used
			set[i].burst += used
		}
	}
	return wait
}

// SetLimits bounds the requests from now on; the zero Limits do not.
func (r *Root) SetLimits(l Limits) error {
	if err := l.Check(); err != nil {
		return err
	}
	r.letThrough.Lock()
	defer r.letThrough.Unlock()
	var next *throttle
	if l != (Limits{}) {
		next = newThrottle(l)
	}
	r.replaceThrottle(next)
	return nil
}

// replaceThrottle has who waits go on: they are not held to limits that are none any
// more. Preconditions: letThrough is held.
func (r *Root) replaceThrottle(next *throttle) {
	if next != nil && r.hurried {
		close(next.through)
	}
	if old := r.throttle.Swap(next); old != nil {
		select {
		case <-old.through:
		default:
			close(old.through)
		}
	}
}

// Limits are those that SetLimits set.
func (r *Root) Limits() Limits {
	if t := r.throttle.Load(); t != nil {
		return t.limits
	}
	return Limits{}
}

// Hurry has no request wait because of limits, while it is on: for who waits until
// there are no requests.
func (r *Root) Hurry(on bool) {
	r.letThrough.Lock()
	defer r.letThrough.Unlock()
	if r.hurried == on {
		return
	}
	r.hurried = on
	if t := r.throttle.Load(); t != nil {
		r.replaceThrottle(newThrottle(t.limits))
	}
}

// hold waits until a request is within the limits. It is called before the request
// counts as one that is under way.
func (r *Root) hold(write bool, n int64) {
	t := r.throttle.Load()
	if t == nil {
		return
	}
	wait := t.reserve(write, n, time.Now())
	if wait <= 0 {
		return
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-t.through:
	}
}
