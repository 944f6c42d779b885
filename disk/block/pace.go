package block

import (
	"context"
	"sync"
	"time"
)

// Pace holds a copy to a rate. Any number of goroutines may share it.
type Pace struct {
	rate int64 // bytes a second; 0: no limit

	mu    sync.Mutex
	moved bucket // guarded by mu
}

// NewPace makes a Pace of rate bytes a second; 0: no limit.
func NewPace(rate int64) *Pace { return &Pace{rate: rate, moved: bucket{Limit: Limit{Rate: rate}}} }

// Wait counts n bytes that were moved, and returns when more may be, or when ctx ends,
// with its cause.
func (p *Pace) Wait(ctx context.Context, n int64) error {
	if p.rate <= 0 || n <= 0 {
		return context.Cause(ctx)
	}
	timer := time.NewTimer(p.count(n, time.Now()))
	defer timer.Stop()
	select {
	case <-timer.C:
		return context.Cause(ctx)
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// count counts n bytes at an instant, and tells how long after it more may be moved.
func (p *Pace) count(n int64, now time.Time) time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.moved.leak(now)
	p.moved.level += float64(n)
	return leaked(p.moved.level, p.rate)
}
