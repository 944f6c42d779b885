package virtio

import (
	"sync/atomic"
	"time"
)

// BlkStats is what a block device has done, for query-blockstats.
type BlkStats struct {
	Read, Write, Flush, Discard, WriteZeroes BlkOpStats
}

// BlkOpStats is what it has done of one kind of request.
type BlkOpStats struct {
	Ops     int64         // served
	Bytes   int64         // by those
	Failed  int64         // the node returned an error
	Invalid int64         // refused: out of range, or of a read-only disk
	Time    time.Duration // spent in the node
}

type blkCounter struct {
	ops, bytes, failed, invalid, time atomic.Int64
}

type blkCounters struct {
	read, write, flush, unmap, zero blkCounter
}

func (c *blkCounter) load() BlkOpStats {
	return BlkOpStats{
		Ops: c.ops.Load(), Bytes: c.bytes.Load(), Failed: c.failed.Load(), Invalid: c.invalid.Load(),
		Time: time.Duration(c.time.Load()),
	}
}

// Stats returns the counters since the device was made.
func (b *Blk) Stats() BlkStats {
	return BlkStats{
		Read: b.stats.read.load(), Write: b.stats.write.load(), Flush: b.stats.flush.load(),
		Discard: b.stats.unmap.load(), WriteZeroes: b.stats.zero.load(),
	}
}
