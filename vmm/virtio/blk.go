package virtio

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/internal/passer"
)

// Block device feature bits (section 5.2.3).
const (
	BlkFeatureSegMax      uint64 = 1 << 2
	BlkFeatureReadOnly    uint64 = 1 << 5
	BlkFeatureBlockSize   uint64 = 1 << 6
	BlkFeatureFlush       uint64 = 1 << 9
	BlkFeatureTopology    uint64 = 1 << 10
	BlkFeatureConfigWCE   uint64 = 1 << 11
	BlkFeatureMultiQueue  uint64 = 1 << 12
	BlkFeatureDiscard     uint64 = 1 << 13
	BlkFeatureWriteZeroes uint64 = 1 << 14
)

// Request types and status (section 5.2.6).
const (
	blkIn          = 0
	blkOut         = 1
	blkFlush       = 4
	blkGetID       = 8
	blkDiscard     = 11
	blkWriteZeroes = 13

	blkOK    = 0
	blkIOErr = 1
	blkUnsup = 2

	blkRetry = 0xFF // ours: no status, the request is tried again
)

const (
	blkSector     = 512
	blkHeaderSize = 16
	blkIDSize     = 20
	// blkRangeSize is struct virtio_blk_discard_write_zeroes.
	blkRangeSize = 16
	blkMaxRanges = 64
	// blkMaxRangeSectors is 1 GiB.
	blkMaxRangeSectors = 1 << 21
	blkUnmap           = 1 << 0

	// A worker with more to do interrupts the driver for what is done after
	// blkFlushCost bytes; a request counts for blkRequestCost more than its data.
	blkFlushCost   = 256 << 10
	blkRequestCost = 4 << 10
)

// Device configuration (section 5.2.4).
const (
	blkConfigSize      = 60
	blkConfigWriteback = 32
)

// ErrBlk is the stage of serving a block device.
var ErrBlk = errors.New("virtio-blk")

// errRetry is a request that waits for Retry.
var errRetry = errors.New("request waits")

// BlkOp names a kind of request.
type BlkOp string

// The kinds of request.
const (
	BlkRead        BlkOp = "read"
	BlkWrite       BlkOp = "write"
	BlkFlush       BlkOp = "flush"
	BlkDiscard     BlkOp = "discard"
	BlkWriteZeroes BlkOp = "write-zeroes"
)

// BlkConfig says what a block device shows.
type BlkConfig struct {
	Node   block.Node
	Serial string // up to 20 bytes, for the guest's disk id
	// ReadOnly refuses writes, as a node that is read-only does.
	ReadOnly bool
	Queues   int // 0 means 1
	// QueueSize is a power of two of at most MaxQueueSize; 0 means 256.
	QueueSize uint16
	// BlockSize is the logical block size in bytes, 512 or 4096; 0 means 512.
	BlockSize int
	// Depth is how many requests of a queue are served side by side at most where the
	// node's requests wait for a device (block.Waits); 0 means 1. With more than 1 a
	// request cannot wait for Retry: BlkStop means BlkReport.
	Depth int
	// OnIOError, where not nil, decides what becomes of a request that the node failed;
	// where it is nil the driver is told. It is called by any goroutine and must not
	// block.
	OnIOError func(op BlkOp, err error) BlkAction
	// OnStop, where not nil, is told when requests wait for Retry since one failed. It
	// is called by the queue's worker and must not block.
	OnStop func()
}

// BlkAction is what becomes of a request that the node failed.
type BlkAction string

// What can become of it.
const (
	BlkReport BlkAction = "report" // the driver is told
	BlkIgnore BlkAction = "ignore" // it passes for done
	BlkStop   BlkAction = "stop"   // it waits, as do all others, for Retry
)

// BlkState is what survives a checkpoint.
type BlkState struct {
	Writeback bool // the driver lets writes stay in the cache until a flush
	// Size in bytes, and ReadOnly, are of what the guest was shown; states from
	// before they were kept have neither.
	Size     int64 `json:",omitempty"`
	ReadOnly *bool `json:",omitempty"`
}

