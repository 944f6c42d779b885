package pager

import (
	"sync/atomic"
	"time"
)

// counters are what Stats tells of.
type counters struct {
	guestFaults, heldFaults, deviceFaults atomic.Uint64
	installed                             [sweeping + 1]atomic.Uint64
	copies                                atomic.Uint64
	zeroPages, zeroCalls                  atomic.Uint64
	blockReads, bytesRead                 atomic.Uint64
	stalled                               atomic.Int64
}

// Stats are the figures of a Pager since New.
type Stats struct {
	// Demands: faults of the guest, on zeros too; those among them that met a page
	// which was on its way already; pages that devices waited for.
	GuestFaults  uint64 `json:"guest-faults"`
	HeldFaults   uint64 `json:"held-faults"`
	DeviceFaults uint64 `json:"device-faults"`
	// Pages installed from the file, in blocks and runs around demanded pages; ahead
	// of demands; and in the background.
	DemandPages     uint64 `json:"demand-pages"`
	AheadPages      uint64 `json:"ahead-pages"`
	BackgroundPages uint64 `json:"background-pages"`
	// CopyCalls are the UFFDIO_COPY calls that this took.
	CopyCalls uint64 `json:"copy-calls"`
	// ZeroPages are pages of zeros installed, by ZeroCalls calls of UFFDIO_ZEROPAGE.
	ZeroPages uint64 `json:"zero-pages"`
	ZeroCalls uint64 `json:"zero-calls"`
	// BlockReads are reads from the file, BytesRead what they read.
	BlockReads uint64 `json:"block-reads"`
	BytesRead  uint64 `json:"bytes-read"`
	// Stalled is the sum of the times from a demand to its answer.
	Stalled time.Duration `json:"stalled-ns"`
	// Blocks is how many blocks there are, and BlocksLeft how many nobody has begun
	// to load whole.
	Blocks     int  `json:"blocks"`
	BlocksLeft int  `json:"blocks-left"`
	Complete   bool `json:"complete"` // nothing is missing, and the pager has let go
}

// Installed is how many pages came from the file.
func (s *Stats) Installed() uint64 { return s.DemandPages + s.AheadPages + s.BackgroundPages }

// Stats returns the figures so far.
func (p *Pager) Stats() Stats {
	c := &p.counts
	s := Stats{
		GuestFaults: c.guestFaults.Load(), HeldFaults: c.heldFaults.Load(), DeviceFaults: c.deviceFaults.Load(),
		DemandPages: c.installed[demand].Load(), AheadPages: c.installed[ahead].Load(),
		BackgroundPages: c.installed[background].Load() + c.installed[sweeping].Load(),
		CopyCalls:       c.copies.Load(), ZeroPages: c.zeroPages.Load(), ZeroCalls: c.zeroCalls.Load(),
		BlockReads: c.blockReads.Load(), BytesRead: c.bytesRead.Load(), Stalled: time.Duration(c.stalled.Load()),
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	s.Blocks, s.BlocksLeft, s.Complete = len(p.blocks), p.idle, p.gone
	return s
}
