package owner

import (
	"slices"
	"testing"
	"time"
)

// TestHandOver: two live processes write the same disk in turn.
func TestHandOver(t *testing.T) {
	const times = 500
	path := newImage(t)
	o := childOptions{Path: path, Lease: 2 * time.Second}
	ps := [2]*process{startChild(t, o), startChild(t, o)}
	ps[0].take()
	owner := ps[0].expect("owned")
	var took, unflushed []time.Duration
	var writes uint64
	for i := range times {
		from, to := ps[i%2], ps[(i+1)%2]
		to.take()
		ended, next := from.expect("ended"), to.expect("owned")
		if err := next.sameAs(&ended); err != nil {
			t.Errorf("hand-over %d: %v", i, err)
		}
		if next.Epoch != owner.Epoch+1 || ended.Epoch != owner.Epoch || ended.Again != ErrReleased.Error() {
			t.Errorf("hand-over %d: from epoch %d to %d to %d; then %q", i, owner.Epoch, ended.Epoch, next.Epoch, ended.Again)
		}
		if t.Failed() {
			t.FailNow()
		}
		owner = next
		took, writes = append(took, next.Took), writes+ended.Count
		unflushed = append(unflushed, next.Took-ended.Closing)
	}
	if writes == 0 {
		t.Error("nothing was written")
	}
	slices.Sort(took)
	slices.Sort(unflushed)
	t.Logf("%d hand-overs, %d writes: p50 %v, p99 %v, longest %v; without the old owner's flush: p50 %v, p99 %v", times, writes, took[times/2], took[times*99/100], took[times-1], unflushed[times/2], unflushed[times*99/100])
}