// Blk is a virtio block device.
type Blk struct {
	cfg      BlkConfig
	readOnly bool
	features uint64
	queues   []*blkQueue
	lanes    []*blkLanes // by queue; from Start to Stop where Depth is more than 1
	stats    blkCounters
	host     atomic.Pointer[Host]
	accepted atomic.Uint64 // feature bits the driver accepted

	// writeback is BlkState.Writeback.
	writeback atomic.Bool

	stopped atomic.Pointer[error]    // why requests wait for Retry; nil: they do not
	started atomic.Pointer[[]*Queue] // those of Start; nil after Stop
	latency [latencyNone + 1]atomic.Pointer[Histogram]
}

// blkQueue is what a worker needs for a request, kept from one to the next.
type blkQueue struct {
	chain  Chain
	bufs   [][]byte
	passer passer.Passer
}

// NewBlk returns a block device over a node, which it does not close.
func NewBlk(cfg BlkConfig) (*Blk, error) {
	if cfg.Queues == 0 {
		cfg.Queues = 1
	}
	if cfg.QueueSize == 0 {
		cfg.QueueSize = 256
	}
	if cfg.BlockSize == 0 {
		cfg.BlockSize = blkSector
	}
	switch {
	case cfg.Node == nil:
		return nil, fmt.Errorf("%w: no disk", ErrBlk)
	case cfg.Queues < 0 || cfg.Queues > 64:
		return nil, fmt.Errorf("%w: %d queues; 1 to 64 are possible", ErrBlk, cfg.Queues)
	case cfg.QueueSize < 4 || cfg.QueueSize > MaxQueueSize || cfg.QueueSize&(cfg.QueueSize-1) != 0:
		return nil, fmt.Errorf("%w: queue size %d; powers of two from 4 to %d are possible", ErrBlk, cfg.QueueSize, MaxQueueSize)
	case cfg.BlockSize != 512 && cfg.BlockSize != 4096:
		return nil, fmt.Errorf("%w: block size %d; 512 and 4096 are possible", ErrBlk, cfg.BlockSize)
	case cfg.Depth < 0 || cfg.Depth > MaxQueueSize:
		return nil, fmt.Errorf("%w: %d requests side by side; 1 to %d are possible", ErrBlk, cfg.Depth, MaxQueueSize)
	case len(cfg.Serial) > blkIDSize:
		return nil, fmt.Errorf("%w: serial of %d bytes; at most %d are possible", ErrBlk, len(cfg.Serial), blkIDSize)
	}
	b := &Blk{cfg: cfg, readOnly: cfg.ReadOnly || cfg.Node.ReadOnly()}
	b.features = BlkFeatureSegMax | BlkFeatureBlockSize | BlkFeatureTopology | BlkFeatureFlush | BlkFeatureConfigWCE
	if cfg.Queues > 1 {
		b.features |= BlkFeatureMultiQueue
	}
	if b.readOnly {
		b.features |= BlkFeatureReadOnly
	} else {
		b.features |= BlkFeatureDiscard | BlkFeatureWriteZeroes
	}
	for range cfg.Queues {
		b.queues = append(b.queues, &blkQueue{})
	}
	b.writeback.Store(true)
	return b, nil
}

// ID is IDBlock.
func (b *Blk) ID() DeviceID { return IDBlock }

// Features are the device's feature bits.
func (b *Blk) Features() uint64 { return b.features }

// QueueSizes are the request queues' sizes.
func (b *Blk) QueueSizes() []uint16 {
	sizes := make([]uint16, b.cfg.Queues)
	for i := range sizes {
		sizes[i] = b.cfg.QueueSize
	}
	return sizes
}

