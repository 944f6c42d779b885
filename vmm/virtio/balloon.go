package virtio

import (
	"errors"
	"fmt"
	"sync"
)

// ErrBalloon is the stage of errors from the balloon.
var ErrBalloon = errors.New("virtio-balloon")

// Feature bits (section 5.5.3).
const (
	balloonFStatsVQ      = 1 << 1
	balloonFDeflateOnOOM = 1 << 2
	balloonFReporting    = 1 << 5
)

const (
	balloonPage       = 4096 // unit of page frame numbers, whatever the guest's page size
	balloonConfigSize = 8
	balloonBatch      = 1024 // page frame numbers put in order at once
	balloonMaxStats   = 64   // statistics taken from one buffer
)

// Memory is what a balloon gives pages of back to the host; guestmem.Memory is one.
type Memory interface {
	Size() uint64
	// Discard gives back the whole pages in n bytes from gpa on. It refuses
	// what is not RAM.
	Discard(gpa, n uint64) error
}

// BalloonState is what survives a checkpoint of a balloon.
type BalloonState struct {
	Target uint32 // pages the balloon should hold
	Actual uint32 // pages the driver says it holds
}

// BalloonStats are what the guest last said about its memory (section 5.5.6.4):
// values by tag, in bytes or events.
type BalloonStats map[BalloonTag]uint64

// BalloonTag names a statistic.
type BalloonTag uint16

// Statistics, with the meanings of the specification.
const (
	BalloonSwapIn BalloonTag = iota
	BalloonSwapOut
	BalloonMajorFaults
	BalloonMinorFaults
	BalloonFreeMemory
	BalloonTotalMemory
	BalloonAvailableMemory
	BalloonDiskCaches
	BalloonHugeAllocations
	BalloonHugeFailures
)

// BalloonConfig describes a balloon.
type BalloonConfig struct {
	Memory Memory
	// OnChange, where not nil, is told the guest's memory in bytes whenever
	// the driver has changed the balloon. It must not block: a vCPU waits.
	OnChange func(actual uint64)
	// OnStats, where not nil, is called when the answer to RequestStats is
	// there. It must not block.
	OnStats func()
}

// Steps of taking statistics. The driver keeps one buffer in the queue. To get
// fresh values the device returns it, reads what comes, and returns that too,
// so that no buffer is in the device's hands while nothing is going on.
const (
	statsRest  = iota // the buffer stays in the queue
	statsAsk          // return the buffer: its values are old
	statsFresh        // the next buffer has fresh values
)

// Balloon is a memory balloon with statistics and free page reporting
// (section 5.5).
type Balloon struct {
	config BalloonConfig

	mu         sync.Mutex
	state      BalloonState // guarded by mu
	host       Host         // nil while stopped; guarded by mu
	statsQueue *Queue       // nil where there is none; guarded by mu
	statsStep  int          // guarded by mu
	stats      BalloonStats // latest; guarded by mu
	discarded  uint64       // bytes given back; guarded by mu

	chains [balloonQueues]Chain // each used by its queue's worker alone
	frames []uint32             // used by the inflate queue's worker alone
}

// Queue numbers (section 5.5.2). Drivers leave no gaps for queues they do not
// use, whatever the specification says, so free page reporting is on any queue
// but the first three, or on the third where it is not for statistics.
const (
	balloonInflateQueue = 0
	balloonDeflateQueue = 1
	balloonStatsQueue   = 2
	balloonQueues       = 5
)

// NewBalloon makes a balloon that is empty.
func NewBalloon(config BalloonConfig) *Balloon {
	return &Balloon{config: config, frames: make([]uint32, 0, balloonBatch)}
}

// ID is IDBalloon.
func (b *Balloon) ID() DeviceID { return IDBalloon }

// Features are statistics, deflating when the guest is out of memory, and free
// page reporting.
func (b *Balloon) Features() uint64 {
	return balloonFStatsVQ | balloonFDeflateOnOOM | balloonFReporting
}

// QueueSizes are those of inflateq, deflateq, statsq, free_page_vq (which is
// not offered but has its number) and reporting_vq.
func (b *Balloon) QueueSizes() []uint16 { return []uint16{128, 128, 16, 32, 32} }

// ReadConfig reads struct virtio_balloon_config (section 5.5.4).
func (b *Balloon) ReadConfig(off int, p []byte) {
	var c [balloonConfigSize]byte
	b.mu.Lock()
	le.PutUint32(c[0:], b.state.Target)
	le.PutUint32(c[4:], b.state.Actual)
	b.mu.Unlock()
	readConfig(c[:], off, p)
}

// WriteConfig takes what the driver says the balloon holds.
func (b *Balloon) WriteConfig(off int, p []byte) {
	b.mu.Lock()
	var c [balloonConfigSize]byte
	le.PutUint32(c[4:], b.state.Actual)
	for i, v := range p {
		if at := off + i; at >= 4 && at < balloonConfigSize {
			c[at] = v
		}
	}
	actual := le.Uint32(c[4:])
	changed := actual != b.state.Actual
	b.state.Actual = actual
	b.mu.Unlock()
	if changed && b.config.OnChange != nil {
		b.config.OnChange(b.Actual())
	}
}

// Start finds which queue is which.
func (b *Balloon) Start(features uint64, queues []*Queue, host Host) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.host, b.statsQueue, b.statsStep = host, nil, statsRest
	if features&balloonFStatsVQ != 0 {
		b.statsQueue = queues[balloonStatsQueue]
	}
	return nil
}

// Stop forgets the queues. The driver that comes next has an empty balloon.
func (b *Balloon) Stop() {
	b.mu.Lock()
	changed := b.state.Actual != 0
	b.host, b.statsQueue, b.statsStep, b.stats = nil, nil, statsRest, nil
	b.state.Actual = 0
	b.mu.Unlock()
	if changed && b.config.OnChange != nil {
		b.config.OnChange(b.Actual())
	}
}

// SetTarget asks for a balloon that leaves the guest bytes of its memory. The
// driver follows in its own time, as far as it can.
func (b *Balloon) SetTarget(bytes uint64) error {
	size := b.config.Memory.Size()
	if bytes > size {
		return fmt.Errorf("%w: target of %d bytes: the machine has %d", ErrBalloon, bytes, size)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.state.Target = uint32(min((size-bytes)/balloonPage, 1<<32-1))
	if b.host != nil {
		b.host.ConfigChanged()
	}
	return nil
}

// Actual is the memory in bytes that the balloon leaves the guest, by the driver's word.
func (b *Balloon) Actual() uint64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	size := b.config.Memory.Size()
	return size - min(uint64(b.state.Actual)*balloonPage, size)
}

// Target is the memory in bytes that SetTarget asked for last.
func (b *Balloon) Target() uint64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	size := b.config.Memory.Size()
	return size - min(uint64(b.state.Target)*balloonPage, size)
}

// Discarded counts the bytes given back to the host since the balloon was made.
func (b *Balloon) Discarded() uint64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.discarded
}

// RequestStats asks the driver for fresh statistics. It returns false when
// there is no driver that has them.
func (b *Balloon) RequestStats() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.statsQueue == nil {
		return false
	}
	if b.statsStep == statsRest {
		b.statsStep = statsAsk
	}
	b.statsQueue.Wake()
	return true
}

// Stats are the latest statistics; nil while there are none.
func (b *Balloon) Stats() BalloonStats {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.stats
}

// State is what a checkpoint keeps.
func (b *Balloon) State() BalloonState {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.state
}

// SetState restores what a checkpoint kept; before Start.
func (b *Balloon) SetState(s BalloonState) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.state = s
	return nil
}
