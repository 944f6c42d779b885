package capture

import (
	"sync/atomic"
	"time"
)

type counter = atomic.Uint64

// counters are what Stats returns, as they grow.
type counters struct {
	protectCalls, freezeCalls                   counter
	faultsArming, rewritten, faultsSaving       counter
	copiedByFault, copiedByTouch, pinned, swept counter
	holes, waited                               counter
	frozenFor                                   atomic.Int64 // nanoseconds
}

// Stats tell what a capture did so far, in pages where nothing else is said.
type Stats struct {
	FaultsArming  uint64        // write faults between Arm and Freeze
	Rewritten     uint64        // protected again by Freeze
	FreezeCalls   uint64        // system calls that Freeze made for that
	Frozen        time.Duration // how long Freeze took
	Pinned        uint64        // copied by Freeze, because devices write them at any time
	FaultsSaving  uint64        // write faults after Freeze
	CopiedByFault uint64        // kept because the guest was about to write them
	CopiedByTouch uint64        // kept because a device was
	Waited        uint64        // for which there was no room, so that the writer waited
	SideCopies    uint64        // the most that were kept at a time
	Swept         uint64        // copied from the guest's memory by the sweeper
	Holes         uint64        // never touched, known as zero without a look
}

// Stats may be called at any time.
func (c *Capture) Stats() Stats {
	c.pages.mu.Lock()
	highest := c.pages.highest
	c.pages.mu.Unlock()
	n := &c.count
	return Stats{
		FaultsArming: n.faultsArming.Load(), Rewritten: n.rewritten.Load(), FreezeCalls: n.freezeCalls.Load(),
		Frozen: time.Duration(n.frozenFor.Load()), Pinned: n.pinned.Load(),
		FaultsSaving: n.faultsSaving.Load(), CopiedByFault: n.copiedByFault.Load(), CopiedByTouch: n.copiedByTouch.Load(),
		Waited: n.waited.Load(), SideCopies: uint64(highest), Swept: n.swept.Load(), Holes: n.holes.Load(),
	}
}