// ReadConfig reads the configuration.
func (b *Blk) ReadConfig(off int, p []byte) {
	var c [blkConfigSize]byte
	le := binary.LittleEndian
	le.PutUint64(c[0:], uint64(b.cfg.Node.Size())/blkSector)
	le.PutUint32(c[12:], uint32(b.cfg.QueueSize)-2)
	le.PutUint32(c[20:], uint32(b.cfg.BlockSize))
	// Physical blocks are of 4 KiB: what the page cache and most disks like.
	c[24] = byte(map[int]int{512: 3, 4096: 0}[b.cfg.BlockSize])
	le.PutUint16(c[26:], uint16(4096/b.cfg.BlockSize)) // minimum I/O size, in blocks
	if b.writeback.Load() {
		c[blkConfigWriteback] = 1
	}
	le.PutUint16(c[34:], uint16(b.cfg.Queues))
	le.PutUint32(c[36:], blkMaxRangeSectors)
	le.PutUint32(c[40:], blkMaxRanges)
	le.PutUint32(c[44:], uint32(b.cfg.BlockSize/blkSector))
	le.PutUint32(c[48:], blkMaxRangeSectors)
	le.PutUint32(c[52:], blkMaxRanges)
	c[56] = 1 // write-zeroes may unmap
	clear(p)
	if off >= 0 && off < len(c) {
		copy(p, c[off:])
	}
}

// WriteConfig lets the driver choose between write-back and write-through.
func (b *Blk) WriteConfig(off int, p []byte) {
	if off == blkConfigWriteback && len(p) == 1 && b.accepted.Load()&BlkFeatureConfigWCE != 0 {
		b.writeback.Store(p[0] != 0)
	}
}

// Start begins serving.
func (b *Blk) Start(features uint64, queues []*Queue, host Host) error {
	b.started.Store(&queues)
	b.accepted.Store(features)
	b.host.Store(&host)
	if b.cfg.Depth > 1 {
		b.lanes = make([]*blkLanes, len(queues))
		for i, q := range queues {
			b.lanes[i] = newBlkLanes(b, q)
		}
	}
	return nil
}

// Stop ends serving. The cache mode is back to write-back after a reset.
func (b *Blk) Stop() {
	for _, l := range b.lanes {
		l.end()
	}
	b.lanes = nil
	b.started.Store(nil)
	b.stopped.Store(nil)
	b.host.Store(nil)
	b.accepted.Store(0)
	b.writeback.Store(true)
}

// Resized tells the driver that the node's size changed.
func (b *Blk) Resized() {
	if h := b.host.Load(); h != nil {
		(*h).ConfigChanged()
	}
}

// Stopped is why requests wait for Retry, or nil.
func (b *Blk) Stopped() error {
	if err := b.stopped.Load(); err != nil {
		return *err
	}
	return nil
}

// Retry has requests that wait since one failed, and that one, be served.
func (b *Blk) Retry() {
	if b.stopped.Swap(nil) == nil {
		return
	}
	if queues := b.started.Load(); queues != nil {
		for _, q := range *queues {
			if q != nil {
				q.Wake()
			}
		}
	}
}

// State returns what must survive a checkpoint.
func (b *Blk) State() BlkState {
	return BlkState{Writeback: b.writeback.Load(), Size: b.cfg.Node.Size(), ReadOnly: &b.readOnly}
}

// Restore takes over saved state, unless the disk is not what the guest was shown.
func (b *Blk) Restore(s BlkState) error {
	if size := b.cfg.Node.Size(); s.Size != 0 && s.Size != size {
		return fmt.Errorf("%w: the disk has %d bytes, and had %d when it was saved: use one of that size", ErrBlk, size, s.Size)
	}
	if s.ReadOnly != nil && *s.ReadOnly != b.readOnly {
		return fmt.Errorf("%w: the guest knows the disk as one that %s be written: make it so (readonly=on, or off)", ErrBlk, map[bool]string{true: "cannot", false: "can"}[*s.ReadOnly])
	}
	b.writeback.Store(s.Writeback)
	return nil
}

// writeThrough tells that a write must be durable when it completes (section 5.2.6.2).
func (b *Blk) writeThrough() bool {
	return b.accepted.Load()&BlkFeatureFlush == 0 || !b.writeback.Load()
}

