package block

import (
	"context"
	"errors"
	"testing"
	"time"
)

// A Pace makes up for what was moved, and saves nothing up of what was not.
func TestPace(t *testing.T) {
	p := NewPace(1 << 20)
	begin := time.Unix(1e9, 0)
	for _, tt := range []struct {
		n         int64
		at, after time.Duration
	}{
		{1 << 20, 0, time.Second},
		{512 << 10, 0, 1500 * time.Millisecond}, // by another goroutine
		{512 << 10, time.Second, time.Second},
		{256 << 10, time.Hour, 250 * time.Millisecond},
		{1 << 62, 2 * time.Hour, 1e9 * time.Second},
	} {
		if got := p.count(tt.n, begin.Add(tt.at)); got != tt.after {
			t.Errorf("%d bytes after %v: wait %v, not %v", tt.n, tt.at, got, tt.after)
		}
	}
	if err := NewPace(0).Wait(t.Context(), 1<<62); err != nil {
		t.Errorf("no limit: %v", err)
	}
	// Who waits for long hears of the end.
	ctx, cancel := context.WithCancelCause(t.Context())
	ended, why := make(chan error), errors.New("enough")
	go func() { ended <- NewPace(1).Wait(ctx, 1<<30) }()
	cancel(why)
	if err := <-ended; err != why {
		t.Error(err)
	}
	if err := NewPace(0).Wait(ctx, 1); err != why {
		t.Errorf("no limit, ended: %v", err)
	}
}