// Handle serves requests until the queue is empty, or has lanes serve them.
func (b *Blk) Handle(q *Queue) error {
	var mate *blkMate
	if b.lanes != nil {
		l := b.lanes[q.Index()]
		if block.Waits(b.cfg.Node) || (q.aside || q.begun > 0) && l.underWay() {
			return l.serve()
		}
		q.aside, mate = false, &l.mate
	}
	bq := b.queues[q.Index()]
	cost := 0
	for {
		if b.stopped.Load() != nil {
			return nil
		}
		ok, err := q.Pop(&bq.chain)
		switch {
		case err != nil:
			return err
		case !ok && mate != nil && mate.ready():
			if err := mate.serve(); err != nil {
				return err
			}
			bq.passer.Pass()
			continue
		case !ok:
			return nil
		case mate != nil && mate.takes(bq):
			continue
		}
		written, err := b.request(bq)
		if err == errRetry {
			q.Undo(&bq.chain)
			return nil
		}
		if err != nil {
			return fmt.Errorf("%w: queue %d: %w", ErrBlk, q.Index(), err)
		}
		if err := q.Push(&bq.chain, written); err != nil {
			return err
		}
		if cost += blkRequestCost + int(total(bq.bufs)); cost >= blkFlushCost {
			q.Flush()
			cost = 0
			bq.passer.Pass()
		}
	}
}

// request serves one request and returns how many bytes the driver gets.
// An error means that not even a status can be returned.
func (b *Blk) request(bq *blkQueue) (uint32, error) {
	c := &bq.chain
	status := lastByte(c.Write)
	if status == nil {
		return 0, errors.New("request without a status byte")
	}
	bq.bufs = bq.bufs[:0]
	var header [blkHeaderSize]byte
	if !b.header(bq, header[:]) {
		*status = blkIOErr
		return writeLen(c), nil
	}
	sector := le.Uint64(header[8:])
	result := byte(blkUnsup)
	switch le.Uint32(header[:]) {
	case blkIn:
		result = b.read(bq, sector)
	case blkOut:
		result = b.write(bq, sector)
	case blkFlush:
		result = b.flush()
	case blkGetID:
		result = b.getID(bq)
	case blkDiscard:
		result = b.ranges(bq, BlkDiscard)
	case blkWriteZeroes:
		result = b.ranges(bq, BlkWriteZeroes)
	}
	if result == blkRetry {
		return 0, errRetry
	}
	*status = result
	return writeLen(c), nil
}

// lastByte is where the status goes: the last byte the driver lets us write.
func lastByte(bufs []Buffer) *byte {
	if len(bufs) == 0 {
		return nil
	}
	last := bufs[len(bufs)-1].Data
	return &last[len(last)-1]
}

// writeLen is the length of all that the driver lets us write. The status is
// at its end, so that is how much we say we wrote.
func writeLen(c *Chain) uint32 { return uint32(min(c.writable(), 1<<32-1)) }

// header copies the request's header, however the driver split it, and keeps in
// bq.bufs the data for the device that follows it.
func (b *Blk) header(bq *blkQueue, h []byte) bool {
	for i := range bq.chain.Read {
		data := bq.chain.Read[i].Data
		if len(h) > 0 {
			n := copy(h, data)
			h, data = h[n:], data[n:]
		}
		if len(data) > 0 {
			bq.bufs = append(bq.bufs, data)
		}
	}
	return len(h) == 0
}

// input has bq.bufs be what the device writes, up to the status byte.
func (b *Blk) input(bq *blkQueue) {
	bq.bufs = bq.bufs[:0]
	for i := range bq.chain.Write {
		data := bq.chain.Write[i].Data
		if i == len(bq.chain.Write)-1 {
			data = data[:len(data)-1]
		}
		if len(data) > 0 {
			bq.bufs = append(bq.bufs, data)
		}
	}
}

func total(bufs [][]byte) int64 {
	n := int64(0)
	for _, b := range bufs {
		n += int64(len(b))
	}
	return n
}

// offset checks that n bytes from a sector on are whole blocks of the disk.
func (b *Blk) offset(sector uint64, n int64) (int64, bool) {
	size := b.cfg.Node.Size()
	if sector > uint64(size)/blkSector {
		return 0, false
	}
	off := int64(sector) * blkSector
	block := int64(b.cfg.BlockSize)
	return off, n <= size-off && off%block == 0 && n%block == 0
}

// done counts a request that the node served and returns its status.
func (b *Blk) done(c *blkCounter, op BlkOp, n int64, start time.Time, err error) byte {
	took := time.Since(start)
	c.time.Add(int64(took))
	if h := b.latency[latencyOf(op)].Load(); h != nil {
		h.observe(took)
	}
	if err != nil {
		c.failed.Add(1)
		action := BlkReport
		if b.cfg.OnIOError != nil {
			action = b.cfg.OnIOError(op, err)
		}
		if action == BlkStop && b.cfg.Depth > 1 {
			action = BlkReport // see BlkConfig.Depth
		}
		switch action {
		case BlkStop:
			cause := err // which goes to the heap here alone
			b.stopped.Store(&cause)
			if b.cfg.OnStop != nil {
				b.cfg.OnStop()
			}
			return blkRetry
		case BlkIgnore:
			return blkOK
		}
		return blkIOErr
	}
	c.ops.Add(1)
	c.bytes.Add(n)
	return blkOK
}

func (b *Blk) read(bq *blkQueue, sector uint64) byte {
	b.input(bq)
	n := total(bq.bufs)
	off, ok := b.offset(sector, n)
	if !ok {
		b.stats.read.invalid.Add(1)
		return blkIOErr
	}
	start := time.Now()
	return b.done(&b.stats.read, BlkRead, n, start, b.cfg.Node.Readv(bq.bufs, off))
}

func (b *Blk) write(bq *blkQueue, sector uint64) byte {
	n := total(bq.bufs)
	off, ok := b.offset(sector, n)
	if !ok || b.readOnly {
		b.stats.write.invalid.Add(1)
		return blkIOErr
	}
	start := time.Now()
	err := b.cfg.Node.Writev(bq.bufs, off)
	if err == nil && b.writeThrough() {
		err = b.cfg.Node.Flush()
	}
	return b.done(&b.stats.write, BlkWrite, n, start, err)
}

func (b *Blk) flush() byte {
	start := time.Now()
	return b.done(&b.stats.flush, BlkFlush, 0, start, b.cfg.Node.Flush())
}

// getID answers with the serial, padded with zeros.
func (b *Blk) getID(bq *blkQueue) byte {
	b.input(bq)
	if total(bq.bufs) < blkIDSize {
		return blkIOErr
	}
	var id [blkIDSize]byte
	copy(id[:], b.cfg.Serial)
	for from, i := id[:], 0; len(from) > 0; i++ {
		from = from[copy(bq.bufs[i], from):]
	}
	return blkOK
}

// ranges serves a discard or write-zeroes request: a list of ranges.
func (b *Blk) ranges(bq *blkQueue, op BlkOp) byte {
	counter := &b.stats.unmap
	if op == BlkWriteZeroes {
		counter = &b.stats.zero
	}
	n := total(bq.bufs)
	if b.readOnly || n == 0 || n%blkRangeSize != 0 || n > blkMaxRanges*blkRangeSize {
		counter.invalid.Add(1)
		return blkIOErr
	}
	var list [blkMaxRanges * blkRangeSize]byte
	rest := list[:n]
	for i := 0; len(rest) > 0; i++ {
		rest = rest[copy(rest, bq.bufs[i]):]
	}
	for r := list[:n]; len(r) > 0; r = r[blkRangeSize:] {
		sectors, flags := le.Uint32(r[8:]), le.Uint32(r[12:])
		if flags&^blkUnmap != 0 || op == BlkDiscard && flags != 0 {
			return blkUnsup
		}
		length := int64(sectors) * blkSector
		off, ok := b.offset(le.Uint64(r), length)
		if !ok || sectors > blkMaxRangeSectors {
			counter.invalid.Add(1)
			return blkIOErr
		}
		start := time.Now()
		var err error
		if op == BlkDiscard {
			err = b.cfg.Node.Discard(off, length)
		} else {
			err = b.cfg.Node.WriteZeroes(off, length, flags&blkUnmap != 0)
		}
		if err == nil && b.writeThrough() {
			err = b.cfg.Node.Flush()
		}
		if s := b.done(counter, op, length, start, err); s != blkOK {
			return s
		}
	}
	return blkOK
}
